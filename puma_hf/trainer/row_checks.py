"""What a trainer's datasets must have before anything is trained: rows, negatives, a list entry for each row."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
    MultipleNegativesRankingLoss,
    MultipleNegativesSymmetricRankingLoss,
)

from puma_hf.losses import ScheduledTemperatureLoss

logger = logging.getLogger(__name__)

# Losses whose negatives are the other rows of the batch.
IN_BATCH_LOSSES = (
    ScheduledTemperatureLoss,
    MultipleNegativesRankingLoss,
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesSymmetricRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
)


def check_rows(trainer: Any, datasets: Any, what: str, batch_size: int) -> None:
    """Raise if there are no rows, or nothing to tell a positive from.

    Args:
        trainer: A `PumaTrainer`, whose loss and arguments are read.
        datasets: A dataset, a dict of these, or None.
        what: What the message calls it.
        batch_size: Rows per batch and device.

    Raises:
        ValueError: If a dataset is empty, or every row would be alone in its batch and have no negative.
    """
    for key, dataset in (datasets if isinstance(datasets, dict) else {"": datasets}).items():
        if not isinstance(dataset, Dataset | IterableDataset):
            continue
        name = f"{what}[{key!r}]" if key else what
        rows = len(dataset) if isinstance(dataset, Dataset) else None
        if rows == 0:
            raise ValueError(f"{name} has no rows. Look at the folder, the split and the filters it comes from.")
        loss: Any = trainer.loss.get(key) if isinstance(trainer.loss, Mapping) else trainer.loss
        found = [module for module in (() if loss is None else loss.modules()) if isinstance(module, IN_BATCH_LOSSES)]
        labels = {*trainer.data_collator.valid_label_columns, "dataset_name"}
        if not found or len(set(dataset.column_names) - labels) > 2:
            continue
        devices: int = trainer.args.world_size
        compared = batch_size * (devices if getattr(found[0], "gather_across_devices", False) else 1)
        kind = type(found[0]).__name__
        if 1 in (compared, rows):
            size = "is a stream" if rows is None else f"has {rows} row(s)"
            raise ValueError(
                f"{name} {size}, batches have {compared} and there are no negative columns: {kind} compares a "
                "positive with those of other rows, so it would always be 0. Give it two rows and a batch size of 2 "
                "at least, or columns of negatives."
            )
        if rows is not None and devices == 1 and rows % batch_size == 1 and not trainer.args.dataloader_drop_last:
            logger.warning(
                "The last batch of %s, of %d rows in batches of %d, has one row, whose %s is 0 and lowers the mean. "
                "Choose another batch size, or set dataloader_drop_last.",
                *(name, rows, batch_size, kind),
            )


def check_positives(dataset: Any, positives: Sequence[Any] | None) -> None:
    """Raise a ValueError if `positives`, which belong to the rows of one dataset, do not fit it."""
    if positives is None:
        return
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"positives belong to the rows of one dataset, but train_dataset is a {type(dataset).__name__}. "
            "Concatenate the datasets, or leave positives out."
        )
    if len(positives) != len(dataset):
        raise ValueError(
            f"positives has {len(positives)} rows and train_dataset {len(dataset)}. Pass one list of ids per row."
        )
