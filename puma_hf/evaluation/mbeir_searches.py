"""What M-BEIR's evaluation searches: each task against its own pool, the pool of all tasks, or both.

Source: M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from puma_hf.data.mbeir_format import Candidate, MBEIRFormatError, Query
from puma_hf.data.mbeir_reader import MBEIR
from puma_hf.data.mbeir_tasks import MBEIRTask
from puma_hf.evaluation.mbeir_results import MBEIRTaskResult
from puma_hf.evaluation.metrics import retrieval_metrics, wrong_modality_at_1

NDCG_K = 10


@dataclass(frozen=True)
class Search:
    """One task against one pool; relevance only has queries to which something in the pool is relevant."""

    task: MBEIRTask
    pool_name: str
    pool: dict[str, Candidate]
    queries: list[Query]
    relevance: dict[str, dict[str, int]]


def read_searches(data: MBEIR, tasks: Sequence[MBEIRTask], split: str, pool_names: Sequence[str]) -> list[Search]:
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
                    f"{pool_name} pool; look at its qrels, or leave the task out with tasks=[...]"
                )
            searches.append(Search(task, pool_name, pool, queries[task], relevance))
    return searches


def task_result(search: Search, rankings: Mapping[str, list[str]], ks: Sequence[int]) -> MBEIRTaskResult:
    task, judged = search.task, list(search.relevance.values())
    ranked = [rankings[qid] for qid in search.relevance]
    metrics = retrieval_metrics(ranked, judged, sorted({*ks, task.reported_k}), ndcg_k=NDCG_K)
    score = metrics[f"hit@{task.reported_k}"]
    if task.reported_k not in ks:  # every row must have the same metrics
        del metrics[f"hit@{task.reported_k}"], metrics[f"recall@{task.reported_k}"]
    modalities = {did: candidate.modality for did, candidate in search.pool.items()}
    metrics["wrong_modality@1"] = wrong_modality_at_1(ranked, judged, modalities)
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
