"""Batches in which one thing is asked for in several target modalities."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from puma_hf.data.sampler import LOOKED_AT_PER_ROW, DistinctPositivesBatchSampler, Unit
from puma_hf.values import shown

logger = logging.getLogger(__name__)

_FEW_TWINS = 0.05  # share of rows with a twin of another target modality, below which a warning says so


class TwinBatchSampler(DistinctPositivesBatchSampler):
    """Batches in which rows that ask for the same thing in different target modalities come together.

    A row meets the drawing it asks for as a drawing, as a captioned drawing and as a name: hard negatives of
    its own concept in another modality, beside those of other concepts in its own. Only then do the two
    temperatures of MAC-Loss treat different negatives.

    Rows of one group, "twins", come into a batch as one unit: at most one row of each target modality, none
    that share a right answer. What is left of a group comes in later batches, never two units of a group in one.
    Rows without a twin fill up; where there are none, the last unit of a batch is cut to fit. Two rows of a
    batch, or on several devices of a step, never share a right answer, and the last step is filled, as in
    `DistinctPositivesBatchSampler`; the rows of a unit stay on one device. But for that filling every row comes
    at most once an epoch; the order depends on the seed and the epoch alone.

    Args:
        dataset: The training dataset.
        twins: For each row, the key of its group, such as `twin_keys` makes; None for a row without twins.
        positives: For each row, the ids of all its right answers; None if they are not known.
        modalities: For each row, its target modality; by default that of the column "positive", if the dataset
            has one like `load_mbeir`. Without, all rows of a group count as different.
        max_twins: The most rows of a group in one batch; by default as many as fit.
        kwargs: `num_devices`, see `DistinctPositivesBatchSampler`, and what the trainer passes: batch_size,
            drop_last, generator, seed.

    Raises:
        ValueError: If `twins`, `positives` or `modalities` has not as many rows as the dataset, or `max_twins`
            is less than 1.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from puma_hf.data.twins import TwinBatchSampler

    >>> dataset = Dataset.from_dict({"anchor": ["shoe", "shoe", "hat", "hat"]})
    >>> keys = ["shoe", "shoe", "hat", "hat"]
    >>> sampler = TwinBatchSampler(dataset, keys, batch_size=2, drop_last=False, seed=0)
    >>> sorted(sorted(batch) for batch in sampler)
    [[0, 1], [2, 3]]
    ```

    Source: ours, for MAC-Loss of PUMA, ACM MM 2025, arXiv 2507.08064; the paper says nothing about batches.
    """

    def __init__(
        self,
        dataset: Any,
        twins: Sequence[Hashable],
        positives: Sequence[Sequence[str]] | None = None,
        *,
        modalities: Sequence[Hashable] | None = None,
        max_twins: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, [()] * len(dataset) if positives is None else positives, **kwargs)
        if modalities is None:
            modalities = _own_modalities(dataset)
        for name, values in (("twins", twins), ("modalities", modalities)):
            if values is not None and len(values) != len(dataset):
                raise ValueError(f"{name} has {len(values)} rows and the dataset {len(dataset)}. Pass one per row.")
        if max_twins is not None and max_twins < 1:
            raise ValueError(f"max_twins is {max_twins}, must be 1 or more; None takes as many as fit into a batch.")
        self.modalities = None if modalities is None else list(modalities)
        self.max_twins = min(max_twins or self.batch_size, self.batch_size)
        counts = Counter(twins)
        self.twins = [key if counts[key] > 1 else None for key in twins]
        self._warn_of_few_twins()

    def _warn_of_few_twins(self) -> None:
        kinds: dict[Hashable, set[Hashable]] = defaultdict(set)
        modalities = range(len(self.twins)) if self.modalities is None else self.modalities
        for key, modality in zip(self.twins, modalities, strict=True):
            kinds[key].add(modality)
        share = sum(key is not None and len(kinds[key]) > 1 for key in self.twins) / max(len(self.twins), 1)
        if self.twins and share < _FEW_TWINS:
            logger.warning(
                "%.1f %% of the %d rows have a twin of another target modality, so hardly any batch differs from one "
                "without twins. Train on tasks that ask for the same things in several modalities, or leave the twins "
                "out (batches: mixed).",
                100 * share,
                len(self.twins),
            )

    def _units(self, generator: torch.Generator) -> Iterator[Unit]:
        units: list[Unit] = []
        groups: dict[Hashable, dict[Hashable, deque[int]]] = defaultdict(dict)
        for row in torch.randperm(len(self.twins), generator=generator).tolist():
            key = self.twins[row]
            if key is None:
                units.append((row,))
            else:
                modality = row if self.modalities is None else self.modalities[row]
                groups[key].setdefault(modality, deque()).append(row)
        for group in groups.values():
            queues = deque(group.values())
            while queues:
                units.append(self._take(queues))
        for number in torch.randperm(len(units), generator=generator).tolist():
            yield units[number]

    def _take(self, queues: deque[deque[int]]) -> Unit:
        """One row of each queue, as far as they share no right answer; the first always gives one."""
        unit: list[int] = []
        used: set[str] = set()
        # As in a batch, a bound on what is looked at keeps large groups from being quadratic.
        for _ in range(min(len(queues), LOOKED_AT_PER_ROW * self.max_twins)):
            queue = queues.popleft()
            for _ in range(min(len(queue), LOOKED_AT_PER_ROW)):
                row = queue.popleft()
                if used.isdisjoint(self.positives[row]):
                    unit.append(row)
                    used |= self.positives[row]
                    break
                queue.append(row)
            if queue:
                queues.append(queue)
            if len(unit) == self.max_twins:
                break
        return tuple(unit)

    def _ids(self, unit: Unit) -> set[Hashable]:
        key = self.twins[unit[0]]
        return super()._ids(unit) | (set() if key is None else {("group", key)})


def twin_keys(rows: Any, *, max_group: int = 256) -> list[int | None]:
    """A group for each row of M-BEIR: rows that ask for the same thing, in whatever modality.

    Two rows are twins if they share a thing, directly or through other rows. The things of a row are

    - its anchor's text and image together, the instruction aside: a question of WebQA's tasks 1 and 2, or a
      query of OVEN's and InfoSeek's tasks 6 and 8;
    - its positive, which may be the anchor of another row: the mirror pairs of VisualNews, MSCOCO and
      Fashion200K. Of a positive with an image the image alone counts, for captions repeat;
    - the ids of all its positives, where the column `positives` has them.

    Texts count as equal whatever their case and spacing. A group of more than `max_group` rows, which some
    common text may have chained together, falls apart into rows with equal anchors.

    Args:
        rows: Rows as `load_mbeir` makes them, best with `with_ids=True`.
        max_group: The most rows of a group.

    Returns:
        For each row the number of its group, or None if no other row is in it; for `TwinBatchSampler`.

    Raises:
        ValueError: If `max_group` is less than 2, or the rows have no columns anchor and positive of structs.

    Example:

    ```python
    >>> from puma_hf.data import load_mbeir
    >>> from puma_hf.data.twins import twin_keys

    >>> rows = load_mbeir("demo/emoji", with_ids=True)
    >>> sum(key is not None for key in twin_keys(rows)) == len(rows)
    True
    ```
    """
    if max_group < 2:
        raise ValueError(f"max_group is {max_group}, must be 2 or more: a group of one row has no twins.")
    _check_columns(rows)
    names = [name for name in ("anchor", "positive", "positives") if name in rows.column_names]
    groups = _DisjointSets()
    numbers: dict[Hashable, int] = {}
    anchors: list[int] = []
    for batch in rows.select_columns(names).iter(1000):
        ids = batch.get("positives") or [()] * len(batch["anchor"])
        for anchor, positive, answers in zip(batch["anchor"], batch["positive"], ids, strict=True):
            things = [_content(anchor), _content(positive, image_alone=True), *answers]
            first, *others = (numbers.setdefault(thing, len(numbers)) for thing in things)
            anchors.append(first)
            for other in others:
                groups.join(first, other)
    keys = [groups.find(first) for first in anchors]
    sizes, sizes_of_anchors = Counter(keys), Counter(anchors)
    small = [
        # A key of an anchor must not be that of a group: count on from the last.
        (key, sizes[key]) if sizes[key] <= max_group else (len(numbers) + first, sizes_of_anchors[first])
        for key, first in zip(keys, anchors, strict=True)
    ]
    return [key if 2 <= size <= max_group else None for key, size in small]


def _content(cell: dict[str, Any], *, image_alone: bool = False) -> tuple[str | None, str | None]:
    text, image = cell["text"], cell["image"]
    if image is not None and image_alone:
        text = None
    return None if text is None else " ".join(text.casefold().split()), image


def _check_columns(rows: Any) -> None:
    for name in ("anchor", "positive"):
        feature = rows.features.get(name)
        if not isinstance(feature, dict) or not {"text", "image"} <= set(feature):
            raise ValueError(
                f"The column {name!r} is {shown(feature)}, must be structs of text and image as load_mbeir makes them; "
                "pass group keys of your own to TwinBatchSampler instead."
            )


class _DisjointSets:
    """Union-find over small integers."""

    def __init__(self) -> None:
        self._parents: list[int] = []

    def find(self, number: int) -> int:
        while len(self._parents) <= number:
            self._parents.append(len(self._parents))
        parents = self._parents
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    def join(self, one: int, other: int) -> None:
        one, other = self.find(one), self.find(other)
        self._parents[max(one, other)] = min(one, other)


def target_modalities(rows: Any) -> list[str]:
    """The target modality of each row, that of its positive: "text", "image" or "image,text".

    Args:
        rows: Rows as `load_mbeir` makes them.

    Returns:
        A name for each row.

    Example:

    ```python
    >>> from puma_hf.data import load_mbeir
    >>> from puma_hf.data.twins import target_modalities

    >>> sorted(set(target_modalities(load_mbeir("demo/emoji"))))
    ['image', 'image,text', 'text']
    ```
    """
    cells = (cell for batch in rows.select_columns(["positive"]).iter(1000) for cell in batch["positive"])
    return [",".join(name for name in ("image", "text") if cell.get(name) is not None) for cell in cells]


def _own_modalities(dataset: Any) -> list[str] | None:
    """Target modalities, if the dataset has positives in structs of text and image."""
    feature = (getattr(dataset, "features", None) or {}).get("positive")
    return target_modalities(dataset) if isinstance(feature, dict) and {"text", "image"} <= set(feature) else None
