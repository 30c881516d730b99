from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from puma_hf.data import MBEIR
from puma_hf.data.items import load_items, load_mbeir_items
from puma_hf.modeling.image_inputs_puma import load_rgb_image
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


@pytest.mark.parametrize("split", ["train", "union_train"])
def test_files_that_do_not_tell_their_tasks(root: Path, split: str) -> None:
    def texts() -> set[tuple[str | None, str | None]]:
        return {(row["text"], row["image"]) for row in load_mbeir_items(root, split)["item"]}

    expected = {(row["text"], row["image"]) for row in load_mbeir_items(root)["item"]}
    folder = root / "query" / "train"
    lines = [line for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    for path in folder.iterdir():
        path.unlink()
    builder.write_lines(folder / f"mbeir_{builder.DATASET}_train.jsonl", lines)
    assert texts() == expected
    some = load_mbeir_items(root, split, tasks=["toys_task3"])["item"]
    assert sum(row["instruction"] is not None for row in some) == builder.NUM_QUERIES


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


# --- any source


def test_a_folder_of_mbeir_is_known_by_its_folders(root: Path) -> None:
    expected = load_mbeir_items(root, seed=3)[:]
    assert load_items(root, seed=3)[:] == load_items(str(root), seed=3)[:] == load_items(MBEIR(root), seed=3)[:]
    assert load_items(root, seed=3)[:] == expected != load_items(root, seed=4)[:]
    assert load_items(root, split="test")[:] == load_mbeir_items(root, "test")[:] != expected
    # Half an M-BEIR folder is not taken for a folder of images.
    shutil.rmtree(root / "query")
    with pytest.raises(FileNotFoundError, match=r"holds no mbeir_<dataset>_task<n>_train\.jsonl"):
        load_items(root)


def test_several_sources_and_equal_items(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\none\n")
    (tmp_path / "b.csv").write_text("sent0,sent1,hard_neg\ntwo,three,four\n")
    texts = [row["text"] for row in load_items(f"{tmp_path / 'a.txt'}, {tmp_path / 'b.csv'}")["item"]]
    assert texts == ["one", "two", "three", "four"]
    rows = load_items([tmp_path / "a.txt", root / "images", load_mbeir_items(root), str(tmp_path / "b.csv")])
    assert rows.features == load_mbeir_items(root).features
    images = len(list((root / "images").iterdir()))
    assert sum(row["text"] is None and row["instruction"] is None for row in rows["item"]) == images
    assert load_items(rows)[:] == rows[:]
    # The same source twice adds nothing, and is no empty one.
    assert load_items([rows, rows])[:] == rows[:]


def test_a_comma_may_be_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "a,b.txt").write_text("one\n")
    assert load_items(str(tmp_path / "a,b.txt"))["item"][0]["text"] == "one"
    with pytest.raises(FileNotFoundError, match=r"a' is neither a file nor a folder"):
        load_items(f"{tmp_path / 'a,b.txt'},c")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], r"The source is \[\], must name at least one file or folder"),
        ("", r"The source is \[''\], must name at least one"),
        ("a.txt,,b.txt", r"must name at least one file or folder, and no empty name"),
        (DatasetDict(), r"The source is a DatasetDict, must be a path.*choose one split"),
        ([3], r"A source is a int, must be a path"),
        (Dataset.from_dict({"text": []}), r"The Dataset holds no items\. Name a source with at least one text"),
    ],
)
def test_bad_sources(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_items(source)


def test_empty_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"a\.txt holds no items"):
        load_items(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match=r"b\.txt' is neither a file nor a folder\. Check the path"):
        load_items(tmp_path / "b.txt")


def test_a_damaged_image_is_named_when_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    item = load_items(tmp_path)["item"][0]
    with pytest.raises(ValueError, match=r"a\.png' cannot be read as an image"):
        load_rgb_image(item["image"])
