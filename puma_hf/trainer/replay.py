"""Which rows of the training data the batches of an epoch held: for messages about what went wrong in them."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, islice
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher


def describe_batches(loader: Any, dataset: Any, epoch: int, positions: list[int]) -> str:
    """Batches of an epoch in words, with their rows if these are certain.

    Args:
        loader: The training data loader of this process.
        dataset: The training dataset, or a mapping of several.
        epoch: Number of the epoch, from 0.
        positions: Places of the batches in the epoch and process, from 0.

    Returns:
        Such as "batch 2 of epoch 1, rows [3, 7] of train_dataset".
    """
    where = f"batch {', '.join(str(position + 1) for position in positions)} of epoch {epoch + 1}"
    first, again = (_replay(loader, dataset, epoch, positions) for _ in range(2))
    # A sampler that depends on more than the epoch gives another order now: better no rows than wrong ones.
    return f"{where}, rows {first} of train_dataset" if first and first == again else where


def _replay(loader: Any, dataset: Any, epoch: int, positions: list[int]) -> str:
    """The rows of batches of this epoch and process, asked again of the sampler.

    What it gave is not recorded while training: data loaders fetch ahead, workers more so, a resumed epoch
    skips and processes share. The position in the epoch is certain, and so is the order of each epoch.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if sampler is None or isinstance(loader, DataLoaderDispatcher):
        return ""
    loader.set_epoch(epoch)
    batches = list(islice(sampler, max(positions) + 1))
    rows = [row for position in positions if position < len(batches) for row in batches[position]]
    if not isinstance(dataset, dict):
        return str(rows)
    # Several datasets are numbered through.
    keys, starts = list(dataset), [0, *accumulate(map(len, dataset.values()))]
    return str([f"{keys[(part := bisect_right(starts, row) - 1)]}:{row - starts[part]}" for row in rows])
