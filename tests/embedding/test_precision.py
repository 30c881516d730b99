from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.util import quantize_embeddings

from puma_hf.embedding.precision import Collector, check_precision, quantize
from puma_hf.embedding.results import BrokenInput

ROWS = np.random.default_rng(0).standard_normal((6, 12)).astype(np.float32)
RANGES = np.stack([np.full(12, -2.0), np.full(12, 2.0)])


def collect(precision: Any, ranges: Any = None) -> Collector:
    collector = Collector(6, 12, precision, ranges)
    for places in ([4, 0], [5, 2, 3], [1]):
        collector.add(torch.tensor(places), torch.from_numpy(ROWS[places]))
    return collector


@pytest.mark.parametrize(
    ("precision", "ranges"),
    [
        ("float32", None),
        ("int8", None),
        ("int8", RANGES),
        ("uint8", None),
        ("uint8", RANGES),
        ("binary", None),
        ("ubinary", None),
    ],
)
def test_rows_are_those_of_sentence_transformers_in_the_order_of_the_inputs(precision: Any, ranges: Any) -> None:
    result = collect(precision, ranges).result()
    expected = quantize_embeddings(ROWS, precision=precision, ranges=ranges)
    assert result.embeddings.dtype == expected.dtype  # type: ignore[union-attr]
    np.testing.assert_array_equal(result.embeddings, expected)
    assert result.indices.tolist() == list(range(6))
    assert result.indices.dtype == np.int64


def test_float16() -> None:
    np.testing.assert_array_equal(collect("float16").result().embeddings, ROWS.astype(np.float16))
    assert quantize(ROWS, "float32") is ROWS


def test_inputs_that_never_came_are_left_out() -> None:
    collector = Collector(6, 12, "float32")
    collector.add(torch.tensor([4, 1]), torch.from_numpy(ROWS[[4, 1]]))
    errors = [BrokenInput(5, "b"), BrokenInput(0, "a")]
    result = collector.result(errors)
    assert result.indices.tolist() == [1, 4]
    np.testing.assert_array_equal(result.embeddings, ROWS[[1, 4]])
    assert [error.index for error in result.errors] == [0, 5]


def test_zeros_of_broken_inputs_do_not_widen_the_ranges() -> None:
    rows = ROWS + 10.0
    collector = Collector(6, 12, "uint8")
    collector.add(torch.arange(5), torch.from_numpy(rows[:5]))
    collector.add(torch.tensor([5]), torch.zeros(1, 12))
    result = collector.result([BrokenInput(5, "broken")])
    np.testing.assert_array_equal(result.embeddings[:5], quantize_embeddings(rows[:5], precision="uint8"))
    assert (result.embeddings[5] == 0).all()


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_a_part_of_the_rows_is_not_scaled_by_itself(precision: Any) -> None:
    result = collect(precision).result(is_complete=False)
    np.testing.assert_array_equal(result.embeddings, ROWS)
    assert collect("int8", RANGES).result(is_complete=False).embeddings.dtype == np.int8


@pytest.mark.parametrize(("precision", "dim"), [("float32", 12), ("int8", 12), ("ubinary", 2)])
def test_no_rows(precision: Any, dim: int) -> None:
    result = Collector(0, 12, precision).result()
    assert result.embeddings.shape == (0, dim)
    assert result.indices.shape == (0,)


def test_what_is_packed_is_stored_packed() -> None:
    assert Collector(1000, 16, "binary")._rows.nbytes == 2000
    assert Collector(1000, 16, "int8", np.zeros((2, 16)))._rows.nbytes == 16_000
    assert Collector(1000, 16, "float16")._rows.nbytes == 32_000


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"precision is 'int4', must be one of float32, .*ubinary"):
        check_precision("int4")
    with pytest.raises(ValueError, match=r"ranges are for precision int8 and uint8, not 'binary'"):
        check_precision("binary", RANGES)
    check_precision("int8", RANGES)
    with pytest.raises(ValueError, match=r"ranges have shape \(2, 12\), must be \(2, 8\)"):
        Collector(3, 8, "int8", RANGES)
    collector = Collector(1, 12, "int8")
    collector.add(torch.tensor([0]), torch.from_numpy(ROWS[:1]))
    with pytest.raises(ValueError, match=r"there are only 1, must be 2 or more. Pass ranges.*\(2, 12\)"):
        collector.result()
