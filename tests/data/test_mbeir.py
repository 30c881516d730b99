from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from puma_hf.data.mbeir import MBEIR, load_mbeir
from puma_hf.data.mbeir_format import MBEIRFormatError
from tests.data import mbeir_builder as builder

NUM_ROWS = len(builder.MODALITIES) * builder.NUM_QUERIES


def test_rows_have_only_what_a_trainer_embeds(root: Path) -> None:
    rows = load_mbeir(root, num_negatives=2)
    assert rows.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert len(rows) == NUM_ROWS
    assert load_mbeir(root).column_names == ["anchor", "positive"]
    row = load_mbeir(root, tasks=["toys_task7"])[0]
    assert row["anchor"].pop("instruction") in {f"7 wording {n}." for n in range(1, 5)}
    assert row == {
        "anchor": {"text": "text of q7_0", "image": str((root / "images" / "q7_0.png").resolve())},
        "positive": {"text": None, "image": str((root / "images" / "c7_0.png").resolve())},
    }


def test_choices_come_from_the_query_and_never_repeat_while_there_are_enough(root: Path) -> None:
    queries = {query.qid: query for query in MBEIR(root).union_queries()}
    pool = MBEIR(root).global_pool("train")
    did_of = {(candidate.text, candidate.image): did for did, candidate in pool.items()}
    seen: set[str] = set()
    for seed in range(5):
        for row in load_mbeir(root, num_negatives=3, seed=seed, with_ids=True):
            query = queries[row["qid"]]
            assert row["did"] in query.positives
            assert tuple(row["positives"]) == query.positives
            assert did_of[row["positive"]["text"], row["positive"]["image"]] == row["did"]
            negatives = [did_of[row[f"negative_{n}"]["text"], row[f"negative_{n}"]["image"]] for n in (1, 2, 3)]
            assert set(negatives) <= set(query.negatives)
            assert len(set(negatives)) == min(3, len(query.negatives))
            seen.add(row["did"])
    assert builder.did(0, 1) in seen
    assert builder.did(0, 2) in seen


def test_same_seed_same_rows(root: Path) -> None:
    first, again, other = (load_mbeir(root, num_negatives=2, seed=seed).to_list() for seed in (3, 3, 4))
    assert first == again
    assert first != other
    some = load_mbeir(root, tasks=["toys_task4"], num_negatives=2, seed=3).to_list()
    start = list(builder.MODALITIES).index(4) * builder.NUM_QUERIES
    assert some == first[start : start + builder.NUM_QUERIES]  # a row does not depend on the rows before it


def test_union_split(root: Path) -> None:
    rows = load_mbeir(root, "union_train", with_ids=True)
    assert len(rows) == NUM_ROWS + 1
    assert rows["qid"][0] == rows["qid"][-1]
    chosen = load_mbeir(root, "union_train", tasks=["toys_task0"], with_ids=True)
    assert chosen["qid"][:] == [builder.qid(0, n) for n in (0, 1, 2, 3, 0)]


def _name_files_as_m_beir_does(root: Path) -> None:
    """All training queries of a dataset in one file, whose name has no task."""
    folder = root / "query" / "train"
    lines = [line for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    for path in folder.iterdir():
        path.unlink()
    builder.write_lines(folder / f"mbeir_{builder.DATASET}_train.jsonl", lines)


def test_training_files_of_m_beir_hold_all_tasks_of_a_dataset(root: Path) -> None:
    by_task = load_mbeir(root, with_ids=True)
    _name_files_as_m_beir_does(root)
    rows = load_mbeir(root, with_ids=True)
    assert sorted(rows["qid"]) == sorted(by_task["qid"])
    chosen = load_mbeir(root, tasks=["toys_task3"], with_ids=True)
    assert chosen["qid"][:] == [builder.qid(3, number) for number in range(builder.NUM_QUERIES)]
    with pytest.raises(ValueError, match=r"must be some of \['toys_task0', "):
        load_mbeir(root, tasks=["toys_task5"])


def test_a_dataset_with_files_of_its_tasks_comes_once(root: Path) -> None:
    before = load_mbeir(root)
    lines = builder.query_path(root, 0, "train").read_text().splitlines()
    builder.write_lines(root / "query" / "train" / f"mbeir_{builder.DATASET}_train.jsonl", lines)
    assert load_mbeir(root)[:] == before[:]


def test_a_positive_is_never_a_negative(root: Path) -> None:
    dids = [builder.did(1, 0), builder.did(1, 3)]
    builder.change_record(builder.query_path(root, 1, "train"), 1, neg_cand_list=dids)
    row = load_mbeir(root, tasks=["toys_task1"], num_negatives=2)[0]
    assert row["negative_1"]["text"] == row["negative_2"]["text"] == "text of c1_3"


def test_query_without_negatives(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    builder.change_record(builder.query_path(root, 1, "train"), 2, neg_cand_list=[])
    assert len(load_mbeir(root)) == NUM_ROWS
    with pytest.raises(
        MBEIRFormatError,
        match=r"task1_train\.jsonl, line 2: query '11:1101' has no negatives .*missing_negatives='drop'",
    ):
        load_mbeir(root, num_negatives=1)
    with caplog.at_level(logging.WARNING):
        assert len(load_mbeir(root, num_negatives=1, missing_negatives="drop")) == NUM_ROWS - 1
    assert "Dropped 1 queries of train without negatives" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pos_cand_list": ["11:9999"]},
            r"pos_cand_list has dids that are not in the global pool .*\['11:9999'\]",
        ),
        (
            {"neg_cand_list": ["11:9999"]},
            r"neg_cand_list has dids that are not in the global pool .*\['11:9999'\]",
        ),
        ({"pos_cand_list": []}, "pos_cand_list of query '11:1101' is empty; a training row needs a positive"),
        ({"query_txt": ...}, "field 'query_txt' is missing"),
        ({"query_modality": "audio"}, "query_modality is 'audio', must be one of"),
    ],
)
def test_broken_row_names_file_and_line(root: Path, changes: dict[str, Any], message: str) -> None:
    builder.change_record(builder.query_path(root, 1, "train"), 2, **changes)
    with pytest.raises(MBEIRFormatError, match=rf"mbeir_toys_task1_train\.jsonl, line 2: {message}"):
        load_mbeir(root)


def test_broken_union_row_names_file_and_line(root: Path) -> None:
    path = root / "query" / "union_train" / "mbeir_union_up_train.jsonl"
    record = {**builder.read_records(path)[0], "pos_cand_list": ["11:9999"]}
    line = builder.append_line(path, json.dumps(record))
    with pytest.raises(MBEIRFormatError, match=rf"mbeir_union_up_train\.jsonl, line {line}: pos_cand_list has dids"):
        load_mbeir(root, "union_train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_negatives": -1}, "num_negatives is -1, must be 0 or more"),
        ({"missing_negatives": "ignore"}, "missing_negatives is 'ignore', must be 'error' or 'drop'"),
        ({"tasks": ["toys_task5"]}, r"tasks is \['toys_task5'\], must be some of"),
    ],
)
def test_wrong_arguments(root: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_mbeir(root, **arguments)


def test_every_broken_row_of_a_file_is_reported(root: Path) -> None:
    path = builder.query_path(root, 1, "train")
    builder.change_record(path, 1, pos_cand_list=[])
    builder.change_record(path, 3, neg_cand_list=["11:9999"])
    with pytest.raises(
        MBEIRFormatError, match=r"task1_train\.jsonl: 2 problems \(no positive: 1, did that is in no pool: 1\):\n"
    ):
        load_mbeir(root)
