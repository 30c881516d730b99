from __future__ import annotations

import ctypes
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
import pytrec_eval_ext

from puma_hf.data.tasks import MBEIR_INSTRUCTIONS, TASK_MODALITIES, MBEIRTask
from puma_hf.evaluation.mbeir import evaluate_mbeir
from puma_hf.evaluation.results import (
    PUBLISHED,
    PUBLISHED_NOTE,
    MBEIRResults,
    MBEIRTaskResult,
    falling_scores,
    write_run,
)
from tests.data import mbeir_builder as builder
from tests.evaluation.fake_encoder import FakeEncoder

METRICS = {"hit@1": 0.25, "recall@1": 0.2, "ndcg@10": 0.5, "mrr@10": 0.4, "wrong_modality@1": 0.1}
TASKS = [MBEIRTask(number, builder.DATASET) for number in TASK_MODALITIES]


def row(name: str, pool: str = "local", **changes: Any) -> MBEIRTaskResult:
    dataset, _, number = name.rpartition("_task")
    values = {"pool_size": 1000, "num_queries": 10, "num_skipped": 0, "score": 0.625, "metrics": METRICS, **changes}
    return MBEIRTaskResult(dataset, int(number), pool, **values)


def table(results: MBEIRResults) -> list[list[str]]:
    lines = results.to_markdown().split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def results_of(names: list[str], pools: tuple[str, ...] = ("local",), **values: Any) -> MBEIRResults:
    rows = [row(name, pool) for pool in pools for name in names]
    return MBEIRResults(values.pop("split", "test"), rows, **values)


# --- Markdown


def test_published_figures_stand_beside_ours() -> None:
    results = results_of(["cirr_task7", "toys_task7"], ("local", "global"))
    header, _, cirr, toys, mean, *rest = table(results)
    assert header == [
        *("task", "dataset", "pool", "candidates", "queries", "k", "hit@k", "LamRA-Ret 7B", "LamRA < 4B", "PUMA"),
        *("hit@1", "ndcg@10", "wrong_modality@1"),
    ]
    assert " ".join(cirr) == "it -> i cirr local 1,000 10 5 62.5 53.1 47.7 49.9 25.0 50.0 10.0"
    # Other datasets, the global pool and a mean of fewer rows have none.
    assert toys[6:] == ["62.5", "", "", "", "25.0", "50.0", "10.0"]
    assert mean == ["", "**mean**", "local", "", "20", "", "62.5", "", "", "", "25.0", "50.0", "10.0"]
    assert [line[7:10] for line in rest] == [[""] * 3] * 3
    assert results.to_markdown().count(PUBLISHED_NOTE) == 1


def test_the_mean_of_all_sixteen_rows_has_the_published_means() -> None:
    both = table(results_of(sorted(PUBLISHED), ("local", "global")))
    assert both[18][6:10] == ["62.5", "56.6", "51.8", "54.4"]
    assert both[-1][2:10] == ["global", "", "160", "", "62.5", "54.9", "", ""]
    assert table(results_of([*sorted(PUBLISHED), "toys_task1"]))[-1][7:10] == [""] * 3  # ours is of other rows then
    assert table(results_of(sorted(PUBLISHED)[1:]))[-1][7:10] == [""] * 3


@pytest.mark.parametrize(
    "results",
    [
        results_of(["toys_task7"]),
        results_of(["cirr_task7"], ("global",)),
        results_of(["cirr_task7"], split="val"),
        results_of(["cirr_task7"], made_from={"content_hash": "ab"}),  # the nano benchmark's pools are smaller
        results_of(["cirr_task7"], made_from={"candidates_model": "a"}),
    ],
    ids=["other dataset", "global pool", "val", "nano", "two models"],
)
def test_nothing_published_where_it_would_not_compare(results: MBEIRResults) -> None:
    assert "PUMA" not in results.to_markdown()


def test_published_figures_are_those_of_the_papers() -> None:
    assert {f"mbeir_{name}" for name in PUBLISHED} == set(MBEIR_INSTRUCTIONS)
    # Each row is rounded to 0.05, and so is the printed mean.
    for figures, printed in zip(zip(*PUBLISHED.values(), strict=True), (56.6, 51.8, 54.4), strict=True):
        assert sum(figures) / len(figures) == pytest.approx(printed, abs=0.1)


def test_corrected_figures_stand_beside_the_plain_ones() -> None:
    other = {**METRICS, "score": 0.75}
    rows = [row("cirr_task7", corrected=other), row("toys_task7", corrected={**other, "score": 0.25})]
    results = MBEIRResults("test", rows, made_from={"popularity_penalty": 0.2})
    header, _, *lines = table(results)
    assert header[6:9] == ["hit@k", "corrected", "LamRA-Ret 7B"]
    assert [line[6:9] for line in lines] == [
        ["62.5", "75.0", "53.1"],
        ["62.5", "25.0", ""],
        ["62.5", "50.0", ""],
    ]
    assert "less 0.2 times the candidate's mean similarity to all test queries" in results.to_markdown()
    assert results.mean("local")["corrected_score"] == 0.5


# --- JSON


def test_json_round_trip(tmp_path: Path) -> None:
    results = results_of(["cirr_task7", "toys_task1"], ("local", "global"), made_from={"model": "m"})
    path = tmp_path / "new" / "results.json"
    results.to_json(path)
    values = json.loads(path.read_text())
    assert MBEIRResults.from_dict(values) == results
    assert list(values) == ["split", "made_from", "mean", "rows"]
    assert values["mean"]["global"]["hit@1"] == 0.25


# --- trec_eval's files


@pytest.mark.parametrize(
    "scores",
    [
        [1.0] * 60,
        [0.0] * 60,
        [0.5 + 2**-24, 0.5, 0.5, 0.5],  # steps are halved below a power of two
        [2**-29, 2**-30, 0.0, 0.0, -(2**-30), -(2**-30)],
        [0.7, 0.7, 0.7, 0.7 - 1e-7, 0.2, 0.2, -0.3],
    ],
)
def test_scores_fall_and_stay_where_they_are(scores: list[float]) -> None:
    fallen = np.array(falling_scores(scores))
    assert (fallen.astype(np.float32) == fallen).all()
    assert (np.diff(fallen.astype(np.float32)) < 0).all()
    assert np.abs(fallen - scores).max() < 1e-5
    assert falling_scores(fallen.tolist()) == fallen.tolist()  # without ties they stay


def test_a_run_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.trec"
    write_run(path, {"1:2": [("1:9", 0.5), ("1:8", 0.5)], "1:1": [("1:8", 1.0)], "1:3": []}, tag="mine")
    lines = path.read_text().splitlines()
    assert lines == ["1:2 Q0 1:9 1 0.5 mine", "1:2 Q0 1:8 2 0.49999994 mine", "1:1 Q0 1:8 1 1 mine"]


def read_by_trec_eval(reader: str, path: Path) -> int:
    """How many queries trec_eval's own C code, which is part of pytrec_eval's library, finds in a file; -1 for none."""
    read = getattr(ctypes.CDLL(pytrec_eval_ext.__file__), f"te_get_{reader}", None)
    if read is None:
        pytest.skip("this build of pytrec_eval hides trec_eval's functions")
    found = (ctypes.c_long * 8)()  # the count, then pointers
    return found[0] if read(bytes(4096), bytes(path), found) == 1 else -1


def test_trec_eval_agrees_from_the_files(root: Path, tmp_path: Path) -> None:
    """Ties and graded relevance in all eight tasks, local and global; ids in an order that trec_eval would not take."""
    generator = random.Random(0)
    for task in TASKS:  # grades 1 to 3 for half of the pool
        dids = [builder.did(task.task_id, number) for number in range(builder.NUM_CANDIDATES)]
        lines = [
            f"{builder.qid(task.task_id, query)} 0 {did} {generator.randint(1, 3)} {task.task_id}"
            for query in range(builder.NUM_QUERIES - 1)
            for did in generator.sample(dids, 3)
        ]
        builder.write_lines(builder.qrels_path(root, task.task_id, "test"), lines)
    output = tmp_path / "out"
    results = evaluate_mbeir(FakeEncoder(), root, pool="both", output_dir=output, show_progress_bar=False)
    names = {"ndcg@10": "ndcg_cut_10", "recall@1": "recall_1", "recall@5": "recall_5", "recall@10": "recall_10"}
    tied = 0
    for row in results.rows:
        run_path = output / "runs" / row.pool / f"{row.task.name}.trec"
        qrels_path = output / "qrels" / row.pool / f"{row.task.name}.txt"
        with run_path.open() as run_file, qrels_path.open() as qrels_file:
            run, qrels = pytrec_eval.parse_run(run_file), pytrec_eval.parse_qrel(qrels_file)
        # Their order is that of the scores alone.
        order = {qid: sorted(scores, key=lambda did: -scores[did]) for qid, scores in run.items()}
        assert order == results.rankings[row.pool][row.task.name]
        assert read_by_trec_eval("trec_results", run_path) == len(results.rankings[row.pool][row.task.name])
        assert read_by_trec_eval("qrels", qrels_path) == row.num_queries
        measured = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.1,5,10"}).evaluate(run)
        assert len(measured) == row.num_queries
        for name, theirs in names.items():
            mean = sum(values[theirs] for values in measured.values()) / len(measured)
            assert row.metrics[name] == pytest.approx(mean, abs=1e-6), (row.task.name, row.pool, name)
        tied += sum(bool((np.diff(list(scores.values())) > -1e-5).any()) for scores in run.values())
    assert tied > len(results.rows)
