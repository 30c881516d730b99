"""A batch sampler that keeps false negatives of M-BEIR rows apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler

LOOKED_AT_PER_ROW = 8  # waiting rows, for each row of a batch


class DistinctPositivesBatchSampler(DefaultBatchSampler):
    """Batches in which no two rows share a right answer.

    In-batch negatives of a row are the other rows' positives. Two queries about the same thing would make
    each other's right answer a negative; here they never meet. A row that does not fit into a batch waits for
    a later one, so every row comes once an epoch, but for those that an answer shared by too many rows leaves
    over: an epoch has never more batches than `len` says, and with `drop_last` it ends at the first that
    cannot be filled.

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
        self.positives = [frozenset(ids) for ids in positives]

    def __iter__(self) -> Iterator[list[int]]:
        generator = self.generator or torch.Generator()
        generator.manual_seed((self.seed or 0) + self.epoch)
        order = iter(torch.randperm(len(self.positives), generator=generator).tolist())
        waiting: deque[int] = deque()
        for _ in range(len(self)):
            batch: list[int] = []
            used: set[str] = set()
            # Rows that waited go first. Only some are looked at: an answer that very many rows share would
            # else make an epoch quadratic.
            for _ in range(min(len(waiting), LOOKED_AT_PER_ROW * self.batch_size)):
                self._place(waiting.popleft(), batch, used, waiting)
            while len(batch) < self.batch_size and (row := next(order, None)) is not None:
                self._place(row, batch, used, waiting)
            if len(batch) < self.batch_size:
                for _ in range(len(waiting)):
                    self._place(waiting.popleft(), batch, used, waiting)
            if not batch or (self.drop_last and len(batch) < self.batch_size):
                return
            yield batch

    def _place(self, row: int, batch: list[int], used: set[str], waiting: deque[int]) -> None:
        if len(batch) < self.batch_size and used.isdisjoint(self.positives[row]):
            batch.append(row)
            used |= self.positives[row]
        else:
            waiting.append(row)

    def __len__(self) -> int:
        full, rest = divmod(len(self.positives), self.batch_size)
        return full + bool(rest and not self.drop_last)
