from __future__ import annotations

from pathlib import Path

import pytest

from puma_hf.data.mbeir import MBEIR, Candidate, MBEIRTask, Query
from puma_hf.data.records import MBEIRFormatError
from puma_hf.evaluation.mbeir_searches import Search, read_searches, task_result
from tests.data import mbeir_builder as builder

TASK = MBEIRTask(1, "toys")


def search(relevance: dict[str, dict[str, int]], dataset: str = "toys") -> Search:
    modalities = {"1:1": "text", "1:2": "image", "1:3": "text", "1:4": "image"}
    pool = {
        did: Candidate(did, "a" if "text" in modality else None, "b.png" if "image" in modality else None)
        for did, modality in modalities.items()
    }
    queries = [Query(f"1:{number}", "q", None, (), (), number) for number in (11, 12, 13)]
    return Search(MBEIRTask(1, dataset), "local", pool, queries, relevance)


def test_a_row_by_hand() -> None:
    """Query 12 has nothing relevant and does not count."""
    rankings = {"1:11": ["1:2", "1:1", "1:4", "1:3"], "1:12": ["1:1"] * 4, "1:13": ["1:4", "1:2", "1:1", "1:3"]}
    row = task_result(search({"1:11": {"1:1": 1, "1:3": 1}, "1:13": {"1:2": 2, "1:3": 1}}), rankings, (2, 3))
    assert (row.pool_size, row.num_queries, row.num_skipped, row.score) == (4, 2, 1, 1)
    assert list(row.metrics) == [
        *("hit@2", "hit@3", "recall@2", "recall@3", "ndcg@10", "mrr@10"),
        *("wrong_modality@1", "wrong_modality@2", "wrong_modality@3"),
    ]
    # Of query 11 images are wrong; query 13 has both kinds among its relevant candidates.
    assert row.metrics["wrong_modality@1"] == 1 / 2
    assert row.metrics["wrong_modality@2"] == 1 / 4
    assert row.metrics["wrong_modality@3"] == pytest.approx(2 / 3 / 2)
    assert row.metrics["recall@2"] == 1 / 2
    assert row.metrics["mrr@10"] == 1 / 2


def test_the_score_has_the_k_of_the_papers() -> None:
    rankings = {qid: ["1:2", "1:4", "1:3", "1:1"] for qid in ("1:11", "1:12", "1:13")}
    rankings["1:11"] = ["1:2"] * 5 + ["1:1"]
    judged = {"1:11": {"1:1": 1}}
    assert task_result(search(judged), rankings, (1,)).score == 0
    fashion = task_result(search(judged, "fashioniq"), rankings, (1,))
    assert fashion.score == 1
    assert "hit@10" not in fashion.metrics


def test_pools_and_order(root: Path) -> None:
    tasks = [TASK, MBEIRTask(7, "toys")]
    searches = read_searches(MBEIR(root), tasks, "test", ("local", "global"))
    assert [(s.pool_name, s.task) for s in searches] == [(pool, task) for pool in ("local", "global") for task in tasks]
    assert searches[2].pool is searches[3].pool
    assert [len(s.pool) for s in searches] == [6, 6, 48, 48]
    assert {len(s.relevance) for s in searches} == {builder.NUM_QUERIES - 1}


def test_one_line_tells_what_is_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_searches(MBEIR(root), [TASK], "test", ("local", "global"))
    assert caplog.messages == [
        "Queries to which nothing is relevant are left out of the means: 1 of 4 in toys_task1 (local pool), "
        "1 of 4 in toys_task1 (global pool)"
    ]
    builder.append_line(
        builder.qrels_path(root, 1, "test"), f"{builder.qid(1, builder.UNJUDGED_QUERY)} 0 {builder.did(1, 0)} 1 1"
    )
    caplog.clear()
    read_searches(MBEIR(root), [TASK], "test", ("local", "global"))
    assert not caplog.messages


def test_a_task_in_which_nothing_is_relevant(root: Path) -> None:
    line = f"{builder.qid(1, 0)} 0 {builder.did(1, 0)} 0 1"
    builder.write_lines(builder.qrels_path(root, 1, "test"), [line])
    with pytest.raises(
        MBEIRFormatError, match=r"no query of toys_task1 \(test\) has a relevant candidate in its local"
    ):
        read_searches(MBEIR(root), [TASK], "test", ("local",))
