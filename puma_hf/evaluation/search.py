"""Exact cosine search in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from puma_hf.evaluation import search_bounds as bounds
from puma_hf.evaluation.candidate_source import CandidateSource, TensorCandidates
from puma_hf.evaluation.search_passes import ONE, Pass, exact_pass, from_sort_keys, make_queries, quick_pass, sort_keys

__all__ = ["CandidateSource", "SearchResult", "TensorCandidates", "exact_search", "less_popular", "merge_results"]

logger = logging.getLogger(__name__)

_SCORE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_BACKENDS = ("torch", "faiss")
# Candidates proposed beyond top_k, as a share of it: the coarser the scores, the more lie too close to tell.
_SLACK = {torch.float32: 0.25, torch.float16: 1.0, torch.bfloat16: 4.0}
_MIN_SLACK = 16
_MORE_SLACK = 8  # times as much when that was not enough


class SearchResult(NamedTuple):
    """The best candidates of each query, best first.

    Attributes:
        scores: Cosine similarities in steps of 2^-30, float64, `(num_queries, top_k)`.
        indices: Rows of the candidates, int64, `(num_queries, top_k)`.
    """

    scores: Tensor
    indices: Tensor


@torch.no_grad()
def exact_search(
    query_embeddings: Tensor,
    candidates: Tensor | CandidateSource,
    top_k: int,
    *,
    block_size: int = 4096,
    score_dtype: torch.dtype | Literal["auto"] = "auto",
    device: str | torch.device | None = None,
    backend: Literal["torch", "faiss"] = "torch",
    show_progress_bar: bool = False,
) -> SearchResult:
    """Exact nearest candidates by cosine similarity.

    The rule: cosines in float64, compared in steps of 2^-30 (finer than float32 near 1, coarser than float64's
    rounding errors); ties go to the lower candidate row; a zero vector has similarity 0 to everything.  The result
    follows from the rule alone: `block_size`, `score_dtype`, `device` and `backend` change the time, not a bit of it.

    Candidates are read once, block by block, and scored in low precision; of each query the best `top_k` and some
    more are kept and scored again as the rule says.  A bound on the error of the first scores then proves that none
    that was dropped belongs to the best.  Queries for which it does not, such as those with more ties than were kept,
    are searched again with more kept, and at last in float64.  Memory is that of some blocks, of the queries, and of
    what is kept of each; it does not grow with the pool.

    Args:
        query_embeddings: `(num_queries, embedding_dim)`, of any length; normalised here.
        candidates: `(num_candidates, embedding_dim)`, of any length, or a `CandidateSource` such as
            `EmbeddingCache.source`, whose rows need not fit into memory.
        top_k: Number of candidates to return for each query, at most all of them.
        block_size: Rows of a block, of queries and of candidates alike.
        score_dtype: Type of the first scores: float32, float16, bfloat16, or float64 for no first scores; "auto" for
            float16 on CUDA and float32 elsewhere.  bfloat16 is quick on CPUs that have instructions for it.
        device: Where to search; None for the queries' device.
        backend: What makes the first scores: "torch", or "faiss" (`pip install 'puma-hf[faiss]'`) in float32 on the
            CPU.
        show_progress_bar: Whether to show how many candidates have been read.

    Returns:
        Scores and indices, `(num_queries, min(top_k, num_candidates))`, on the queries' device.

    Raises:
        ValueError: If a shape, `top_k`, `block_size`, `score_dtype` or `backend` is out of range, or an embedding is
            not finite.
        ImportError: If faiss is asked for and not installed.

    Example:
        >>> pool = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
        >>> exact_search(torch.tensor([[1.0, 0.0]]), pool, top_k=2).indices
        tensor([[1, 2]])
    """
    device = torch.device(query_embeddings.device if device is None else device)
    _check_arguments(query_embeddings, candidates, top_k, block_size)
    dtype = _check_score_dtype(score_dtype, backend, device)
    source = TensorCandidates(candidates) if isinstance(candidates, Tensor) else candidates
    top_k = min(top_k, len(source))
    # MPS has no float64: what decides is computed on the CPU there.
    queries = make_queries(query_embeddings, block_size, torch.device("cpu") if device.type == "mps" else device)
    keys = torch.zeros(len(queries), top_k, dtype=torch.int64, device=queries.norms.device)
    todo = torch.arange(len(queries), device=keys.device)
    for num_kept, tried in _attempts(dtype, top_k, len(source)):
        how = Pass(tried, num_kept, block_size, device, backend, show_progress_bar)
        found, is_proven = quick_pass(queries.subset(todo), source, top_k, how)
        keys[todo[is_proven]] = found[is_proven]
        todo = todo[~is_proven]
        if not len(todo):
            break
        logger.debug("%d of %d queries need a closer look than %s", len(todo), len(queries), tried)
    if len(todo):
        keys[todo] = exact_pass(queries.subset(todo), source, top_k, block_size, show_progress_bar)
    return SearchResult(*from_sort_keys(keys.to(query_embeddings.device)))


def merge_results(results: Sequence[SearchResult], top_k: int) -> SearchResult:
    """One result from those of disjoint parts of a pool, equal to that of searching the pool at once.

    Args:
        results: Of the same queries, each searched with this `top_k`; `indices` are rows of the whole pool, and each
            part had its candidates in the order of the whole pool, since ties go to the lower row.
        top_k: Number of candidates to return for each query, at most all of them.

    Returns:
        Scores and indices, `(num_queries, min(top_k, num_candidates))`.

    Raises:
        ValueError: If there is no result, the numbers of queries differ, or `top_k` is below 1.

    Example:
        >>> query, pool = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
        >>> first, second = exact_search(query, pool[:2], 2), exact_search(query, pool[2:], 2)
        >>> merge_results([first, second._replace(indices=second.indices + 2)], 2).indices
        tensor([[1, 2]])
    """
    sizes = [len(result.scores) for result in results]
    if len(set(sizes)) != 1 or top_k < 1:
        raise ValueError(
            f"results have {sizes} queries and top_k is {top_k}; give at least one result, all of the same queries, "
            "and a top_k of 1 or more"
        )
    keys = torch.cat(
        [sort_keys((result.scores * ONE).round().to(torch.int64), result.indices) for result in results], dim=1
    )
    return SearchResult(*from_sort_keys(keys.topk(min(top_k, keys.shape[1]), dim=1).values))


def less_popular(query_embeddings: Tensor, penalty: float) -> Tensor:
    """Queries whose search ranks candidates by `s_ij - penalty * mean_i(s_ij)`, the popularity-corrected cosine.

    A candidate that is near to every query (a "hub") is pushed back. For unit vectors

        q_i . c_j - penalty * mean_i(q_i . c_j)  =  (q_i - penalty * mean_i(q_i)) . c_j

    so the correction moves the queries and leaves the candidates alone; that `exact_search` divides by the length of
    the moved query changes no ranking. It is transductive: the ranking of one query depends on all the others.

    Args:
        query_embeddings: All queries of a task, `(num_queries, embedding_dim)`, of any length.
        penalty: Weight of the mean, between 0 (none) and 1. PUMA's released evaluation takes 0.2.

    Returns:
        The moved queries in float32, `(num_queries, embedding_dim)`.

    Example:
        >>> queries, pool = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.8, 0.6], [0.6, -0.8]])
        >>> exact_search(queries, pool, top_k=1).indices.tolist()  # the first is near to both
        [[0], [0]]
        >>> exact_search(less_popular(queries, 1.0), pool, top_k=1).indices.tolist()
        [[1], [0]]
    """
    doubles = bounds.double_rows(query_embeddings)
    units = bounds.unit_rows(doubles, bounds.norms_of(doubles))
    return (units - penalty * units.mean(dim=0)).float()


def _attempts(dtype: torch.dtype, top_k: int, pool_size: int) -> list[tuple[int, torch.dtype]]:
    """How many to keep and in which type, from the quickest try on; float64 comes after the last."""
    if dtype is torch.float64:
        return []
    slack = max(_MIN_SLACK, int(_SLACK[dtype] * top_k))
    more = _MORE_SLACK * max(_MIN_SLACK, int(_SLACK[torch.float32] * top_k))
    return [(min(top_k + slack, pool_size), dtype), (min(top_k + more, pool_size), torch.float32)]


def _check_arguments(queries: Tensor, candidates: Tensor | CandidateSource, top_k: int, block_size: int) -> None:
    if isinstance(candidates, Tensor):
        shape: tuple[int, ...] = tuple(candidates.shape)
    else:
        shape = (len(candidates), candidates.embedding_dim)
    if queries.ndim != 2 or len(shape) != 2 or queries.shape[1] != shape[1] or not shape[1]:
        raise ValueError(
            f"query_embeddings is {tuple(queries.shape)} and candidate_embeddings is {shape}; both must be (rows, "
            "embedding_dim) with one embedding_dim: encode both with the same model"
        )
    if not len(queries) or not shape[0]:
        raise ValueError(f"{len(queries)} queries and {shape[0]} candidates; a search needs at least one of each")
    if top_k < 1 or block_size < 1:
        raise ValueError(f"top_k is {top_k} and block_size is {block_size}; both must be 1 or more")


def _check_score_dtype(score_dtype: torch.dtype | str, backend: str, device: torch.device) -> torch.dtype:
    if backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}, must be one of {list(_BACKENDS)}")
    if score_dtype == "auto":
        score_dtype = torch.float16 if device.type == "cuda" and backend == "torch" else torch.float32
    if not isinstance(score_dtype, torch.dtype) or score_dtype not in _SCORE_DTYPES:
        raise ValueError(f"score_dtype is {score_dtype!r}, must be 'auto' or one of {list(_SCORE_DTYPES)}")
    if backend == "faiss":
        if score_dtype is not torch.float32:
            raise ValueError(f"backend 'faiss' scores in float32, score_dtype is {score_dtype}; leave it at 'auto'")
        if find_spec("faiss") is None:
            raise ImportError("backend 'faiss' needs faiss: pip install 'puma-hf[faiss]', or choose backend='torch'")
    return score_dtype
