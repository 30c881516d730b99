"""A batch sampler that keeps false negatives apart."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler

LOOKED_AT_PER_ROW = 8  # waiting rows, for each row of a batch
LOOKED_AT_LAST = 8  # waiting rows, for each row of the dataset, once no new ones are left


class DistinctPositivesBatchSampler(DefaultBatchSampler):
    """Batches in which no two rows share a right answer.

    In-batch negatives of a row are the other rows' positives. Two queries about the same thing would make
    each other's right answer a negative; here they never meet. A row that does not fit into a batch waits for
    a later one, so every row comes once an epoch, but for those that an answer shared by too many rows leaves
    over: with `drop_last` an epoch ends at the first batch that cannot be filled.

    On several devices no two rows of a step share a right answer, for a loss may gather the candidates of all:
    each run of `num_devices` batches, which accelerate deals out one to each device, is one such step. Every device
    needs as many rows, so a last step that is not full is left out, whatever `drop_last` says.

    A hard negative that a row brings along in a column of its own may still be right for another row.

    Args:
        dataset: The training dataset.
        positives: For each row, the ids of all its right answers, as the column "positives" of
            `load_mbeir(..., with_ids=True)` has them.
        num_devices: Number of processes that train together; `batch_size` is that of one.
        kwargs: What the trainer passes: batch_size, drop_last, generator, seed.

    Example:
        >>> from datasets import Dataset
        >>> dataset = Dataset.from_dict({"anchor": ["a", "b", "c", "d"]})
        >>> positives = [["x"], ["x"], ["y"], ["z"]]
        >>> sampler = DistinctPositivesBatchSampler(dataset, positives, batch_size=2, drop_last=False, seed=0)
        >>> all(set(batch) != {0, 1} for batch in sampler)
        True
    """

    def __init__(
        self, dataset: Any, positives: Sequence[Sequence[str]], *, num_devices: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(dataset, **kwargs)
        if len(positives) != len(dataset) or num_devices < 1:
            what = f"positives has {len(positives)} rows, the dataset {len(dataset)}, and num_devices is {num_devices}"
            raise ValueError(f"{what}. Pass one list of ids per row, and 1 device or more.")
        # Numbers in one array take 4 bytes an id; a million sets of texts would take some hundred each.
        numbers: dict[str, int] = {}
        self._answers, self._starts = array("i"), array("q", [0])
        for ids in positives:
            self._answers.extend(numbers.setdefault(one, len(numbers)) for one in ids)
            self._starts.append(len(self._answers))
        self.num_devices = num_devices

    def __iter__(self) -> Iterator[list[int]]:
        # Seed and epoch are added as in sentence-transformers, so that a resumed epoch has the same batches.
        generator = self.generator or torch.Generator()
        generator.manual_seed((self.seed or 0) + self.epoch)
        num_rows = len(self._starts) - 1
        new = iter(torch.randperm(num_rows, generator=generator).tolist())
        waiting: deque[int] = deque()
        looks_left = LOOKED_AT_LAST * num_rows
        is_whole = self.drop_last or self.num_devices > 1
        for _ in range(len(self) // self.num_devices):
            # Answers of a whole step, on all devices: a loss may gather their candidates.
            used: set[int] = set()
            step: list[list[int]] = [[] for _ in range(self.num_devices)]
            for batch in step:
                looks_left -= self._fill(batch, used, new, waiting, looks_left)
            if not step[0] or (is_whole and any(len(batch) < self.batch_size for batch in step)):
                return
            yield from step

    def _fill(self, batch: list[int], used: set[int], new: Iterator[int], waiting: deque[int], looks_left: int) -> int:
        """Fill a batch with rows that have not come yet, and return how many looks at the last ones it took."""
        # Rows that waited go first. Only some are looked at: an answer that very many rows share would
        # else make an epoch quadratic.
        for _ in range(min(len(waiting), LOOKED_AT_PER_ROW * self.batch_size)):
            self._place(waiting.popleft(), batch, used, waiting)
        while len(batch) < self.batch_size and (row := next(new, None)) is not None:
            self._place(row, batch, used, waiting)
        if len(batch) == self.batch_size:
            return 0
        looks = min(len(waiting), looks_left)  # no new rows are left
        for _ in range(looks):
            self._place(waiting.popleft(), batch, used, waiting)
        return looks

    def _place(self, row: int, batch: list[int], used: set[int], waiting: deque[int]) -> None:
        """Take a row into a batch, or let it wait if the batch is full or knows one of its answers."""
        answers = self._answers[self._starts[row] : self._starts[row + 1]]
        if len(batch) == self.batch_size or not used.isdisjoint(answers):
            waiting.append(row)
        else:
            batch.append(row)
            used.update(answers)

    def __len__(self) -> int:
        full, rest = divmod(len(self._starts) - 1, self.batch_size * self.num_devices)
        return full * self.num_devices + (rest > 0 and not self.drop_last and self.num_devices == 1)
