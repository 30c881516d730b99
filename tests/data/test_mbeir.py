from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from puma_hf.data import (
    MBEIR,
    MBEIR_DATASET_IDS,
    MBEIR_INSTRUCTIONS,
    TASK_MODALITIES,
    Candidate,
    MBEIRFormatError,
    MBEIRTask,
    Query,
)
from tests.data import mbeir_builder as builder

TASKS = [MBEIRTask(number, builder.DATASET) for number in builder.MODALITIES]


# --- tasks


def test_tables_are_m_beirs() -> None:
    assert TASK_MODALITIES == builder.MODALITIES
    assert (MBEIR_DATASET_IDS["visualnews"], MBEIR_DATASET_IDS["infoseek"], MBEIR_DATASET_IDS["mscoco"]) == (0, 6, 9)
    # One instruction for each of the 16 rows.
    rows = [re.fullmatch(r"mbeir_(\w+)_task(\d)", name) for name in MBEIR_INSTRUCTIONS]
    found = {(row[1], int(row[2])) for row in rows if row}
    assert len(found) == len(MBEIR_INSTRUCTIONS) == 16
    assert ({dataset for dataset, _ in found}, {task for _, task in found}) == (
        set(MBEIR_DATASET_IDS),
        set(TASK_MODALITIES),
    )


# --- a folder


def test_reads_everything_that_was_written(root: Path) -> None:
    data = MBEIR(root)
    assert data.tasks("test") == data.tasks("train") == TASKS
    for task in TASKS:
        queries, pool = data.queries(task), data.local_pool(task)
        assert [query.id for query in queries] == [builder.qid(task.task_id, n) for n in range(builder.NUM_QUERIES)]
        assert {candidate.modality for candidate in pool.values()} == {task.candidate_modality}
        qrels = data.qrels(task, "test", queries, pool)
        assert len(qrels) == builder.NUM_QUERIES - 1
        assert all(tuple(qrels[q.id]) == q.positives for q in queries[: builder.UNJUDGED_QUERY])
    query = data.queries(MBEIRTask(7, "toys"))[1]
    assert query == Query(
        id="11:1701",
        text="text of q7_1",
        image=str((root / "images" / "q7_1.png").resolve()),
        positives=("11:701", "11:702"),
        negatives=("11:700", "11:703", "11:704", "11:705"),
    )


def test_a_pool_is_a_mapping_that_is_read_when_it_is_asked(root: Path) -> None:
    pool = MBEIR(root).global_pool("test")
    dids = [builder.did(task, number) for task in builder.MODALITIES for number in range(builder.NUM_CANDIDATES)]
    assert list(pool) == dids
    image = str((root / "images/c8_2.png").resolve())
    assert pool["11:802"] == Candidate("11:802", "text of c8_2", image)
    assert list(pool.values()) == [pool[did] for did in dids]
    assert [pool[did].id for did in dids] == dids
    assert pool.get("11:9999") is None
    with pytest.raises(KeyError):
        pool["11:9999"]


def test_validation_shares_the_pool_of_the_test_split(root: Path) -> None:
    data = MBEIR(root)
    assert list(data.global_pool("union_train")) == list(data.global_pool("train"))
    for split in ("val", "union_val"):
        assert data.global_pool(split) == data.global_pool("test")
    # One of its own comes first, and no other split borrows.
    records = builder.read_records(builder.global_pool_path(root, "test"))
    builder.write_records(builder.global_pool_path(root, "val"), records[:3])
    assert list(data.global_pool("val")) == list(data.global_pool("union_val")) == ["11:0", "11:1", "11:2"]
    builder.global_pool_path(root, "train").unlink()
    with pytest.raises(FileNotFoundError, match=r"No such file .*mbeir_union_train_cand_pool\.jsonl"):
        data.global_pool("train")


# --- lines


def test_wrong_queries(root: Path) -> None:
    path = builder.query_path(root, 1, "test")
    builder.change_record(path, 2, qid=builder.qid(1, 0))
    builder.change_record(path, 3, pos_cand_list="9:1")
    builder.change_record(path, 4, query_img_path="images/q3_0.png", query_modality="image,text")
    with pytest.raises(MBEIRFormatError) as caught:
        MBEIR(root).queries(TASKS[1])
    for message in (
        r"line 2: qid '11:1100' is also at .*, line 1",
        r"line 3: pos_cand_list must be a list of dids, got '9:1'",
        r"line 4: query_modality is 'image,text' but task 1 has 'text' queries",
    ):
        assert re.search(rf"mbeir_toys_task1_test\.jsonl, {message}", str(caught.value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"did": "12"}, r"did must look like '<dataset_id>:<number>', got '12'"),
        (
            {"modality": "text", "img_path": None, "txt": " "},
            "modality is 'text' but the line holds neither text nor image",
        ),
        ({"modality": "text"}, "modality is 'text' but"),
        ({"txt": ...}, ".*txt"),
        ({"txt": "\ud83d"}, r"txt is '\\ud83d', which holds half a character"),
        ({"img_path": "../a.png"}, r"image path '\.\./a\.png' leaves"),
    ],
)
def test_wrong_candidates(root: Path, changes: dict[str, Any], message: str) -> None:
    builder.change_record(builder.local_pool_path(root, 8), 3, **changes)
    with pytest.raises(MBEIRFormatError, match=rf"task8_cand_pool\.jsonl, line 3: {message}"):
        MBEIR(root).local_pool(TASKS[-1])


def test_a_candidate_comes_once(root: Path) -> None:
    builder.change_record(builder.local_pool_path(root, 8), 3, did=builder.did(8, 0))
    with pytest.raises(MBEIRFormatError, match=r"task8_cand_pool\.jsonl: 1 dids come twice, as '11:800'\. Remove"):
        MBEIR(root).local_pool(TASKS[-1])


# --- instructions


def test_seeded_instructions_are_the_same_on_every_machine(root: Path) -> None:
    data = MBEIR(root)
    queries = data.queries(TASKS[0])
    assert [data.instruction(query, "image", 0) for query in queries] == [f"0 wording {n}." for n in (3, 1, 4, 4)]
    assert data.instruction(queries[0], "image") == "0 wording 1."


def test_task_of_a_union_row(root: Path) -> None:
    data = MBEIR(root)
    assert data.task_of(Query("11:1", "a", None), "image,text") == MBEIRTask(2, "toys")
    assert data.task_of(Query("9:1", "a", None), "image") == MBEIRTask(0, "mscoco")
    with pytest.raises(MBEIRFormatError, match="query 11:1: M-BEIR has no task from 'image' to 'image,text'"):
        data.task_of(Query("11:1", None, "i.png"), "image,text")


def test_instructions(root: Path) -> None:
    path, query = builder.instructions_path(root), Query("3:1", "a", None)
    path.write_text('q\tc\tname\tid\tp1\tp2\ntext\timage\tToys\t3\t"First."\t\tSecond. \r\n\n', encoding="utf-8")
    assert MBEIR(root).wordings(query, "image") == ("First.", "Second.")
    row = "text\ttext\tToys\t3\tFind.\n"
    for wrong, message in (("text\timage", "expected query modality, .*"), (row, "expected .* one row of each kind")):
        path.write_text(f"header\n{row}{wrong}", encoding="utf-8")
        with pytest.raises(MBEIRFormatError, match=rf"instructions\.tsv, line 3: {message}"):
            MBEIR(root).wordings(query, "text")


# --- judgements


def read_qrels(root: Path, qids: str, dids: str, text: bytes) -> dict[str, dict[str, int]]:
    path = builder.qrels_path(root, 6, "test")
    path.write_bytes(text)
    queries = [Query(qid, None, "a.png") for qid in qids.split()]
    return MBEIR(root).qrels(MBEIRTask(6, builder.DATASET), "test", queries, dids.split())


def test_qrels_keep_grades_and_leave_out_other_datasets_candidates(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    text = b"5:1 0 5:7 2 6\n5:1 0 5:8 0 6\n5:1 0 6:9 1 6\n5:1 0 5:7 2 6\n\n5:2 0 6:9 1 6\n"
    assert read_qrels(root, "5:1 5:2", "5:7 5:8", text) == {"5:1": {"5:7": 2}}
    left_out = "qrels.txt: left out 1 judged candidates of other datasets that this pool does not hold"
    assert [message[-len(left_out) :] for message in caplog.messages] == [left_out]
    found = read_qrels(root, "5:1 5:2", "5:7 5:8 6:9", text)
    assert found == {"5:1": {"5:7": 2, "6:9": 1}, "5:2": {"6:9": 1}}
    assert len(caplog.messages) == 1  # none was left out of this one


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"5:1 0 5:7 1\n", "expected 'qid 0 did relevance task_id'"),
        (b"5:2 0 5:7 1 6\n", "qid '5:2' is not in the query file of this task"),
        (b"5:1 0 5:8 1 6\n", "did '5:8' is not in the candidate pool"),
        (b"5:1 0 5:7 3 6\n", "'5:1' and '5:7' were judged 1 before, now 3"),
        (b"5:1 0 \xff", "expected 'qid 0 did .*; the file ends in the middle of this"),
    ],
)
def test_broken_qrels(root: Path, line: bytes, message: str) -> None:
    with pytest.raises(MBEIRFormatError, match=rf"qrels\.txt, line 2: {message}"):
        read_qrels(root, "5:1", "5:7", b"5:1 0 5:7 1 6\n" + line)
