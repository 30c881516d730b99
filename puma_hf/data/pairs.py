"""Training rows from pairs of one's own, such as images with captions or questions with answers, and their dry run."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import datasets

from puma_hf.configs import PairDirection
from puma_hf.data.images import TABLE_STEMS, Images, image_table
from puma_hf.data.items import training_features, training_row
from puma_hf.data.records import (
    CAPTION_NAMES,
    Line,
    Problems,
    Record,
    dataset_lines,
    existing,
    on_disk,
    read_lines,
    text_value,
    wrong,
)
from puma_hf.data.tasks import MODALITIES
from puma_hf.modeling.inputs_puma import SPECIAL_TOKEN, is_image_name
from puma_hf.settings import SpecialTokens, cut, shown

logger = logging.getLogger(__name__)

Given: TypeAlias = str | Mapping[str, str]
PairSource: TypeAlias = str | Path | datasets.Dataset
Side: TypeAlias = Mapping[str, str]  # columns by what they hold: "text", "image", or "both" of a column of structs

# What others call the columns, the likeliest first.
ANCHOR_NAMES = ("anchor", "query", "question", "sent0", "sentence1")
POSITIVE_NAMES = ("positive", "pos", "answer", "sent1", "sentence2", "document", "passage")
IMAGE_NAMES = ("image", "file_name", "filename", "image_path", "img_path", "path", "filepath", "img")
# Beside two texts these may say that a row is no right pair, as in collections for classifiers.
SCORE_NAMES = ("label", "score", "relevance", "similarity")
_NEGATIVE = re.compile(r"((?:negative|hard_negative|hard_neg|neg)(?:_?(\d+))?)(?:_(?:text|image|image_path))?")
_ANOTHER_IMAGE = re.compile(r".+_(?:image|img)(?:_path|_file)?|(?:image|img)_?\d+")
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

    What is not given is guessed from the columns' names and logged: anchor or query, positive, `negative_1` and so
    on, each also with `_image` behind it; else a caption asks for an image. A cell with a list of texts, such as
    five captions, makes as many pairs. Run `check_pairs` first: it reports everything that is wrong at once.

    Args:
        source: The table.
        on_error: What to do if lines cannot be used: "raise" with counts and the first of them, or "drop" them.
        with_ids: Whether to add the columns `qid`, `did` and `positives`, ids by content as `PairIds` makes them,
            which a batch sampler uses to keep rows with the same right answer apart: five captions of one image.
            Remove them before training.
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
    reading = read_pairs(source, **options)
    pairs, problems = reading.pairs, reading.problems
    logger.info("%s: %d pairs; %s", reading.name, len(pairs), reading.columns)
    if problems and (on_error != "drop" or not pairs):
        raise ValueError(reading.refusal())
    if problems:
        counts = (problems.counts.total(), reading.num_rows)
        logger.warning("%s: left out %d of %d rows: %s", reading.name, *counts, problems)
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
    return on_disk(rows, training_features(len(reading.columns.negatives), with_ids), ["pairs 1", digest.hexdigest()])


# --- columns


class PairColumns(NamedTuple):
    """Where everything stands; see `find_columns`."""

    anchor: Side
    positive: Side
    negatives: tuple[Side, ...] = ()
    instruction: str | None = None
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [_sides_of(self.anchor, self.positive, *self.negatives)]
        parts += [f"instruction: {self.instruction}"] if self.instruction is not None else []
        return "; ".join([*parts, f"ignored: {', '.join(self.ignored)}"] if self.ignored else parts)


def _sides_of(*sides: Side) -> str:
    names = ["anchor", "positive", *(f"negative {number}" for number in range(1, len(sides) - 1))]
    columns = ([f"{name} ({'text and image' if kind == 'both' else kind})" for kind, name in s.items()] for s in sides)
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in zip(names, columns, strict=True))


def find_columns(
    rows: Sequence[Mapping[str, Any]],
    anchor: Given | None = None,
    positive: Given | None = None,
    negatives: Sequence[Given] | Given | None = None,
    instruction: str | None = None,
) -> PairColumns:
    """What is given, as in `load_pairs`, and for the rest what the columns' names and first values tell.

    If both sides are guessed, a column such as `label`, which may say that some rows are wrong pairs, and images that
    may belong to either side are refused.
    """
    kinds = {name: _kind_of(name, rows) for name in dict.fromkeys(name for row in rows for name in row)}
    first = _guess(ANCHOR_NAMES, kinds) if anchor is None else _given(anchor, "anchor", kinds)
    second = _guess(POSITIVE_NAMES, kinds) if positive is None else _given(positive, "positive", kinds)
    is_guessed = anchor is None and positive is None
    is_clear = not first or not second or any(name.startswith("pos") for name in second.values())
    if is_guessed and not is_clear and (scores := [name for name in SCORE_NAMES if name in kinds]):
        what = f"There is a column {scores[0]!r}, which may say that some rows are no right pairs"
        raise ValueError(f"{what}. Leave these out and remove it, or name the columns (--anchor, --positive).")
    # Of an image with a caption the caption asks, unless it is the answer.
    free = {name: kind for name, kind in kinds.items() if name not in (*first.values(), *second.values())}
    caption = next(({"text": name} for name in CAPTION_NAMES if free.get(name) == "text"), {})
    image = next(({"image": name} for name in IMAGE_NAMES if free.get(name) == "image"), {})
    first = first or caption or image
    second = second or next((side for side in (image, caption) if side and side != first), {})
    if not first or not second or first == second:
        role = "positive" if first else "anchor"
        here = f"No column for the {role}: the columns are {cut(', '.join(kinds)) or 'none'}"
        raise ValueError(f"{here}. Name another ({role}=..., --{role}), or call one {role} or image.")
    if negatives is None:
        bases = {match[1]: int(match[2] or 0) for name in kinds if (match := _NEGATIVE.fullmatch(name))}
        bad = [_guess([base], kinds) for base in sorted(bases, key=lambda base: bases[base])]
    else:
        bad = [_given(one, "negatives", kinds) for one in _listed(negatives)]
    sides = [first, second, *filter(None, bad)]
    instruction = instruction or ("instruction" if "instruction" in kinds else None)
    used = {name for side in sides for name in side.values()} | {instruction}
    ignored = tuple(name for name in kinds if name not in used)
    has_image = any(set(side) != {"text"} for side in (first, second))
    for name in ignored if is_guessed else ():
        # They may be half of a composed query, as in image, caption, target_image. But of an image that is taken there
        # may be the name in other columns as well.
        is_other = not has_image or _ANOTHER_IMAGE.fullmatch(name.lower())
        if kinds[name] == "image" and is_other and not _NEGATIVE.fullmatch(name) and _holds_files(name, rows):
            what = f"The column {shown(name)} holds images, but its name does not tell whose"
            raise ValueError(f"{what}: {_sides_of(first, second)}. Name the columns (--anchor, --positive).")
    return PairColumns(first, second, tuple(sides[2:]), instruction, ignored)


def _listed(value: Any) -> Sequence[Any]:
    return [value] if isinstance(value, str | Mapping) else value


def _holds_files(name: str, rows: Iterable[Mapping[str, Any]]) -> bool:
    values = (value for row in rows if (value := row.get(name)) is not None)
    return any(not isinstance(value, str) or (is_image_name(value) and "://" not in value) for value in values)


def _kind_of(name: str, rows: Iterable[Mapping[str, Any]]) -> str:
    values = [value for row in rows if (value := row.get(name)) is not None and value != ""]
    if values and isinstance(values[0], Mapping):
        return "both" if {"text", "image"} & set(values[0]) else "image"
    are_images = bool(values) and all(isinstance(value, str) and is_image_name(value) for value in values)
    return "image" if are_images or name.lower() in IMAGE_NAMES or _ANOTHER_IMAGE.fullmatch(name.lower()) else "text"


def _given(value: Given, role: str, kinds: Mapping[str, str]) -> Side:
    if isinstance(value, str) and value not in kinds and "=" in value:
        entries = [entry.partition("=") for entry in value.split(",")]
        value = {key.strip(): name.strip() for key, _, name in entries}
    named = {kinds.get(value, "text"): value} if isinstance(value, str) else value
    if not named or set(named) - {"text", "image", "both"} or not set(named.values()) <= set(kinds):
        ways = "a column, or columns of text and image: {'text': ..., 'image': ...}, in a command text=...,image=..."
        raise ValueError(f"{role}={shown(value)} must be {ways}. The columns are {cut(', '.join(kinds))}.")
    return {kind: named[kind] for kind in ("text", "image", "both") if kind in named}


def _guess(bases: Iterable[str], kinds: Mapping[str, str]) -> Side:
    """The columns of the first of these names: the name itself, or with `_text` and `_image` behind it."""
    for base in bases:
        names = (base, f"{base}_text", f"{base}_image", f"{base}_image_path", f"{base}_img_path")
        if side := {kinds[name]: name for name in reversed(names) if name in kinds}:
            # A struct has text and image itself.
            return {"both": side["both"]} if "both" in side else dict(sorted(side.items(), reverse=True))
    return {}


# --- rows


@dataclass
class PairReading:
    """All that was read of a source: the whole pairs, and what is wrong with the other rows, one thing a row."""

    name: str
    columns: PairColumns
    pairs: list[Pair]
    problems: Problems
    images: Images
    num_rows: int = 0

    def refusal(self) -> str:
        """What an error says about the rows that cannot be used."""
        share = f"{self.name}: {self.problems.counts.total()} of {self.num_rows} rows cannot be used"
        remedy = "Mend them (puma-hf pairs lists more), or leave them out (on_error='drop', --bad-pairs drop)."
        return f"{share}: {self.problems}{self.problems.quotes()}\n{remedy}"


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
    dry: bool = False,
) -> PairReading:
    """Read a source to its end, whatever is wrong with its rows; a dry run saves no images. See `load_pairs`."""
    name, folder, lines = _open(source)
    # The first rows tell the columns of all, so the rest can be a stream.
    head = list(islice(lines, _NUM_ROWS_LOOKED_AT))
    good = [line.columns for line in head if line.error is None]
    if not good:
        raise ValueError(f"{name} holds no rows ({head[0].error if head else 'it is empty'}). Name one with a pair.")
    text = instruction if not any(instruction in row for row in good) else None
    # A single word is more likely a misspelt column than an instruction.
    if text is not None and text.isascii() and text.isidentifier():
        raise ValueError(f"instruction={shown(text)} must be a text of several words or a column of {name}.")
    columns = find_columns(good, anchor, positive, negatives, instruction if text is None else None)
    ways = _ways(columns, direction, text or columns.instruction, reverse_instruction)
    images = Images(folder, decode=decode, save_to=None if images_to is None else Path(images_to), dry=dry)
    row = _Row(columns, images, text, special_tokens == "raise")
    reading = PairReading(name, columns, [], Problems(name), images)
    for line in chain(head, lines):
        reading.num_rows += 1
        for pair in reading.problems.attempt(row.pairs, line) or ():
            other = pair.anchor.instruction if len(ways) == 1 else reverse_instruction
            turned = (replace(pair.positive, instruction=other), replace(pair.anchor, instruction=None))
            both = {"forward": pair, "reverse": Pair(pair.where, *turned)}
            reading.pairs += (both[way] for way in ways)
    return reading


def _open(source: PairSource) -> tuple[str, Path | None, Iterator[Line]]:
    """How errors call it, the folder that its images must be in, and its rows."""
    if isinstance(source, datasets.Dataset):
        return "the dataset", None, dataset_lines(source)
    path = existing(source)
    if table := path if path.is_file() else image_table(path):
        return str(table), table.parent, read_lines(table)
    shards = sorted(path.glob("*.parquet"))
    if not shards:
        what = f"must hold one table of its images called {' or '.join(TABLE_STEMS)}, or Parquet files"
        raise ValueError(f"{path} {what}. Name the file.")
    return str(path), path, chain.from_iterable(map(read_lines, shards))


def _ways(columns: PairColumns, direction: str | None, asks: str | None, reverse: str | None) -> tuple[str, ...]:
    """Which of the two ways the pairs are read: forward, from the anchor as it was found, and reverse."""
    what, ways = "", ("forward", "reverse") if direction == "both" else ("forward",)
    if direction not in (None, "both"):
        wanted, found = str(direction).split("-to-"), [*columns.anchor, *columns.positive]
        ways = ways if found == wanted else ("reverse",)
        if found not in (wanted, wanted[::-1]):
            what = f"needs one side of texts and one of images, found {cut(str(columns))}: leave it out"
    if "reverse" in ways and columns.negatives and not what:
        what = "turns pairs round, but not their negatives: remove them (in Python negatives=()), or leave it out"
    if (direction == "both" and asks and reverse is None) or (direction != "both" and reverse is not None):
        what = f"with instruction={asks!r} needs reverse_instruction, for the positives when they ask; no other has it"
    if what:
        raise ValueError(f"direction={direction!r} {what}.")
    return ways


class _Row(NamedTuple):
    """Makes pairs of a row; raises at the first thing that is wrong with it."""

    columns: PairColumns
    images: Images
    instruction: str | None
    refuses_special_tokens: bool

    def pairs(self, line: Line) -> list[Pair]:
        """The pairs of a row, several if a cell is a list of texts."""
        if line.error is not None:
            raise line.error
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
        self._images: dict[str, str] = {one.image: one.image for one in sides if one.image is not None}
        by_size: dict[int, list[str]] = defaultdict(list)
        for path in filter(os.path.isfile, self._images):
            by_size[os.path.getsize(path)].append(path)
        # Only files whose size another file has, too, are read.
        for path in (path for paths in by_size.values() if len(paths) > 1 for path in paths):
            with open(path, "rb") as file:
                self._images[path] = hashlib.file_digest(file, "blake2b").hexdigest()
        self._positives: dict[str, dict[str, None]] = defaultdict(dict)
        for pair in pairs:
            self._positives[self.of(pair.anchor)][self.of(pair.positive)] = None
        self._counts = Counter(chain.from_iterable(self._positives.values()))

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


@dataclass(frozen=True)
class Found:
    """Something that was found: what, how often, and the first five, each with its line."""

    kind: str
    count: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class PairsReport:
    """What a source of pairs holds; `str` makes a page of it.

    Of `num_rows` rows some cannot be used; a row makes several pairs if it is read in both directions, or holds a list.
    `offenders` is the first thing that is wrong with each row: `load_pairs` raises, or leaves the row out. `notes` can
    be trained on, but are worth a look. Of the images those are counted that can be read.
    """

    source: str
    columns: str
    num_rows: int
    num_rows_left_out: int
    num_pairs: int
    modalities: Mapping[str, Mapping[str, int]]
    offenders: tuple[Found, ...]
    notes: tuple[Found, ...]
    num_images: int

    @property
    def ok(self) -> bool:
        """Whether `load_pairs` takes the source as it is."""
        return not self.offenders and self.num_pairs > 0

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries, lists and numbers."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        lines = [f"Pairs of {self.source}", *(f"  column     {column}" for column in self.columns.split("; "))]
        lines += [f"  rows       {self.num_rows:,}, of which {self.num_rows_left_out:,} cannot be used"]
        lines += [f"  pairs      {self.num_pairs:,}"]
        for side, counts in self.modalities.items():
            found = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            lines += [f"  {side:<10} {found}"] if found else []
        lines += [f"  images     {self.num_images:,} different files"] if self.num_images else []
        for title, entries in (("Cannot be used", self.offenders), ("Worth a look", self.notes)):
            lines += ["", f"{title}:"] if entries else []
            for entry in entries:
                lines += [f"  {entry.count:,} x {entry.kind}", *(f"    {message}" for message in entry.first)]
        verdict = "All rows can be trained on." if self.ok else "Mend these rows, or leave them out (--bad-pairs drop)."
        return "\n".join([*lines, "", verdict if self.num_pairs else "No row can be trained on: mend them."])


def check_pairs(source: PairSource, **options: Any) -> PairsReport:
    """Look at everything that `load_pairs` would read, without stopping at what is wrong.

    Nothing is written. Equal texts are those that differ in case and blanks at most, equal images copies of a file.

    The arguments are those of `load_pairs`; to `decode` takes as long as an epoch of reading the images. Raises a
    FileNotFoundError if the source is missing, a ValueError if it has no rows or lacks a column.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from puma_hf.data import check_pairs

    >>> images = ["demo/emoji/mbeir_images/emoji_images/noto/1f34e.webp", "none.png"]
    >>> report = check_pairs(Dataset.from_dict({"image": images, "caption": ["an apple", "a pear"]}))
    >>> report.ok, [(found.count, found.kind) for found in report.offenders]
    (False, [(1, 'image missing')])
    ```
    """
    reading = read_pairs(source, dry=True, **options)
    pairs, counts = reading.pairs, {side: Counter[str]() for side in ("anchors", "positives", "negatives")}
    for pair in pairs:
        counts["anchors"][pair.anchor.modality] += 1
        counts["positives"][pair.positive.modality] += 1
        counts["negatives"].update(record.modality for record in pair.negatives)
    offenders, notes = (
        tuple(Found(kind, count, tuple(found.first[kind])) for kind, count in found.counts.items())
        for found in (reading.problems, _notes(pairs))
    )
    modalities = {side: {name: found[name] for name in MODALITIES if found[name]} for side, found in counts.items()}
    num_left_out, num_images = reading.problems.counts.total(), len(reading.images.read_paths)
    rows = (reading.num_rows, num_left_out, len(pairs))
    return PairsReport(reading.name, str(reading.columns), *rows, modalities, offenders, notes, num_images)


def _notes(pairs: Sequence[Pair]) -> Problems:
    """What can be trained on, but is often a mistake in the table."""
    ids, notes = PairIds(pairs), Problems()
    seen: dict[tuple[str | None, ...], str] = {}
    for pair in pairs:
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
    return notes
