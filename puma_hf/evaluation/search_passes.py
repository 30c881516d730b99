"""The passes of an exact search: a quick one that proposes, the scores that decide, and one that needs no proof."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from puma_hf.evaluation import search_bounds as bounds
from puma_hf.evaluation.candidate_source import CandidateSource

logger = logging.getLogger(__name__)

ONE = 1 << 30  # cosines are compared in steps of 2^-30
_INDEX_BITS = 32
_INDEX_MASK = (1 << _INDEX_BITS) - 1
_NOTHING = torch.iinfo(torch.int64).min
_SHOWN_ROWS = 5
# Numbers in the float64 tensors of a moment, 32 MiB: small enough for memory, large enough for speed.
_CHUNK_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Queries:
    """Queries as the scores that decide need them; `embeddings` and `norms` lie on one device.

    Attributes:
        embeddings: `(num_queries, embedding_dim)`, as given, or in float64 scaled by powers of two.
        norms: `(num_queries,)` float64.
    """

    embeddings: Tensor
    norms: Tensor

    def __len__(self) -> int:
        return len(self.embeddings)

    def subset(self, rows: Tensor) -> Queries:
        return self if len(rows) == len(self) else Queries(self.embeddings[rows], self.norms[rows])

    def chunks(self, size: int) -> Iterator[tuple[slice, Queries]]:
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield part, Queries(self.embeddings[part], self.norms[part])


@dataclass
class BadRows:
    """Rows of the pool that are not finite: how many, and the first."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, start: int, is_finite: Tensor) -> None:
        if not bool(is_finite.all()):
            rows = (~is_finite).nonzero().flatten().tolist()
            self.count += len(rows)
            self.first += [start + row for row in rows[: _SHOWN_ROWS - len(self.first)]]

    def check(self, name: str, total: int) -> None:
        if self.count:
            raise ValueError(
                f"{name} has {self.count} of {total} rows with NaN or infinity, first rows {self.first}; look at "
                "their inputs, or encode in float32 or bfloat16 instead of float16"
            )


@dataclass(frozen=True)
class Pass:
    """How the quick pass runs.

    Attributes:
        dtype: Type of its products and scores.
        num_kept: Candidates it proposes for each query.
        block_size: Rows of a block.
        device: Where the products are made.
        backend: "torch" or "faiss".
        show_progress_bar: Whether to show how far it is.
    """

    dtype: torch.dtype
    num_kept: int
    block_size: int
    device: torch.device
    backend: str
    show_progress_bar: bool


def make_queries(embeddings: Tensor, block_size: int, device: torch.device) -> Queries:
    """Check that every query is finite, and measure it.

    Raises:
        ValueError: If one is not.
    """
    if embeddings.dtype is torch.float64:
        embeddings = torch.cat([bounds.double_rows(rows) for rows in embeddings.split(block_size)])
    embeddings = embeddings.to(device)
    size = _chunk_size(embeddings.shape[1])
    norms = torch.cat([bounds.norms_of(rows.double()) for rows in embeddings.split(size)])
    bad = BadRows()
    bad.add(0, norms.isfinite())
    bad.check("query_embeddings", len(embeddings))
    return Queries(embeddings, norms)


def quick_pass(queries: Queries, source: CandidateSource, top_k: int, how: Pass) -> tuple[Tensor, Tensor]:
    """Sort keys `(num_queries, top_k)`, and for which queries they are proven right, `(num_queries,)`.

    Raises:
        ValueError: If a candidate is not finite.
    """
    low = [bounds.low_rows(part.embeddings, how.dtype) for _, part in queries.chunks(how.block_size)]
    low_queries = torch.cat([part.rows for part in low]).to(how.device)
    scores = torch.full((len(queries), how.num_kept), -torch.inf, device=how.device)
    indices = torch.full_like(scores, -1, dtype=torch.int64)
    candidate_error, bad = 0.0, BadRows()
    with _progress(len(source), how.show_progress_bar) as progress, _full_sums(how.device):
        for start, block in source.blocks(how.block_size):
            rows = bounds.low_rows(block.to(queries.norms.device), how.dtype)
            bad.add(start, rows.is_finite)
            if not bad.count:  # otherwise only the count of them is wanted
                candidate_error = max(candidate_error, float(rows.errors.max()))
                _keep_best(scores, indices, low_queries, rows.rows.to(how.device), start, how)
            progress.update(len(block))
    bad.check("candidate_embeddings", len(source))
    query_errors = torch.cat([part.errors for part in low])
    errors = bounds.score_errors(query_errors, candidate_error, source.embedding_dim, how.dtype, how.device.type)
    scores, indices = scores.to(queries.norms.device), indices.to(queries.norms.device)
    return _decide(queries, source, top_k, scores, indices, errors)


def exact_pass(
    queries: Queries, source: CandidateSource, top_k: int, block_size: int, show_progress_bar: bool
) -> Tensor:
    """Sort keys `(num_queries, top_k)` from products in float64 with every candidate.

    A product in float64 is summed in an order of its own and so may lie on the other side of the border between two
    steps. The few that are that close to one are computed again, in the order that decides.

    Raises:
        ValueError: If a candidate is not finite.
    """
    keys = torch.full((len(queries), top_k), _NOTHING, device=queries.norms.device)
    margin = bounds.float64_error(source.embedding_dim) * ONE
    size = max(1, min(block_size, _CHUNK_NUMBERS // block_size))
    bad = BadRows()
    with _progress(len(source), show_progress_bar) as progress:
        for start, block in source.blocks(block_size):
            doubles = bounds.double_rows(block.to(queries.norms.device))
            norms = bounds.norms_of(doubles)
            bad.add(start, norms.isfinite())
            units = bounds.unit_rows(doubles, norms)
            for part, some in queries.chunks(size) if not bad.count else ():
                scaled = bounds.unit_rows(some.embeddings.double(), some.norms) @ units.T * ONE
                steps = scaled.round().to(torch.int64)
                wanted = (steps + 1) << _INDEX_BITS > keys[part, -1:]
                unclear = ((scaled - margin).round() != (scaled + margin).round()) & wanted
                rows, columns = unclear.nonzero(as_tuple=True)
                for pairs in range(0, len(rows), _chunk_size(source.embedding_dim)):
                    chosen = slice(pairs, pairs + _chunk_size(source.embedding_dim))
                    row, column = rows[chosen], columns[chosen]
                    steps[row, column] = _pair_steps(some, row, doubles[column], norms[column])
                found = sort_keys(steps, torch.arange(start, start + len(block), device=steps.device))
                found = found.topk(min(top_k, found.shape[1]), dim=1).values
                keys[part] = torch.cat([keys[part], found], dim=1).topk(top_k, dim=1).values
            progress.update(len(block))
    bad.check("candidate_embeddings", len(source))
    return keys


def sort_keys(steps: Tensor, indices: Tensor) -> Tensor:
    """One int64 for each score and candidate that sorts by score, then by lower index; no two are equal.

    The upper half is the cosine in steps, the lower half the complement of the index.  `topk` on these keys is
    deterministic, on floats with ties it is not.
    """
    return (steps << _INDEX_BITS) + (_INDEX_MASK - indices)


def from_sort_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores in float64, and indices."""
    return (keys >> _INDEX_BITS).double() / ONE, _INDEX_MASK - (keys & _INDEX_MASK)


def _keep_best(scores: Tensor, indices: Tensor, queries: Tensor, rows: Tensor, start: int, how: Pass) -> None:
    """Merge a block into the best so far, in place; each query's are sorted, best first."""
    for first in range(0, len(queries), how.block_size):
        part = slice(first, first + how.block_size)
        kept = min(how.num_kept, len(rows))
        if how.backend == "faiss":
            found, columns = _faiss_best(queries[part], rows, kept)
            better = torch.arange(len(found), device=found.device)
        else:
            products = queries[part] @ rows.T
            # Most blocks hold nothing for most queries: looking for their best is quicker than sorting.
            better = (products.amax(dim=1).float() > scores[part, -1]).nonzero().flatten()
            products = products if len(better) == len(products) else products[better]
            found, columns = products.topk(kept, dim=1)
        better = better + first
        merged, places = torch.cat([scores[better], found.float()], dim=1).topk(how.num_kept, dim=1)
        scores[better] = merged
        indices[better] = torch.cat([indices[better], columns + start], dim=1).gather(1, places)


def _faiss_best(queries: Tensor, rows: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    import faiss

    found, columns = faiss.knn(queries.cpu().numpy(), rows.cpu().numpy(), kept, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(found).to(queries.device), torch.from_numpy(columns).to(queries.device)


def _decide(
    queries: Queries,
    source: CandidateSource,
    top_k: int,
    scores: Tensor,
    indices: Tensor,
    errors: bounds.ScoreErrors,
) -> tuple[Tensor, Tensor]:
    """Score what the quick pass kept as it counts, and tell where something it dropped could have been better."""
    scores = scores.double()
    # What cannot reach the k-th score that is certain (less a step, for rounding) is not among the best k.
    floor = errors.below(scores[:, top_k - 1 : top_k]) - 1 / ONE
    rows, places = (errors.above(scores) >= floor).nonzero(as_tuple=True)
    candidates, order = indices[rows, places].sort()
    rows, places = rows[order], places[order]
    keys, exact = torch.full_like(indices, _NOTHING), (scores * ONE).to(torch.int64)
    for start in range(0, len(rows), _chunk_size(source.embedding_dim)):
        chunk = slice(start, start + _chunk_size(source.embedding_dim))
        wanted, inverse = candidates[chunk].unique_consecutive(return_inverse=True)
        doubles = bounds.double_rows(source.rows(wanted.cpu()).to(keys.device))
        norms = bounds.norms_of(doubles)
        row, place = rows[chunk], places[chunk]
        steps = _pair_steps(queries, row, doubles[inverse], norms[inverse])
        keys[row, place] = sort_keys(steps, candidates[chunk])
        exact[row, place] = steps
    keys = keys.topk(top_k, dim=1).values
    exact_scores = exact / ONE
    is_sound = (exact_scores <= errors.above(scores) + 1 / ONE) & (exact_scores >= errors.below(scores) - 1 / ONE)
    if not bool(is_sound.all()):
        logger.warning("%s multiplies less exactly than its types promise: searching again in float64", scores.device)
        return keys, torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    # Rounding to steps keeps order. Equal steps prove nothing: the tie may go to a lower row that was dropped.
    most = (errors.above(scores[:, -1:]) * ONE).round().flatten()
    was_dropped = scores.shape[1] < len(source)
    return keys, (most < (keys[:, -1] >> _INDEX_BITS)) | (not was_dropped)


def _pair_steps(queries: Queries, rows: Tensor, doubles: Tensor, norms: Tensor) -> Tensor:
    """The cosines that decide, in steps: of query `rows[i]` with candidate `doubles[i]`, each on its own."""
    dots = bounds.ordered_sum(doubles * queries.embeddings[rows].double())
    lengths = queries.norms[rows] * norms
    return (dots / lengths.where(lengths > 0, 1.0) * ONE).round().to(torch.int64)


def _chunk_size(dim: int) -> int:
    return max(1, _CHUNK_NUMBERS // 2 // dim)


def _progress(total: int, show: bool) -> tqdm:
    return tqdm(total=total, desc="Searching", unit=" candidates", unit_scale=True, disable=not show)


@contextmanager
def _full_sums(device: torch.device) -> Iterator[None]:
    """Keep CUDA from rounding the parts of a sum to 16 bits, which no bound covers."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("fp16", "bf16")] + ["allow_fp16_accumulation"]
    before = {name: getattr(matmul, name) for name in names if hasattr(matmul, name)} if device.type == "cuda" else {}
    try:
        for name in before:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
