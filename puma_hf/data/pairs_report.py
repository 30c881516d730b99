"""The dry run over pairs of one's own: what there is, and everything that is wrong, without stopping."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puma_hf.configs import PairsConfig
from puma_hf.data.mbeir_write import write_mbeir
from puma_hf.data.pairs import Pair, PairIds, PairSource, load_pairs, read_pairs
from puma_hf.data.records import Problems, wrong
from puma_hf.data.tasks import MODALITIES
from puma_hf.files import write_whole
from puma_hf.settings import shown

logger = logging.getLogger(__name__)


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
    pairs = reading.pairs
    sides = {"anchors": [pair.anchor for pair in pairs], "positives": [pair.positive for pair in pairs]}
    sides["negatives"] = [record for pair in pairs for record in pair.negatives]
    counts = {side: Counter(record.modality for record in records) for side, records in sides.items()}
    offenders, notes = (
        tuple(Found(kind, count, tuple(found.first[kind])) for kind, count in found.counts.items())
        for found in (reading.problems, _notes(pairs))
    )
    return PairsReport(
        source=reading.name,
        columns=str(reading.columns),
        num_rows=reading.num_rows,
        num_rows_left_out=reading.num_rows_left_out,
        num_pairs=len(pairs),
        modalities={side: {name: found[name] for name in MODALITIES if found[name]} for side, found in counts.items()},
        offenders=offenders,
        notes=notes,
        num_images=len(reading.images.read_paths),
    )


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


def pairs(config: PairsConfig) -> PairsReport:
    """The dry run of `puma-hf pairs`.

    The report is also written to `config.json` if that is given. With `config.mbeir` the pairs are written there in
    M-BEIR's layout, unless rows cannot be used and are not to be dropped; errors are those of `load_pairs`.
    """
    arguments = {**config.pair_arguments(), "special_tokens": config.special_tokens}
    # Read twice, for the report must not depend on what is dropped.
    report = check_pairs(config.data, decode=config.decode, **arguments)
    if config.json is not None:
        write_whole(Path(config.json), (json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())
    if config.mbeir is not None and (not report.num_pairs or (report.offenders and config.bad_pairs == "raise")):
        logger.warning("%s was not written, for rows cannot be used; see the report.", config.mbeir)
    elif config.mbeir is not None:
        rows = load_pairs(config.data, on_error=config.bad_pairs, **arguments)
        val, test = config.val_fraction, config.test_fraction
        write_mbeir(rows, config.mbeir, val_fraction=val, test_fraction=test, seed=config.seed)
    return report
