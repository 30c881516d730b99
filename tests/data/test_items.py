from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image

from puma_hf.data import MBEIR, MBEIRFormatError, load_items, load_mbeir, load_mbeir_items
from puma_hf.modeling.inputs_puma import load_rgb_image
from tests.data import mbeir_builder as builder


def items_of(source: Any) -> list[tuple[str | None, ...]]:
    return [tuple(item.values()) for item in load_items(source)["item"]]


NUM_ROWS = len(builder.MODALITIES) * builder.NUM_QUERIES

# --- M-BEIR's pairs


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


# --- M-BEIR's items


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
        (Dataset.from_dict({"text": []}), r"The dataset holds no items\. Name a source with at least one text"),
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


# --- folders, tables and datasets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`corpus/` with three images in two folders, and one image outside of it."""
    paths = ("corpus/b.png", "corpus/deep/er/a.JPG", "corpus/a.webp", "outside.png")
    for number, name in enumerate(paths):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + number, 4), (number, 0, 0)).save(path)
    return tmp_path / "corpus"


def write_jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_image_below_a_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "notes.md").write_text("no image")
    (folder / "README").write_text("no image")
    (folder / "._b.png").write_bytes(b"of another system")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "b.png").write_bytes(b"hidden")
    with caplog.at_level(logging.INFO, logger="puma_hf"):
        items = load_items(folder)["item"][:]
    names = ["a.webp", "b.png", "deep/er/a.JPG"]
    assert items == [{"text": None, "image": str(folder / name), "instruction": None} for name in names]
    assert f"{folder}: left out what is no image here: 1 x no ending, 1 x .md" in caplog.text


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no image")
    with pytest.raises(
        ValueError, match=r"holds no image \(such as \.jpg, .*\) and is no M-BEIR folder, which has query/"
    ):
        load_items(tmp_path)


def test_all_broken_images_of_a_folder_are_told_at_once(folder: Path) -> None:
    for number in range(6):
        (folder / f"broken{number}.png").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"corpus: 6 problems \(image that cannot be used: 6\)\. The first 5:\n- "
    ) as caught:
        load_items(folder)
    assert [f"broken{number}.png" in str(caught.value) for number in range(6)] == [True] * 5 + [False]
    (folder / "broken5.png").unlink()
    with pytest.raises(ValueError, match=r"corpus: 5 problems \(image that cannot be used: 5\):\n- .*broken0\.png"):
        load_items(folder)


def test_texts_and_images_of_a_file(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(
        folder,
        {"text": " a shoe ", "image": None, "id": 7},
        {"image": "b.png", "instruction": "Find it."},
        {"text": "both", "image": "deep/er/a.JPG", "instruction": None, "score": 0.5},
        {"text": "", "image": str(folder / "b.png")},
    )
    with caplog.at_level(logging.INFO, logger="puma_hf"):
        items = [tuple(item.values()) for item in load_items(path)["item"]]
    assert items == [
        ("a shoe", None, None),
        (None, str(folder / "b.png"), "Find it."),
        ("both", str(folder / "deep/er/a.JPG"), None),
        (None, str(folder / "b.png"), None),
    ]
    assert "corpus.jsonl: ignored the columns id, score" in caplog.text


def test_every_sentence_of_nli_is_an_item(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "nli.csv"
    path.write_text("id,sent0,sent1,hard_neg\n1,a,b,c\n2,a,d,e\n")
    with caplog.at_level(logging.INFO, logger="puma_hf"):
        assert [item["text"] for item in load_items(path)["item"]] == ["a", "b", "c", "d", "e"]
    assert "ignored the columns id" in caplog.text
    path.write_text("sent0,sent1,hard_neg\na,b,\n")
    with pytest.raises(ValueError, match=r"nli\.csv, line 2: hard_neg is '', must be a text"):
        load_items(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": "a", "url": "b"}, r"line 2: no column text or image, nor sent0, sent1, hard_neg\. .*caption, url"),
        ({}, r"line 2: no column text or image.* The columns here are none"),
        ({"text": " ", "image": ""}, r"line 2: text and image are both empty\. Fill one of them"),
        ({"text": 3}, r"line 2: text is 3, must be a text or null"),
        ({"text": "a", "instruction": ["b"]}, r"line 2: instruction is \['b'\], must be a text or null"),
        ({"image": 3}, r"line 2: image is 3, must be the path of a file, or null"),
        (
            {"image": "../outside.png"},
            r"line 2: image path '\.\./outside\.png' leaves .*corpus; .*names them up",
        ),
        ({"image": "/elsewhere/a.png"}, r"line 2: image path '.*elsewhere/a\.png' leaves"),
        ({"image": "link.png"}, r"line 2: image path 'link\.png' passes a symbolic link that leaves"),
        ({"image": "a\0.png"}, r"line 2: image 'a\\x00\.png' has a NUL byte"),
        ({"image": "broken.png"}, r"line 2: '.*broken\.png' cannot be read as an image"),
    ],
)
def test_bad_rows(folder: Path, row: dict[str, Any], message: str) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "broken.png").write_bytes(b"broken")
    path = write_jsonl(folder, {"text": "good"}, row)
    with pytest.raises(ValueError, match=message):
        load_items(path)


@pytest.mark.parametrize("image", ["none.png", "deep", "https://example.org/a.png"])
def test_missing_images(folder: Path, image: str) -> None:
    path = write_jsonl(folder, {"text": "good"}, {"image": image})
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl, line 2: image '.*' is not a file below "):
        load_items(path)


def test_a_dataset_may_name_any_path(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    outside = str(folder.parent / "outside.png")
    rows = Dataset.from_dict({"text": ["a", None], "image": [None, outside], "label": [0, 1]})
    with caplog.at_level(logging.INFO, logger="puma_hf"):
        assert items_of(rows) == [("a", None, None), (None, outside, None)]
    assert "The dataset: ignored the columns label" in caplog.text


def test_images_inside_a_dataset_are_refused(folder: Path) -> None:
    features = Features({"image": ImageFeature()})
    rows = Dataset.from_dict({"image": [Image.new("RGB", (4, 4))]}, features=features)
    with pytest.raises(ValueError, match=r"the dataset, row 1: the image is inside the dataset, .*Save the images"):
        items_of(rows)
