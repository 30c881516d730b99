from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from puma_hf.data import MBEIR, load_mbeir
from puma_hf.data.pairs import load_pairs
from puma_hf.data.pairs_mbeir import write_mbeir
from tests.data.photos import make_photos, write_captions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def texts(pairs: list[tuple[str, str]], **columns: Any) -> Dataset:
    anchors, positives = zip(*pairs, strict=True)
    return load_pairs(Dataset.from_dict({"anchor": list(anchors), "positive": list(positives), **columns}))


def relations(data: MBEIR, split: str) -> set[tuple[str | None, str | None]]:
    """Text of each query with that of each of its right answers, by the qrels."""
    found = set()
    for task in data.tasks(split):
        queries, pool = data.queries(task, split), data.local_pool(task, split)
        for qid, judged in data.qrels(task, split, queries, pool).items():
            query = next(query for query in queries if query.qid == qid)
            assert set(query.positives) == set(judged)
            found |= {(query.text, pool[did].text) for did in judged}
    return found


def test_the_folder_holds_the_pairs(tmp_path: Path) -> None:
    pairs = [(f"a{number}", f"b{number}") for number in range(10)]
    data = write_mbeir(texts(pairs), tmp_path / "out", test_fraction=0.3, val_fraction=0.2)
    splits = [relations(data, split) for split in ("train", "val", "test")]
    assert list(map(len, splits)) == [5, 2, 3]
    assert set.union(*splits) == set(pairs)
    task = data.tasks("test")[0]
    assert (task.task_id, task.name) == (1, "pairs_task1")
    for pool in (data.local_pool(task), *map(data.global_pool, ("train", "val", "test"))):
        assert [candidate.text for candidate in pool.values()] == [f"b{number}" for number in range(10)]
        assert next(iter(pool)) == "100:1"
    train = load_mbeir(data, with_ids=True)
    assert {(row["anchor"]["text"], row["positive"]["text"]) for row in train} == splits[0]
    assert set(row["anchor"]["instruction"] for row in train) == {"Find the text that matches the given text."}


def test_the_seed_alone_makes_the_splits(tmp_path: Path) -> None:
    rows = texts([(f"a{number}", f"b{number}") for number in range(20)])
    found = [
        relations(write_mbeir(rows, tmp_path / str(number), seed=seed), "test") for number, seed in enumerate([0, 0, 1])
    ]
    assert found[0] == found[1] != found[2]


def test_right_answers_come_together_and_stay_in_one_split(tmp_path: Path) -> None:
    pairs = [("a", "x"), ("A ", "y"), ("b", "Y"), ("c", "z"), ("d", "w"), ("a", "x")]
    data = write_mbeir(texts(pairs), tmp_path / "out", test_fraction=0.5, val_fraction=0)
    train, test = relations(data, "train"), relations(data, "test")
    assert {("a", "x"), ("a", "y"), ("b", "y")} in (train, test)
    assert train | test == {("a", "x"), ("a", "y"), ("b", "y"), ("c", "z"), ("d", "w")}
    assert len(data.global_pool("test")) == 4


def test_a_set_for_evaluation_alone(tmp_path: Path) -> None:
    data = write_mbeir(texts([("a", "x"), ("b", "y"), ("a", "y")]), tmp_path / "out", test_fraction=1, val_fraction=0)
    assert len(relations(data, "test")) == 3
    assert not (tmp_path / "out" / "query" / "train").exists()


def test_images_in_both_directions(folder: Path, tmp_path: Path) -> None:
    write_captions(folder, [("a.png", "red"), ("copy of a.png", "crimson"), ("deep/b.png", "green")])
    rows = load_pairs(folder, direction="both", instruction="Find it.", reverse_instruction="Say\t it.")
    data = write_mbeir(rows, tmp_path / "out", dataset="photos", dataset_id=123, test_fraction=1, val_fraction=0)
    assert [(task.name, task.arrow) for task in data.tasks("test")] == [
        ("photos_task0", "t -> i"),
        ("photos_task3", "i -> t"),
    ]
    first, second = data.tasks("test")
    to_image, to_text = (data.queries(task, "test") for task in (first, second))
    assert [len(query.positives) for query in to_image] == [1, 1, 1]
    assert [len(query.positives) for query in to_text] == [2, 1]
    assert data.instruction(to_image[0], "image") == "Find it."
    assert data.instruction(to_text[0], "text") == "Say it."
    assert [candidate.modality for candidate in data.local_pool(first).values()] == ["image", "image"]
    assert len(data.global_pool()) == 5
    image = next(iter(data.local_pool(first).values())).image
    assert image is not None
    assert image.startswith(str(tmp_path / "out" / "mbeir_images" / "photos_images"))
    assert os.path.samefile(image, folder / "a.png")
    assert all(query.qid.startswith("123:") for query in to_text)


def test_images_are_copied_where_links_are_not_to_be_had(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    rows = load_pairs(write_captions(folder, {"a.png": "red"}))
    data = write_mbeir(rows, tmp_path / "out", test_fraction=1, val_fraction=0)
    image = next(iter(data.global_pool().values())).image
    assert image is not None
    assert not os.path.samefile(image, folder / "a.png")
    assert Path(image).read_bytes() == (folder / "a.png").read_bytes()


def test_negatives_go_along_unless_they_are_right(tmp_path: Path) -> None:
    columns = {"negative": ["n", "x", "m"]}
    rows = texts([("a", "x"), ("a", "y"), ("b", "z")], **columns)
    data = write_mbeir(rows, tmp_path / "out", test_fraction=1, val_fraction=0)
    task = data.tasks("test")[0]
    pool = data.local_pool(task)
    negatives = {query.text: [pool[did].text for did in query.negatives] for query in data.queries(task)}
    assert negatives == {"a": ["n"], "b": ["m"]}
    assert [candidate.text for candidate in pool.values()] == ["x", "n", "y", "z", "m"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "my photos"}, r"dataset='my photos' must be letters, digits and underscores"),
        ({"dataset_id": 9}, r"dataset_id=9 must be 100 or more: smaller ones are M-BEIR's own"),
        ({"val_fraction": 0.6, "test_fraction": 0.6}, r"must be 0 to 1, and 1 at most together.*Lower one"),
        ({"test_fraction": -0.1}, r"test_fraction=-0\.1 must be 0 to 1"),
        ({"test_fraction": 0.1}, r"test_fraction=0\.1 of 2 queries in 2 groups .* leaves the split empty\. Raise it"),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_mbeir(texts([("a", "x"), ("b", "y")]), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_tasks_that_mbeir_has_not(folder: Path, tmp_path: Path) -> None:
    row = {"anchor_image": str(folder / "a.png"), "positive": "b", "positive_image": str(folder / "a.png")}
    with pytest.raises(
        ValueError, match=r"the dataset, row 1: M-BEIR has no task from 'image' to 'image,text'\. Leave"
    ):
        write_mbeir(load_pairs(Dataset.from_list([row])), tmp_path / "out")


def test_an_instruction_for_each_row_is_too_many(tmp_path: Path) -> None:
    pairs = [(f"a{number}", f"b{number}") for number in range(60)]
    rows = texts(pairs, instruction=[f"Find number {number}." for number in range(60)])
    with pytest.raises(ValueError, match=r"row 51: more than 50 different instructions for one task"):
        write_mbeir(rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_whose_images_are_gone_since(folder: Path, tmp_path: Path) -> None:
    rows = load_pairs(write_captions(folder, {"a.png": "red"}))
    (folder / "a.png").unlink()
    with pytest.raises(ValueError, match=r"the dataset: 1 of 1 rows cannot be used: 1 x image missing"):
        write_mbeir(rows, tmp_path / "out")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for output in (tmp_path, tmp_path / "notes"):
        with pytest.raises(FileExistsError, match=r"is not empty\. Choose a new folder"):
            write_mbeir(texts([("a", "x")]), output)
