from __future__ import annotations

import ctypes
import random
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import pytrec_eval_ext

from puma_hf.data.mbeir import MBEIR, TASK_MODALITIES, MBEIRTask
from puma_hf.data.records import MBEIRFormatError
from puma_hf.evaluation.mbeir import evaluate_mbeir
from puma_hf.evaluation.trec import falling_scores, read_qrels_file, read_run, write_qrels, write_run
from tests.data import mbeir_builder as builder
from tests.evaluation.fake_encoder import FakeEncoder

TASKS = [MBEIRTask(number, builder.DATASET) for number in TASK_MODALITIES]


@pytest.mark.parametrize(
    "scores",
    [
        [1.0] * 60,
        [0.0] * 60,
        [-1.0] * 60,
        [0.5 + 2**-24, 0.5, 0.5, 0.5],  # steps are halved below a power of two
        [0.5, 0.5 - 2**-30, 0.5 - 2**-29],  # cosines that differ, but not in float32
        [2**-29, 2**-30, 0.0, 0.0, -(2**-30), -(2**-30)],
        [0.7, 0.7, 0.7, 0.7 - 1e-7, 0.2, 0.2, -0.3],
    ],
)
def test_scores_fall_and_stay_where_they_are(scores: list[float]) -> None:
    fallen = np.array(falling_scores(scores))
    assert (fallen.astype(np.float32) == fallen).all()
    assert (np.diff(fallen.astype(np.float32)) < 0).all()
    assert np.abs(fallen - scores).max() < 1e-5


def test_scores_without_ties_are_not_changed() -> None:
    scores = sorted(np.random.default_rng(0).normal(size=50).astype(np.float32).tolist(), reverse=True)
    assert falling_scores(scores) == scores
    assert falling_scores([]) == []


def test_run_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.trec"
    write_run(path, {"1:2": [("1:9", 0.5), ("1:8", 0.5)], "1:1": [("1:8", 1.0)], "1:3": []}, tag="mine")
    lines = path.read_text().splitlines()
    assert lines == ["1:2 Q0 1:9 1 0.5 mine", "1:2 Q0 1:8 2 0.49999994 mine", "1:1 Q0 1:8 1 1 mine"]
    found = read_run(path)
    assert {qid: list(scores) for qid, scores in found.items()} == {"1:2": ["1:9", "1:8"], "1:1": ["1:8"]}
    path.write_text("\n".join(["", lines[1], lines[0]]) + "\n")
    assert list(read_run(path)["1:2"]) == ["1:9", "1:8"]  # best first, whatever the order of the lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1:2 Q0 1:9 1 0.5", r"run\.trec, line 2: expected 'qid Q0 did rank score tag', got '1:2 Q0 1:9 1 0\.5'"),
        ("1:2 Q0 1:9 1 high mine", r"line 2: score is 'high', must be a number"),
        ("1:2 Q0 1:8 2 0.1 mine", r"line 2: '1:8' was ranked for '1:2' before; keep one line"),
    ],
)
def test_broken_runs(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "run.trec"
    path.write_text(f"1:2 Q0 1:8 1 0.6 mine\n{line}\n")
    with pytest.raises(MBEIRFormatError, match=message):
        read_run(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1:2 0 1:9", r"qrels\.txt, line 2: expected 'qid 0 did relevance \[task_id\]', got '1:2 0 1:9'"),
        ("1:2 0 1:9 1 3 4", r"qrels\.txt, line 2: expected 'qid 0 did relevance \[task_id\]', got '1:2 0 1:9 1 3 4'"),
        ("1:2 0 1:9 one 3", r"line 2: relevance is 'one', must be a whole number of 0 or more"),
    ],
)
def test_broken_qrels(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "qrels.txt"
    path.write_text(f"1:2 0 1:8 1 3\n{line}\n")
    with pytest.raises(MBEIRFormatError, match=message):
        read_qrels_file(path)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_official_qrels_round_trip_through_the_reader(root: Path, task: MBEIRTask) -> None:
    """What the reader made of the official file, written and put in its place, is read as the same."""
    data = MBEIR(root)
    queries, pool = data.queries(task), data.local_pool(task)
    path = builder.qrels_path(root, task.task_id, "test")
    lines = path.read_text().splitlines()
    relevance = data.qrels(task, "test", queries, pool)
    assert {gain for judged in relevance.values() for gain in judged.values()} == {1, 2}
    write_qrels(path, relevance, task.task_id)
    assert sorted(path.read_text().splitlines()) == sorted(lines)
    assert data.qrels(task, "test", queries, pool) == relevance == read_qrels_file(path)


def read_by_trec_eval(reader: str, path: Path) -> int:
    """How many queries trec_eval's own C code, which is part of pytrec_eval's library, finds in a file; -1 for none."""
    read = getattr(ctypes.CDLL(pytrec_eval_ext.__file__), f"te_get_{reader}", None)
    if read is None:
        pytest.skip("this build of pytrec_eval hides trec_eval's functions")
    found = (ctypes.c_long * 8)()  # the count, then pointers
    return found[0] if read(bytes(4096), bytes(path), found) == 1 else -1


def test_trec_eval_reads_four_fields_and_ours_both(tmp_path: Path) -> None:
    relevance = {"2:1": {"2:7": 1, "2:8": 0}, "2:2": {"2:7": 2}}
    four, five = tmp_path / "four.txt", tmp_path / "five.txt"
    write_qrels(four, relevance)
    write_qrels(five, relevance, 1)
    assert four.read_text().splitlines() == ["2:1 0 2:7 1", "2:1 0 2:8 0", "2:2 0 2:7 2"]
    assert five.read_text().splitlines() == ["2:1 0 2:7 1 1", "2:1 0 2:8 0 1", "2:2 0 2:7 2 1"]
    assert read_qrels_file(four) == read_qrels_file(five) == relevance
    assert (read_by_trec_eval("qrels", four), read_by_trec_eval("qrels", five)) == (2, -1)


@pytest.mark.parametrize("seed", [0, 1])
def test_trec_eval_agrees_from_the_files(root: Path, tmp_path: Path, seed: int) -> None:
    """Ties and graded relevance in all eight tasks, local and global; ids in an order that trec_eval would not take."""
    generator = random.Random(seed)
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
        ours = read_run(run_path)
        assert (ours, read_qrels_file(qrels_path)) == (run, qrels)
        assert {qid: list(scores) for qid, scores in ours.items()} == results.rankings[row.pool][row.task.name]
        assert read_by_trec_eval("trec_results", run_path) == len(results.rankings[row.pool][row.task.name])
        assert read_by_trec_eval("qrels", qrels_path) == row.num_queries
        measured = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.1,5,10"}).evaluate(run)
        assert len(measured) == row.num_queries
        for name, theirs in names.items():
            mean = sum(values[theirs] for values in measured.values()) / len(measured)
            assert row.metrics[name] == pytest.approx(mean, abs=1e-6), (row.task.name, row.pool, name)
        tied += sum(bool((np.diff(list(scores.values())) > -1e-5).any()) for scores in run.values())
    assert tied > len(results.rows)
