"""The metrics, and the same as a metric of the evaluate library."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import evaluate
import pytest

from puma_hf.evaluation import metric_path
from puma_hf.evaluation.metrics import overlap_at_k, retrieval_metrics, wrong_modality_at_1, wrong_modality_at_k

RANKINGS = [["b", "a", "c"], ["c", "a", "b"]]


def test_metrics_by_hand() -> None:
    rankings = [["a", "b", "c", "d"], ["d", "c", "b", "a"]]
    relevance = [{"b": 1, "d": 2, "x": 0}, {"d": 1}]
    metrics = retrieval_metrics(rankings, relevance, ks=(1, 2, 4), ndcg_k=4, mrr_k=4)
    gain = (1 / math.log2(3) + 2 / math.log2(5)) / (2 + 1 / math.log2(3))
    expected = {
        **{"hit@1": 0.5, "hit@2": 1.0, "hit@4": 1.0, "recall@1": 0.5, "recall@2": 0.75, "recall@4": 1.0},
        **{"ndcg@4": (gain + 1) / 2, "mrr@4": 0.75},
    }
    assert list(metrics) == list(expected)
    assert metrics == pytest.approx(expected, abs=1e-15)


def test_metrics_stop_at_their_k_and_count_what_was_not_found() -> None:
    metrics = retrieval_metrics([["x", "a"]], [{"a": 1, "b": 1}], ks=(1, 100), ndcg_k=1, mrr_k=1)
    assert metrics == {"hit@1": 0, "hit@100": 1, "recall@1": 0, "recall@100": 0.5, "ndcg@1": 0, "mrr@1": 0}


def test_wrong_modality_of_the_first_k() -> None:
    modalities = {"a": "text", "b": "image", "c": "image,text"}
    rankings = [["b", "a", "c"], ["c", "a", "b"], ["a"]]
    relevance = [{"b": 1, "a": 0}, {"a": 2, "b": 1}, {"c": 1}]
    wrong = {k: wrong_modality_at_k(rankings, relevance, modalities, k) for k in (1, 2, 3, 10)}
    # Of the third ranking only one candidate is there, whatever k.
    expected = {1: (0 + 1 + 1) / 3, 2: (1 / 2 + 1 / 2 + 1) / 3, 3: (2 / 3 + 1 / 3 + 1) / 3, 10: (2 / 3 + 1 / 3 + 1) / 3}
    assert wrong == pytest.approx(expected, abs=1e-15)
    assert wrong[1] == wrong_modality_at_1(rankings, relevance, modalities)


def test_overlap_by_hand() -> None:
    found, wanted = [["a", "b", "c"], ["x", "y"], ["e"]], [["c", "a", "d"], ["x", "y"], ["f", "e"]]
    # Of a pool of fewer candidates than k the share is of those that there are.
    assert overlap_at_k(found, wanted, 2) == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert overlap_at_k(found, wanted) == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)


@pytest.mark.parametrize(
    ("rankings", "relevance", "k", "message"),
    [
        ([["a"]], [], 1, "1 rankings, 0 relevance judgements.* give one of each"),
        ([["a"], ["a"]], [{"a": 1}, {"a": 0}], 1, "query 1 has no relevant candidate; leave such queries out"),
    ],
)
def test_wrong_arguments(rankings: list[list[str]], relevance: list[dict[str, int]], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(rankings, relevance, [k])
    with pytest.raises(ValueError, match=message):
        wrong_modality_at_k(rankings, relevance, {"a": "text"}, k)


# --- in the evaluate library


@pytest.fixture
def metric(tmp_path: Path) -> Any:
    return evaluate.load(metric_path(), cache_dir=str(tmp_path))


def test_graded_references_and_wrong_modalities_by_hand(metric: Any) -> None:
    graded = [[{"id": "a", "relevance": 3}, {"id": "b", "relevance": 0}], [{"id": "c", "relevance": 1}]]
    modalities = {"a": "image", "b": "text", "c": "image"}
    figures = metric.compute(predictions=RANKINGS, references=graded, ks=[1, 2, 3], modalities=modalities)
    assert figures["ndcg@10"] == pytest.approx((1 / math.log2(3) + 1) / 2)
    assert figures["hit@1"] == 0.5  # relevance 0 is no hit
    assert figures["wrong_modality@1"] == (1 + 0) / 2
    assert figures["wrong_modality@2"] == (1 / 2 + 0) / 2
    assert figures["wrong_modality@3"] == pytest.approx((1 / 3 + 1 / 3) / 2)
    with pytest.raises(ValueError, match=r"predictions\[0\] has a candidate more than once; give each candidate once"):
        metric.compute(predictions=[["a", "b", "a"]], references=[["a"]])
