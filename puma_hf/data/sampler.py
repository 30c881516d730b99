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

    On several devices no two rows of a step share a right answer, for a loss may gather the candidates of all:
    each run of `num_devices` batches, which accelerate deals out one to each device, is one such step. All its
    batches are full, and the epoch ends with the first step that cannot be filled. Without `drop_last` that one
    is filled with rows that came before and share no answer with it; with it, or where these do not suffice,
    it is left out.

    A hard negative that a row brings along in a column of its own may still be right for another row.

    Args:
        dataset: The training dataset.
        positives: For each row, the ids of all its right answers, as the column "positives" of
            `load_mbeir(..., with_ids=True)` has them.
        num_devices: Number of processes that train together; `batch_size` is that of one.
        kwargs: What the trainer passes: batch_size, drop_last, generator, seed.

    Raises:
        ValueError: If `positives` has not as many rows as the dataset, or `num_devices` is less than 1.

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

    def __init__(
        self, dataset: Any, positives: Sequence[Sequence[str]], *, num_devices: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(dataset, **kwargs)
        if len(positives) != len(dataset):
            raise ValueError(
                f"positives has {len(positives)} rows and the dataset {len(dataset)}. Pass one list of ids per row."
            )
        if num_devices < 1:
            raise ValueError(f"num_devices is {num_devices}, must be 1 or more: pass the number of processes.")
        self.positives: list[frozenset[str]] = [frozenset(ids) for ids in positives]
        self.num_devices = num_devices

    def __iter__(self) -> Iterator[list[int]]:
        generator = self.generator or torch.Generator()
        generator.manual_seed((self.seed or 0) + self.epoch)
        new = self._units(generator)
        waiting: deque[Unit] = deque()
        looks_left = LOOKED_AT_LAST * len(self.positives)
        seen: list[int] = []
        for _ in range(len(self) // self.num_devices):
            used: set[Hashable] = set()
            step = [_Batch(self.batch_size, used) for _ in range(self.num_devices)]
            for batch in step:
                looks_left -= self._fill(batch, new, waiting, looks_left)
            short = any(batch.room for batch in step)
            if short and self.drop_last:
                return
            if short and self.num_devices > 1:
                self._fill_again(step, seen)
            if not step[0].rows or (self.num_devices > 1 and any(batch.room for batch in step)):
                return
            yield from (batch.rows for batch in step)
            if self.num_devices > 1:
                if short:
                    return
                seen += (row for batch in step for row in batch.rows)

    def _fill(self, batch: _Batch, new: Iterator[Unit], waiting: deque[Unit], looks_left: int) -> int:
        """Fill a batch with rows that have not come yet, and return how many looks at the last ones it took."""
        # Rows that waited go first. Only some are looked at: an answer that very many rows share would
        # else make an epoch quadratic.
        for _ in range(min(len(waiting), LOOKED_AT_PER_ROW * self.batch_size)):
            self._place(waiting.popleft(), batch, waiting)
        while batch.room and (unit := next(new, None)) is not None:
            self._place(unit, batch, waiting)
        if not batch.room:
            return 0
        batch.too_large = CUT_AFTER  # no new rows are left
        looks = min(len(waiting), looks_left)
        for _ in range(looks):
            self._place(waiting.popleft(), batch, waiting)
        return looks

    def _fill_again(self, step: list[_Batch], seen: list[int]) -> None:
        """Fill the last step with rows that came before: every device needs as many."""
        rows = iter(seen)
        for batch in step:
            while batch.room and (row := next(rows, None)) is not None:
                batch.add((row,), self._ids((row,)))

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
        full, rest = divmod(len(self.positives), self.batch_size * self.num_devices)
        # A first step on several devices has no earlier rows that could fill it.
        rest_comes = rest and not self.drop_last and (full or self.num_devices == 1)
        return (full + bool(rest_comes)) * self.num_devices


class _Batch:
    """The rows of a batch so far, and what those of its step share with no other."""

    def __init__(self, size: int, used: set[Hashable]) -> None:
        self.rows: list[int] = []
        self.room = size
        self.too_large = 0
        self._used = used

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
