"""The dry run over pairs of one's own: what there is, and everything that is wrong, without stopping."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puma_hf.data.images import ImageFiles
from puma_hf.data.pair_columns import Given
from puma_hf.data.pair_ids import PairIds
from puma_hf.data.pair_rows import Cell, Direction, Offenders, Pair, PairOptions, PairSource, read_pairs
from puma_hf.data.pairs import load_pairs
from puma_hf.data.pairs_config import PairsConfig
from puma_hf.data.pairs_mbeir import write_mbeir
from puma_hf.modeling.messages_puma import MODALITY_NAMES
from puma_hf.settings import SpecialTokens

logger = logging.getLogger(__name__)

# Kinds of what is worth a look, though it can be trained on.
DUPLICATE = "pair given again"
NEGATIVE_IS_RIGHT = "negative that is a right answer of its anchor"
ANCHOR_IS_POSITIVE = "anchor that is its own positive"
SEVERAL_POSITIVES = "anchor with several positives"
SEVERAL_ANCHORS = "positive of several anchors"

_SIDES = ("anchors", "positives", "negatives")


@dataclass(frozen=True)
class Found:
    """Something that was found: how often, and where first.

    Args:
        kind: What it is.
        count: How often.
        first: The first five, each with its line.
    """

    kind: str
    count: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some numbers.

    Args:
        count: How many numbers.
        smallest: The smallest.
        median: The middle one; of an even count the lower of the two.
        largest: The largest.
    """

    count: int
    smallest: int
    median: int
    largest: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Spread | None:
        """That of some numbers, None of none."""
        ordered = sorted(numbers)
        return cls(len(ordered), ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1]) if ordered else None

    def __str__(self) -> str:
        return f"{self.smallest:,} to {self.largest:,}, median {self.median:,}"


@dataclass(frozen=True)
class PairsReport:
    """What a source of pairs holds; `str` makes a page of it.

    Args:
        source: Its name.
        columns: Which columns were read as what.
        num_rows: Rows of the source.
        num_rows_left_out: Rows that cannot be used.
        num_pairs: Pairs to train on: a row makes several if it is read in both directions, or holds a list.
        modalities: For anchors, positives and negatives the number of each modality.
        offenders: What is wrong: `load_pairs` raises, or leaves the rows out.
        notes: What can be trained on, but is worth a look: duplicates, right answers among the negatives.
        image_widths: Over the different image files that can be read; None without images.
        image_heights: Likewise.
        text_lengths: For anchors, positives and negatives the characters of their texts.
        decoded: Whether images were decoded, not their headers alone.
    """

    source: str
    columns: str
    num_rows: int
    num_rows_left_out: int
    num_pairs: int
    modalities: Mapping[str, Mapping[str, int]]
    offenders: tuple[Found, ...]
    notes: tuple[Found, ...]
    image_widths: Spread | None
    image_heights: Spread | None
    text_lengths: Mapping[str, Spread]
    decoded: bool

    @property
    def ok(self) -> bool:
        """Whether `load_pairs` takes the source as it is."""
        return not self.offenders and self.num_pairs > 0

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries, lists and numbers."""
        return {"ok": self.ok, **asdict(self)}

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file, whole or not at all.

        Args:
            path: The file.
        """
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}-{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)

    def __str__(self) -> str:
        lines = [f"Pairs of {self.source}", *_lines("columns", self.columns.split("; "))]
        rows = f"{self.num_rows:,}, of which {self.num_rows_left_out:,} cannot be used"
        lines += [*_lines("rows", [rows]), *_lines("pairs", [f"{self.num_pairs:,}"])]
        for side in _SIDES:
            counts = [f"{count:,} {name}" for name, count in self.modalities[side].items()]
            lines += _lines(side, [", ".join(counts)] if counts else [])
        if self.image_widths is not None and self.image_heights is not None:
            how = "decoded" if self.decoded else "headers read"
            size = f"{self.image_widths.count:,} files ({how}); width {self.image_widths}; height {self.image_heights}"
            lines += _lines("images", [size])
        texts = [f"{side}: {spread} characters" for side, spread in self.text_lengths.items()]
        lines += _lines("texts", texts)
        for title, entries in (("Cannot be used", self.offenders), ("Worth a look", self.notes)):
            lines += ["", f"{title}:"] if entries else []
            for entry in entries:
                lines.append(f"  {entry.count:,} x {entry.kind}")
                lines += [f"    {message}" for message in entry.first]
                lines += [f"    and {entry.count - len(entry.first):,} more"] if entry.count > len(entry.first) else []
        return "\n".join([*lines, "", self._verdict()])

    def _verdict(self) -> str:
        if self.ok:
            return "All rows can be trained on."
        if not self.num_pairs:
            return "No row can be trained on: mend them."
        return "Mend these rows, or leave them out (on_error='drop', in a command --bad-pairs drop)."


def _lines(title: str, texts: Sequence[str]) -> list[str]:
    return [f"  {title if number == 0 else '':<10} {text}" for number, text in enumerate(texts)]


def check_pairs(
    source: PairSource,
    *,
    anchor: Given | None = None,
    positive: Given | None = None,
    negatives: Sequence[Given] | Given | None = None,
    instruction: str | None = None,
    reverse_instruction: str | None = None,
    direction: Direction | None = None,
    decode: bool = False,
    images_to: str | Path | None = None,
    special_tokens: SpecialTokens = "raise",
) -> PairsReport:
    """Look at everything that `load_pairs` would read, without stopping at what is wrong.

    Nothing is written. Equal texts are those that differ in case and blanks at most, equal images copies of a file.

    Args:
        source: As in `load_pairs`, and so are all others.
        anchor: Column or columns of what asks.
        positive: Column or columns of the right answers.
        negatives: One of these for each wrong answer; `()` for none.
        instruction: What the anchors look for.
        reverse_instruction: What the positives look for with `direction="both"`.
        direction: Which side asks.
        decode: Whether to decode every image, which takes as long as an epoch of reading them.
        images_to: Folder that `load_pairs` is to save images to; here they are looked at alone.
        special_tokens: Whether a text with a special token is wrong.

    Returns:
        The report.

    Raises:
        FileNotFoundError: If the source is missing.
        ValueError: If there are no rows at all, a column is missing, or an argument does not fit.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from puma_hf.data.pairs_report import check_pairs

    >>> images = ["demo/emoji/mbeir_images/emoji_images/noto/1f34e.webp", "none.png"]
    >>> report = check_pairs(Dataset.from_dict({"image": images, "caption": ["an apple", "a pear"]}))
    >>> report.ok, [(found.count, found.kind) for found in report.offenders]
    (False, [(1, 'image missing')])
    ```
    """
    options = PairOptions(
        anchor=anchor,
        positive=positive,
        negatives=negatives,
        instruction=instruction,
        reverse_instruction=reverse_instruction,
        direction=direction,
        decode=decode,
        images_to=images_to,
        special_tokens=special_tokens,
    )
    reading = read_pairs(source, options, dry=True)
    sides = _sides(reading.pairs)
    modalities = {name: Counter(cell.modality for cell in cells) for name, cells in sides.items()}
    lengths = {name: Spread.of([len(cell.text) for cell in cells if cell.text]) for name, cells in sides.items()}
    widths, heights = _sizes(reading.images)
    return PairsReport(
        source=reading.name,
        columns=str(reading.columns),
        num_rows=reading.num_rows,
        num_rows_left_out=reading.num_rows_left_out,
        num_pairs=len(reading.pairs),
        modalities={
            side: {name: counts[name] for name in MODALITY_NAMES if counts[name]} for side, counts in modalities.items()
        },
        offenders=_found(reading.offenders),
        notes=_found(_notes(reading.pairs)),
        image_widths=widths,
        image_heights=heights,
        text_lengths={name: spread for name, spread in lengths.items() if spread is not None},
        decoded=decode,
    )


def pairs(config: PairsConfig) -> PairsReport:
    """The dry run of `puma-hf pairs`.

    Args:
        config: What to look at; see `PairsConfig`.

    Returns:
        The report, which is also in `config.json` if that is given. With `config.mbeir` the pairs are written there
        in M-BEIR's layout, unless rows cannot be used and are not to be dropped.

    Raises:
        FileNotFoundError: If the source is missing.
        FileExistsError: If `config.mbeir` is there already.
        ValueError: If there are no rows at all, or a column is missing.
    """
    arguments = config.pair_arguments()
    arguments["special_tokens"] = config.special_tokens
    report = check_pairs(config.data, decode=config.decode, **arguments)
    if config.json is not None:
        report.to_json(config.json)
    if config.mbeir is None:
        return report
    if not report.num_pairs or (report.offenders and config.bad_pairs == "raise"):
        logger.warning("%s was not written, for rows cannot be used; see the report.", config.mbeir)
        return report
    rows = load_pairs(config.data, on_error=config.bad_pairs, **arguments)
    val, test = config.val_fraction, config.test_fraction
    write_mbeir(rows, config.mbeir, val_fraction=val, test_fraction=test, seed=config.seed)
    return report


def _sides(pairs: Sequence[Pair]) -> dict[str, list[Cell]]:
    cells = ([pair.anchor for pair in pairs], [pair.positive for pair in pairs])
    return dict(zip(_SIDES, (*cells, [cell for pair in pairs for cell in pair.negatives]), strict=True))


def _sizes(images: ImageFiles) -> tuple[Spread | None, Spread | None]:
    sizes = images.sizes.values()
    return Spread.of([width for width, _ in sizes]), Spread.of([height for _, height in sizes])


def _found(offenders: Offenders) -> tuple[Found, ...]:
    return tuple(Found(kind, count, tuple(offenders.first[kind])) for kind, count in offenders.counts.items())


def _notes(pairs: Sequence[Pair]) -> Offenders:
    ids = PairIds(pairs)
    notes = Offenders()
    seen: dict[tuple[str, ...], str] = {}
    anchors: dict[str, dict[str, str]] = {}  # of each positive, with the first place of each anchor
    for pair in pairs:
        anchor, positive = ids.of(pair.anchor), ids.of(pair.positive)
        key = (anchor, positive, *map(ids.of, pair.negatives), pair.instruction or "")
        if key in seen:
            notes.add(DUPLICATE, f"{pair.where}: the same as {seen[key]}")
        seen.setdefault(key, pair.where)
        if anchor == positive:
            notes.add(ANCHOR_IS_POSITIVE, f"{pair.where}: {_shown(pair.anchor)}")
        right = ids.positives(pair.anchor)
        for negative in pair.negatives:
            if ids.of(negative) in right:
                notes.add(NEGATIVE_IS_RIGHT, f"{pair.where}: {_shown(negative)}")
        anchors.setdefault(positive, {}).setdefault(anchor, f"{pair.where}: {_shown(pair.positive)}")
    known: set[str] = set()
    for pair in pairs:
        anchor, right = ids.of(pair.anchor), ids.positives(pair.anchor)
        if anchor not in known and len(right) > 1:
            notes.add(SEVERAL_POSITIVES, f"{pair.where}: {_shown(pair.anchor)} has {len(right)}")
        known.add(anchor)
    for places in anchors.values():
        if len(places) > 1:
            notes.add(SEVERAL_ANCHORS, f"{next(iter(places.values()))} has {len(places)}")
    return notes


def _shown(cell: Cell) -> str:
    text = None if cell.text is None else cell.text if len(cell.text) <= 60 else cell.text[:57] + "..."
    image = None if cell.image is None else os.path.basename(cell.image)
    return " with ".join(repr(part) for part in (text, image) if part is not None)
