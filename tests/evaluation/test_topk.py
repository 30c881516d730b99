from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from puma_hf.embedding.store import EmbeddingStore
from puma_hf.evaluation import topk
from puma_hf.evaluation.topk import exact_search, less_popular, merge_results


def brute_force(queries: torch.Tensor, candidates: torch.Tensor, top_k: int) -> list[list[int]]:
    """One cosine at a time in Python's doubles, sorted by score and then by index."""

    def unit(row: list[float]) -> list[float]:
        norm = math.sqrt(math.fsum(value * value for value in row))
        return [value / norm if norm else 0.0 for value in row]

    pool = [unit(row) for row in candidates.double().tolist()]
    rankings = []
    for query in map(unit, queries.double().tolist()):
        scores = [math.fsum(a * b for a, b in zip(query, row, strict=True)) for row in pool]
        steps = [round(score * 2**24) for score in scores]
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
    found = candidates.double()[result.indices]
    expected = torch.nn.functional.cosine_similarity(queries.double()[:, None], found, dim=-1)
    torch.testing.assert_close(result.scores, expected.float(), atol=2e-7, rtol=0)
    assert result.indices.dtype == torch.int64


@pytest.mark.parametrize("block_size", [1, 3, 100])
def test_ties_go_to_the_lower_index(block_size: int) -> None:
    candidates = torch.tensor([[0.0, -1.0], [3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    result = exact_search(torch.tensor([[1.0, 0.0], [-7.0, 0.0]]), candidates, 10, block_size=block_size)
    assert result.indices.tolist() == [[1, 2, 4, 0, 3, 6, 5], [5, 0, 3, 6, 1, 2, 4]]
    assert result.scores.tolist() == [[1, 1, 1, 0, 0, 0, -1], [1, 0, 0, 0, -1, -1, -1]]


def test_a_popular_candidate_is_pushed_back() -> None:
    """By hand: the hub scores 0.8 and 0.96, mean 0.88; the other candidate 0.6 and -0.28, mean 0.16.

    With a penalty of 0.5 the first query scores them 0.36 and 0.52, the second 0.52 and -0.36.
    """
    queries, pool = torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.8, 0.6], [0.6, -0.8]])
    assert exact_search(queries, pool, 1).indices.flatten().tolist() == [0, 0]
    moved = less_popular(queries, 0.5)
    assert (moved @ pool.T).flatten().tolist() == pytest.approx([0.36, 0.52, 0.52, -0.36])
    assert exact_search(moved, pool, 1).indices.flatten().tolist() == [1, 0]


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


def test_a_pool_on_disk_is_read_once_and_no_tensor_grows_with_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, pool = torch.randn(48, 32, generator=generator), torch.randn(3000, 32, generator=generator)
    order = torch.randperm(3000, generator=generator)
    store = EmbeddingStore(tmp_path, {}, file_format="safetensors")
    for keys in order.split(100):
        store.add(keys, pool[keys])
    store.refresh()
    read: list[int] = []

    def blocks() -> Iterator[tuple[int, torch.Tensor]]:
        for start, block in store.blocks(torch.arange(3000), 16):
            read.append(len(block))
            yield start, block

    with LargestTensor() as largest:
        result = exact_search(queries, blocks(), 3, block_size=16)
    assert sum(read) == 3000
    # A shard has 100 * 32 numbers of four bytes, the pool 3000 * 32; all scores would be 48 * 3000.
    assert largest.size <= 100 * 32 * 4
    assert result.indices.tolist() == brute_force(queries, pool, 3)


@pytest.mark.parametrize("borders", [[300], [1, 2], [599]])
def test_parts_merge_into_the_whole(borders: list[int]) -> None:
    generator = torch.Generator().manual_seed(2)
    pool = torch.randn(600, 24, generator=generator)
    pool[::3], pool[::50] = pool[0].clone(), 0
    queries = torch.cat([pool[:5], -pool[:2]])
    whole = exact_search(queries, pool, 50, block_size=600)
    parts = []
    for start, stop in itertools.pairwise([0, *borders, 600]):
        parts.append(exact_search(queries, [(start, pool[start:stop])], 50, block_size=600))
    merged = merge_results(parts[::-1], 50)
    torch.testing.assert_close(merged.scores, whole.scores, atol=2e-7, rtol=0)
    assert [set(row) for row in merged.indices.tolist()] == [set(row) for row in whole.indices.tolist()]
    assert merge_results(parts, 10_000).indices.shape == (7, sum(part.indices.shape[1] for part in parts))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarse_products_of_a_training_do_not_reach_the_search(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        seen = []
        with topk._full_float32():
            seen = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee", "ieee"]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_embeddings_that_are_not_finite_are_named(value: float) -> None:
    bad = torch.ones(20, 2)
    bad[8:10, 1] = value
    with pytest.raises(ValueError, match=r"candidates has 2 rows with NaN or infinity, first rows \[8, 9\]"):
        exact_search(torch.ones(1, 2), bad, 1, block_size=6)
    with pytest.raises(ValueError, match="query_embeddings has 2 rows with NaN"):
        exact_search(bad, torch.ones(1, 2), 1)
