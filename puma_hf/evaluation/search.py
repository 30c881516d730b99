"""Exact cosine search in bounded memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ONE = 1 << 30  # cosines are compared in steps of 2^-30
_INDEX_BITS = 32
_INDEX_MASK = (1 << _INDEX_BITS) - 1
_SHOWN_ROWS = 5


class SearchResult(NamedTuple):
    """The best candidates of each query, best first.

    Attributes:
        scores: Cosine similarities, float32, `(num_queries, top_k)`.
        indices: Rows of the candidates, int64, `(num_queries, top_k)`.
    """

    scores: Tensor
    indices: Tensor


@torch.no_grad()
def exact_search(
    query_embeddings: Tensor,
    candidate_embeddings: Tensor,
    top_k: int,
    *,
    block_size: int = 4096,
    dtype: torch.dtype = torch.float64,
) -> SearchResult:
    """Exact nearest candidates by cosine similarity.

    Queries and candidates are compared `block_size` by `block_size` and merged into a running top-k, so
    memory does not grow with the pool.  Products are summed in `dtype` and compared in steps of 2^-30, finer
    than float32 near 1 and coarser than float64's rounding errors: equal cosines tie whatever block they are
    in.  Ties go to the lower candidate row.  A zero vector has similarity 0 to everything.

    Args:
        query_embeddings: `(num_queries, embedding_dim)`, of any length; normalised here.
        candidate_embeddings: `(num_candidates, embedding_dim)`; blocks of it are moved to the queries'
            device.
        top_k: Number of candidates to return for each query, at most all of them.
        block_size: Rows of a block, of queries and of candidates alike.
        dtype: Type the products are summed in.  float32 is faster where float64 is slow (consumer GPUs);
            near-ties may then depend on `block_size`.

    Returns:
        Scores and indices, `(num_queries, min(top_k, num_candidates))`, on the queries' device.

    Raises:
        ValueError: If a shape, `top_k` or `block_size` is out of range, or an embedding is not finite.

    Example:
        >>> pool = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
        >>> exact_search(torch.tensor([[1.0, 0.0]]), pool, top_k=2).indices
        tensor([[1, 2]])
    """
    _check_arguments(query_embeddings, candidate_embeddings, top_k, block_size)
    _check_finite(query_embeddings, "query_embeddings", block_size)
    _check_finite(candidate_embeddings, "candidate_embeddings", block_size)
    best: list[Tensor] = []
    for queries in query_embeddings.split(block_size):
        queries = _normalise(queries, dtype)
        keys = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start in range(0, len(candidate_embeddings), block_size):
            block = candidate_embeddings[start : start + block_size].to(queries.device)
            scores = queries @ _normalise(block, dtype).T
            keys = torch.cat([keys, _sort_keys(scores, start)], dim=1)
            keys = keys.topk(min(top_k, keys.shape[1]), dim=1).values
        best.append(keys)
    return _from_sort_keys(torch.cat(best))


def _normalise(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.normalize(embeddings.to(dtype), dim=-1)


def _sort_keys(scores: Tensor, first_index: int) -> Tensor:
    """One int64 for each score and candidate that sorts by score, then by lower index; no two are equal.

    The upper half is the cosine in fixed point, the lower half the complement of the index.  `topk` on these
    keys is deterministic, on floats with ties it is not.
    """
    fixed = (scores * _ONE).round().to(torch.int64)
    indices = torch.arange(first_index, first_index + scores.shape[1], device=scores.device)
    return (fixed << _INDEX_BITS) + (_INDEX_MASK - indices)


def _from_sort_keys(keys: Tensor) -> SearchResult:
    scores = (keys >> _INDEX_BITS).to(torch.float32) / _ONE
    return SearchResult(scores, _INDEX_MASK - (keys & _INDEX_MASK))


def _check_arguments(queries: Tensor, candidates: Tensor, top_k: int, block_size: int) -> None:
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"query_embeddings is {tuple(queries.shape)} and candidate_embeddings is "
            f"{tuple(candidates.shape)}; both must be (rows, embedding_dim) with one embedding_dim: encode "
            "both with the same model"
        )
    if not len(queries) or not len(candidates):
        raise ValueError(
            f"{len(queries)} queries and {len(candidates)} candidates; a search needs at least one of each"
        )
    if top_k < 1 or block_size < 1:
        raise ValueError(f"top_k is {top_k} and block_size is {block_size}; both must be 1 or more")


def _check_finite(embeddings: Tensor, name: str, block_size: int) -> None:
    rows = [
        start + row
        for start in range(0, len(embeddings), block_size)
        for row in (~torch.isfinite(embeddings[start : start + block_size]).all(dim=1)).nonzero().flatten().tolist()
    ]
    if rows:
        raise ValueError(
            f"{name} has {len(rows)} of {len(embeddings)} rows with NaN or infinity, first rows "
            f"{rows[:_SHOWN_ROWS]}; look at their inputs, or encode in float32 or bfloat16 instead of float16"
        )
