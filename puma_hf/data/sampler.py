"""A batch sampler that keeps false negatives of M-BEIR rows apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler

LOOKED_AT_PER_ROW = 8  # waiting rows, for each row of a batch
LOOKED_AT_LAST = 8  # waiting rows, for each row of the dataset, once no new ones are left
CUT_AFTER = 8  # units that are too large for the rest of a batch, before one is cut to fit

Unit = tuple[int, ...]


class DistinctPositivesBatchSampler(DefaultBatchSampler):
    """Batches in which no two rows share a right answer.

    In-batch negatives of a row are the other rows' positives. Two queries about the same thing would make
    each other's right answer a negative; here they never meet. A row that does not fit into a batch waits for
    a later one, so every row comes once an epoch, but for those that an answer shared by too many rows leaves
    over: an epoch has never more batches than `len` says, and with `drop_last` it ends at the first that
    cannot be filled. Time grows with the number of rows, whatever they share.

    A hard negative that a row brings along in a column of its own may still be right for another row.

    Args:
        dataset: The training dataset.
        positives: For each row, the ids of all its right answers, as the column "positives" of
            `load_mbeir(..., with_ids=True)` has them.
        kwargs: What the trainer passes: batch_size, drop_last, generator, seed.

    Raises:
        ValueError: If `positives` has not as many rows as the dataset.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from puma_hf.data.sampler import DistinctPositivesBatchSampler

    >>> dataset = Dataset.from_dict({"anchor": ["a", "b", "c", "d"]})
    >>> positives = [["x"], ["x"], ["y"], ["z"]]
    >>> sampler = DistinctPositivesBatchSampler(dataset, positives, batch_size=2, drop_last=False, seed=0)
    >>> all(set(batch) != {0, 1} for batch in sampler)
    True
    ```
    """

    def __init__(self, dataset: Any, positives: Sequence[Sequence[str]], **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        if len(positives) != len(dataset):
            raise ValueError(
                f"positives has {len(positives)} rows and the dataset {len(dataset)}. Pass one list of ids per row."
            )
        self.positives: list[frozenset[str]] = [frozenset(ids) for ids in positives]

    def __iter__(self) -> Iterator[list[int]]:
        generator = self.generator or torch.Generator()
        generator.manual_seed((self.seed or 0) + self.epoch)
        new = self._units(generator)
        waiting: deque[Unit] = deque()
        looks_left = LOOKED_AT_LAST * len(self.positives)
        for _ in range(len(self)):
            batch = _Batch(self.batch_size)
            # Rows that waited go first. Only some are looked at: an answer that very many rows share would
            # else make an epoch quadratic.
            for _ in range(min(len(waiting), LOOKED_AT_PER_ROW * self.batch_size)):
                self._place(waiting.popleft(), batch, waiting)
            while batch.room and (unit := next(new, None)) is not None:
                self._place(unit, batch, waiting)
            if batch.room:  # no new rows are left
                batch.too_large = CUT_AFTER
                looks = min(len(waiting), looks_left)
                looks_left -= looks
                for _ in range(looks):
                    self._place(waiting.popleft(), batch, waiting)
            if not batch.rows or (self.drop_last and batch.room):
                return
            yield batch.rows

    def _units(self, generator: torch.Generator) -> Iterator[Unit]:
        """Rows that are to come together, in the order of the epoch; here each is on its own."""
        for row in torch.randperm(len(self.positives), generator=generator).tolist():
            yield (row,)

    def _ids(self, unit: Unit) -> set[Hashable]:
        """What no other unit of a batch may share."""
        return {answer for row in unit for answer in self.positives[row]}

    def _place(self, unit: Unit, batch: _Batch, waiting: deque[Unit]) -> None:
        rest = batch.add(unit, self._ids(unit)) if batch.room else unit
        if rest:
            waiting.append(rest)

    def __len__(self) -> int:
        full, rest = divmod(len(self.positives), self.batch_size)
        return full + bool(rest and not self.drop_last)


class _Batch:
    """The rows of a batch so far, and what they share with no other."""

    def __init__(self, size: int) -> None:
        self.rows: list[int] = []
        self.room = size
        self.too_large = 0
        self._used: set[Hashable] = set()

    def add(self, unit: Unit, ids: set[Hashable]) -> Unit:
        """Take a unit if it fits, and return what could not be taken."""
        if not self._used.isdisjoint(ids):
            return unit
        if len(unit) > self.room:
            self.too_large += 1
            if self.too_large < CUT_AFTER:
                return unit
        taken, rest = unit[: self.room], unit[self.room :]
        self.rows += taken
        self.room -= len(taken)
        self._used |= ids
        return rest
