from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from puma_hf.embedding import batches
from puma_hf.embedding.batches import AIM, Batch, Unsendable, cut, plan_batches
from puma_hf.embedding.measure import Measure, Rates


@pytest.fixture
def measure(processor: Any, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Guesses that a text has as many tokens as characters."""
    monkeypatch.setattr(Measure, "rates", lambda self, items, known: known)
    return Measure(processor)


ONE_BYTE = Rates(bytes_per_token=1.0)


def plan(inputs: Any, measure: Measure, max_tokens: int, **options: Any) -> list[Batch]:
    return list(plan_batches(inputs, measure, ONE_BYTE, max_tokens, **options))


@pytest.mark.parametrize(
    ("sizes", "max_tokens", "padded", "ends"),
    [
        ([], 8, False, []),
        ([20], 8, False, [1]),
        ([4, 4], 8, False, [2]),
        ([4, 4, 1], 8, False, [2, 3]),
        ([20, 20, 1, 7], 8, False, [1, 2, 4]),
        ([1, 1, 6], 8, False, [3]),
        ([1, 1, 6], 8, True, [2, 3]),
        ([6, 1, 1], 8, True, [1, 3]),
        ([2, 2, 2, 2, 2], 8, True, [4, 5]),
    ],
)
def test_batches_are_cut_at_the_budget(sizes: list[float], max_tokens: int, padded: bool, ends: list[int]) -> None:
    runs = cut(sizes, max_tokens, padded)
    assert [run.stop for run in runs] == ends
    assert [run.start for run in runs] == [0, *ends][: len(ends)]


def test_the_longest_of_a_window_come_first(measure: Measure) -> None:
    inputs = ["x" * length for length in (1, 5, 2, 5, 3, 9)]
    planned = plan(inputs, measure, 12, window=4)
    assert [batch.indices for batch in planned] == [(1, 3), (2, 0), (5,), (4,)]
    assert [batch.inputs for batch in planned][1] == ("xx", "x")
    assert planned[0].rates == ONE_BYTE


def test_without_sorting_batches_are_consecutive(measure: Measure) -> None:
    inputs = ["x" * length for length in (1, 5, 2, 5, 3, 9)]
    planned = plan(inputs, measure, 10, sort=False)
    assert [index for batch in planned for index in batch.indices] == list(range(6))
    assert [len(batch.indices) for batch in planned] == [3, 2, 1]


def test_every_input_comes_once_and_batches_keep_to_the_aim(measure: Measure) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    planned = plan(["x" * int(length) for length in lengths], measure, 100, window=64)
    assert sorted(index for batch in planned for index in batch.indices) == list(range(500))
    assert max(sum(lengths[list(batch.indices)]) for batch in planned) <= AIM * 100
    padded = plan(["x" * int(length) for length in lengths], measure, 100, window=64, padded=True)
    assert max(lengths[list(batch.indices)].max() * len(batch.indices) for batch in padded) <= AIM * 100


def test_a_stream_is_read_one_window_ahead(measure: Measure) -> None:
    read = 0

    def stream() -> Iterator[str]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield "x"

    planned = plan_batches(stream(), measure, ONE_BYTE, 4, window=10)
    assert read == 0
    assert len(next(planned).indices) == 3
    assert read == 10
    assert len(list(planned)) == 39
    assert read == 100


@pytest.mark.parametrize(
    ("item", "held"),
    [
        (b"x" * 60, 60),
        (bytearray(60), 60),
        (Image.new("RGB", (4, 5)), 60),
        (np.zeros((4, 5, 3), dtype=np.uint8), 60),
        ({"image": [b"x" * 30, b"x" * 30], "text": "not counted"}, 60),
    ],
)
def test_a_window_of_large_images_is_short(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, item: Any, held: int
) -> None:
    monkeypatch.setattr(batches, "_HELD_BYTES", 2 * held)
    starts = [start for start, _ in batches._windows((item for _ in range(5)), 100)]
    assert starts == [0, 2, 4]
    # A list has them in memory anyway.
    assert [start for start, _ in batches._windows([item] * 5, 100)] == [0]


def test_texts_hold_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_HELD_BYTES", 1)
    assert [start for start, _ in batches._windows(iter(["text", {"text": "text"}, 7, None]), 3)] == [0, 3]


def test_each_window_has_its_own_rates(processor: Any) -> None:
    inputs = ["a red apple on a table"] * 3 + ["éééééé"] * 3
    planned = list(plan_batches(inputs, Measure(processor), Rates(), 10_000, window=3))
    assert len(planned) == 2
    assert planned[0].rates.bytes_per_token > 2 * planned[1].rates.bytes_per_token == 2.0


def test_a_batch_can_always_be_pickled() -> None:
    rates = Rates(tokens_per_input=3.0)
    whole = Batch((4, 2), ("a", {"image": b"b"}), rates)
    assert pickle.loads(pickle.dumps(whole)) == whole
    found = pickle.loads(pickle.dumps(Batch((4, 2), ("a", threading.Lock()), rates)))
    assert found == Batch((4, 2), ("a", Unsendable("TypeError: cannot pickle '_thread.lock' object")), rates)
