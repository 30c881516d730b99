"""Pairs of one's own, read row by row: each either whole, or with what is wrong with it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets

from puma_hf.data.images import BrokenImageError, ImageFiles, InsideImageError
from puma_hf.data.pair_columns import Given, PairColumns, Part, find_columns
from puma_hf.data.tables import BadLine, Record, read_table, without_decoding
from puma_hf.modeling.messages_puma import SPECIAL_TOKEN, modality_of
from puma_hf.settings import SpecialTokens
from puma_hf.values import cut, is_unicode, shown

PairSource: TypeAlias = str | Path | datasets.Dataset
Direction = Literal["text-to-image", "image-to-text", "both"]

NUM_SHOWN = 5  # offenders of a kind
_NUM_ROWS_LOOKED_AT = 1000  # to tell what the columns hold
# What `datasets` calls the table of a folder of images, and what others do.
_TABLE_STEMS = ("metadata", "captions")
_TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")

# Kinds of offenders.
BROKEN_LINE = "line that cannot be read"
ANCHOR_MISSING = "anchor missing"
POSITIVE_MISSING = "positive missing"
NEGATIVE_MISSING = "negative missing"
NO_TEXT = "text of another type"
SPECIAL = "special token in a text"
IMAGE_MISSING = "image missing"
IMAGE_BROKEN = "image broken"
IMAGE_INSIDE = "image inside of the dataset"
IMAGE_REFUSED = "image refused"

_MISSING = {"anchor": ANCHOR_MISSING, "positive": POSITIVE_MISSING}


@dataclass(frozen=True, slots=True)
class Cell:
    """One side of a pair: text, absolute path of an image, or both."""

    text: str | None
    image: str | None

    @property
    def modality(self) -> str:
        """One of M-BEIR's names."""
        return modality_of(self.text is not None, self.image is not None, False)


@dataclass(frozen=True, slots=True)
class Pair:
    """An anchor, its right answer and its wrong ones."""

    where: str
    anchor: Cell
    positive: Cell
    negatives: tuple[Cell, ...] = ()
    instruction: str | None = None


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """How to read pairs; see `load_pairs`, which has the same arguments."""

    anchor: Given | None = None
    positive: Given | None = None
    negatives: Sequence[Given] | Given | None = None
    instruction: str | None = None
    reverse_instruction: str | None = None
    direction: Direction | None = None
    decode: bool = False
    images_to: str | Path | None = None
    special_tokens: SpecialTokens = "raise"


class Offenders:
    """What is wrong, counted by kind, with the first messages of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, message: str) -> None:
        """Count one."""
        self.counts[kind] += 1
        if len(self.first[kind]) < NUM_SHOWN:
            self.first[kind].append(message)

    def some(self) -> list[str]:
        """A few messages, the first of each kind before any second."""
        turns = zip_longest(*self.first.values())
        return [message for turn in turns for message in turn if message is not None][:NUM_SHOWN]

    def __str__(self) -> str:
        return ", ".join(f"{count} x {kind}" for kind, count in self.counts.most_common())


@dataclass
class PairReading:
    """All that was read of a source."""

    name: str
    columns: PairColumns
    images: ImageFiles
    offenders: Offenders
    pairs: list[Pair] = field(default_factory=list)
    num_rows: int = 0
    num_rows_left_out: int = 0

    def refusal(self) -> str:
        """What an error says about the offenders."""
        share, first = f"{self.num_rows_left_out} of {self.num_rows}", " | ".join(self.offenders.some())
        return (
            f"{self.name}: {share} rows cannot be used: {self.offenders}. The first: {first} Mend them (puma-hf "
            "pairs lists more), or leave them out (on_error='drop', in a command --bad-pairs drop)."
        )


def read_pairs(source: PairSource, options: PairOptions, *, dry: bool = False) -> PairReading:
    """Read a source to its end, whatever is wrong with its rows.

    Args:
        source: A table, a folder with one, or a dataset; see `load_pairs`.
        options: How to read it.
        dry: Whether images inside of a dataset are looked at, but not saved.

    Returns:
        The whole pairs, and what is wrong with the other rows.

    Raises:
        FileNotFoundError: If the source, or the table in it, is missing.
        ValueError: If there are no rows, or the options do not fit the columns.
    """
    offenders = Offenders()
    name, folder, records = _open(source, lambda error: offenders.add(BROKEN_LINE, str(error)))
    head = list(islice(records, _NUM_ROWS_LOOKED_AT))
    if not head:
        because = f" ({offenders.first[BROKEN_LINE][0]})" if offenders.counts else ""
        raise ValueError(f"{name} holds no rows{because}. Name a source with at least one pair.")
    columns, instruction = _columns([row for _, row in head], options)
    ways = _ways(columns, options, instruction)
    save_to = None if options.images_to is None else Path(options.images_to)
    images = ImageFiles(folder, decode=options.decode, save_to=save_to, dry=dry)
    reading = PairReading(name, columns, images, offenders)
    reader = _RowReader(columns, images, offenders, instruction, options.special_tokens)
    for where, row in chain(head, records):
        found = reader.read(row, where)
        reading.num_rows += 1
        reading.num_rows_left_out += not found
        for pair in found:
            if "forward" in ways:
                reading.pairs.append(pair)
            if "reverse" in ways:
                other = pair.instruction if len(ways) == 1 else options.reverse_instruction
                reading.pairs.append(Pair(where, pair.positive, pair.anchor, (), other))
    reading.num_rows += offenders.counts[BROKEN_LINE]
    reading.num_rows_left_out += offenders.counts[BROKEN_LINE]
    return reading


def _open(source: PairSource, bad_line: BadLine) -> tuple[str, Path | None, Iterator[Record]]:
    """How errors call it, the folder that its images must be in, and its rows."""
    if isinstance(source, datasets.Dataset):
        rows = enumerate(without_decoding(source), start=1)
        return "the dataset", None, ((f"the dataset, row {number}", row) for number, row in rows)
    if not isinstance(source, str | Path):
        raise ValueError(
            f"The source is a {type(source).__name__}, must be a path or a datasets.Dataset. Of a DatasetDict choose "
            "one split."
        )
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{str(source)!r} is neither a file nor a folder. Check the path.")
    tables = [path] if path.is_file() else _tables(path)
    rows_of = (record for table in tables for record in read_table(table, bad_line))
    return str(tables[0] if len(tables) == 1 else path), tables[0].parent, rows_of


def named_tables(folder: Path) -> list[Path]:
    """The files in a folder that are called as tables of its images are."""
    return [path for path in _table_files(folder) if path.stem.lower() in _TABLE_STEMS]


def _table_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _TABLE_SUFFIXES and path.is_file())


def _tables(folder: Path) -> list[Path]:
    """The table that describes a folder of images, or the Parquet files of a dataset."""
    named, files = named_tables(folder), _table_files(folder)
    if len(named) == 1:
        return named
    if not named and files and all(path.suffix.lower() == ".parquet" for path in files):
        return files
    found = cut(", ".join(path.name for path in named or files)) or "none"
    raise ValueError(
        f"{folder} must hold one table called {' or '.join(_TABLE_STEMS)} ({', '.join(_TABLE_SUFFIXES)}), or Parquet "
        f"files alone; the tables here: {found}. Name the file."
    )


def _columns(rows: list[dict[str, Any]], options: PairOptions) -> tuple[PairColumns, str | None]:
    """Where everything stands, and the instruction of all rows if it is in no column."""
    given = options.instruction
    names = {name for row in rows for name in row}
    in_column = given is not None and given in names
    if given is not None and not in_column and given.isidentifier() and given.isascii():
        raise ValueError(
            f"instruction={shown(given)} must be a text of several words or a column; the columns are "
            f"{cut(', '.join(sorted(map(str, names))))}."
        )
    found = find_columns(
        rows,
        anchor=options.anchor,
        positive=options.positive,
        negatives=options.negatives,
        instruction=given if in_column else None,
    )
    return found, None if in_column else given


def _ways(columns: PairColumns, options: PairOptions, instruction: str | None) -> tuple[str, ...]:
    """Which of the two ways the pairs are read: forward, from the anchor as it was found, and reverse."""
    direction = options.direction
    if options.reverse_instruction is not None and direction != "both":
        raise ValueError(
            f"reverse_instruction={options.reverse_instruction!r} is for direction='both' only, not {direction!r}. "
            "Leave it out, or call it instruction."
        )
    if direction is None:
        return ("forward",)
    ways: tuple[str, ...] = ("forward", "reverse")
    if direction != "both":
        wanted = tuple(direction.split("-to-"))
        found = tuple(part.kind for part in (columns.anchor, columns.positive))
        if found not in (wanted, wanted[::-1]):
            raise ValueError(
                f"direction={direction!r} needs one side of texts and one of images, found {cut(str(columns))}. Leave "
                "the direction out: the anchor is what asks."
            )
        ways = ("forward",) if found == wanted else ("reverse",)
    elif (instruction or columns.instruction) and options.reverse_instruction is None:
        raise ValueError(
            f"direction='both' with instruction={instruction or columns.instruction!r} needs reverse_instruction, "
            "which says what the positives look for when they ask. Give both, or none."
        )
    if "reverse" in ways and columns.negatives:
        raise ValueError(
            f"direction={direction!r} turns pairs round, but their negatives are wrong answers of one side alone. "
            "Remove their columns (in Python negatives=()), or leave the direction out."
        )
    return ways


class _RowReader:
    """Makes pairs of rows."""

    def __init__(
        self,
        columns: PairColumns,
        images: ImageFiles,
        offenders: Offenders,
        instruction: str | None,
        special_tokens: SpecialTokens,
    ) -> None:
        self._columns = columns
        self._images = images
        self._offenders = offenders
        self._instruction = instruction
        self._refuses_special_tokens = special_tokens == "raise"

    def read(self, row: Mapping[str, Any], where: str) -> list[Pair]:
        """The pairs of a row, several if a cell is a list of texts; none if anything is wrong."""
        before = sum(self._offenders.counts.values())
        anchors = self._cells(row, self._columns.anchor, "anchor", where)
        positives = self._cells(row, self._columns.positive, "positive", where)
        negatives = [
            self._cells(row, part, f"negative_{number}", where)
            for number, part in enumerate(self._columns.negatives, start=1)
        ]
        instruction = self._instruction_of(row, where)
        if sum(self._offenders.counts.values()) > before:
            return []
        wrong = tuple(cells[0] for cells in negatives)
        return [Pair(where, anchor, positive, wrong, instruction) for anchor in anchors for positive in positives]

    def _cells(self, row: Mapping[str, Any], part: Part, role: str, where: str) -> list[Cell]:
        before = sum(self._offenders.counts.values())
        values, text_name, image_name = row, part.text, part.image
        if part.both is not None:
            values, text_name, image_name = self._struct(row, part.both, where), "text", "image"
        text, image = (None if name is None else values.get(name) for name in (text_name, image_name))
        texts = self._texts(text, f"{where}: {role}", several=not role.startswith("negative"))
        path = None if image is None or image == "" else self._image(image, where)
        if sum(self._offenders.counts.values()) > before:
            return []
        # Both columns of a composed query belong to it, but either may be empty in a row.
        if not texts and path is None:
            kind = _MISSING.get(role, NEGATIVE_MISSING)
            columns = " and ".join(part.columns)
            self._offenders.add(kind, f"{where}: {role} is empty (column {columns}). Fill it or leave the line out.")
            return []
        return [Cell(text, path) for text in texts or [None]]

    def _struct(self, row: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
        value = row.get(name)
        if value is not None and not isinstance(value, Mapping):
            self._offenders.add(
                NO_TEXT, f"{where}: {name} is {shown(value)}, must have text and image as in other rows."
            )
        return value if isinstance(value, Mapping) else {}

    def _texts(self, value: Any, what: str, *, several: bool) -> Sequence[str | None]:
        values = value if isinstance(value, list) and several else [value]
        for one in values:
            if one is not None and not isinstance(one, str):
                remedy = "Give each negative a column of its own." if isinstance(one, list) else "Convert the column."
                self._offenders.add(NO_TEXT, f"{what} is {shown(one)}, must be a text or null. {remedy}")
                return []
            if one is not None and not is_unicode(one):
                self._offenders.add(
                    NO_TEXT, f"{what} is {shown(one)}, which holds half a character. Mend its encoding."
                )
                return []
            if one is not None and self._refuses_special_tokens and (found := SPECIAL_TOKEN.search(one)):
                remedy = "Remove it, or read it as text (special_tokens='split', in a command --special-tokens split)."
                self._offenders.add(SPECIAL, f"{what} is {shown(one)} with the special token {found[0]!r}. {remedy}")
                return []
        return [one.strip() for one in values if one is not None and one.strip()]

    def _image(self, value: Any, where: str) -> str | None:
        try:
            return self._images.find(value, where)
        except FileNotFoundError as error:
            self._offenders.add(IMAGE_MISSING, str(error))
        except BrokenImageError as error:
            self._offenders.add(IMAGE_BROKEN, str(error))
        except InsideImageError as error:
            remedy = "images_to=FOLDER (in a command --images-to) does so for you."
            self._offenders.add(IMAGE_INSIDE, f"{error} {remedy}")
        except ValueError as error:
            self._offenders.add(IMAGE_REFUSED, str(error))
        return None

    def _instruction_of(self, row: Mapping[str, Any], where: str) -> str | None:
        if self._instruction is not None:
            return self._instruction.strip()
        value = None if self._columns.instruction is None else row.get(self._columns.instruction)
        if self._columns.instruction is None and self._columns.anchor.both is not None:
            struct = row.get(self._columns.anchor.both)
            value = struct.get("instruction") if isinstance(struct, Mapping) else None
        texts = self._texts(value, f"{where}: instruction", several=False)
        return texts[0] if texts else None
