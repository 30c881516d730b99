from __future__ import annotations

from pathlib import Path

import pytest

from puma_hf.data.mbeir_format import MBEIRFormatError, Query
from puma_hf.data.mbeir_reader import MBEIR, select_tasks
from puma_hf.data.mbeir_tasks import MBEIRTask
from tests.data import mbeir_builder as builder

TASKS = [MBEIRTask(number, builder.DATASET) for number in builder.MODALITIES]


def test_reads_everything_that_was_written(root: Path) -> None:
    data = MBEIR(root)
    assert data.tasks("test") == data.tasks("train") == TASKS
    assert len(data.global_pool("test")) == len(TASKS) * builder.NUM_CANDIDATES
    assert list(data.global_pool("union_train")) == list(data.global_pool("train"))
    for task in TASKS:
        queries = data.queries(task)
        pool = data.local_pool(task)
        assert [query.qid for query in queries] == [builder.qid(task.task_id, n) for n in range(builder.NUM_QUERIES)]
        assert list(pool) == [builder.did(task.task_id, n) for n in range(builder.NUM_CANDIDATES)]
        assert {candidate.modality for candidate in pool.values()} == {task.candidate_modality}
        qrels = data.qrels(task, "test", queries, pool)
        assert len(qrels) == builder.NUM_QUERIES - 1
        assert all(tuple(qrels[q.qid]) == q.positives for q in queries[: builder.UNJUDGED_QUERY])
    query = data.queries(MBEIRTask(7, "toys"))[1]
    assert query == Query(
        qid="11:1701",
        text="text of q7_1",
        image=str((root / "images" / "q7_1.png").resolve()),
        modality="image,text",
        positives=("11:701", "11:702"),
        negatives=("11:700", "11:703", "11:704", "11:705"),
    )


def test_validation_shares_the_pool_of_the_test_split(root: Path) -> None:
    data = MBEIR(root)
    for split in ("val", "union_val"):
        assert data.global_pool(split) == data.global_pool("test")
    # One of its own comes first, and no other split borrows.
    builder.write_records(
        builder.global_pool_path(root, "val"), builder.read_records(builder.global_pool_path(root, "test"))[:3]
    )
    assert list(data.global_pool("val")) == list(data.global_pool("union_val")) == ["11:0", "11:1", "11:2"]
    builder.global_pool_path(root, "train").unlink()
    with pytest.raises(FileNotFoundError, match=r"mbeir_union_train_cand_pool\.jsonl"):
        data.global_pool("train")


def test_union_file_may_repeat_a_query(root: Path) -> None:
    queries = MBEIR(root).union_queries()
    assert len(queries) == len(TASKS) * builder.NUM_QUERIES + 1
    assert queries[0] == queries[-1]
    assert (queries[0].line, queries[-1].line) == (1, len(queries))


def test_images_may_be_elsewhere(root: Path, tmp_path: Path) -> None:
    (root / "images").rename(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match=r"task0_test_cand_pool\.jsonl, line 1: image 'images/c0_0\.png'"):
        MBEIR(root).local_pool(TASKS[0])
    image = MBEIR(root, image_root=tmp_path).local_pool(TASKS[0])["11:0"].image
    assert image == str((tmp_path / "images" / "c0_0.png").resolve())


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing is not a folder; pass the root"):
        MBEIR(tmp_path / "nothing")


def test_no_such_split(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the splits here are \['test', 'train', 'union_train'\]"):
        MBEIR(root).tasks("val")


def test_unknown_task_number(root: Path) -> None:
    builder.query_path(root, 1, "test").rename(root / "query" / "test" / "mbeir_toys_task5_test.jsonl")
    with pytest.raises(MBEIRFormatError, match=r"task 5 is not one of M-BEIR's \[0, 1, 2, 3, 4, 6, 7, 8\]"):
        MBEIR(root).tasks()


def test_repeated_qid(root: Path) -> None:
    builder.change_record(builder.query_path(root, 1, "test"), 3, qid=builder.qid(1, 0))
    with pytest.raises(MBEIRFormatError, match=r"task1_test\.jsonl, line 3: qid '11:1100' is also on line 1"):
        MBEIR(root).queries(TASKS[1])


def test_query_in_the_wrong_file(root: Path) -> None:
    path = builder.query_path(root, 1, "test")
    builder.change_record(path, 2, query_img_path="images/q3_0.png", query_modality="image,text")
    with pytest.raises(MBEIRFormatError, match=r"line 2: query_modality is 'image,text' but task 1 has 'text'"):
        MBEIR(root).queries(TASKS[1])


def test_repeated_did(root: Path) -> None:
    builder.change_record(builder.local_pool_path(root, 1), 3, did=builder.did(1, 0))
    with pytest.raises(MBEIRFormatError, match=r"task1_cand_pool\.jsonl, line 3: did '11:100' was already given"):
        MBEIR(root).local_pool(TASKS[1])


def test_empty_files(root: Path) -> None:
    builder.local_pool_path(root, 1).write_text("\n")
    builder.query_path(root, 1, "test").write_text("")
    with pytest.raises(MBEIRFormatError, match=r"line 1: the candidate pool is empty"):
        MBEIR(root).local_pool(TASKS[1])
    with pytest.raises(MBEIRFormatError, match=r"line 1: the query file is empty"):
        MBEIR(root).queries(TASKS[1])


def test_first_instruction_or_a_seeded_one(root: Path) -> None:
    data = MBEIR(root)
    query = data.queries(TASKS[0])[0]
    assert data.instruction(query, "image") == "0 wording 1."
    drawn = [data.instruction(query, "image", seed) for seed in range(50)]
    assert set(drawn) == {f"0 wording {n}." for n in range(1, 5)}
    assert drawn == [MBEIR(root).instruction(query, "image", seed) for seed in range(50)]
    assert len({data.instruction(query, "image", 0, row=row) for row in range(50)}) == 4


def test_seeded_instructions_are_the_same_on_every_machine(root: Path) -> None:
    data = MBEIR(root)
    drawn = [data.instruction(query, "image", 0) for query in data.queries(TASKS[0])]
    assert drawn == [f"0 wording {n}." for n in (3, 1, 4, 4)]


def test_missing_instruction(root: Path) -> None:
    data = MBEIR(root)
    query = data.queries(TASKS[4])[0]
    with pytest.raises(
        MBEIRFormatError,
        match=r"query_instructions\.tsv: no instruction .* = \(11, 'image', 'image,text'\), .*add the row",
    ):
        data.instruction(query, "image,text")


def test_task_of_a_union_row(root: Path) -> None:
    data = MBEIR(root)
    text_query = Query("11:1", "a", None, "text")
    assert data.task_of(text_query, "image,text") == MBEIRTask(2, "toys")
    assert data.task_of(Query("9:1", "a", None, "text"), "image") == MBEIRTask(0, "mscoco")
    assert data.task_of(Query("77:1", "a", None, "text"), "image") == MBEIRTask(0, "dataset77")
    with pytest.raises(MBEIRFormatError, match="query '11:1': M-BEIR has no task from 'image' to 'image,text'"):
        data.task_of(Query("11:1", None, "i.png", "image"), "image,text")


def test_select_tasks() -> None:
    assert select_tasks(TASKS, None) == TASKS
    assert select_tasks(TASKS, ["toys_task3", "toys_task1"]) == [TASKS[1], TASKS[3]]
    assert select_tasks(TASKS, "toys_task3") == [TASKS[3]]
    for names in (["toys_task5"], []):
        with pytest.raises(ValueError, match=r"tasks is \[.*\], must be some of .*'toys_task0'.*; choose"):
            select_tasks(TASKS, names)


def test_everything_wrong_in_a_pool_is_reported_at_once(root: Path) -> None:
    path = builder.local_pool_path(root, 8)
    (root / "images" / "c8_0.png").unlink()
    builder.change_record(path, 2, did=builder.did(8, 5))
    builder.change_record(path, 3, modality="text")
    builder.change_record(path, 4, txt=...)
    with path.open("a") as file:
        file.write('{"did": "11:8')
    with pytest.raises(MBEIRFormatError) as caught:
        MBEIR(root).local_pool(TASKS[-1])
    first, *quoted = str(caught.value).splitlines()
    assert first == (
        f"{path}: 5 problems (missing image: 1, wrong modality label: 1, missing field: 1, duplicated id: 1, "
        "cut last line: 1):"
    )
    assert [line.partition(": ")[0] for line in quoted] == [f"- {path}, line {number}" for number in (1, 3, 4, 6, 7)]


def test_everything_wrong_with_queries_is_reported_at_once(root: Path) -> None:
    path = builder.query_path(root, 1, "test")
    builder.change_record(path, 2, query_img_path="images/q3_0.png", query_modality="image,text")
    builder.change_record(path, 3, qid=builder.qid(1, 0))
    builder.change_record(path, 4, qid="4")
    with pytest.raises(
        MBEIRFormatError, match=r"3 problems \(query of another task: 1, duplicated id: 1, wrong id: 1\):\n"
    ):
        MBEIR(root).queries(TASKS[1])
    path = root / "query" / "union_train" / "mbeir_union_up_train.jsonl"
    for line in range(1, 9):
        builder.change_record(path, line, query_modality="audio")
    with pytest.raises(MBEIRFormatError, match=r"8 problems \(wrong modality label: 8\). The first 5:"):
        MBEIR(root).union_queries()


def test_only_missing_images_are_missing_files(root: Path) -> None:
    for image in (root / "images").glob("c4_*.png"):
        image.unlink()
    with pytest.raises(FileNotFoundError, match=r"6 problems \(missing image: 6\)\. The first 5:"):
        MBEIR(root).local_pool(TASKS[4])


def test_a_file_of_broken_lines_is_not_called_empty(root: Path) -> None:
    builder.query_path(root, 1, "test").write_text("no\n")
    builder.local_pool_path(root, 1).write_text("no\n")
    for read in (MBEIR(root).queries, MBEIR(root).local_pool):
        with pytest.raises(MBEIRFormatError, match=r"line 1: broken JSON"):
            read(TASKS[1])


def test_all_wordings(root: Path) -> None:
    data = MBEIR(root)
    query = data.queries(TASKS[0])[0]
    assert data.wordings(query, "image") == tuple(f"0 wording {n}." for n in range(1, 5))


def test_a_plain_folder_is_its_own_image_root_and_has_no_hash(root: Path) -> None:
    data = MBEIR(root)
    assert (data.image_root, data.content_hash) == (root.resolve(), None)


def test_no_folder_of_images(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"The images' folder .*nothing is not there; put it back, or name"):
        MBEIR(root, image_root=tmp_path / "nothing")
