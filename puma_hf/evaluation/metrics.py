"""Metrics of rankings."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

IdT = TypeVar("IdT", bound=Hashable)


def retrieval_metrics(
    rankings: Sequence[Sequence[IdT]],
    relevance: Sequence[Mapping[IdT, int]],
    ks: Sequence[int] = (1, 5, 10),
    *,
    ndcg_k: int = 10,
    mrr_k: int = 10,
) -> dict[str, float]:
    """Means over queries of the usual metrics of a ranking.

    - `hit@k`: whether any relevant candidate is in the top k. Papers on M-BEIR call this Recall@k.
    - `recall@k`: share of the relevant candidates in the top k.
    - `ndcg@k`: relevance / log2(rank + 1) summed over the top k, over that of the ideal ranking.
    - `mrr@k`: one over the rank of the first relevant candidate, 0 beyond k.

    Args:
        rankings: For each query, candidate ids, best first, without repetition.
        relevance: For each query, the relevance of its relevant candidates; 0 is not relevant.
        ks: The k of hit@k and recall@k.
        ndcg_k: The k of nDCG.
        mrr_k: The k of MRR.

    Returns:
        The value of each metric, between 0 and 1, by name.

    Raises:
        ValueError: If the lengths differ, there is no query, a query has nothing relevant, or a k is below 1.

    Example:
        >>> retrieval_metrics([["b", "a"]], [{"a": 1}], ks=[1, 2])["hit@2"]
        1.0
    """
    _check(rankings, relevance, (*ks, ndcg_k, mrr_k))
    totals: dict[str, float] = {}
    for ranking, judged in zip(rankings, relevance, strict=True):
        # Not sentence-transformers' InformationRetrievalEvaluator: it has the same hits, recall and MRR (a test holds
        # them equal), but takes every judgement for 1, and trec_eval's nDCG is graded.
        gains = [judged.get(candidate, 0) for candidate in ranking]
        ideal = sorted(judged.values(), reverse=True)
        # Nothing relevant in the top k: an infinite rank, whose inverse is 0.
        first = next((rank for rank, gain in enumerate(gains[:mrr_k], start=1) if gain > 0), math.inf)
        num_relevant = sum(gain > 0 for gain in ideal)
        found = {k: sum(gain > 0 for gain in gains[:k]) for k in ks}
        values = {f"hit@{k}": float(count > 0) for k, count in found.items()}
        values |= {f"recall@{k}": count / num_relevant for k, count in found.items()}
        values[f"ndcg@{ndcg_k}"] = _discounted(gains[:ndcg_k]) / _discounted(ideal[:ndcg_k])
        values[f"mrr@{mrr_k}"] = 1 / first
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + value
    return {name: total / len(rankings) for name, total in totals.items()}


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def overlap_at_k(rankings: Sequence[Sequence[IdT]], references: Sequence[Sequence[IdT]], k: int = 10) -> float:
    """Share of each reference's first k that the first k of the ranking hold, too; the mean over queries.

    Example:
        >>> overlap_at_k([["b", "a", "c"]], [["a", "d", "b"]], k=2)
        0.5
    """
    pairs = [(set(ranking[:k]), set(other[:k])) for ranking, other in zip(rankings, references, strict=True)]
    return sum(len(ranking & other) / len(other) for ranking, other in pairs) / len(pairs)


def wrong_modality_at_k(
    rankings: Sequence[Sequence[IdT]], relevance: Sequence[Mapping[IdT, int]], modalities: Mapping[IdT, str], k: int
) -> float:
    """Share of the first k candidates with a modality that none of the query's relevant candidates has.

    The mean over queries, between 0 and 1. A ranking shorter than k is taken as it is. Rankings, relevance and errors
    are those of `retrieval_metrics`; `modalities` has the modality of every candidate.

    Example:
        >>> wrong_modality_at_k([["b", "a"]], [{"a": 1}], {"a": "image", "b": "text"}, k=2)
        0.5
    """
    _check(rankings, relevance, (k,))
    total = 0.0
    for ranking, judged in zip(rankings, relevance, strict=True):
        # A query may have relevant candidates of more than one kind; none of these is wrong.
        wanted = {modalities[candidate] for candidate, gain in judged.items() if gain > 0}
        wrong = [modalities[candidate] not in wanted for candidate in ranking[:k]]
        total += sum(wrong) / len(wrong)
    return total / len(rankings)


def wrong_modality_at_1(
    rankings: Sequence[Sequence[IdT]], relevance: Sequence[Mapping[IdT, int]], modalities: Mapping[IdT, str]
) -> float:
    """`wrong_modality_at_k` of the first candidate alone.

    Example:
        >>> wrong_modality_at_1([["b", "a"]], [{"a": 1}], {"a": "image", "b": "text"})
        1.0
    """
    return wrong_modality_at_k(rankings, relevance, modalities, k=1)


def metric_path() -> str:
    """The folder of the same metrics for `evaluate.load`; it works offline.

    Example:
        >>> import evaluate
        >>> from puma_hf.evaluation import metric_path
        >>> metric = evaluate.load(metric_path())
        >>> metric.compute(predictions=[["b", "a"]], references=[["a"]], ks=[1, 2])["hit@2"]
        1.0
    """
    return str(Path(__file__).parent / "retrieval_metric")


def _check(rankings: Sequence[Sequence[IdT]], relevance: Sequence[Mapping[IdT, int]], ks: Sequence[int]) -> None:
    if len(rankings) != len(relevance) or not rankings or min(ks) < 1:
        problem = f"{len(rankings)} rankings, {len(relevance)} relevance judgements, and k is {sorted(set(ks))}"
        raise ValueError(f"{problem}; give one of each for at least one query, and every k of 1 or more")
    if missing := [row for row, judged in enumerate(relevance) if not any(gain > 0 for gain in judged.values())]:
        raise ValueError(f"query {missing[0]} has no relevant candidate; leave such queries out, and say how many")
