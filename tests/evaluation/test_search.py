from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from puma_hf.evaluation import search
from puma_hf.evaluation import search_bounds as bounds
from puma_hf.evaluation.search import TensorCandidates, exact_search, less_popular, merge_results

INF, NAN = math.inf, math.nan
LOW_ROWS = bounds.low_rows
SEARCHES = [
    (torch.float32, "torch"),
    (torch.float16, "torch"),
    (torch.bfloat16, "torch"),
    (torch.float64, "torch"),
    (torch.float32, "faiss"),
]


def brute_force(queries: torch.Tensor, candidates: torch.Tensor, top_k: int) -> list[list[int]]:
    """One cosine at a time in Python's doubles, sorted by score and then by index."""

    def unit(row: list[float]) -> list[float]:
        norm = math.sqrt(math.fsum(value * value for value in row))
        return [value / norm if norm else 0.0 for value in row]

    pool = [unit(row) for row in candidates.double().tolist()]
    rankings = []
    for query in map(unit, queries.double().tolist()):
        scores = [math.fsum(a * b for a, b in zip(query, row, strict=True)) for row in pool]
        steps = [round(score * 2**30) for score in scores]
        rankings.append(sorted(range(len(pool)), key=lambda index: (-steps[index], index))[:top_k])
    return rankings


@pytest.mark.parametrize("block_size", [1, 3, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_search_equals_brute_force_for_every_block_size(block_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(11, 16, generator=generator).to(dtype)
    candidates = (5 * torch.randn(29, 16, generator=generator)).to(dtype)
    candidates[7] = candidates[20] = candidates[3]
    result = exact_search(queries, candidates, 10, block_size=block_size)
    assert result.indices.tolist() == brute_force(queries, candidates, 10)
    expected = torch.nn.functional.cosine_similarity(
        queries.double()[:, None], candidates.double()[result.indices], dim=-1
    )
    torch.testing.assert_close(result.scores, expected, atol=2**-30, rtol=0)


def test_a_popular_candidate_is_pushed_back() -> None:
    """By hand: the hub scores 0.8 and 0.96, mean 0.88; the other candidate 0.6 and -0.28, mean 0.16.

    With a penalty of 0.5 the first query scores them 0.36 and 0.52, the second 0.52 and -0.36.
    """
    queries, pool = torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.8, 0.6], [0.6, -0.8]])
    assert exact_search(queries, pool, 1).indices.flatten().tolist() == [0, 0]
    moved = less_popular(queries, 0.5)
    assert (moved @ pool.T).flatten().tolist() == pytest.approx([0.36, 0.52, 0.52, -0.36])
    assert exact_search(moved, pool, 1).indices.flatten().tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_corrected_scores_are_those_of_the_formula(dtype: torch.dtype) -> None:
    """Whatever the lengths of queries and candidates, zero vectors among them."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(40, 16, generator=generator, dtype=torch.float64) + 0.5
    pool = torch.randn(300, 16, generator=generator, dtype=torch.float64) * 3
    queries[3], pool[5] = 0, 0
    queries, pool = queries.to(dtype), pool.to(dtype)
    scores = torch.nn.functional.normalize(queries.double()) @ torch.nn.functional.normalize(pool.double()).T
    corrected = scores - 0.2 * scores.mean(dim=0)
    found = exact_search(less_popular(queries, 0.2), pool, 10).indices
    best = corrected.topk(10, dim=1)
    torch.testing.assert_close(corrected.gather(1, found), best.values, atol=1e-6, rtol=0)
    assert not torch.equal(found, scores.topk(10, dim=1).indices)


@pytest.mark.parametrize("block_size", [1, 3, 100])
def test_ties_go_to_the_lower_index(block_size: int) -> None:
    candidates = torch.tensor([[0.0, -1.0], [3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    result = exact_search(torch.tensor([[1.0, 0.0], [-7.0, 0.0]]), candidates, 7, block_size=block_size)
    assert result.indices.tolist() == [[1, 2, 4, 0, 3, 6, 5], [5, 0, 3, 6, 1, 2, 4]]
    assert result.scores.tolist() == [[1, 1, 1, 0, 0, 0, -1], [1, 0, 0, 0, -1, -1, -1]]


def test_many_ties_do_not_depend_on_the_block_size() -> None:
    generator = torch.Generator().manual_seed(1)
    queries = torch.randint(-1, 2, (40, 3), generator=generator).float()
    candidates = torch.randint(-1, 2, (200, 3), generator=generator).float()
    expected = brute_force(queries, candidates, 50)
    for block_size in (1, 3, 64, 200):
        assert exact_search(queries, candidates, 50, block_size=block_size).indices.tolist() == expected


def test_top_k_beyond_the_pool_returns_the_pool() -> None:
    result = exact_search(torch.eye(2), torch.eye(2), 10, block_size=1)
    assert result.indices.tolist() == [[0, 1], [1, 0]]
    assert result.scores.dtype == torch.float64
    assert result.indices.dtype == torch.int64


def pool_of_ties_and_neighbours(num: int = 600, dim: int = 24) -> torch.Tensor:
    """Directions that many rows share, rows closer to each other than 16 bits can tell, zero vectors."""
    generator = torch.Generator().manual_seed(2)
    pool = torch.randn(num, dim, generator=generator)
    pool[::3] = pool[0]
    pool[1::3] = pool[1] + 1e-5 * torch.randn(len(pool[1::3]), dim, generator=generator)
    pool[::50] = 0
    return pool


@pytest.mark.parametrize("block_size", [5, 64, 1000])
@pytest.mark.parametrize(("score_dtype", "backend"), SEARCHES)
def test_one_result_for_every_type_backend_and_block_size(
    score_dtype: torch.dtype, backend: Literal["torch", "faiss"], block_size: int
) -> None:
    pool = pool_of_ties_and_neighbours()
    queries = torch.cat([pool[:4] + 0.1, torch.randn(5, 24, generator=torch.Generator().manual_seed(3)), pool[:1] * 0])
    result = exact_search(queries, pool, 20, block_size=block_size, score_dtype=score_dtype, backend=backend)
    expected = exact_search(queries, pool, 20, score_dtype=torch.float64)
    assert result.indices.tolist() == brute_force(queries, pool, 20)
    assert torch.equal(result.scores, expected.scores)


def test_auto_is_float32_on_the_cpu() -> None:
    types = []

    def record(embeddings: torch.Tensor, dtype: torch.dtype) -> bounds.LowRows:
        types.append(dtype)
        return LOW_ROWS(embeddings, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "low_rows", record)
        exact_search(torch.eye(3), torch.eye(3), 1)
    assert set(types) == {torch.float32}


def test_a_score_is_that_of_its_pair_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    queries, pool = torch.randn(3, 33, generator=generator), torch.randn(40, 33, generator=generator)
    result = exact_search(queries, pool, 40)
    for row, query in enumerate(queries):
        for score, index in zip(result.scores[row].tolist(), result.indices[row].tolist(), strict=True):
            alone = exact_search(query[None], pool[index : index + 1], 1)
            assert alone.scores.item() == score


def test_only_queries_without_proof_are_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[tuple[str, int]] = []

    def recorded(name: str, run: Any) -> Any:
        def record(queries: Any, *args: Any) -> Any:
            searched.append((name, len(queries)))
            return run(queries, *args)

        return record

    for name in ("quick_pass", "exact_pass"):
        monkeypatch.setattr(search, name, recorded(name, getattr(search, name)))
    pool = torch.randn(2000, 16, generator=torch.Generator().manual_seed(5))
    pool[:60] = pool[0]  # more than the first try keeps, fewer than the second
    pool[1000:1900] = pool[1000]  # more than any try keeps
    result = exact_search(pool[[0, 1000, 1950]], pool, 10, score_dtype=torch.float32)
    assert searched == [("quick_pass", 3), ("quick_pass", 2), ("exact_pass", 1)]
    assert result.indices.tolist() == brute_force(pool[[0, 1000, 1950]], pool, 10)


@pytest.mark.parametrize("score_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_directions_of_a_whole_pool_end_and_go_to_the_lower_rows(score_dtype: torch.dtype) -> None:
    pool = torch.ones(5000, 8) * torch.arange(1, 5001)[:, None]
    result = exact_search(torch.randn(3, 8), pool, 40, score_dtype=score_dtype)
    assert result.indices.tolist() == [list(range(40))] * 3


@pytest.mark.parametrize("score_dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 3e38), (torch.float32, 1e-38), (torch.float64, 1e300)])
def test_lengths_do_not_matter(dtype: torch.dtype, length: float, score_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    pool = torch.randn(60, 5, generator=generator).clamp(-1, 1).to(dtype)
    queries = torch.randn(3, 5, generator=generator).to(dtype)
    pool[7] = 0
    scaled = pool.clone()
    scaled[::2] *= 2.0 ** math.floor(math.log2(length))
    scaled[1::4] /= 2.0**10
    result = exact_search(queries, scaled, 60, score_dtype=score_dtype)
    expected = exact_search(queries, pool, 60, score_dtype=torch.float64)
    assert torch.equal(result.indices, expected.indices)
    assert result.scores[result.indices == 7].tolist() == [0, 0, 0]


def test_cosines_on_the_border_between_two_steps_fall_to_the_same_side() -> None:
    cosine = (torch.arange(-900, 900, dtype=torch.float64) * 1001 + 0.5) / 2**30
    pool = torch.stack([cosine, (1 - cosine.square()).sqrt() * 0.6, (1 - cosine.square()).sqrt() * 0.8], dim=1)
    pool = pool * torch.linspace(0.3, 3, 1800, dtype=torch.float64)[:, None]
    query = torch.tensor([[0.7, 0.0, 0.0]], dtype=torch.float64)
    scores = exact_search(query, pool, 1800, score_dtype=torch.float64).scores
    pairs = [exact_search(query, pool[[index]], 1, score_dtype=torch.float32).scores for index in range(0, 1800, 20)]
    assert set(torch.cat(pairs).flatten().tolist()) <= set(scores.flatten().tolist())
    assert torch.equal(scores, exact_search(query, pool, 1800, score_dtype=torch.float32).scores)


@pytest.mark.parametrize("error", [1e-3, 0.03, 0.5])
def test_errors_as_large_as_the_bound_allows_change_nothing(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    generator = torch.Generator().manual_seed(8)
    pool, query = torch.randn(3000, 4, generator=generator), torch.tensor([[1.0, 0.0, 0.0, 0.0]])

    def spoiled(embeddings: torch.Tensor, dtype: torch.dtype) -> bounds.LowRows:
        low = LOW_ROWS(embeddings, dtype)
        if len(embeddings) > 1:  # each candidate off by the same length, towards the query or away from it
            low.rows[:, 0] += error * (torch.randint(2, (len(low.rows),), generator=generator) * 2 - 1)
            low.errors.add_(error)
        return low

    monkeypatch.setattr(bounds, "low_rows", spoiled)
    assert exact_search(query, pool, 50).indices.tolist() == brute_force(query, pool, 50)
    assert exact_search(query, pool, 1200).indices.tolist() == brute_force(query, pool, 1200)


def test_a_device_that_breaks_the_bound_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bounds, "score_errors", lambda errors, *_: bounds.ScoreErrors(errors[:, None] * 0 + 1e-9, 0.0))
    generator = torch.Generator().manual_seed(7)
    queries, pool = torch.randn(4, 16, generator=generator), torch.randn(300, 16, generator=generator)
    result = exact_search(queries, pool, 5, score_dtype=torch.bfloat16)
    assert result.indices.tolist() == brute_force(queries, pool, 5)
    assert "multiplies less exactly than its types promise" in caplog.text


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_coarser_float32_is_still_exact(precision: str) -> None:
    pool = pool_of_ties_and_neighbours()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        result = exact_search(pool[:6], pool, 30)
    finally:
        torch.set_float32_matmul_precision(before)
    assert result.indices.tolist() == brute_force(pool[:6], pool, 30)


class Recorder(TensorCandidates):
    """Counts what is read."""

    def __init__(self, embeddings: torch.Tensor) -> None:
        super().__init__(embeddings)
        self.passes: list[int] = []
        self.read = 0

    def blocks(self, block_size: int) -> Iterator[tuple[int, torch.Tensor]]:
        self.passes.append(0)
        for start, block in super().blocks(block_size):
            self.passes[-1] += len(block)
            yield start, block

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        self.read += len(indices)
        return super().rows(indices)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor) and not value._is_view():
                self.size = max(self.size, value.numel())
        return out


def test_the_pool_is_streamed_once_and_no_tensor_grows_with_it() -> None:
    queries, pool = torch.randn(48, 32), torch.randn(3000, 32)
    source = Recorder(pool)
    with LargestTensor() as largest:
        result = exact_search(queries, source, 3, block_size=16)
    assert source.passes == [3000]
    assert source.read <= 48 * 4  # few but the best are looked at again
    assert largest.size <= 2 * 48 * 64  # the pool has 3000 * 32 numbers, all scores would be 48 * 3000
    assert torch.equal(result.indices, exact_search(queries, pool, 3, score_dtype=torch.float64).indices)


def test_no_tensor_of_the_exact_pass_grows_with_the_pool() -> None:
    source = Recorder(torch.randn(3000, 32))
    with LargestTensor() as largest:
        exact_search(torch.randn(48, 32), source, 3, block_size=64, score_dtype=torch.float64)
    assert source.passes == [3000]
    assert largest.size <= 48 * 64


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    exact_search(torch.eye(2), torch.eye(2), 1, show_progress_bar=True)
    assert "Searching: 100%" in capsys.readouterr().err
    exact_search(torch.eye(2), torch.eye(2), 1)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("borders", [[300], [1, 2], [200, 400], [599]])
def test_parts_merge_into_the_whole(borders: list[int]) -> None:
    pool = pool_of_ties_and_neighbours()
    queries = torch.cat([pool[:5], -pool[:2]])
    whole = exact_search(queries, pool, 50)
    parts = []
    for start, stop in itertools.pairwise([0, *borders, 600]):
        found = exact_search(queries, pool[start:stop], 50)
        parts.append(found._replace(indices=found.indices + start))
    merged = merge_results(parts[::-1], 50)
    assert torch.equal(merged.indices, whole.indices)
    assert torch.equal(merged.scores, whole.scores)
    assert merge_results(parts, 10_000).indices.shape == (7, sum(part.indices.shape[1] for part in parts))


def test_merge_needs_results_of_the_same_queries() -> None:
    two, one = exact_search(torch.eye(2), torch.eye(2), 1), exact_search(torch.ones(1, 2), torch.eye(2), 1)
    with pytest.raises(ValueError, match=r"results have \[2, 1\] queries and top_k is 1; give at least one result"):
        merge_results([two, one], 1)
    with pytest.raises(ValueError, match=r"results have \[\] queries"):
        merge_results([], 1)
    with pytest.raises(ValueError, match=r"\[2\] queries and top_k is 0"):
        merge_results([two], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_dtype": torch.int8}, r"score_dtype is torch.int8, must be 'auto' or one of \[torch.float32"),
        ({"score_dtype": "half"}, "score_dtype is 'half', must be 'auto'"),
        ({"backend": "annoy"}, r"backend is 'annoy', must be one of \['torch', 'faiss'\]"),
        ({"backend": "faiss", "score_dtype": torch.float16}, "'faiss' scores in float32, score_dtype is torch.float16"),
    ],
)
def test_wrong_search_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact_search(torch.eye(2), torch.eye(2), 1, **options)


def test_faiss_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'puma-hf\[faiss\]', or choose backend='torch'"):
        exact_search(torch.eye(2), torch.eye(2), 1, backend="faiss")


@pytest.mark.parametrize(
    ("queries", "candidates", "top_k", "block_size", "message"),
    [
        (torch.ones(2), torch.ones(2, 2), 1, 1, r"query_embeddings is \(2,\) .* same model"),
        (torch.ones(2, 3), torch.ones(2, 2), 1, 1, r"\(2, 3\) and candidate_embeddings is \(2, 2\)"),
        (torch.ones(0, 2), torch.ones(2, 2), 1, 1, "0 queries and 2 candidates; a search needs at least one"),
        (torch.ones(2, 2), torch.ones(0, 2), 1, 1, "2 queries and 0 candidates"),
        (torch.ones(2, 2), torch.ones(2, 2), 0, 1, "top_k is 0 and block_size is 1; both must be 1 or more"),
        (torch.ones(2, 2), torch.ones(2, 2), 1, 0, "top_k is 1 and block_size is 0"),
    ],
)
def test_wrong_search_arguments(
    queries: torch.Tensor, candidates: torch.Tensor, top_k: int, block_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        exact_search(queries, candidates, top_k, block_size=block_size)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_embeddings_that_are_not_finite(value: float) -> None:
    bad = torch.ones(20, 2)
    bad[3:10, 1] = value
    with pytest.raises(
        ValueError, match=r"candidate_embeddings has 7 of 20 rows .* first rows \[3, 4, 5, 6, 7\]; look"
    ):
        exact_search(torch.ones(1, 2), bad, 1, block_size=6)
    with pytest.raises(ValueError, match="query_embeddings has 7 of 20 rows"):
        exact_search(bad, torch.ones(1, 2), 1)
    with pytest.raises(ValueError, match="candidate_embeddings has 7 of 20 rows"):
        exact_search(torch.ones(1, 2), bad.double(), 1, block_size=6, score_dtype=torch.float64)
