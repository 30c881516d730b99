from __future__ import annotations

import math
import random

import pytest

from puma_hf.evaluation.metrics import retrieval_metrics, wrong_modality_at_1, wrong_modality_at_k

INF = math.inf


def test_metrics_by_hand() -> None:
    rankings = [["a", "b", "c", "d"], ["d", "c", "b", "a"]]
    relevance = [{"b": 1, "d": 2, "x": 0}, {"d": 1}]
    metrics = retrieval_metrics(rankings, relevance, ks=(1, 2, 4), ndcg_k=4, mrr_k=4)
    gain = (1 / math.log2(3) + 2 / math.log2(5)) / (2 + 1 / math.log2(3))
    assert metrics == pytest.approx(
        {
            "hit@1": 0.5,
            "hit@2": 1.0,
            "hit@4": 1.0,
            "recall@1": 0.5,
            "recall@2": 0.75,
            "recall@4": 1.0,
            "ndcg@4": (gain + 1) / 2,
            "mrr@4": 0.75,
        },
        abs=1e-15,
    )


def test_metrics_stop_at_their_k_and_count_what_was_not_found() -> None:
    metrics = retrieval_metrics([["x", "a"]], [{"a": 1, "b": 1}], ks=(1, 100), ndcg_k=1, mrr_k=1)
    assert metrics == {"hit@1": 0, "hit@100": 1, "recall@1": 0, "recall@100": 0.5, "ndcg@1": 0, "mrr@1": 0}


def test_metrics_equal_a_second_way_of_counting() -> None:
    rng = random.Random(0)
    rankings = [rng.sample(range(30), 12) for _ in range(50)]
    relevance = [{did: 1 for did in rng.sample(range(30), rng.randint(1, 12))} for _ in range(50)]
    metrics = retrieval_metrics(rankings, relevance, ks=(1, 5, 10))
    for k in (1, 5, 10):
        found = [len(set(ranking[:k]) & set(judged)) for ranking, judged in zip(rankings, relevance, strict=True)]
        assert metrics[f"hit@{k}"] == sum(count > 0 for count in found) / 50
        recalls = [count / len(judged) for count, judged in zip(found, relevance, strict=True)]
        assert metrics[f"recall@{k}"] == pytest.approx(sum(recalls) / 50, abs=1e-12)
    ranks = [
        min((ranking[:10].index(did) + 1 for did in judged if did in ranking[:10]), default=INF)
        for ranking, judged in zip(rankings, relevance, strict=True)
    ]
    assert metrics["mrr@10"] == pytest.approx(sum(1 / rank for rank in ranks) / 50, abs=1e-12)


@pytest.mark.parametrize(
    ("rankings", "relevance", "ks", "message"),
    [
        ([], [], [1], "0 rankings and 0 relevance judgements"),
        ([["a"]], [], [1], "1 rankings and 0 relevance judgements; give one of each"),
        ([["a"]], [{"a": 0}], [1], "query 0 has no relevant candidate; leave such queries out"),
        ([["a"]], [{"a": 1}], [0], r"ks is \[0\], ndcg_k is 10, mrr_k is 10; every k must be 1 or more"),
    ],
)
def test_wrong_metric_arguments(
    rankings: list[list[str]], relevance: list[dict[str, int]], ks: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(rankings, relevance, ks)


def test_wrong_modality() -> None:
    modalities = {"a": "text", "b": "image", "c": "image,text"}
    rankings = [["a", "b"], ["b", "a"], ["c", "a"], ["b", "c"]]
    relevance = [{"b": 1}, {"b": 1}, {"a": 1, "b": 1, "c": 0}, {"a": 1, "b": 2}]
    assert wrong_modality_at_1(rankings, relevance, modalities) == 0.5
    with pytest.raises(ValueError, match="0 rankings and 0 relevance judgements"):
        wrong_modality_at_1([], [], modalities)


def test_wrong_modality_of_the_first_k() -> None:
    modalities = {"a": "text", "b": "image", "c": "image,text"}
    rankings = [["b", "a", "c"], ["c", "a", "b"], ["a"]]
    relevance = [{"b": 1, "a": 0}, {"a": 2, "b": 1}, {"c": 1}]
    wrong = {k: wrong_modality_at_k(rankings, relevance, modalities, k) for k in (1, 2, 3, 10)}
    # Of the third ranking only one candidate is there, whatever k.
    expected = {1: (0 + 1 + 1) / 3, 2: (1 / 2 + 1 / 2 + 1) / 3, 3: (2 / 3 + 1 / 3 + 1) / 3, 10: (2 / 3 + 1 / 3 + 1) / 3}
    assert wrong == pytest.approx(expected, abs=1e-15)
    assert wrong[1] == wrong_modality_at_1(rankings, relevance, modalities)


@pytest.mark.parametrize(
    ("rankings", "relevance", "k", "message"),
    [
        ([], [], 1, "0 rankings and 0 relevance judgements; give one of each"),
        ([["a"]], [{"a": 1}], 0, "k is 0, must be 1 or more"),
        ([["a"], ["a"]], [{"a": 1}, {"a": 0}], 1, "query 1 has 0 relevant and 1 ranked candidates; leave such queries"),
        ([[]], [{"a": 1}], 1, "query 0 has 1 relevant and 0 ranked candidates"),
    ],
)
def test_wrong_modality_arguments(
    rankings: list[list[str]], relevance: list[dict[str, int]], k: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        wrong_modality_at_k(rankings, relevance, {"a": "text"}, k)
