"""Exact nearest candidates by cosine, block by block: memory does not grow with the pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

# Cosines are float32, compared in steps of 2^-24, which is as fine as float32 is just below 1. A product of long rows
# rounds a few times: candidates nearer to each other than about 2e-7 may come in either order.
_STEPS = 2**24
_ROW_BITS = 32
_ROW_MASK = 2**_ROW_BITS - 1
_TILE = 64  # columns that a matrix product computes at a time, or a multiple of them


class SearchResult(NamedTuple):
    """The best candidates of each query, best first.

    Attributes:
        scores: Cosine similarities in steps of 2^-24, float32, `(num_queries, top_k)`.
        indices: Rows of the candidates, int64, `(num_queries, top_k)`.
    """

    scores: Tensor
    indices: Tensor


@torch.no_grad()
def exact_search(
    query_embeddings: Tensor,
    candidates: Tensor | Iterable[tuple[int, Tensor]],
    top_k: int,
    *,
    block_size: int = 4096,
    device: str | torch.device | None = None,
) -> SearchResult:
    """Exact nearest candidates by cosine similarity.

    Every query is compared with every candidate in float32. Ties go to the lower candidate row; a zero vector has
    similarity 0 to everything. Memory is that of one block of scores, of the queries, and of what is kept of each.

    Args:
        query_embeddings: `(num_queries, embedding_dim)`, of any length; normalised here.
        candidates: `(num_candidates, embedding_dim)`, of any length; or, for a pool that is not in memory, blocks of
            at most `block_size` rows, each with the number of its first row, in order, as `EmbeddingStore.blocks`.
        top_k: Number of candidates to return for each query, at most all of them.
        block_size: Rows of a block, of queries and of candidates alike.
        device: Where to search; None for the queries' device.

    Returns:
        Scores and indices, `(num_queries, min(top_k, num_candidates))`, on the queries' device.

    Raises:
        ValueError: If an embedding is not finite; the message names its row.

    Example:
        >>> pool = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
        >>> exact_search(torch.tensor([[1.0, 0.0]]), pool, top_k=2).indices
        tensor([[1, 2]])
    """
    device = device or query_embeddings.device
    queries = _unit_rows("query_embeddings", query_embeddings.to(device), 0)
    width = block_size
    if isinstance(candidates, Tensor):
        width = min(block_size, len(candidates))
        candidates = ((number * block_size, rows) for number, rows in enumerate(candidates.split(block_size)))
    keys = torch.full((len(queries), top_k), torch.iinfo(torch.int64).min, device=device)
    num_candidates = 0
    with _full_float32():
        for start, block in candidates:
            rows = _unit_rows("candidates", block.to(device), start)
            numbers = torch.arange(start, start + len(rows), device=device)
            # All products have one shape, of whole tiles: of another a copy's score may differ in its last digit, and
            # the tie with the copy would be lost.
            missing = -(-width // _TILE) * _TILE - len(rows)
            padded = pad(rows, (0, 0, 0, missing)) if missing > 0 else rows
            for part, best in zip(queries.split(block_size), keys.split(block_size), strict=True):
                scores = (part @ padded.T)[:, : len(rows)]
                # Most blocks hold nothing for most queries, and a maximum is found much quicker than the best k. A tie
                # with the last one that is kept adds nothing, since rows only go up.
                better = (_steps(scores.amax(dim=1)) > best[:, -1] >> _ROW_BITS).nonzero().flatten()
                if len(better):
                    found = _to_keys(scores[better], numbers).topk(min(top_k, len(rows)), dim=1).values
                    best[better] = torch.cat([best[better], found], dim=1).topk(top_k, dim=1).values
            num_candidates += len(rows)
    return _from_keys(keys[:, :num_candidates].to(query_embeddings.device))


def merge_results(results: Sequence[SearchResult], top_k: int) -> SearchResult:
    """One result from those of disjoint parts of a pool, as if the pool had been searched at once.

    All are of the same queries and `top_k`, and their `indices` are rows of the whole pool.

    Example:
        >>> query, pool = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
        >>> parts = [exact_search(query, [(0, pool[:2])], 2), exact_search(query, [(2, pool[2:])], 2)]
        >>> merge_results(parts, 2).indices
        tensor([[1, 2]])
    """
    keys = torch.cat([_to_keys(result.scores, result.indices) for result in results], dim=1)
    return _from_keys(keys.topk(min(top_k, keys.shape[1]), dim=1).values)


def less_popular(query_embeddings: Tensor, penalty: float) -> Tensor:
    """Queries whose search ranks candidates by `s_ij - penalty * mean_i(s_ij)`, the popularity-corrected cosine.

    A candidate that is near to every query (a "hub") is pushed back. For unit vectors

        q_i . c_j - penalty * mean_i(q_i . c_j)  =  (q_i - penalty * mean_i(q_i)) . c_j

    so the correction moves the queries and leaves the candidates alone; that `exact_search` divides by the length of
    the moved query changes no ranking. It is transductive: the ranking of one query depends on all the others.
    All queries of a task go in, `(num_queries, embedding_dim)`, of any length, and come out moved, in float32. The
    penalty is between 0 (none) and 1; PUMA's released evaluation takes 0.2.

    Example:
        >>> queries, pool = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.8, 0.6], [0.6, -0.8]])
        >>> exact_search(queries, pool, top_k=1).indices.tolist()  # the first is near to both
        [[0], [0]]
        >>> exact_search(less_popular(queries, 1.0), pool, top_k=1).indices.tolist()
        [[1], [0]]
    """
    units = normalize(query_embeddings.double(), dim=1)
    return (units - penalty * units.mean(dim=0)).float()


def _to_keys(scores: Tensor, rows: Tensor) -> Tensor:
    # One integer holds the score and then the lower row. No two are equal, so `topk` has one answer; on floats it
    # leaves the order of ties to chance.
    keys: Tensor = (_steps(scores) << _ROW_BITS) + (_ROW_MASK - rows)
    return keys


def _from_keys(keys: Tensor) -> SearchResult:
    return SearchResult((keys >> _ROW_BITS).float() / _STEPS, _ROW_MASK - (keys & _ROW_MASK))


def _steps(scores: Tensor) -> Tensor:
    return (scores * _STEPS).round().clamp(-_STEPS, _STEPS).long()


def _unit_rows(name: str, embeddings: Tensor, start: int) -> Tensor:
    units = normalize(embeddings.float(), dim=1)
    # A sum is NaN where anything is, and needs no copy; infinity becomes NaN when it is normalised.
    if not bool(units.sum().isfinite()):
        bad = (~units.isfinite().all(dim=1)).nonzero().flatten() + start
        problem = f"{name} has {len(bad)} rows with NaN or infinity, first rows {bad[:5].tolist()}"
        raise ValueError(f"{problem}; look at their inputs, or encode in float32 or bfloat16 instead of float16")
    return units


@contextmanager
def _full_float32() -> Iterator[None]:
    # A training may have switched on TensorFloat-32 or bfloat16 for all products, which keep 3 digits of a cosine.
    # Before torch 2.9 there is no such switch for a part of them, and theirs stays.
    parts = [part.matmul for part in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(part, "matmul")]
    before = [(part, part.fp32_precision) for part in parts if hasattr(part, "fp32_precision")]
    try:
        for part, _ in before:
            part.fp32_precision = "ieee"
        yield
    finally:
        for part, precision in before:
            part.fp32_precision = precision
