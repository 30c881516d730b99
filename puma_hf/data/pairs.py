"""Training rows from pairs of one's own, such as images with captions or questions with answers, and their dry run."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import datasets

from puma_hf.configs import PairDirection
from puma_hf.data.images import TABLE_STEMS, Images, image_table
from puma_hf.data.items import training_features, training_row
from puma_hf.data.records import Line, Problems, Record, dataset_lines, on_disk, read_lines, text_value, wrong
from puma_hf.modeling.inputs_puma import SPECIAL_TOKEN, is_image_name
from puma_hf.settings import SpecialTokens, cut, shown

logger = logging.getLogger(__name__)

Given: TypeAlias = str | Mapping[str, str]
PairSource: TypeAlias = str | Path | datasets.Dataset
Side: TypeAlias = Mapping[str, str]  # columns by their kind
_KINDS = ("text", "image", "both")  # "both" is a column of structs with text and image

# What the columns are called, the likeliest first; a name may have `_text` or `_image` behind it. Of an image with a
# caption the caption asks, unless it is the answer.
_NAMES = {
    "anchor": ("anchor", "query", "question", "sent0", "caption", "text", "image", "file_name"),
    "positive": ("positive", "answer", "sent1", "image", "file_name", "caption", "text"),
}
_NEGATIVE = re.compile(r"((?:negative|hard_neg)(?:_(\d+))?)(?:_(?:text|image))?")
_SCORES = ("label", "score", "relevance")  # these may say which rows are no right pairs
_NUM_ROWS_LOOKED_AT = 1000  # to tell what the columns hold


@dataclass(frozen=True, slots=True)
class Pair:
    """An anchor with its instruction, its right answer and its wrong ones."""

    where: str
    anchor: Record
    positive: Record
    negatives: tuple[Record, ...] = ()


def load_pairs(
    source: PairSource, *, on_error: Literal["raise", "drop"] = "raise", with_ids: bool = False, **options: Any
) -> datasets.Dataset:
    """Training rows of a table of pairs, for `SentenceTransformerTrainer` and its relatives.

    A source is one of

    - a .csv, .tsv, .jsonl, .json or .parquet; images are paths below the file's own folder;
    - a folder with one such file called `captions` or `metadata` beside its images, as `datasets` has it, or
      with nothing but Parquet files;
    - a `datasets.Dataset`, whose images may have any path.

    What is not given is taken from columns called anchor, query or question; positive or answer; `negative_1` and so
    on, each also with `_text` and `_image` behind it; else a caption asks for an image. A cell with a list of texts,
    such as five captions, makes as many pairs. Run `check_pairs` first: it reports all that is wrong at once.

    Args:
        source: The table.
        on_error: What to do if rows cannot be used: "raise" with counts and the first of them, or "drop" them. A table
            that cannot be parsed is always an error.
        with_ids: Whether to add the columns `qid`, `did` and `positives`, ids by content (`PairIds`), by which a batch
            sampler keeps rows with the same right answer apart. Remove them before training.
        options:
            anchor: Column of what asks, or columns by what they hold: `{"text": ..., "image": ...}`.
            positive: Column or columns of the right answers.
            negatives: One of these for each wrong answer; `()` for none.
            instruction: What the anchors look for, as a text or a column; by default the column `instruction`.
            reverse_instruction: The same for the positives of `direction="both"`, when they ask.
            direction: "text-to-image" or "image-to-text", whichever side is the anchor; "both" for every pair in
                both directions; by default as found.
            decode: Whether to decode every image, and not to read its header alone.
            images_to: Folder for images that are inside of a dataset, saved as they are and named by their hash.
            special_tokens: "raise" refuses a text with a special token such as `<|im_end|>`; "split" takes it.

    Returns:
        Columns anchor, positive, negative_1 .. negative_n as `load_mbeir` makes them, so that both can be concatenated.

    Raises:
        ValueError: If a column is missing, an argument does not fit, no pair is left, or rows cannot be used; the
            message has counts by kind, and the first five of each.

    Example:
        >>> from datasets import Dataset
        >>> image = "demo/emoji/mbeir_images/emoji_images/noto/1f34e.webp"
        >>> rows = load_pairs(Dataset.from_dict({"image": [image], "caption": ["a red apple"]}))
        >>> rows["anchor"][0]["text"]
        'a red apple'
    """
    report = read_pairs(source, **options)
    pairs, problems = report.pairs, report.offenders
    logger.info("%s: %d pairs; %s", report.source, len(pairs), report.columns)
    if problems and (on_error != "drop" or not pairs):
        raise ValueError(str(report))
    if problems:
        counts = (problems.counts.total(), report.num_rows)
        logger.warning("%s: left out %d of %d rows: %s", report.source, *counts, problems)
    ids = PairIds(pairs) if with_ids else None

    def rows() -> Iterator[dict[str, Any]]:
        for pair in pairs:
            row = training_row(pair.anchor, pair.positive, pair.negatives)
            if ids is not None:
                telling = ids.telling_positives(pair)
                row |= {"qid": ids.of(pair.anchor), "did": telling[0], "positives": telling}
            yield row

    # Known again by what was read, and not by the file: an image may have been mended that a former run left out.
    digest = hashlib.blake2b()
    for row in rows():
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return on_disk(rows, training_features(len(report.columns.negatives), with_ids), ["pairs 1", digest.hexdigest()])


# --- columns


class PairColumns(NamedTuple):
    """Where everything stands; see `find_columns`."""

    anchor: Side
    positive: Side
    negatives: tuple[Side, ...] = ()
    instruction: str | None = None
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        sides = {"anchor": self.anchor, "positive": self.positive}
        sides |= {f"negative {number}": side for number, side in enumerate(self.negatives, start=1)}
        parts = [f"{role}: {','.join(f'{kind}={name}' for kind, name in side.items())}" for role, side in sides.items()]
        parts += [] if self.instruction is None else [f"instruction: {self.instruction}"]
        return "; ".join([*parts, f"ignored: {', '.join(self.ignored)}"] if self.ignored else parts)


def find_columns(
    rows: Sequence[Mapping[str, Any]],
    anchor: Given | None = None,
    positive: Given | None = None,
    negatives: Sequence[Given] | Given | None = None,
    instruction: str | None = None,
) -> PairColumns:
    """What is given, as in `load_pairs`, and for the rest what the columns' names and first values tell."""
    kinds = {name: _kind_of(name, rows) for name in dict.fromkeys(name for row in rows for name in row)}
    both = {"anchor": anchor, "positive": positive}
    sides = {role: _given(value, role, kinds) for role, value in both.items() if value is not None}
    is_guessed = not sides
    for role, names in _NAMES.items():
        used = {name for side in sides.values() for name in side.values()}
        free = {name: kind for name, kind in kinds.items() if name not in used}
        if not sides.setdefault(role, _guess(names, free)):
            here = f"No column for the {role}: the columns are {cut(', '.join(kinds)) or 'none'}"
            raise ValueError(f"{here}. Name another ({role}=..., --{role}), or call one {role} or image.")
    if negatives is None:
        bases = {match[1]: int(match[2] or 0) for name in kinds if (match := _NEGATIVE.fullmatch(name))}
        bad = [_guess([base], kinds) for base in sorted(bases, key=lambda base: bases[base])]
    else:
        listed = [negatives] if isinstance(negatives, str | Mapping) else negatives
        bad = [_given(one, "negatives", kinds) for one in listed]
    instruction = instruction or ("instruction" if "instruction" in kinds else None)
    used = {name for side in (*sides.values(), *bad) for name in side.values()}
    ignored = [name for name in kinds if name not in used and name != instruction]
    # Half of a composed query, as in image, caption, target_image, must not be lost in silence.
    for name in ignored if is_guessed else ():
        if name in _SCORES or (kinds[name] == "image" and not _NEGATIVE.fullmatch(name)):
            what = f"The column {shown(name)} may belong to either side, or say which rows are no right pairs"
            raise ValueError(f"{what}. Name the columns (anchor=..., positive=..., --anchor, --positive).")
    return PairColumns(sides["anchor"], sides["positive"], tuple(bad), instruction, tuple(ignored))


def _kind_of(name: str, rows: Iterable[Mapping[str, Any]]) -> str:
    values = [value for row in rows if (value := row.get(name)) is not None and value != ""]
    if values and isinstance(values[0], Mapping):
        return "both" if {"text", "image"} & set(values[0]) else "image"
    are_images = bool(values) and all(isinstance(value, str) and is_image_name(value) for value in values)
    return "image" if are_images or name in ("image", "file_name") or name.endswith("_image") else "text"


def _given(value: Given, role: str, kinds: Mapping[str, str]) -> Side:
    if isinstance(value, str) and value not in kinds and "=" in value:
        entries = [entry.partition("=") for entry in value.split(",")]
        value = {key.strip(): name.strip() for key, _, name in entries}
    named = {kinds.get(value, "text"): value} if isinstance(value, str) else value
    if not named or set(named) - set(_KINDS) or not set(named.values()) <= set(kinds):
        ways = "a column, or columns of text and image: {'text': ..., 'image': ...}, in a command text=...,image=..."
        raise ValueError(f"{role}={shown(value)} must be {ways}. The columns are {cut(', '.join(kinds))}.")
    return {kind: named[kind] for kind in _KINDS if kind in named}


def _guess(bases: Iterable[str], kinds: Mapping[str, str]) -> Side:
    """The columns of the first of these names: the name itself, or with `_text` and `_image` behind it."""
    for base in bases:
        if side := {kinds[name]: name for name in (f"{base}_image", f"{base}_text", base) if name in kinds}:
            return {kind: side[kind] for kind in _KINDS if kind in side}
    return {}


# --- rows


@dataclass
class PairsReport:
    """All that was read of a source of pairs; `str` makes a page of it.

    Of `num_rows` rows some cannot be used; a row makes several pairs if it is read in both directions, or holds a list.
    `offenders` is the first thing that is wrong with each row: `load_pairs` raises, or leaves the row out. `notes`, of
    `check_pairs` alone, can be trained on, but are worth a look.
    """

    source: str
    columns: PairColumns
    offenders: Problems
    notes: Problems = field(default_factory=Problems)
    num_rows: int = 0
    pairs: list[Pair] = field(default_factory=list, repr=False)

    @property
    def num_pairs(self) -> int:
        """How many pairs can be trained on."""
        return len(self.pairs)

    @property
    def ok(self) -> bool:
        """Whether `load_pairs` takes the source as it is."""
        return not self.offenders and self.num_pairs > 0

    def to_dict(self) -> dict[str, Any]:
        """Its figures as plain dictionaries, lists and numbers."""
        figures = {"ok": self.ok, "source": self.source, "columns": str(self.columns)}
        figures |= {"num_rows": self.num_rows, "num_pairs": self.num_pairs}
        return {**figures, "offenders": self.offenders.to_list(), "notes": self.notes.to_list()}

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.offenders.counts.total():,} of {self.num_rows:,} rows cannot be used"]
        lines[0] += f": {self.offenders}:{self.offenders.quotes()}" if self.offenders else ""
        lines += [f"{self.num_pairs:,} pairs; {self.columns}"]
        lines += [f"Worth a look: {self.notes}:{self.notes.quotes()}"] if self.notes else []
        remedy = "Mend these rows, or leave them out (on_error='drop', --bad-pairs drop)."
        return "\n".join([*lines, "All rows can be trained on." if self.ok else remedy])


def read_pairs(
    source: PairSource,
    *,
    anchor: Given | None = None,
    positive: Given | None = None,
    negatives: Sequence[Given] | Given | None = None,
    instruction: str | None = None,
    reverse_instruction: str | None = None,
    direction: PairDirection | None = None,
    decode: bool = False,
    images_to: str | Path | None = None,
    special_tokens: SpecialTokens = "raise",
) -> PairsReport:
    """Read a source to its end, whatever is wrong with its rows. See `load_pairs`."""
    name, folder, lines = _open(source)
    # The first rows tell the columns of all, so the rest can be a stream.
    head = list(islice(lines, _NUM_ROWS_LOOKED_AT))
    if not head:
        raise ValueError(f"{name} holds no rows. Name one with a pair.")
    text = instruction if not any(instruction in line.columns for line in head) else None
    # A single word is more likely a misspelt column than an instruction.
    if text is not None and text.isascii() and text.isidentifier():
        raise ValueError(f"instruction={shown(text)} must be a text of several words or a column of {name}.")
    given = (anchor, positive, negatives, instruction if text is None else None)
    columns = find_columns([line.columns for line in head], *given)
    columns = _directed(columns, direction, text or columns.instruction, reverse_instruction)
    images = Images(folder, decode=decode, save_to=None if images_to is None else Path(images_to))
    row = _Row(columns, images, text, special_tokens == "raise")
    report = PairsReport(name, columns, Problems(name))
    for line in chain(head, lines):
        report.num_rows += 1
        for pair in report.offenders.attempt(row.pairs, line) or ():
            report.pairs.append(pair)
            if direction == "both":
                turned = replace(pair.positive, instruction=reverse_instruction), replace(pair.anchor, instruction=None)
                report.pairs.append(Pair(pair.where, *turned))
    return report


def _open(source: PairSource) -> tuple[str, Path | None, Iterator[Line]]:
    """How errors call it, the folder that its images must be in, and its rows."""
    if isinstance(source, datasets.Dataset):
        return "the dataset", None, dataset_lines(source)
    path = Path(source)
    if table := path if path.is_file() else image_table(path):
        return str(table), table.parent, read_lines(table)
    shards = sorted(path.glob("*.parquet"))
    if not shards:
        what = f"must hold one table of its images called {' or '.join(TABLE_STEMS)}, or Parquet files"
        raise ValueError(f"{path} {what}. Name the file.")
    return str(path), path, chain.from_iterable(map(read_lines, shards))


def _directed(columns: PairColumns, direction: str | None, asks: str | None, reverse: str | None) -> PairColumns:
    """The columns, their sides swapped where that is the direction; a ValueError if it does not fit them."""
    found, what = [*columns.anchor, *columns.positive], ""
    wanted = found if direction in (None, "both") else str(direction).split("-to-")
    if sorted(wanted) != sorted(found):
        what = f"needs one side of texts and one of images, found {cut(str(columns))}: leave it out"
    elif columns.negatives and (direction == "both" or wanted != found):
        what = "turns pairs round, but not their negatives: remove them (in Python negatives=()), or leave it out"
    elif (direction == "both" and asks and reverse is None) or (direction != "both" and reverse is not None):
        what = f"with instruction={asks!r} needs reverse_instruction, for the positives when they ask; no other has it"
    if what:
        raise ValueError(f"direction={direction!r} {what}.")
    return columns if wanted == found else columns._replace(anchor=columns.positive, positive=columns.anchor)


class _Row(NamedTuple):
    """Makes pairs of a row; raises at the first thing that is wrong with it."""

    columns: PairColumns
    images: Images
    instruction: str | None
    refuses_special_tokens: bool

    def pairs(self, line: Line) -> list[Pair]:
        """The pairs of a row, several if a cell is a list of texts."""
        struct, name = line.columns.get(self.columns.anchor.get("both", "")), self.columns.instruction
        # Not `get(name or "")`: a spreadsheet's column of row numbers is called "".
        value = None if name is None else line.columns.get(name)
        if name is None and isinstance(struct, Mapping):
            value = struct.get("instruction")
        asks = self._text(value if self.instruction is None else self.instruction, line.where, "instruction")
        anchors = [replace(one, instruction=asks) for one in self._side(line, self.columns.anchor, "anchor")]
        positives = self._side(line, self.columns.positive, "positive")
        bad = tuple(self._side(line, side, "negative")[0] for side in self.columns.negatives)
        return [Pair(line.where, anchor, positive, bad) for anchor in anchors for positive in positives]

    def _side(self, line: Line, side: Side, role: str) -> list[Record]:
        values = {kind: line.columns.get(name) for kind, name in side.items()}
        values = values["both"] or {} if "both" in values else values
        if not isinstance(values, Mapping):
            raise wrong(line.where, f"{role} is {shown(values)}, must have text and image as in other rows.")
        text, image = values.get("text"), values.get("image")
        # As many pairs as captions; of wrong answers there is one a column.
        several = text if isinstance(text, list) and role != "negative" else [text]
        texts: list[str | None] = [found for one in several if (found := self._text(one, line.where, role))]
        path = None if image is None or image == "" else self.images.read(image, line.where)
        # Both columns of a composed query belong to it, but either may be empty in a row.
        if not texts and path is None:
            what = f"{role} is empty (column {' and '.join(side.values())}). Fill it or leave the line out."
            raise wrong(line.where, what, f"{role} missing")
        return [Record(text=one, image=path) for one in texts or [None]]

    def _text(self, value: Any, where: str, role: str) -> str | None:
        text = text_value(value, where, role)
        if text and self.refuses_special_tokens and (found := SPECIAL_TOKEN.search(text)):
            remedy = "Remove it, or read it as text (special_tokens='split', --special-tokens split)."
            what = f"{role} is {shown(text)} with the special token {found[0]!r}. {remedy}"
            raise wrong(where, what, "special token in a text")
        return text and text.strip()


# --- ids


class PairIds:
    """Ids of the sides of pairs: equal for equal content, within these pairs.

    Texts are equal if they differ in case and blanks at most, images if their files are copies of each other.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        sides = (one for pair in pairs for one in (pair.anchor, pair.positive, *pair.negatives))
        # The name of what each image file holds: equal for copies of it.
        self.images: dict[str, str] = {one.image: one.image for one in sides if one.image is not None}
        by_size: dict[int, list[str]] = defaultdict(list)
        for path in filter(os.path.isfile, self.images):
            by_size[os.path.getsize(path)].append(path)
        # Only files whose size another file has, too, are read.
        for path in (path for paths in by_size.values() if len(paths) > 1 for path in paths):
            with open(path, "rb") as file:
                self.images[path] = hashlib.file_digest(file, "blake2b").hexdigest()
        self._positives: dict[str, dict[str, None]] = defaultdict(dict)
        for pair in pairs:
            self._positives[self.of(pair.anchor)][self.of(pair.positive)] = None
        self._counts = Counter(chain.from_iterable(self._positives.values()))

    def of(self, record: Record) -> str:
        """The id of what a side holds."""
        text = "" if record.text is None else " ".join(record.text.casefold().split())
        image = "" if record.image is None else self.images[record.image]
        # Neither holds a NUL byte that could make two of them look alike: texts are split, paths have none.
        return hashlib.blake2b(f"{text}\0{image}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def positives(self, anchor: Record) -> list[str]:
        """The ids of all right answers of an anchor, in the order of the pairs."""
        return list(self._positives[self.of(anchor)])

    def telling_positives(self, pair: Pair) -> list[str]:
        """The positive's id, and as many of the anchor's others as tell which rows must be kept apart.

        Two rows have one of these in common exactly if their anchors have a right answer in common. Of the answers
        that no other anchor has, one stands for all: an anchor with a thousand answers has a thousand rows, which
        would take a million ids.
        """
        right = self.positives(pair.anchor)
        shared = [one for one in right if self._counts[one] > 1] or right[:1]
        return list(dict.fromkeys([self.of(pair.positive), *shared]))


# --- the dry run


def check_pairs(source: PairSource, **options: Any) -> PairsReport:
    """Look at everything that `load_pairs` would read, without stopping at what is wrong.

    Nothing is written but images for which `images_to` names a folder. Equal texts are those that differ in case and
    blanks at most, equal images copies of a file.

    The arguments are those of `load_pairs`; to `decode` takes as long as an epoch of reading the images. Raises a
    FileNotFoundError if the source is missing, a ValueError if it has no rows or lacks a column.

    Example:
        >>> from datasets import Dataset
        >>> images = ["demo/emoji/mbeir_images/emoji_images/noto/1f34e.webp", "none.png"]
        >>> report = check_pairs(Dataset.from_dict({"image": images, "caption": ["an apple", "a pear"]}))
        >>> report.ok, str(report.offenders)
        (False, 'image missing: 1')
    """
    report = read_pairs(source, **options)
    ids, notes = PairIds(report.pairs), report.notes
    seen: dict[tuple[str | None, ...], str] = {}
    for pair in report.pairs:
        anchor, positive, *negatives = map(ids.of, (pair.anchor, pair.positive, *pair.negatives))
        first = seen.setdefault((anchor, positive, *negatives, pair.anchor.instruction), pair.where)
        # Whoever trains on the pair twice weighs it twice.
        if first is not pair.where:
            notes.add(wrong(pair.where, f"the same as {first}", "pair given again"))
        if anchor == positive:
            notes.add(wrong(pair.where, shown(pair.anchor.model_input), "anchor that is its own positive"))
        for negative, record in zip(negatives, pair.negatives, strict=True):
            # The loss would push away what it pulls elsewhere.
            if negative in ids.positives(pair.anchor):
                kind = "negative that is a right answer of its anchor"
                notes.add(wrong(pair.where, shown(record.model_input), kind))
    return report
