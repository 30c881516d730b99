from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset

from puma_hf.data.sampler import LOOKED_AT_PER_ROW, DistinctPositivesBatchSampler


def make(
    positives: list[list[str]], batch_size: int = 4, *, drop_last: bool = False, seed: int = 0, **kwargs: Any
) -> DistinctPositivesBatchSampler:
    dataset = Dataset.from_dict({"anchor": [str(row) for row in range(len(positives))]})
    return DistinctPositivesBatchSampler(
        dataset, positives, batch_size=batch_size, drop_last=drop_last, seed=seed, **kwargs
    )


def random_positives(rows: int, answers: int) -> list[list[str]]:
    generator = random.Random(0)
    return [generator.sample([f"d{n}" for n in range(answers)], generator.randint(1, 3)) for _ in range(rows)]


def clashes(batch: list[int], positives: list[list[str]]) -> bool:
    answers = [answer for row in batch for answer in positives[row]]
    return len(answers) != len(set(answers))


@pytest.mark.parametrize("drop_last", [False, True])
def test_no_two_rows_share_an_answer(drop_last: bool) -> None:
    positives = random_positives(200, 60)
    batches = list(make(positives, 8, drop_last=drop_last))
    rows = [row for batch in batches for row in batch]
    assert not any(clashes(batch, positives) for batch in batches)
    assert len(rows) == len(set(rows))
    assert len(rows) >= 150
    assert not drop_last or {len(batch) for batch in batches} == {8}
    plain = torch.randperm(200, generator=torch.Generator().manual_seed(0)).split(8)
    assert any(clashes(batch.tolist(), positives) for batch in plain)  # chance alone would not do


@pytest.mark.parametrize("rows", [12, 13])
def test_every_row_comes_once(rows: int) -> None:
    positives = [[f"d{row}"] for row in range(rows)]
    sampler = make(positives)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert len(sampler) == len(batches) == -(-rows // 4)
    dropping = make(positives, drop_last=True)
    assert [len(batch) for batch in dropping] == [4] * 3
    assert len(dropping) == 3


@pytest.mark.parametrize("looked_at", [0, LOOKED_AT_PER_ROW])
def test_rows_that_wait_come_too(looked_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # At the latest when no new rows are left, all that wait are looked at.
    monkeypatch.setattr("puma_hf.data.sampler.LOOKED_AT_PER_ROW", looked_at)
    # Two rows for each answer fit into two batches, but not in any order.
    positives = [[f"d{row % 4}"] for row in range(8)]
    for seed in range(20):
        batches = list(make(positives, seed=seed))
        assert sorted(row for batch in batches for row in batch) == list(range(8)), seed
        assert not any(clashes(batch, positives) for batch in batches)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    positives = random_positives(60, 40)
    sampler = make(positives)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) == list(make(positives, seed=1)) != first  # they are added, as in sentence-transformers
    sampler.set_epoch(0)
    assert list(sampler) == first


# --- several devices


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("even_batches", [False, True])
@pytest.mark.parametrize("rows", [197, 192])
def test_no_two_rows_of_a_step_share_an_answer(drop_last: bool, even_batches: bool, rows: int) -> None:
    positives = random_positives(rows, 120)
    sampler = make(positives, 4, drop_last=drop_last, num_devices=3)
    shards = [list(BatchSamplerShard(sampler, 3, rank, even_batches=even_batches)) for rank in range(3)]
    steps = list(zip(*shards, strict=True))
    assert 14 <= len(steps) <= len(sampler) // 3 == rows // 12
    for step in steps:
        assert [len(batch) for batch in step] == [4] * 3
        assert not clashes([row for batch in step for row in batch], positives)
    alone = list(make(positives, 4, drop_last=drop_last))
    apart = [[row for batch in alone[n : n + 3] for row in batch] for n in range(0, len(alone), 3)]
    assert any(clashes(step, positives) for step in apart)  # batches of one device would not do


def test_steps_that_cannot_be_filled_are_left_out() -> None:
    for drop_last in (False, True):
        assert list(make([["same"]] * 10, 2, drop_last=drop_last, num_devices=2)) == []
        few = make([["a"], ["b"], ["c"]], 2, drop_last=drop_last, num_devices=2)
        assert (list(few), len(few)) == ([], 0)


def test_one_device_is_the_default() -> None:
    """Pinned: published numbers depend on the order."""
    positives = [[f"d{row % 5}"] for row in range(10)]
    assert list(make(positives)) == list(make(positives, num_devices=1))
    assert list(make(positives)) == [[4, 1, 7, 5], [3, 9, 0, 6], [8, 2]]
