"""Training rows from pairs of one's own: images with captions, questions with answers, or any two columns."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets

from puma_hf.data.images import (
    TABLE_STEMS,
    TABLE_SUFFIXES,
    BrokenImageError,
    ImageFiles,
    InsideImageError,
    table_files,
)
from puma_hf.data.items import cell_of, training_features
from puma_hf.data.records import CAPTION_NAMES, Line, Problems, Record, dataset_lines, read_lines
from puma_hf.modeling.inputs_puma import SPECIAL_TOKEN, is_image_name
from puma_hf.settings import SpecialTokens, cut, is_unicode, nearest, shown

logger = logging.getLogger(__name__)

Given: TypeAlias = str | Mapping[str, str]
PairSource: TypeAlias = str | Path | datasets.Dataset
Kind = Literal["text", "image", "both"]
Direction = Literal["text-to-image", "image-to-text", "both"]

# What others call the columns, the likeliest first.
ANCHOR_NAMES = ("anchor", "query", "question", "sent0", "sentence1")
POSITIVE_NAMES = ("positive", "pos", "answer", "sent1", "sentence2", "document", "passage")
IMAGE_NAMES = ("image", "file_name", "filename", "image_path", "img_path", "path", "filepath", "img")
# Beside two texts these may say that a row is no right pair, as in collections for classifiers.
SCORE_NAMES = ("label", "score", "relevance", "similarity")
_NEGATIVE = re.compile(r"((?:negative|hard_negative|hard_neg|neg)(?:_?(\d+))?)(?:_(?:text|image|image_path))?")
_IMAGE_NAME = re.compile(r"(?:.*_)?(?:image|img|file_?name|(?:image|img)_(?:path|file)|filepath|path)")
_ANOTHER_IMAGE = re.compile(r".+_(?:image|img)(?:_path|_file)?|(?:image|img)_?\d+")
_NUM_ROWS_LOOKED_AT = 1000  # to tell what the columns hold

# Kinds of problems.
BROKEN_LINE, NO_TEXT, SPECIAL = "line that cannot be read", "text of another type", "special token in a text"
IMAGE_MISSING, IMAGE_BROKEN = "image missing", "image broken"
IMAGE_INSIDE, IMAGE_REFUSED = "image inside of the dataset", "image refused"


@dataclass(frozen=True, slots=True)
class Pair:
    """An anchor, its right answer and its wrong ones."""

    where: str
    anchor: Record
    positive: Record
    negatives: tuple[Record, ...] = ()
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


def load_pairs(
    source: PairSource,
    *,
    on_error: Literal["raise", "drop"] = "raise",
    with_ids: bool = False,
    **options: Any,
) -> datasets.Dataset:
    """Training rows of a table of pairs, for `SentenceTransformerTrainer` and its relatives.

    A source is one of

    - a .csv, .tsv, .jsonl, .json or .parquet; images are paths below the file's own folder;
    - a folder with one such file called `captions` or `metadata` beside its images, as `datasets` has it, or
      with nothing but Parquet files;
    - a `datasets.Dataset`, whose images may have any path.

    What is not given is guessed from the columns' names and logged: anchor or query, positive, `negative_1` and so
    on, each also with `_image` behind it; else a caption asks for an image. A cell with a list of texts, such as
    five captions, makes as many pairs. Run `check_pairs` first: it reports everything that is wrong at once.

    Args:
        source: The table.
        on_error: What to do if lines cannot be used: "raise" with counts and the first of them, or "drop" them and
            log that.
        with_ids: Whether to add the columns `qid`, `did` and `positives`, ids by content as `PairIds` makes them,
            which a batch sampler uses to keep rows with the same right answer apart: five captions of one image.
            `positives` has as many of an anchor's right answers as that takes. Remove them before training.
        options:
            anchor: Column of what asks, or columns by what they hold: `{"text": ..., "image": ...}`.
            positive: Column or columns of the right answers.
            negatives: One of these for each wrong answer; `()` for none.
            instruction: What the anchors look for, as a text or a column of texts; by default the column
                `instruction`, if there is one.
            reverse_instruction: The same for the positives of `direction="both"`, when they ask.
            direction: "text-to-image" or "image-to-text", whichever side is the anchor; "both" for every pair in
                both directions; by default as found.
            decode: Whether to decode every image; by default its header is read, and damage further in is found
                when a batch needs it.
            images_to: Folder for images that are inside of a dataset, not beside it; they are saved as they are,
                named by their hash.
            special_tokens: Whether a text with a special token such as `<|im_end|>` is wrong: "raise"; with "split"
                it is taken as it is, for a model that is told to read it as plain text.

    Returns:
        Columns anchor, positive, negative_1 .. negative_n as `load_mbeir` makes them, so that both can be concatenated.

    Raises:
        ValueError: If a column is missing, an argument does not fit, no pair is left, or lines cannot be used; the
            message has counts by kind, and the first five with their lines.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from puma_hf.data import load_pairs

    >>> image = "demo/emoji/mbeir_images/emoji_images/noto/1f34e.webp"
    >>> rows = load_pairs(Dataset.from_dict({"image": [image], "caption": ["a red apple"]}))
    >>> rows["anchor"][0]["text"]
    'a red apple'
    ```
    """
    if on_error not in ("raise", "drop"):
        raise ValueError(f"on_error={on_error!r} must be 'raise' or 'drop'.")
    reading = read_pairs(source, PairOptions(**options))
    logger.info("%s: %d pairs; %s", reading.name, len(reading.pairs), reading.columns)
    if reading.problems:
        if on_error == "raise" or not reading.pairs:
            raise ValueError(reading.refusal())
        counts = (reading.num_rows_left_out, reading.num_rows)
        logger.warning("%s: left out %d of %d rows: %s", reading.name, *counts, reading.problems)
    features = training_features(len(reading.columns.negatives), with_ids)
    ids = PairIds(reading.pairs) if with_ids else None
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for pair in reading.pairs:
        columns["anchor"].append({**cell_of(pair.anchor), "instruction": pair.instruction})
        columns["positive"].append(cell_of(pair.positive))
        for number, negative in enumerate(pair.negatives, start=1):
            columns[f"negative_{number}"].append(cell_of(negative))
        if ids is not None:
            columns["qid"].append(ids.of(pair.anchor))
            columns["did"].append(ids.of(pair.positive))
            columns["positives"].append(ids.telling_positives(pair))
    return datasets.Dataset.from_dict(columns, features=features)


# --- columns


@dataclass(frozen=True, slots=True)
class Part:
    """Where one side of a pair stands: a column of texts, one of images, or one of structs with both."""

    text: str | None = None
    image: str | None = None
    both: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns it is read from."""
        return [name for name in (self.text, self.image, self.both) if name is not None]

    @property
    def kind(self) -> str:
        """What it may hold: "text", "image" or "both"."""
        return "both" if self.both or (self.text and self.image) else "image" if self.image else "text"

    def __str__(self) -> str:
        named = (("text", self.text), ("image", self.image), ("text and image", self.both))
        return ", ".join(f"{name} ({kind})" for kind, name in named if name is not None)


@dataclass(frozen=True, slots=True)
class PairColumns:
    """Where everything stands; see `find_columns`."""

    anchor: Part
    positive: Part
    negatives: tuple[Part, ...] = ()
    instruction: str | None = None
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        sides = [("anchor", self.anchor), ("positive", self.positive)]
        sides += [(f"negative {number}", part) for number, part in enumerate(self.negatives, start=1)]
        text = "; ".join(f"{name}: {part}" for name, part in sides)
        text += f"; instruction: {self.instruction}" if self.instruction is not None else ""
        return text + (f"; ignored: {', '.join(self.ignored)}" if self.ignored else "")


def find_columns(rows: Sequence[Mapping[str, Any]], options: PairOptions) -> PairColumns:
    """What is given, and for the rest what the columns' names and first values tell.

    If both sides are guessed, a column such as `label`, which may say that some rows are wrong pairs, and images that
    may belong to either side are refused.

    Args:
        rows: The first rows of the table.
        options: What is given. A side is a column, or columns by what they hold: `{"text": ..., "image": ...}`, in a
            command "text=...,image=...".
    """
    kinds = {name: _kind_of(name, rows) for name in dict.fromkeys(name for row in rows for name in row)}
    guessed = options.anchor is None and options.positive is None
    first = _guess(ANCHOR_NAMES, kinds) if options.anchor is None else _given(options.anchor, "anchor", kinds)
    second = _guess(POSITIVE_NAMES, kinds) if options.positive is None else _given(options.positive, "positive", kinds)
    if guessed and first is not None and second is not None:
        _check_no_scores(second, kinds)
    taken = {name for part in (first, second) if part is not None for name in part.columns}
    # Of an image with a caption the caption asks, unless it is the answer.
    caption, image = _first(CAPTION_NAMES, "text", kinds, taken), _first(IMAGE_NAMES, "image", kinds, taken)
    first = first or caption or image
    second = second or next((part for part in (image, caption) if part not in (first, None)), None)
    if first is None or second is None:
        raise ValueError(_none_found("anchor" if first is None else "positive", kinds))
    if first == second:
        raise ValueError(f"anchor and positive are both {first}. Name two different columns.")
    instruction = options.instruction or ("instruction" if "instruction" in kinds else None)
    wrong = _negatives(options.negatives, kinds)
    if guessed:
        _check_other_images(rows, kinds, first, second)
    used = {name for part in (first, second, *wrong) for name in part.columns} | {instruction}
    return PairColumns(first, second, wrong, instruction, tuple(name for name in kinds if name not in used))


def _kind_of(name: str, rows: Iterable[Mapping[str, Any]]) -> Kind:
    values = [value for row in rows if (value := row.get(name)) is not None and value != ""]
    if values and isinstance(values[0], Mapping):
        return "both" if {"text", "image"} & set(values[0]) else "image"
    if values and all(isinstance(value, str) and is_image_name(value) for value in values):
        return "image"
    return "image" if _IMAGE_NAME.fullmatch(name.lower()) else "text"


def _given(value: Given, role: str, kinds: Mapping[str, Kind]) -> Part:
    if isinstance(value, str) and value not in kinds and "=" in value:
        entries = [entry.partition("=") for entry in value.split(",")]
        value = {key.strip(): name.strip() for key, _, name in entries}
    is_mapping = isinstance(value, Mapping)
    if not isinstance(value, str | Mapping) or not value or (is_mapping and set(value) - {"text", "image"}):
        ways = "{'text': ..., 'image': ...}, in a command text=...,image=..."
        raise ValueError(f"{role}={shown(value)} must be a column, or name columns of text and image: {ways}.")
    for name in [value] if isinstance(value, str) else value.values():
        if name not in kinds:
            here = f"the columns are {cut(', '.join(kinds))}.{nearest(name, kinds)}"
            raise ValueError(f"{role}: there is no column {shown(name)}; {here}")
    return Part(**{str(kinds[value]): value}) if isinstance(value, str) else Part(**value)


def _guess(bases: Iterable[str], kinds: Mapping[str, Kind]) -> Part | None:
    """The columns of the first of these names: the name itself, or with `_text` and `_image` behind it."""
    for base in bases:
        parts: dict[str, str] = {}
        for name in (base, f"{base}_text", f"{base}_image", f"{base}_image_path", f"{base}_img_path"):
            if name in kinds:
                parts.setdefault(kinds[name], name)
        if parts:
            return Part(both=parts["both"]) if "both" in parts else Part(**parts)
    return None


def _first(names: Iterable[str], kind: Kind, kinds: Mapping[str, Kind], taken: set[str]) -> Part | None:
    found = next((name for name in names if kinds.get(name) == kind and name not in taken), None)
    return None if found is None else Part(**{kind: found})


def _negatives(given: Sequence[Given] | Given | None, kinds: Mapping[str, Kind]) -> tuple[Part, ...]:
    if given is not None:
        several = [given] if isinstance(given, str | Mapping) else given
        return tuple(_given(one, "negatives", kinds) for one in several)
    bases = {match[1]: int(match[2] or 0) for name in kinds if (match := _NEGATIVE.fullmatch(name))}
    parts = [_guess([base], kinds) for base in sorted(bases, key=lambda base: bases[base])]
    return tuple(part for part in parts if part is not None)


def _check_no_scores(positive: Part, kinds: Mapping[str, Kind]) -> None:
    found = [name for name in SCORE_NAMES if name in kinds]
    if found and not positive.columns[0].startswith("pos"):  # "positive" leaves no doubt
        raise ValueError(
            f"There is a column {found[0]!r}, which may say that some rows are no right pairs. Leave these out and "
            "remove the column, or name the columns (anchor=..., positive=..., in a command --anchor, --positive)."
        )


def _check_other_images(rows: Iterable[Mapping[str, Any]], kinds: Mapping[str, Kind], *sides: Part) -> None:
    """Refuse to guess the side of images: they may be half of a composed query, as image, caption, target_image."""
    used = {name for part in sides for name in part.columns}
    has_image = any(part.kind != "text" for part in sides)
    for name, kind in kinds.items():
        # Of an image that is taken there may be the name in other columns as well.
        doubtful = not has_image or _ANOTHER_IMAGE.fullmatch(name.lower())
        if kind != "image" or name in used or _NEGATIVE.fullmatch(name) or not doubtful:
            continue
        values = [value for row in rows if (value := row.get(name)) is not None]
        if any(not isinstance(value, str) or (is_image_name(value) and "://" not in value) for value in values):
            raise ValueError(
                f"The column {shown(name)} holds images, but its name does not tell whose: anchor {sides[0]}; positive "
                f"{sides[1]}. Name the columns of each side (in a command --anchor text=...,image=... --positive ...)."
            )


def _none_found(role: str, kinds: Mapping[str, Kind]) -> str:
    names = (*(ANCHOR_NAMES if role == "anchor" else POSITIVE_NAMES), *CAPTION_NAMES, *IMAGE_NAMES)
    return (
        f"No column for the {role}: the columns are {cut(', '.join(kinds)) or 'none'}. Name it ({role}=..., in a "
        f"command --{role}), or call it one of {', '.join(names)}."
    )


# --- rows


@dataclass
class PairReading:
    """All that was read of a source: the whole pairs, and what is wrong with the other rows."""

    name: str
    columns: PairColumns
    images: ImageFiles
    problems: Problems
    pairs: list[Pair] = field(default_factory=list)
    num_rows: int = 0
    num_rows_left_out: int = 0

    def refusal(self) -> str:
        """What an error says about the rows that cannot be used."""
        share, first = f"{self.num_rows_left_out} of {self.num_rows}", " | ".join(self.problems.some())
        return (
            f"{self.name}: {share} rows cannot be used: {self.problems}. The first: {first} Mend them (puma-hf "
            "pairs lists more), or leave them out (on_error='drop', in a command --bad-pairs drop)."
        )


def read_pairs(source: PairSource, options: PairOptions, *, dry: bool = False) -> PairReading:
    """Read a source to its end, whatever is wrong with its rows; a dry run saves no images.

    Raises:
        FileNotFoundError: If the source, or the table in it, is missing.
        ValueError: If there are no rows, or the options do not fit the columns.
    """
    name, folder, lines = _open(source)
    head = list(islice(lines, _NUM_ROWS_LOOKED_AT))
    good = [line.columns for line in head if line.error is None]
    if not good:
        because = f" ({head[0].error})" if head else ""
        raise ValueError(f"{name} holds no rows{because}. Name a source with at least one pair.")
    columns, instruction = _columns(good, options)
    ways = _ways(columns, options, instruction)
    save_to = None if options.images_to is None else Path(options.images_to)
    images = ImageFiles(folder, decode=options.decode, save_to=save_to, dry=dry)
    reading = PairReading(name, columns, images, Problems(name))
    reader = _RowReader(reading, instruction, options.special_tokens)
    for line in chain(head, lines):
        found = reader.read(line)
        reading.num_rows += 1
        reading.num_rows_left_out += not found
        for pair in found:
            if "forward" in ways:
                reading.pairs.append(pair)
            if "reverse" in ways:
                other = pair.instruction if len(ways) == 1 else options.reverse_instruction
                reading.pairs.append(Pair(pair.where, pair.positive, pair.anchor, (), other))
    return reading


def _open(source: PairSource) -> tuple[str, Path | None, Iterator[Line]]:
    """How errors call it, the folder that its images must be in, and its rows."""
    if isinstance(source, datasets.Dataset):
        return "the dataset", None, dataset_lines(source)
    if not isinstance(source, str | Path):
        allowed = "a path or a datasets.Dataset. Of a DatasetDict choose one split"
        raise ValueError(f"The source is a {type(source).__name__}, must be {allowed}.")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{str(source)!r} is neither a file nor a folder. Check the path.")
    tables = [path] if path.is_file() else _tables(path)
    lines = chain.from_iterable(map(read_lines, tables))
    return str(tables[0] if len(tables) == 1 else path), tables[0].parent, lines


def _tables(folder: Path) -> list[Path]:
    """The table that describes a folder of images, or the Parquet files of a dataset."""
    named, files = table_files(folder, named=True), table_files(folder)
    if len(named) == 1:
        return named
    if not named and files and all(path.suffix.lower() == ".parquet" for path in files):
        return files
    found = cut(", ".join(path.name for path in named or files)) or "none"
    wanted = f"one table called {' or '.join(TABLE_STEMS)} ({', '.join(TABLE_SUFFIXES)}), or Parquet files alone"
    raise ValueError(f"{folder} must hold {wanted}; the tables here: {found}. Name the file.")


def _columns(rows: list[Mapping[str, Any]], options: PairOptions) -> tuple[PairColumns, str | None]:
    """Where everything stands, and the instruction of all rows if it is in no column."""
    given = options.instruction
    names = {name for row in rows for name in row}
    if given is None or given in names:
        return find_columns(rows, options), None
    if given.isidentifier() and given.isascii():
        here = f"the columns are {cut(', '.join(sorted(map(str, names))))}"
        raise ValueError(f"instruction={shown(given)} must be a text of several words or a column; {here}.")
    return find_columns(rows, PairOptions(**{**vars(options), "instruction": None})), given


def _ways(columns: PairColumns, options: PairOptions, instruction: str | None) -> tuple[str, ...]:
    """Which of the two ways the pairs are read: forward, from the anchor as it was found, and reverse."""
    direction = options.direction
    if options.reverse_instruction is not None and direction != "both":
        given = f"reverse_instruction={options.reverse_instruction!r}"
        raise ValueError(f"{given} is for direction='both' only, not {direction!r}. Leave it out.")
    if direction is None:
        return ("forward",)
    ways: tuple[str, ...] = ("forward", "reverse")
    if direction != "both":
        wanted = tuple(direction.split("-to-"))
        found = tuple(part.kind for part in (columns.anchor, columns.positive))
        if found not in (wanted, wanted[::-1]):
            found_here = f"needs one side of texts and one of images, found {cut(str(columns))}"
            raise ValueError(f"direction={direction!r} {found_here}. Leave it out: the anchor is what asks.")
        ways = ("forward",) if found == wanted else ("reverse",)
    elif (instruction or columns.instruction) and options.reverse_instruction is None:
        given = f"direction='both' with instruction={instruction or columns.instruction!r}"
        raise ValueError(f"{given} needs reverse_instruction, for the positives when they ask. Give both, or none.")
    if "reverse" in ways and columns.negatives:
        what = f"direction={direction!r} turns pairs round, but their negatives are wrong answers of one side alone"
        raise ValueError(f"{what}. Remove their columns (in Python negatives=()), or leave the direction out.")
    return ways


class _RowReader:
    """Makes pairs of rows."""

    def __init__(self, reading: PairReading, instruction: str | None, special_tokens: SpecialTokens) -> None:
        self._columns, self._images, self._problems = reading.columns, reading.images, reading.problems
        self._instruction = instruction
        self._refuses_special_tokens = special_tokens == "raise"

    def read(self, line: Line) -> list[Pair]:
        """The pairs of a row, several if a cell is a list of texts; none if anything is wrong."""
        if line.error is not None:
            self._problems.add(line.error, BROKEN_LINE)
            return []
        where, row = line.where, line.columns
        before = self._problems.counts.total()
        anchors = self._cells(row, self._columns.anchor, "anchor", where)
        positives = self._cells(row, self._columns.positive, "positive", where)
        parts = enumerate(self._columns.negatives, start=1)
        negatives = [self._cells(row, part, f"negative_{number}", where) for number, part in parts]
        instruction = self._instruction_of(row, where)
        if self._problems.counts.total() > before:
            return []
        wrong = tuple(cells[0] for cells in negatives)
        return [Pair(where, anchor, positive, wrong, instruction) for anchor in anchors for positive in positives]

    def _wrong(self, kind: str, message: str) -> list[Any]:
        self._problems.add(ValueError(message), kind)
        return []

    def _cells(self, row: Mapping[str, Any], part: Part, role: str, where: str) -> list[Record]:
        before = self._problems.counts.total()
        values, text_name, image_name = row, part.text, part.image
        if part.both is not None:
            struct = row.get(part.both)
            if struct is not None and not isinstance(struct, Mapping):
                remedy = "must have text and image as in other rows."
                return self._wrong(NO_TEXT, f"{where}: {part.both} is {shown(struct)}, {remedy}")
            values, text_name, image_name = struct or {}, "text", "image"
        text, image = (None if name is None else values.get(name) for name in (text_name, image_name))
        texts = self._texts(text, f"{where}: {role}", several=not role.startswith("negative"))
        path = None if image is None or image == "" else self._image(image, where)
        if self._problems.counts.total() > before:
            return []
        # Both columns of a composed query belong to it, but either may be empty in a row.
        if not texts and path is None:
            columns = " and ".join(part.columns)
            message = f"{where}: {role} is empty (column {columns}). Fill it or leave the line out."
            return self._wrong(f"{role.partition('_')[0]} missing", message)
        return [Record(text=text, image=path) for text in texts or [None]]

    def _texts(self, value: Any, what: str, *, several: bool) -> list[str | None]:
        values = value if isinstance(value, list) and several else [value]
        for one in values:
            if one is not None and not isinstance(one, str):
                remedy = "Give each negative a column of its own." if isinstance(one, list) else "Convert the column."
                return self._wrong(NO_TEXT, f"{what} is {shown(one)}, must be a text or null. {remedy}")
            if one is not None and not is_unicode(one):
                return self._wrong(NO_TEXT, f"{what} is {shown(one)}, which holds half a character. Mend its encoding.")
            if one is not None and self._refuses_special_tokens and (found := SPECIAL_TOKEN.search(one)):
                remedy = "Remove it, or read it as text (special_tokens='split', in a command --special-tokens split)."
                return self._wrong(SPECIAL, f"{what} is {shown(one)} with the special token {found[0]!r}. {remedy}")
        return [one.strip() for one in values if one is not None and one.strip()]

    def _image(self, value: Any, where: str) -> str | None:
        try:
            return self._images.find(value, where)
        except FileNotFoundError as error:
            self._problems.add(error, IMAGE_MISSING)
        except BrokenImageError as error:
            self._problems.add(error, IMAGE_BROKEN)
        except InsideImageError as error:
            self._wrong(IMAGE_INSIDE, f"{error} images_to=FOLDER (in a command --images-to) does so for you.")
        except ValueError as error:
            self._problems.add(error, IMAGE_REFUSED)
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


# --- ids


class PairIds:
    """Ids of the sides of pairs: equal for equal content, within these pairs.

    Texts are equal if they differ in case and blanks at most, images if their files are copies of each other.
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        pairs = list(pairs)
        self._first: dict[int, str] = {}  # the first image of each size
        self._images: dict[str, str] = {}
        for pair in pairs:
            for record in (pair.anchor, pair.positive, *pair.negatives):
                if record.image is not None and record.image not in self._images:
                    self._add(record.image)
        positives: dict[str, dict[str, None]] = defaultdict(dict)
        for pair in pairs:
            positives[self.of(pair.anchor)][self.of(pair.positive)] = None
        self._positives = {anchor: list(ids) for anchor, ids in positives.items()}
        counts = Counter(chain.from_iterable(self._positives.values()))
        self._telling = {
            anchor: [one for one in ids if counts[one] > 1] or ids[:1] for anchor, ids in self._positives.items()
        }

    def _add(self, path: str) -> None:
        """Name an image by its content; only files whose size another file has, too, are read."""
        self._images[path] = path
        first = self._first.setdefault(os.path.getsize(path) if os.path.isfile(path) else -1, path)
        for one in {first, path} if first != path else ():
            if self._images[one] == one and os.path.isfile(one):
                with open(one, "rb") as file:
                    self._images[one] = hashlib.file_digest(file, "blake2b").hexdigest()

    def of(self, record: Record) -> str:
        """The id of what a side holds."""
        text = "" if record.text is None else " ".join(record.text.casefold().split())
        image = "" if record.image is None else self._images[record.image]
        # Neither holds a NUL byte that could make two of them look alike: texts are split, paths have none.
        return hashlib.blake2b(f"{text}\0{image}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def image(self, path: str) -> str:
        """The name of what an image file holds: equal for copies of it."""
        return self._images[path]

    def positives(self, anchor: Record) -> list[str]:
        """The ids of all right answers of an anchor, in the order of the pairs."""
        return self._positives[self.of(anchor)]

    def telling_positives(self, pair: Pair) -> list[str]:
        """The positive's id, and as many of the anchor's others as tell which rows must be kept apart.

        Two rows have one of these in common exactly if their anchors have a right answer in common. Of the answers
        that no other anchor has, one stands for all: an anchor with a thousand answers has a thousand rows, which
        would take a million ids.
        """
        return list(dict.fromkeys([self.of(pair.positive), *self._telling[self.of(pair.anchor)]]))
