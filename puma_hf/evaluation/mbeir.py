"""M-BEIR's table: every task against its own pool, the pool of all tasks, or both.

Source: M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from puma_hf.data.mbeir_format import Candidate, MBEIRFormatError, Query
from puma_hf.data.mbeir_reader import MBEIR, select_tasks
from puma_hf.data.mbeir_tasks import MBEIRTask
from puma_hf.evaluation.mbeir_results import MBEIRResults
from puma_hf.evaluation.mbeir_searches import NDCG_K, Search, read_searches, task_result
from puma_hf.evaluation.search import exact_search

logger = logging.getLogger(__name__)

_POOLS: dict[str, tuple[str, ...]] = {"local": ("local",), "global": ("global",), "both": ("local", "global")}


class Encoder(Protocol):
    """What is asked of a model: `encode(inputs, prompt=..., batch_size=..., show_progress_bar=...)`."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Embed inputs as rows: a tensor or array `(len(inputs), embedding_dim)`."""


def evaluate_mbeir(
    model: Encoder,
    root: str | Path | MBEIR,
    *,
    split: str = "test",
    tasks: Iterable[str] | None = None,
    pool: Literal["local", "global", "both"] = "local",
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 32,
    block_size: int = 4096,
    instruction_seed: int | None = None,
    show_progress_bar: bool = True,
    search_device: str | torch.device = "cpu",
    encode_kwargs: Mapping[str, Any] | None = None,
) -> MBEIRResults:
    """Measure a model on M-BEIR or any dataset in its layout.

    Each distinct candidate is encoded once, without instruction, however many pools it is in.  Queries are
    encoded with their task's instruction as `prompt`.  Inputs of one modality go together: text,
    `{"image": path}` or `{"image": path, "text": ...}`.

    Args:
        model: A `SentenceTransformer` or anything with its `encode`.
        root: Folder in M-BEIR's layout, or an `MBEIR` of it.
        split: Split to evaluate.
        tasks: Names such as "webqa_task1"; None for all of the split.
        pool: "local" for each task's own pool, "global" for the pool of all tasks, or "both".
        ks: The k of hit@k and recall@k.
        batch_size: Batch size of `encode`.
        block_size: Rows compared at a time, see `exact_search`.
        instruction_seed: None for the first wording of each instruction, a number to draw one a query.
        show_progress_bar: Whether `encode` shows its progress.
        search_device: Device of the search.
        encode_kwargs: Further arguments of `encode`.

    Returns:
        One row a task and pool, and the rankings.

    Raises:
        ValueError: If an argument is out of range, or an embedding is not finite.
        MBEIRFormatError: If a file is not what the format says; the message names file and line.
        FileNotFoundError: If a file or an image is missing.

    Example:
        >>> results = evaluate_mbeir(model, "demo/emoji", pool="both")  # doctest: +SKIP
        >>> print(results.to_markdown())  # doctest: +SKIP
    """
    if pool not in _POOLS:
        raise ValueError(f"pool is {pool!r}, must be one of {list(_POOLS)}")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {list(ks)}, must be numbers of 1 or more, such as (1, 5, 10)")
    data = root if isinstance(root, MBEIR) else MBEIR(root)
    chosen = select_tasks(data.tasks(split), tasks)
    searches = read_searches(data, chosen, split, _POOLS[pool])  # reads and checks every file before encoding
    candidates = _distinct_candidates(searches)
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar, **(encode_kwargs or {})}
    logger.info("Encoding %d candidates", len(candidates))
    # The empty prompt, unlike None, keeps a SentenceTransformer's default prompt away.
    pool_embeddings = _encode(model, list(candidates.values()), [""] * len(candidates), options)
    row_of = {did: row for row, did in enumerate(candidates)}
    query_embeddings: dict[MBEIRTask, Tensor] = {}
    results = MBEIRResults(split, [], {name: {} for name in _POOLS[pool]})
    top_k = max(*ks, NDCG_K, *(task.reported_k for task in chosen))
    for search in searches:
        task = search.task
        if task not in query_embeddings:
            modality = task.candidate_modality
            prompts = [data.instruction(query, modality, instruction_seed) for query in search.queries]
            query_embeddings[task] = _encode(model, search.queries, prompts, options)
        dids = list(search.pool)
        rows = [row_of[did] for did in dids]
        whole = rows == list(range(len(candidates)))  # no copy of the largest pool
        found = exact_search(
            query_embeddings[task].to(search_device),
            pool_embeddings if whole else pool_embeddings[rows],
            top_k,
            block_size=block_size,
        )
        ranked = [[dids[index] for index in ranking] for ranking in found.indices.tolist()]
        rankings = {query.qid: ranking for query, ranking in zip(search.queries, ranked, strict=True)}
        results.rankings[search.pool_name][task.name] = rankings
        results.rows.append(task_result(search, rankings, ks))
    return results


def _distinct_candidates(searches: Sequence[Search]) -> dict[str, Candidate]:
    """Every candidate once; the largest pool comes first, so that it is a prefix of the result."""
    distinct: dict[str, Candidate] = {}
    for search in sorted(searches, key=lambda search: -len(search.pool)):
        for did, candidate in search.pool.items():
            if distinct.setdefault(did, candidate) != candidate:
                raise MBEIRFormatError(
                    f"did {did!r} of the {search.pool_name} pool of {search.task.name} differs from that in "
                    f"another pool: {candidate} and {distinct[did]}; a did must mean the same in every pool"
                )
    return distinct


def _encode(
    model: Encoder, records: Sequence[Query | Candidate], prompts: Sequence[str], options: Mapping[str, Any]
) -> Tensor:
    """Embeddings `(len(records), embedding_dim)`, float32, in the order of the records."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, (record, prompt) in enumerate(zip(records, prompts, strict=True)):
        groups[prompt, record.modality].append(row)
    embeddings = torch.empty(0, 0)
    for (prompt, modality), rows in groups.items():
        inputs = [records[row].model_input for row in rows]
        encoded = torch.as_tensor(model.encode(inputs, prompt=prompt, **options)).float().cpu()
        if not embeddings.numel() and encoded.ndim == 2:
            embeddings = torch.empty(len(records), encoded.shape[1])
        if encoded.shape != (len(rows), embeddings.shape[1]):
            raise ValueError(
                f"encode returned {tuple(encoded.shape)} for {len(rows)} inputs of modality {modality!r}, "
                f"expected ({len(rows)}, embedding_dim) with the same embedding_dim for every modality"
            )
        embeddings[rows] = encoded
    return embeddings
