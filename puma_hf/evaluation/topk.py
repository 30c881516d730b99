"""Exact nearest candidates by cosine, block by block: memory does not grow with the pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from puma_hf.embedding.store import EmbeddingStore

# Cosines are float32 and are compared in steps of 2^-24, which is as fine as float32 is just below 1. Summing a product
# of d numbers rounds a few times: candidates nearer to each other than about 2e-7 may come in either order.
_STEPS = 2**24
_TILE = 64  # columns that a matrix product computes at a time, or a multiple of them
_ROW_BITS = 32
_ROW_MASK = 2**_ROW_BITS - 1


class CandidateBlocks(Protocol):
    """Embeddings `(num_candidates, embedding_dim)` of any length and type, which need not be in memory as a whole."""

    def __len__(self) -> int:
        """Number of candidates."""

    def blocks(self, block_size: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in order, at most `block_size` at a time, each block with the number of its first row."""


@dataclass(frozen=True)
class StoredCandidates:
    """The embeddings of some keys of a store, `(num_keys,)` int64, in their order; they stay on the disk."""

    store: EmbeddingStore
    keys: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def blocks(self, block_size: int) -> Iterator[tuple[int, Tensor]]:
        return self.store.blocks(self.keys, block_size)


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
    candidates: Tensor | CandidateBlocks,
    top_k: int,
    *,
    block_size: int = 4096,
    device: str | torch.device | None = None,
    backend: Literal["torch", "faiss"] = "torch",
) -> SearchResult:
    """Exact nearest candidates by cosine similarity.

    Every query is compared with every candidate in float32. Ties go to the lower candidate row; a zero vector has
    similarity 0 to everything. Memory is that of one block of scores, of the queries, and of what is kept of each.

    Args:
        query_embeddings: `(num_queries, embedding_dim)`, of any length; normalised here.
        candidates: `(num_candidates, embedding_dim)`, of any length; or what has `__len__` and `blocks(block_size)`.
        top_k: Number of candidates to return for each query, at most all of them.
        block_size: Rows of a block, of queries and of candidates alike.
        device: Where to search; None for the queries' device.
        backend: What proposes the best of a block: torch, or faiss (`pip install 'puma-hf[faiss]'`) on the CPU.

    Returns:
        Scores and indices, `(num_queries, min(top_k, num_candidates))`, on the queries' device.

    Raises:
        ValueError: If a shape, `top_k`, `block_size` or `backend` is out of range, or an embedding is not finite.
        ImportError: If faiss is asked for and not installed.

    Example:
        >>> pool = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
        >>> exact_search(torch.tensor([[1.0, 0.0]]), pool, top_k=2).indices
        tensor([[1, 2]])
    """
    check_backend(backend)
    if query_embeddings.ndim != 2 or not len(query_embeddings) or not len(candidates) or min(top_k, block_size) < 1:
        raise ValueError(
            f"query_embeddings is {tuple(query_embeddings.shape)}, there are {len(candidates)} candidates, top_k is "
            f"{top_k} and block_size is {block_size}; a search needs (num_queries, embedding_dim), and one of each"
        )
    home, device = query_embeddings.device, device or query_embeddings.device
    queries = _unit_rows("query_embeddings", query_embeddings.to(device), 0, query_embeddings.shape[1])
    kept = (len(queries), min(top_k, len(candidates)))
    keys = torch.full(kept, torch.iinfo(torch.int64).min, device=device)
    blocks = _blocks(candidates, block_size) if isinstance(candidates, Tensor) else candidates.blocks(block_size)
    with _full_float32():
        for start, block in blocks:
            rows = _unit_rows("candidates", block.to(device), start, queries.shape[1])
            # All products have one shape, of whole tiles: of another a copy's score may differ in its last digit, and
            # the tie with the copy would be lost.
            missing = -(-block_size // _TILE) * _TILE - len(rows)
            padded = pad(rows, (0, 0, 0, missing)) if missing else rows
            for first in range(0, len(queries), block_size):
                part = slice(first, first + block_size)
                if backend == "faiss":
                    _keep_best(keys[part], *_faiss_best(queries[part], rows, top_k), start)
                else:
                    _keep_best(keys[part], (queries[part] @ padded.T)[:, : len(rows)], None, start)
    return _from_keys(keys.to(home))


def merge_results(results: Sequence[SearchResult], top_k: int) -> SearchResult:
    """One result from those of disjoint parts of a pool, as if the pool had been searched at once.

    Args:
        results: At least one, of the same queries, each searched with this `top_k`; `indices` are rows of the whole
            pool.
        top_k: Number of candidates to return for each query, at most all of them.

    Returns:
        Scores and indices, `(num_queries, min(top_k, num_candidates))`.

    Example:
        >>> query, pool = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
        >>> first, second = exact_search(query, pool[:2], 2), exact_search(query, pool[2:], 2)
        >>> merge_results([first, second._replace(indices=second.indices + 2)], 2).indices
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
    units = normalize(query_embeddings.double(), dim=1)
    return (units - penalty * units.mean(dim=0)).float()


def check_backend(backend: str) -> None:
    """Raise if there is no such backend, or it is not installed: better before hours of embedding than after."""
    if backend not in ("torch", "faiss"):
        raise ValueError(f"backend is {backend!r}, must be 'torch' or 'faiss'")
    if backend == "faiss" and find_spec("faiss") is None:
        raise ImportError("backend 'faiss' needs faiss: pip install 'puma-hf[faiss]', or choose 'torch'")


def _keep_best(keys: Tensor, scores: Tensor, columns: Tensor | None, start: int) -> None:
    """Merge scores of a block, `(num_queries, n)`, into the best keys so far, `(num_queries, top_k)`, in place."""
    # Most blocks hold nothing for most queries, and a maximum is found much quicker than the best k. A tie with the
    # last one that is kept adds nothing, since rows only go up.
    better = (_steps(scores.amax(dim=1)) > keys[:, -1] >> _ROW_BITS).nonzero().flatten()
    if len(better):
        top_k, width = keys.shape[1], scores.shape[1]
        rows = torch.arange(start, start + width, device=keys.device) if columns is None else columns[better] + start
        found = _to_keys(scores[better], rows).topk(min(top_k, width), dim=1).values
        keys[better] = torch.cat([keys[better], found], dim=1).topk(top_k, dim=1).values


def _faiss_best(queries: Tensor, rows: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    import faiss

    k, metric = min(top_k, len(rows)), faiss.METRIC_INNER_PRODUCT
    scores, columns = faiss.knn(queries.cpu().numpy(), rows.cpu().numpy(), k, metric=metric)
    return torch.from_numpy(scores).to(queries.device), torch.from_numpy(columns).to(queries.device)


def _to_keys(scores: Tensor, rows: Tensor) -> Tensor:
    """One integer for each score and row, the score first and then the lower row.

    No two are equal, so `topk` has one answer; on floats it leaves the order of ties to chance.
    """
    keys: Tensor = (_steps(scores) << _ROW_BITS) + (_ROW_MASK - rows)
    return keys


def _from_keys(keys: Tensor) -> SearchResult:
    return SearchResult((keys >> _ROW_BITS).float() / _STEPS, _ROW_MASK - (keys & _ROW_MASK))


def _steps(scores: Tensor) -> Tensor:
    return (scores * _STEPS).round().clamp(-_STEPS, _STEPS).long()


def _unit_rows(name: str, embeddings: Tensor, start: int, dim: int) -> Tensor:
    if embeddings.ndim != 2 or embeddings.shape[1] != dim:
        raise ValueError(
            f"{name} is {tuple(embeddings.shape)}, must be (rows, {dim}) as the queries are: encode both with one model"
        )
    units = normalize(embeddings.float(), dim=1)
    # A sum is NaN where anything is, and needs no copy; infinity becomes NaN when it is normalised.
    if not bool(units.sum().isfinite()):
        bad = (~units.isfinite().all(dim=1)).nonzero().flatten()
        raise ValueError(
            f"{name} has NaN or infinity in {len(bad)} of {len(units)} rows from {start} on, first rows "
            f"{(bad[:5] + start).tolist()}; look at their inputs, or encode in float32 or bfloat16 instead of float16"
        )
    return units


def _blocks(embeddings: Tensor, block_size: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(embeddings), block_size):
        yield start, embeddings[start : start + block_size]


@contextmanager
def _full_float32() -> Iterator[None]:
    """Switch off TensorFloat-32 and bfloat16 products, which a training may have switched on: they keep 3 digits."""
    backends = [part.matmul for part in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(part, "matmul")]
    before = [(matmul, matmul.fp32_precision) for matmul in backends if hasattr(matmul, "fp32_precision")]
    for matmul, _ in before:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        for matmul, precision in before:
            matmul.fp32_precision = precision
