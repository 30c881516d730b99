from __future__ import annotations

import math

import pytest
import torch

from puma_hf.evaluation.search import exact_search

INF, NAN = math.inf, math.nan


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
    torch.testing.assert_close(result.scores, expected.float(), atol=1e-6, rtol=0)


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
    assert result.scores.dtype == torch.float32
    assert result.indices.dtype == torch.int64


def test_no_block_is_larger_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    topk = torch.Tensor.topk

    def recording_topk(keys: torch.Tensor, *args: int, **kwargs: int) -> object:
        shapes.append(tuple(keys.shape))
        return topk(keys, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", recording_topk)
    exact_search(torch.randn(10, 4), torch.randn(50, 4), 3, block_size=4)
    assert max(rows for rows, _ in shapes) == 4
    assert max(columns for _, columns in shapes) == 4 + 3


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
