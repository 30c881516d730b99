from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from puma_hf.evaluation import search_bounds as bounds

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def cosines(queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    return (
        torch.nn.functional.normalize(queries.double(), dim=1)
        @ torch.nn.functional.normalize(candidates.double(), dim=1).T
    )


def errors_and_bounds(
    queries: torch.Tensor, candidates: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the quick scores are from the cosines, and how far they are said to be at most."""
    low_queries, low_candidates = bounds.low_rows(queries, dtype), bounds.low_rows(candidates, dtype)
    quick = (low_queries.rows @ low_candidates.rows.T).double()
    allowed = bounds.score_errors(
        low_queries.errors, float(low_candidates.errors.max()), queries.shape[1], dtype, "cpu"
    )
    return (quick - cosines(queries, candidates)).abs(), allowed.above(quick) - quick


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "equal", "sparse", "tiny parts"])
def test_no_score_is_further_off_than_its_bound(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, pool = (torch.randn(rows, 512, generator=generator) for rows in (50, 400))
    if kind == "equal":  # all errors in one direction, scores near 1
        queries, pool = queries * 1e-4 + 1.3, pool * 1e-4 + 0.7
    elif kind == "sparse":
        queries, pool = queries * (queries > 2), pool * (pool > 2)
    elif kind == "tiny parts":  # below the smallest float16 but for one number
        queries, pool = queries * 1e-8, pool * 1e-8
        queries[:, 0] = pool[:, 0] = 1
    errors, allowed = errors_and_bounds(queries, pool, dtype)
    assert bool((errors <= allowed).all())
    # Worth something too: of the order of the type's own steps, plus what 512 sums in float32 may add.
    assert float(allowed.max()) < 4 * torch.finfo(dtype).eps + 512 * 4 * 2**-23


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_bound_knows_of_coarser_float32(precision: str) -> None:
    generator = torch.Generator().manual_seed(1)
    queries, pool = torch.randn(64, 512, generator=generator), torch.randn(512, 512, generator=generator)
    _, exact_bound = errors_and_bounds(queries, pool, torch.float32)
    with matmul_precision(precision):
        errors, allowed = errors_and_bounds(queries, pool, torch.float32)
    assert bool((errors <= allowed).all())
    assert float(allowed.min()) > 10 * float(exact_bound.max())


def test_settings_that_cannot_be_summed_up_count_as_the_coarsest(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, pool = torch.randn(4, 16), torch.randn(9, 16)
    with matmul_precision("medium"):
        _, coarsest = errors_and_bounds(queries, pool, torch.float32)

    def refuse() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_float32_matmul_precision", refuse)
        _, allowed = errors_and_bounds(queries, pool, torch.float32)
    assert torch.equal(allowed, coarsest)
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    assert torch.equal(errors_and_bounds(queries, pool, torch.float32)[1], coarsest)
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT")
    assert float(errors_and_bounds(queries, pool, torch.float32)[1].max()) < 1e-5


def test_bounds_by_hand() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    error = bounds.score_errors(zero, 0.0, 1016, torch.float32, "cpu")
    assert error.absolute.item() == 1024 * 2**-24
    assert error.relative == 0
    coarse = bounds.score_errors(zero + 2**-9, 2**-9, 1016, torch.bfloat16, "cuda")
    lengths = (1 + 2**-9) ** 2
    assert coarse.absolute.item() == pytest.approx(2**-9 * (1 + 2**-9) + 2**-9 + 4 * 1024 * 2**-24 * lengths, rel=1e-12)
    assert coarse.relative == 2**-8 / (1 - 2**-8)
    scores = torch.tensor([[-0.5, 0.0, 0.5]], dtype=torch.float64)
    wide, narrow = coarse.absolute.item() + coarse.relative / 2, coarse.absolute.item()
    assert (coarse.above(scores) - scores).flatten().tolist() == pytest.approx([wide, narrow, wide], abs=1e-15)
    assert (scores - coarse.below(scores)).flatten().tolist() == pytest.approx([wide, narrow, wide], abs=1e-15)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 1000, 1536])
def test_ordered_sums(width: int) -> None:
    values = torch.randn(40, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = [math.fsum(row) for row in values.tolist()]
    sums = bounds.ordered_sum(values.clone())
    assert sums.tolist() == pytest.approx(expected, abs=1e-12)
    for rows in (slice(0, 1), slice(3, 10), slice(39, 40)):
        assert torch.equal(bounds.ordered_sum(values[rows].clone()), sums[rows])


def test_the_order_of_a_sum_is_that_of_halves() -> None:
    row = torch.tensor([[1e16, 1.0, -1e16, 3.0, 1e15, 0.1, 1.0, -7.0, 1e16, 0.3, -1e15]], dtype=torch.float64)
    a, b, c, d, e, f, g, h, i, j, k = row.flatten().tolist()
    first = [a + g, b + h, c + i, d + j, e + k, f]
    second = [first[0] + first[3], first[1] + first[4], first[2] + first[5]]
    assert bounds.ordered_sum(row).item() == (second[0] + second[2]) + second[1]


def test_scaling_is_exact_and_takes_every_length() -> None:
    rows = torch.tensor([[3.0, 4.0], [3e200, 4e200], [3e-300, 4e-300], [5e-324, 0.0], [0.0, 0.0]], dtype=torch.float64)
    doubles = bounds.double_rows(rows)
    norms = bounds.norms_of(doubles)
    units = bounds.unit_rows(doubles, norms)
    assert units[:3].flatten().tolist() == pytest.approx([0.6, 0.8] * 3, abs=1e-15)
    assert units[3:].tolist() == [[1, 0], [0, 0]]
    assert torch.equal(bounds.double_rows(torch.ones(2, 3)), torch.ones(2, 3, dtype=torch.float64))
    mantissas, _ = torch.frexp(rows)
    assert torch.equal(torch.frexp(doubles).mantissa, mantissas)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_rows_are_unit_vectors_within_their_errors(source: torch.dtype, dtype: torch.dtype) -> None:
    rows = (torch.randn(30, 40, generator=torch.Generator().manual_seed(3)) * 7).to(source)
    low = bounds.low_rows(rows, dtype)
    assert low.rows.dtype == dtype
    distances = (low.rows.double() - torch.nn.functional.normalize(rows.double(), dim=1)).norm(dim=1)
    assert bool((distances <= low.errors).all())
    assert float(low.errors.max()) < torch.finfo(dtype).eps + 40 * 2**-23
    assert bool(low.is_finite.all())


def test_low_rows_say_which_are_not_finite() -> None:
    rows = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [math.inf, 1.0], [0.0, 0.0]])
    for low in (bounds.low_rows(rows, torch.float32), bounds.low_rows(rows.double(), torch.float16)):
        assert low.is_finite.tolist() == [True, False, False, True]
        assert low.rows[3].tolist() == [0, 0]
