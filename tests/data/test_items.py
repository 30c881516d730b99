from __future__ import annotations

import random
from pathlib import Path

import pytest

from puma_hf.data import MBEIR
from puma_hf.data.items import load_mbeir_items
from tests.data import mbeir_builder as builder


def test_every_query_and_candidate_is_an_item(root: Path) -> None:
    rows = load_mbeir_items(root)["item"]
    queries = [row for row in rows if row["instruction"] is not None]
    candidates = [row for row in rows if row["instruction"] is None]
    assert len(queries) == len(builder.MODALITIES) * builder.NUM_QUERIES
    assert len(candidates) == len(builder.MODALITIES) * builder.NUM_CANDIDATES
    pool = MBEIR(root).global_pool("train").values()
    assert [(row["text"], row["image"]) for row in candidates] == [(c.text, c.image) for c in pool]
    assert queries[0] == {"text": "text of q0_0", "image": None, "instruction": "0 wording 3."}
    image = str((root / "images" / "q7_1.png").resolve())
    assert [row["text"] for row in queries if row["image"] == image] == ["text of q7_1"]
    assert all(row["text"] or row["image"] for row in rows)


def test_instructions_are_drawn_with_the_seed(root: Path) -> None:
    def instructions(seed: int) -> list[str]:
        return [row["instruction"] for row in load_mbeir_items(root, seed=seed)["item"] if row["instruction"]]

    assert instructions(0) == instructions(0) != instructions(1)
    assert {text.split()[-1] for text in instructions(0)} == {"1.", "2.", "3.", "4."}


def test_tasks_select_queries_but_not_candidates(root: Path) -> None:
    rows = load_mbeir_items(MBEIR(root), tasks=["toys_task3"])["item"]
    queries = [row for row in rows if row["instruction"]]
    assert [Path(row["image"]).name for row in queries] == [f"q3_{n}.png" for n in range(4)]
    assert len(rows) - len(queries) == len(builder.MODALITIES) * builder.NUM_CANDIDATES
    with pytest.raises(ValueError, match=r"tasks is \['nothing'\], must be some of"):
        load_mbeir_items(root, tasks=["nothing"])


def test_equal_items_come_once(root: Path) -> None:
    path = builder.global_pool_path(root, "train")
    before = load_mbeir_items(root)
    twin = {**builder.read_records(path)[0], "did": "11:99999"}
    builder.write_records(path, [*builder.read_records(path), twin])
    assert load_mbeir_items(root)["item"] == before["item"]


def test_pairs_are_never_looked_at(root: Path) -> None:
    before = load_mbeir_items(root)["item"]
    generator = random.Random(0)
    for task in builder.MODALITIES:
        path = builder.query_path(root, task, "train")
        records = builder.read_records(path)
        lists = [(record["pos_cand_list"], record["neg_cand_list"]) for record in records]
        generator.shuffle(lists)
        for record, (positives, negatives) in zip(records, lists, strict=True):
            record["pos_cand_list"], record["neg_cand_list"] = negatives, positives
        builder.write_records(path, records)
        builder.qrels_path(root, task, "train").unlink()
    assert load_mbeir_items(root)["item"] == before
    # Not even that there are any.
    for task in builder.MODALITIES:
        path = builder.query_path(root, task, "train")
        for line in range(1, builder.NUM_QUERIES + 1):
            builder.change_record(path, line, pos_cand_list=[], neg_cand_list=[])
    assert load_mbeir_items(root)["item"] == before
