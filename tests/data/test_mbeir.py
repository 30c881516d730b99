from __future__ import annotations

import re
from pathlib import Path

import pytest

from puma_hf.data import MBEIR_INSTRUCTIONS, MBEIRFormatError, Query
from puma_hf.data.mbeir import (
    MBEIR,
    MBEIR_DATASET_IDS,
    TASK_MODALITIES,
    MBEIRTask,
    check_is_file,
    read_instructions,
    read_jsonl,
    read_origin,
    read_qrels,
    select_tasks,
)
from puma_hf.data.records import Problems
from puma_hf.modeling.inputs_puma import MODALITY_NAMES
from tests.data import mbeir_builder as builder

TASKS = [MBEIRTask(number, builder.DATASET) for number in builder.MODALITIES]


def test_tables_are_m_beirs() -> None:
    assert TASK_MODALITIES == builder.MODALITIES
    assert {modality for pair in TASK_MODALITIES.values() for modality in pair} <= set(MODALITY_NAMES)
    assert sorted(MBEIR_DATASET_IDS.values()) == list(range(10))


@pytest.mark.parametrize(
    ("task", "name", "arrow", "k"),
    [
        (MBEIRTask(0, "fashion200k"), "fashion200k_task0", "t -> i", 10),
        (MBEIRTask(7, "fashioniq"), "fashioniq_task7", "it -> i", 10),
        (MBEIRTask(2, "webqa"), "webqa_task2", "t -> it", 5),
        (MBEIRTask(8, "anything_new"), "anything_new_task8", "it -> it", 5),
    ],
)
def test_task_names_itself(task: MBEIRTask, name: str, arrow: str, k: int) -> None:
    assert (task.name, task.arrow, task.reported_k) == (name, arrow, k)
    assert (task.query_modality, task.candidate_modality) == builder.MODALITIES[task.task_id]


def test_there_is_one_instruction_for_each_of_the_16_rows() -> None:
    rows = [re.fullmatch(r"mbeir_(\w+)_task(\d)", name) for name in MBEIR_INSTRUCTIONS]
    found = [(row[1], int(row[2])) for row in rows if row]
    assert len(found) == len(set(found)) == 16
    assert {dataset for dataset, _ in found} == set(MBEIR_DATASET_IDS)
    assert {task for _, task in found} == set(TASK_MODALITIES)


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
        id="11:1701",
        text="text of q7_1",
        image=str((root / "images" / "q7_1.png").resolve()),
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
    with pytest.raises(MBEIRFormatError, match=r"line 1: the file is empty"):
        MBEIR(root).local_pool(TASKS[1])
    with pytest.raises(MBEIRFormatError, match=r"line 1: the file is empty"):
        MBEIR(root).queries(TASKS[1])


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
    text_query = Query("11:1", "a", None)
    assert data.task_of(text_query, "image,text") == MBEIRTask(2, "toys")
    assert data.task_of(Query("9:1", "a", None), "image") == MBEIRTask(0, "mscoco")
    assert data.task_of(Query("77:1", "a", None), "image") == MBEIRTask(0, "dataset77")
    with pytest.raises(MBEIRFormatError, match="query '11:1': M-BEIR has no task from 'image' to 'image,text'"):
        data.task_of(Query("11:1", None, "i.png"), "image,text")


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
        f"{path}: 5 problems (missing image: 1, wrong modality label: 1, missing field: 1, cut last line: 1, "
        "duplicated id: 1):"
    )
    assert [line.partition(": ")[0] for line in quoted] == [f"- {path}, line {number}" for number in (1, 3, 4, 7, 6)]


def test_a_file_that_is_not_there_or_a_note_of_git_lfs(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    with pytest.raises(FileNotFoundError, match=r"pool\.jsonl is missing; M-BEIR's layout needs it"):
        check_is_file(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(FileNotFoundError, match=r"pool\.jsonl is a pointer of Git LFS, .* run `git lfs pull`"):
        check_is_file(path)
    path.write_text("{}\n")
    check_is_file(path)


def test_instructions(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_text('q\tc\tname\tid\tp1\tp2\ntext\timage\tToys\t3\t"First."\t\tSecond. \r\n\n', encoding="utf-8")
    assert read_instructions(path) == ({(3, "text", "image"): ("First.", "Second.")}, {3: "toys"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text\timage\tToys\t3\t\t", "expected query modality, candidate modality, dataset name"),
        ("text\timage\tToys\tthree\tFind it.", "expected query modality"),
        ("text\timage", "expected query modality"),
        ("text\ttext\tToys\t3\tAgain.", r"instruction key \(3, 'text', 'text'\) was already given"),
    ],
)
def test_broken_instructions(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "table.tsv"
    path.write_text(f"header\ntext\ttext\tToys\t3\tFind.\n{row}\n", encoding="utf-8")
    with pytest.raises(MBEIRFormatError, match=rf"table\.tsv, line 3: {message}"):
        read_instructions(path)


def test_instructions_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_bytes(b"header\ntext\ttext\tToys\t3\tF\xfcr.\n")
    with pytest.raises(MBEIRFormatError, match=r"table\.tsv: it is not UTF-8 .* convert it"):
        read_instructions(path)


def test_qrels_keep_grades_and_leave_out_other_datasets_candidates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "qrels.txt"
    path.write_text("5:1 0 5:7 2 6\n5:1 0 5:8 0 6\n5:1 0 6:9 1 6\n5:1 0 5:7 2 6\n\n5:2 0 6:9 1 6\n", encoding="utf-8")
    assert read_qrels(path, {"5:1", "5:2"}, {"5:7", "5:8"}) == {"5:1": {"5:7": 2}}
    left_out = "qrels.txt: left out 1 judged candidates of other datasets that this pool does not hold, such as 6:9"
    assert caplog.messages == [left_out]
    assert read_qrels(path, {"5:1", "5:2"}, {"5:7", "5:8", "6:9"}) == {
        "5:1": {"5:7": 2, "6:9": 1},
        "5:2": {"6:9": 1},
    }
    assert caplog.messages == [left_out]  # none was left out of this one


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5:1 0 5:7 1", "expected 'qid 0 did relevance task_id'"),
        ("5:1 0 5:7 -1 6", "expected 'qid 0 did relevance task_id'"),
        ("5:1 0 5:7 yes 6", "expected 'qid 0 did relevance task_id'"),
        ("5:1 0 seven 1 6", "expected 'qid 0 did relevance task_id'"),
        ("5:2 0 5:7 1 6", "qid '5:2' is not in the query file of this task"),
        ("5:1 0 5:8 1 6", "did '5:8' is not in the candidate pool"),
        ("5:1 0 5:7 3 6", "'5:1' and '5:7' were judged 1 before, now 3"),
    ],
)
def test_broken_qrels(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "qrels.txt"
    path.write_text(f"5:1 0 5:7 1 6\n{line}\n", encoding="utf-8")
    with pytest.raises(MBEIRFormatError, match=rf"qrels\.txt, line 2: {message}"):
        read_qrels(path, {"5:1"}, {"5:7"})


@pytest.mark.parametrize("line", ["5" * 5000, f"5:{'1' * 5000} 0 5:7 1 6", f"5:1 0 5:{'7' * 5000} 1 6"])
def test_an_error_shows_one_line_of_a_field(tmp_path: Path, line: str) -> None:
    (tmp_path / "qrels.txt").write_text(f"{line}\n")
    with pytest.raises(MBEIRFormatError, match=r"qrels\.txt, line 1: ") as caught:
        read_qrels(tmp_path / "qrels.txt", {"5:1"}, {"5:7"})
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_a_cut_qrels_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "qrels.txt"
    path.write_bytes(b"5:1 0 5:7 1 6\n5:1 0 \xff")
    with pytest.raises(MBEIRFormatError, match=r"line 2: expected 'qid 0 did .*; the file ends in the middle of this"):
        read_qrels(path, {"5:1"}, {"5:7"})


@pytest.mark.parametrize("cut", [1, 5, 9])
def test_a_cut_last_line_is_said(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 22}'[:-cut])
    if cut == 9:  # between two lines nobody can tell
        assert len(list(read_jsonl(path, Problems(path)))) == 1
        return
    with (
        pytest.raises(
            MBEIRFormatError,
            match=r"line 2: broken JSON \(.*\); the file ends in the middle of this line, .* download it",
        ),
        Problems(path) as problems,
    ):
        list(read_jsonl(path, problems))


@pytest.mark.parametrize("text", ["", "[]", '{"image_root": "."}', '{"image_root": 3, "settings": {}}', "{"])
def test_a_broken_description(tmp_path: Path, text: str) -> None:
    (tmp_path / "nano.json").write_text(text)
    with pytest.raises(MBEIRFormatError, match=r"nano\.json: it does not say what the folder holds .* build it anew"):
        read_origin(tmp_path)
