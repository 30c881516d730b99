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

from puma_hf import evaluate_mbeir
from puma_hf.data.mbeir import MBEIR
from puma_hf.evaluation.metric_path import metric_path
from puma_hf.evaluation.metrics import retrieval_metrics
from tests.evaluation.fake_encoder import FakeEncoder

RANKINGS = [["b", "a", "c"], ["c", "a", "b"]]


@pytest.fixture
def metric(tmp_path: Path) -> Any:
    return evaluate.load(metric_path(), cache_dir=str(tmp_path))


def test_equals_a_computation_by_hand(metric: Any) -> None:
    figures = metric.compute(predictions=RANKINGS, references=[["a"], ["c", "b"]], ks=[1, 2])
    second = 1 / math.log2(3)
    whole = 1 + second  # the ideal ranking of two relevant candidates
    expected = {
        "hit@1": 1 / 2,
        "hit@2": 1.0,
        "recall@1": (0 + 1 / 2) / 2,
        "recall@2": (1 + 1 / 2) / 2,
        "ndcg@10": (second + (1 + 1 / 2) / whole) / 2,
        "mrr@10": (1 / 2 + 1) / 2,
    }
    assert list(figures) == list(expected)
    assert figures == pytest.approx(expected, abs=1e-15)


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
    assert {"hit@12", "recall@3", "ndcg@7", "mrr@3"} < set(figures)


def test_equals_the_table(metric: Any, root: Path) -> None:
    table = evaluate_mbeir(FakeEncoder(), root, pool="global", ks=(1, 2, 5), show_progress_bar=False)
    data = MBEIR(root)
    modalities = {did: candidate.modality for did, candidate in data.global_pool("test").items()}
    for row in table.rows:
        qrels = data.qrels(row.task, "test", data.queries(row.task, "test"), data.global_pool("test"))
        judged = {qid: gains for qid, gains in qrels.items() if gains}
        figures = metric.compute(
            predictions=[table.rankings["global"][row.task.name][qid] for qid in judged],
            references=[[{"id": did, "relevance": gain} for did, gain in gains.items()] for gains in judged.values()],
            ks=(1, 2, 5),
            modalities=modalities,
        )
        assert figures == pytest.approx(row.metrics, abs=1e-12)


def test_rows_may_be_added_one_by_one(metric: Any) -> None:
    for ranking, references in zip(RANKINGS, [["a"], ["c", "b"]], strict=True):
        metric.add(predictions=ranking, references=references)
    assert metric.compute(ks=[1])["recall@1"] == 0.25


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([["a", "b", "a"]], [["a"]], r"predictions\[0\] has 'a' more than once; give each candidate once"),
        ([["a"], ["b"]], [["a"], ["c", "c"]], r"references\[1\] has 'c' more than once"),
        ([["a"]], [[]], "query 0 has no relevant candidate; leave such queries out"),
    ],
)
def test_bad_input(metric: Any, predictions: list[list[str]], references: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)


def test_candidates_without_a_modality(metric: Any) -> None:
    with pytest.raises(
        ValueError, match=r"modalities lacks 2 of 3 candidates, first \['a', 'd'\]; it must have that of every"
    ):
        metric.compute(predictions=[["a", "b"]], references=[["d"]], modalities={"b": "text"})


def test_loads_in_a_fresh_process_offline_and_writes_only_into_its_caches(tmp_path: Path) -> None:
    # `evaluate` would import transformers, which takes seconds and is for something else.
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import evaluate, json; del sys.modules['transformers']\n"
        "metric = evaluate.load(sys.argv[1])\n"
        "print(json.dumps(metric.compute(predictions=[['b', 'a']], references=[['a']], ks=[1, 2])))\n"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", code, metric_path()]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures == retrieval_metrics([["b", "a"]], [{"a": 1}], ks=[1, 2])
    assert list((tmp_path / "modules").rglob("retrieval_metric.py"))
    assert list(work.iterdir()) == []


def test_no_line_imports_two_modules() -> None:
    source = Path(metric_path(), "retrieval_metric.py").read_text(encoding="utf-8")
    lines = re.findall(r"^import .*$", source, re.MULTILINE)
    assert "import evaluate" in lines
    assert [line for line in lines if "," in line] == []


def test_the_card_says_what_the_hub_asks_for(metric: Any) -> None:
    card = ModelCard.load(Path(metric_path(), "README.md"))
    assert {"evaluate", "metric"} <= set(card.data.tags)
    assert card.data.to_dict()["sdk"] == "static"
    for name in ("ks", "ndcg_k", "mrr_k", "modalities"):
        assert f"`{name}`" in card.text
        assert f"{name}:" in metric.inputs_description
