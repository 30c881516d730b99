from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from puma_hf import PumaModel
from puma_hf.checkpoint import StoredWeights, open_checkpoint
from puma_hf.export import export
from puma_hf.parity.weights import compare_weights

TENSORS = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([[2.0]])}


def largest(changed: dict[str, torch.Tensor]) -> tuple[float, str, bool]:
    row = compare_weights("saved", "model", changed, TENSORS, bound=1e-2)
    return row.largest, row.worst, row.ok


def test_the_largest_difference_is_a_share_of_the_largest_number() -> None:
    assert largest(TENSORS) == (0.0, "all tensors", True)
    assert largest({**TENSORS, "a": torch.tensor([1.02, -4.0])}) == (pytest.approx(0.005, rel=1e-3), "a", True)
    assert largest({**TENSORS, "b": torch.tensor([[2.1]])}) == (pytest.approx(0.05, rel=1e-3), "b", False)


@pytest.mark.parametrize(
    "changed",
    [{"a": TENSORS["a"]}, {**TENSORS, "c": torch.ones(1)}, {**TENSORS, "b": torch.tensor([2.0])}],
)
def test_tensors_that_are_missing_or_of_another_shape(changed: dict[str, torch.Tensor]) -> None:
    difference, worst, ok = largest(changed)
    assert (difference, ok) == (math.inf, False)
    assert worst in ("b", "c")


def test_nan_is_no_success() -> None:
    difference, worst, ok = largest({**TENSORS, "a": torch.tensor([1.0, math.nan])})
    assert math.isnan(difference)
    assert (worst, ok) == ("a", False)


def test_numbers_where_there_should_be_none() -> None:
    row = compare_weights("a", "b", {"a": torch.ones(2)}, {"a": torch.zeros(2)}, bound=1)
    assert (row.largest, row.ok) == (math.inf, False)


def test_what_rounding_to_fewer_bits_changed_is_no_difference() -> None:
    exact = {"a": torch.tensor([1.0001, -4.0])}
    row = compare_weights("a", "b", {"a": exact["a"].bfloat16()}, exact, bound=0)
    assert (row.largest, row.ok, row.measure) == (0.0, True, "relative difference")


def test_stored_weights_have_the_models_own_names(puma_dir: Path, model: PumaModel, tmp_path: Path) -> None:
    export(puma_dir, tmp_path / "stock")
    expected = model.state_dict()
    for folder in (puma_dir, tmp_path / "stock"):
        stored = StoredWeights(open_checkpoint(folder))
        assert len(stored) == len(expected)
        assert set(stored) == set(expected)
        assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
