"""The metrics, and the same as a metric of the evaluate library."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import pytest
from huggingface_hub import ModelCard
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from puma_hf.evaluation import metric_path
from puma_hf.evaluation.metrics import retrieval_metrics, wrong_modality_at_1, wrong_modality_at_k

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


def test_ungraded_they_are_those_of_sentence_transformers() -> None:
    rng = random.Random(0)
    pool = [str(number) for number in range(30)]
    rankings = [rng.sample(pool, 12) for _ in range(50)]
    relevance = [{did: 1 for did in rng.sample(pool, rng.randint(1, 12))} for _ in range(50)]
    theirs = InformationRetrievalEvaluator(
        {str(row): "a query" for row in range(50)},
        dict.fromkeys(pool, "a candidate"),
        {str(row): set(judged) for row, judged in enumerate(relevance)},
        accuracy_at_k=[1, 5, 10],
        precision_recall_at_k=[1, 5, 10],
    ).compute_metrics([[{"corpus_id": did, "score": -rank} for rank, did in enumerate(one)] for one in rankings])
    ours = retrieval_metrics(rankings, relevance, ks=(1, 5, 10))
    for k in (1, 5, 10):
        assert ours[f"hit@{k}"] == theirs["accuracy@k"][k]
        assert ours[f"recall@{k}"] == pytest.approx(theirs["recall@k"][k], abs=1e-15)
    assert ours["mrr@10"] == pytest.approx(theirs["mrr@k"][10], abs=1e-15)
    assert ours["ndcg@10"] == pytest.approx(theirs["ndcg@k"][10], abs=1e-15)


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
        ([], [], 1, "0 rankings, 0 relevance judgements"),
        ([["a"]], [], 1, "1 rankings, 0 relevance judgements.* give one of each"),
        ([["a"], ["a"]], [{"a": 1}, {"a": 0}], 1, "query 1 has no relevant candidate; leave such queries out"),
        ([["a"]], [{"a": 1}], 0, r"k is \[0.*every k of 1 or more"),
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


@pytest.mark.parametrize("graded", [False, True])
def test_equals_the_function_it_wraps(metric: Any, graded: bool) -> None:
    generator = random.Random(0)
    pool = [f"9:{number}" for number in range(30)]
    rankings = [generator.sample(pool, 12) for _ in range(40)]
    relevance = [
        {candidate: generator.randint(1, 3) if graded else 1 for candidate in generator.sample(pool, 4)}
        for _ in rankings
    ]
    references = [
        [{"id": candidate, "relevance": gain} if graded else candidate for candidate, gain in judged.items()]
        for judged in relevance
    ]
    options = {"ks": (1, 3, 12), "ndcg_k": 7, "mrr_k": 3}
    figures = metric.compute(predictions=rankings, references=references, **options)
    assert figures == retrieval_metrics(rankings, relevance, **options)  # type: ignore[arg-type]


def test_rows_may_be_added_one_by_one(metric: Any) -> None:
    for ranking, references in zip(RANKINGS, [["a"], ["c", "b"]], strict=True):
        metric.add(predictions=ranking, references=references)
    assert metric.compute(ks=[1])["recall@1"] == 0.25


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([["a", "b", "a"]], [["a"]], r"predictions\[0\] has a candidate more than once; give each candidate once"),
        ([["a"], ["b"]], [["a"], ["c", "c"]], r"references\[1\] has a candidate more than once"),
        ([["a"]], [[]], "query 0 has no relevant candidate; leave such queries out"),
    ],
)
def test_bad_input(metric: Any, predictions: list[list[str]], references: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)


def test_loads_in_a_fresh_process_offline_and_writes_only_into_its_caches(tmp_path: Path) -> None:
    # `evaluate` would import transformers, which takes seconds and is for something else.
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import evaluate, json; del sys.modules['transformers']\n"
        "metric = evaluate.load(sys.argv[1])\n"
        "print(json.dumps(metric.compute(predictions=[['b', 'a']], references=[['a']], ks=[1, 2])))\n"
    )
    places = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", **places}
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", code, metric_path()]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == retrieval_metrics([["b", "a"]], [{"a": 1}], ks=[1, 2])
    assert list(work.iterdir()) == []


def test_its_folder_is_one_for_the_hub(metric: Any) -> None:
    source = Path(metric_path(), "retrieval_metric.py").read_text(encoding="utf-8")
    imports = re.findall(r"^import .*$", source, re.MULTILINE)
    assert "import evaluate" in imports
    assert not [line for line in imports if "," in line]  # evaluate reads them line by line
    card = ModelCard.load(Path(metric_path(), "README.md"))
    assert {"evaluate", "metric"} <= set(card.data.tags)
    assert card.data.to_dict()["sdk"] == "static"
    for name in ("ks", "ndcg_k", "mrr_k", "modalities"):
        assert f"`{name}`" in card.text
        assert f"{name}:" in metric.inputs_description
