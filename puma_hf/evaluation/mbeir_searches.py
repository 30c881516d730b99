"""What M-BEIR's evaluation searches: each task against its own pool, the pool of all tasks, or both.

Source: M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from puma_hf.data.mbeir import MBEIR, Candidate, MBEIRTask, Query
from puma_hf.data.records import MBEIRFormatError
from puma_hf.evaluation.mbeir_results import MBEIRTaskResult
from puma_hf.evaluation.metrics import retrieval_metrics, wrong_modality_at_k

logger = logging.getLogger(__name__)

NDCG_K = 10
POOLS: dict[str, tuple[str, ...]] = {"local": ("local",), "global": ("global",), "both": ("local", "global")}


@dataclass(frozen=True)
class Search:
    """One task against one pool; relevance only has queries to which something in the pool is relevant."""

    task: MBEIRTask
    pool_name: str
    pool: Mapping[str, Candidate]
    queries: list[Query]
    relevance: dict[str, dict[str, int]]


def read_searches(data: MBEIR, tasks: Sequence[MBEIRTask], split: str, pool_names: Sequence[str]) -> list[Search]:
    """Read and check the files of an evaluation; the global pool is read once.

    Args:
        data: The dataset.
        tasks: Its tasks.
        split: The split to evaluate.
        pool_names: "local", "global", or both.

    Returns:
        For each pool, a search a task.

    Raises:
        MBEIRFormatError: If a file is not what the format says, or a task has no query with a relevant candidate.
        FileNotFoundError: If a file or an image is missing.
    """
    queries = {task: data.queries(task, split) for task in tasks}
    searches = []
    for pool_name in pool_names:
        global_pool = data.global_pool(split) if pool_name == "global" else None
        for task in tasks:
            pool = data.local_pool(task, split) if global_pool is None else global_pool
            qrels = data.qrels(task, split, queries[task], pool)
            relevance = {qid: judged for qid, judged in qrels.items() if judged}
            if not relevance:
                raise MBEIRFormatError(
                    f"{data.root}: no query of {task.name} ({split}) has a relevant candidate in its "
                    f"{pool_name} pool; look at its qrels, or name the other tasks (tasks=[...], --tasks)"
                )
            searches.append(Search(task, pool_name, pool, queries[task], relevance))
    skipped = [
        f"{count} of {len(search.queries)} in {search.task.name} ({search.pool_name} pool)"
        for search in searches
        if (count := len(search.queries) - len(search.relevance))
    ]
    if skipped:
        logger.warning("Queries to which nothing is relevant are left out of the means: %s", ", ".join(skipped))
    return searches


def distinct_candidates(searches: Sequence[Search]) -> dict[str, Candidate]:
    """Every candidate of some searches once, those of the largest pool first.

    Args:
        searches: What `read_searches` returned.

    Returns:
        The candidates by did.

    Raises:
        MBEIRFormatError: If a did means two things.
    """
    distinct: dict[str, Candidate] = {}
    for search in sorted(searches, key=lambda search: -len(search.pool)):
        for did, candidate in search.pool.items():
            known = distinct.setdefault(did, candidate)
            if known is not candidate and known != candidate:
                raise MBEIRFormatError(
                    f"did {did!r} of the {search.pool_name} pool of {search.task.name} differs from that in "
                    f"another pool: {candidate} and {distinct[did]}; a did must mean the same in every pool"
                )
    return distinct


def task_result(search: Search, rankings: Mapping[str, list[str]], ks: Sequence[int]) -> MBEIRTaskResult:
    """The row of one search.

    Args:
        search: The search.
        rankings: For each qid, the dids of the best candidates, best first: at least so many as the largest k, or all.
        ks: The k of hit@k, recall@k and wrong_modality@k; wrong_modality@1 is always there.

    Returns:
        The row; its metrics are means over the queries in `search.relevance`.
    """
    task, judged = search.task, list(search.relevance.values())
    ranked = [rankings[qid] for qid in search.relevance]
    metrics = retrieval_metrics(ranked, judged, sorted({*ks, task.reported_k}), ndcg_k=NDCG_K)
    score = metrics[f"hit@{task.reported_k}"]
    if task.reported_k not in ks:  # every row must have the same metrics
        del metrics[f"hit@{task.reported_k}"], metrics[f"recall@{task.reported_k}"]
    # Of a pool of millions only what is looked at.
    modalities = {did: search.pool[did].modality for dids in (*ranked, *judged) for did in dids}
    for k in sorted({1, *ks}):
        metrics[f"wrong_modality@{k}"] = wrong_modality_at_k(ranked, judged, modalities, k)
    return MBEIRTaskResult(
        dataset=task.dataset,
        task_id=task.task_id,
        pool=search.pool_name,
        pool_size=len(search.pool),
        num_queries=len(search.relevance),
        num_skipped=len(search.queries) - len(search.relevance),
        score=score,
        metrics=metrics,
    )
