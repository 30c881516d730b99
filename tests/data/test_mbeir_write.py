from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from puma_hf.data import (
    MBEIR,
    MBEIRFormatError,
    MBEIRTask,
    build_nano,
    load_mbeir,
    load_pairs,
    mbeir_write,
    write_mbeir,
)
from tests.data import mbeir_builder as builder
from tests.data.photos import write_captions

EMOJI = Path(__file__).parents[2] / "demo" / "emoji"
TEXTS = MBEIRTask(1, builder.DATASET)
# Of toys_task1, which has no images: Pillow's PNG files differ from release to release.
QIDS = ["11:1100", "11:1101"]
DIDS = ["11:100", "11:101", "11:102", "11:103", "11:104"]
HASH = "bbc73a3cfb95801a9c798694c01e07bdde4293a7c74095533f7600138dd71c10"


# --- a small part


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> MBEIR:
    return build_nano(MBEIR(EMOJI), tmp_path_factory.mktemp("nano") / "emoji", num_queries=20, num_candidates=50)


def test_the_demo_gets_smaller_and_keeps_all_that_is_relevant(emoji: MBEIR) -> None:
    whole = MBEIR(EMOJI)
    assert emoji.tasks() == whole.tasks()
    together = {}
    for task in whole.tasks():
        queries, pool = emoji.queries(task), emoji.local_pool(task)
        assert (len(queries), len(pool)) == (20, 50)
        own, original = {query.id: query for query in whole.queries(task)}, whole.local_pool(task)
        relevant = whole.qrels(task, "test", own.values(), original)
        assert emoji.qrels(task, "test", queries, pool) == {query.id: relevant[query.id] for query in queries}
        assert all((own[query.id].text, own[query.id].image) == (query.text, query.image) for query in queries)
        assert list(pool.items()) == [(did, candidate) for did, candidate in original.items() if did in pool]
        together |= pool
    assert emoji.global_pool() == together
    assert emoji.image_root == EMOJI.resolve()


def test_the_draw_and_the_hash_are_the_same_on_every_machine(root: Path, tmp_path: Path, emoji: MBEIR) -> None:
    nano = build_nano(MBEIR(root), tmp_path / "nano", tasks=["toys_task1"], num_queries=2, num_candidates=5)
    assert [query.id for query in nano.queries(TEXTS)] == QIDS
    assert list(nano.local_pool(TEXTS)) == DIDS
    assert nano.content_hash == HASH
    assert (emoji.content_hash is None, MBEIR(EMOJI).content_hash) == (False, None)


@pytest.mark.parametrize("change", ["image", "text", "wording", "qrels", "seed"])
def test_whatever_changes_a_figure_changes_the_hash(root: Path, tmp_path: Path, change: str) -> None:
    def build(name: str, seed: int = 0) -> str | None:
        tasks = ["toys_task1", "toys_task4"]
        return build_nano(MBEIR(root), tmp_path / name, tasks=tasks, num_queries=0, seed=seed).content_hash

    before = build("before")
    assert build("again") == before
    if change == "image":
        shutil.copy(root / "images" / "c0_1.png", root / "images" / "c4_1.png")
    elif change == "text":
        builder.change_record(builder.local_pool_path(root, 1), 1, txt="another text")
    elif change == "wording":
        path = builder.instructions_path(root)
        path.write_text(path.read_text().replace("1 wording 4.", "another"))
    elif change == "qrels":
        builder.append_line(builder.qrels_path(root, 1, "test"), f"{builder.qid(1, 0)} 0 {builder.did(1, 5)} 1 1")
    assert build("after", seed=int(change == "seed")) != before


def test_opening_again_is_no_building(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_nano(MBEIR(root), tmp_path / "nano", num_queries=2)
    monkeypatch.setattr(mbeir_write, "_write_nano", lambda *_: pytest.fail("built again"))
    assert build_nano(MBEIR(root), tmp_path / "nano", num_queries=2).content_hash == first.content_hash
    shutil.copytree(root, tmp_path / "other")
    for source, settings, message in (
        (root, {"num_queries": 3}, "'num_queries': 2, .*, not .*'num_queries': 3"),
        (root, {"num_queries": 2, "tasks": ["toys_task1"]}, r"'toys_task0', .*, not .*'tasks': \['toys_task1'\]"),
        (tmp_path / "other", {"num_queries": 2}, "'images': '.*mbeir'.*, not .*'images': '.*other'"),
    ):
        with pytest.raises(ValueError, match=rf"nano was built with .*{message}.*\. Name another folder, or remove"):
            build_nano(MBEIR(source), tmp_path / "nano", **settings)  # type: ignore[arg-type]


def test_moved_images(root: Path, tmp_path: Path) -> None:
    nano = build_nano(MBEIR(root), tmp_path / "nano", num_queries=2)
    root.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"folder .*mbeir, which .*nano\.json names, is not there"):
        MBEIR(nano.root)
    moved = MBEIR(nano.root, image_root=tmp_path / "moved")
    assert moved.content_hash == nano.content_hash
    assert len(moved.global_pool()) == len(builder.MODALITIES) * builder.NUM_CANDIDATES


def test_a_nano_that_was_changed_has_no_hash(root: Path, tmp_path: Path) -> None:
    nano = build_nano(MBEIR(root), tmp_path / "nano", num_queries=2)
    path = builder.qrels_path(nano.root, 1, "test")
    path.write_text(path.read_text().replace(" 1 1", " 2 1"))
    with pytest.raises(MBEIRFormatError, match=r"task1_test_qrels\.txt: it was changed or removed"):
        _ = MBEIR(nano.root).content_hash


def test_one_did_with_two_meanings(root: Path, tmp_path: Path) -> None:
    builder.change_record(builder.local_pool_path(root, 3), 6, did=builder.did(1, 0))
    with pytest.raises(MBEIRFormatError, match=r"did '11:100' of toys_task3 is something else in another task's pool"):
        build_nano(MBEIR(root), tmp_path / "nano", tasks=["toys_task1", "toys_task3"])


# --- pairs of one's own


def texts(pairs: list[tuple[str, str]], **columns: Any) -> Dataset:
    anchors, positives = zip(*pairs, strict=True)
    return load_pairs(Dataset.from_dict({"anchor": list(anchors), "positive": list(positives), **columns}))


def relations(data: MBEIR, split: str) -> set[tuple[str | None, str | None]]:
    """Text of each query with that of each of its right answers, by the qrels."""
    found = set()
    for task in data.tasks(split):
        queries, pool = data.queries(task, split), data.local_pool(task, split)
        for qid, judged in data.qrels(task, split, queries, pool).items():
            query = next(query for query in queries if query.id == qid)
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


def test_right_answers_come_together_and_stay_in_one_split(tmp_path: Path) -> None:
    pairs = [("a", "x"), ("A ", "y"), ("b", "Y"), ("c", "z"), ("d", "w"), ("a", "x")]
    data = write_mbeir(texts(pairs), tmp_path / "out", test_fraction=0.5, val_fraction=0)
    train, test = relations(data, "train"), relations(data, "test")
    assert {("a", "x"), ("a", "y"), ("b", "y")} in (train, test)
    assert train | test == {("a", "x"), ("a", "y"), ("b", "y"), ("c", "z"), ("d", "w")}
    assert len(data.global_pool("test")) == 4


def test_images_in_both_directions(folder: Path, tmp_path: Path) -> None:
    write_captions(folder, [("a.png", "red"), ("copy of a.png", "crimson"), ("deep/b.png", "green")])
    rows = load_pairs(folder, direction="both", instruction="Find it.", reverse_instruction="Say\t it.")
    data = write_mbeir(rows, tmp_path / "out", dataset="photos", dataset_id=123, test_fraction=1, val_fraction=0)
    first, second = data.tasks("test")
    assert (first.name, first.arrow, second.name, second.arrow) == ("photos_task0", "t -> i", "photos_task3", "i -> t")
    to_image, to_text = (data.queries(task, "test") for task in (first, second))
    assert [len(query.positives) for query in (*to_image, *to_text)] == [1, 1, 1, 2, 1]
    assert (data.instruction(to_image[0], "image"), data.instruction(to_text[0], "text")) == ("Find it.", "Say it.")
    assert all(query.id.startswith("123:") for query in to_text)
    image = next(iter(data.local_pool(first).values())).image
    assert image is not None
    assert image.startswith(str(tmp_path / "out" / "mbeir_images" / "photos_images"))
    assert os.path.samefile(image, folder / "a.png")


def test_negatives_go_along_unless_they_are_right(tmp_path: Path) -> None:
    rows = texts([("a", "x"), ("a", "y"), ("b", "z")], negative=["n", "x", "m"])
    data = write_mbeir(rows, tmp_path / "out", test_fraction=1, val_fraction=0)
    task = data.tasks("test")[0]
    pool = data.local_pool(task)
    negatives = {query.text: [pool[did].text for did in query.negatives] for query in data.queries(task)}
    assert negatives == {"a": ["n"], "b": ["m"]}
    assert [candidate.text for candidate in pool.values()] == ["x", "n", "y", "z", "m"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_id": 9}, r"dataset_id=9 100 or more: smaller ones are M-BEIR's own"),
        ({"val_fraction": 0.6, "test_fraction": 0.6}, r"must be 0 to 1, and 1 at most together.*Lower one"),
        ({"test_fraction": 0.1}, r"test_fraction=0\.1 of 2 queries in 2 groups .* leaves the split empty\. Raise it"),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_mbeir(texts([("a", "x"), ("b", "y")]), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
