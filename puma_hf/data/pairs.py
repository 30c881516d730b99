"""Training rows from pairs of one's own: images with captions, questions with answers, or any two columns."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import datasets

from puma_hf.data.mbeir import training_features
from puma_hf.data.pair_columns import Given
from puma_hf.data.pair_ids import PairIds
from puma_hf.data.pair_rows import Cell, Direction, PairOptions, PairReading, PairSource, read_pairs
from puma_hf.settings import SpecialTokens

logger = logging.getLogger(__name__)


def load_pairs(
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
    on_error: Literal["raise", "drop"] = "raise",
    special_tokens: SpecialTokens = "raise",
    with_ids: bool = False,
) -> datasets.Dataset:
    """Training rows of a table of pairs, for `SentenceTransformerTrainer` and its relatives.

    A source is one of

    - a .csv, .tsv, .jsonl, .json or .parquet; images are paths below the file's own folder;
    - a folder with one such file called `captions` or `metadata` beside its images, as `datasets` has it, or
      with nothing but Parquet files;
    - a `datasets.Dataset`, whose images may have any path.

    What is not given is guessed from the columns' names (`find_columns` lists them) and logged: anchor or query,
    positive, `negative_1` and so on, each also with `_image` behind it; else a caption asks for an image. A cell
    with a list of texts, such as five captions, makes as many pairs. Run `check_pairs` first: it reports
    everything that is wrong at once.

    Args:
        source: The table.
        anchor: Column of what asks, or columns by what they hold: `{"text": ..., "image": ...}`.
        positive: Column or columns of the right answers.
        negatives: One of these for each wrong answer; `()` for none.
        instruction: What the anchors look for, as a text or a column of texts; by default the column
            `instruction`, if there is one.
        reverse_instruction: The same for the positives of `direction="both"`, when they ask.
        direction: "text-to-image" or "image-to-text", whichever side is the anchor; "both" for every pair in both
            directions; by default as found.
        decode: Whether to decode every image; by default its header is read, and damage further in is found when
            a batch needs it.
        images_to: Folder for images that are inside of a dataset, not beside it; they are saved as they are, named
            by their hash.
        on_error: What to do if lines cannot be used: "raise" with counts and the first of them, or "drop" them and
            log that.
        special_tokens: Whether a text with a special token such as `<|im_end|>` is wrong: "raise"; with "split" it is
            taken as it is, for a model that is told to read it as plain text.
        with_ids: Whether to add the columns `qid`, `did` and `positives`, ids by content as `PairIds` makes them,
            which a batch sampler uses to keep rows with the same right answer apart: five captions of one image.
            `positives` has as many of an anchor's right answers as that takes. Remove them before training.

    Returns:
        A dataset with the columns anchor, positive, negative_1 .. negative_n, of structs as `load_mbeir` makes
        them, so that both can be concatenated.

    Raises:
        FileNotFoundError: If the source is missing.
        ValueError: If a column is missing, an argument does not fit, no pair is left, or lines cannot be used; the
            message has counts by kind, and the first five with their lines.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from puma_hf.data.pairs import load_pairs

    >>> image = "demo/emoji/mbeir_images/emoji_images/noto/1f34e.webp"
    >>> rows = load_pairs(Dataset.from_dict({"image": [image], "caption": ["a red apple"]}))
    >>> rows["anchor"][0]["text"]
    'a red apple'
    ```
    """
    if on_error not in ("raise", "drop"):
        raise ValueError(f"on_error={on_error!r} must be 'raise' or 'drop'.")
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
    reading = read_pairs(source, options)
    logger.info("%s: %d pairs; %s", reading.name, len(reading.pairs), reading.columns)
    if reading.offenders.counts:
        if on_error == "raise" or not reading.pairs:
            raise ValueError(reading.refusal())
        logger.warning(
            "%s: left out %d of %d rows: %s",
            reading.name,
            reading.num_rows_left_out,
            reading.num_rows,
            reading.offenders,
        )
    return _to_dataset(reading, with_ids)


def _to_dataset(reading: PairReading, with_ids: bool) -> datasets.Dataset:
    num_negatives = len(reading.columns.negatives)
    ids = PairIds(reading.pairs) if with_ids else None
    features = training_features(num_negatives, with_ids)
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for pair in reading.pairs:
        columns["anchor"].append({**_struct(pair.anchor), "instruction": pair.instruction})
        columns["positive"].append(_struct(pair.positive))
        for number, negative in enumerate(pair.negatives, start=1):
            columns[f"negative_{number}"].append(_struct(negative))
        if ids is not None:
            columns["qid"].append(ids.of(pair.anchor))
            columns["did"].append(ids.of(pair.positive))
            columns["positives"].append(ids.telling_positives(pair))
    return datasets.Dataset.from_dict(columns, features=features)


def _struct(cell: Cell) -> dict[str, str | None]:
    return {"text": cell.text, "image": cell.image}
