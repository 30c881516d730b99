from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature

from puma_hf.data.pair_rows import (
    ANCHOR_MISSING,
    BROKEN_LINE,
    IMAGE_BROKEN,
    IMAGE_MISSING,
    IMAGE_REFUSED,
    NEGATIVE_MISSING,
    NO_TEXT,
    POSITIVE_MISSING,
    Cell,
    Offenders,
    Pair,
    PairOptions,
    PairReading,
    read_pairs,
)
from tests.data.photos import make_photos, write_captions, write_csv


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def read(source: Any, **options: Any) -> PairReading:
    return read_pairs(source, PairOptions(**options))


def write_jsonl(folder: Path, *rows: Any, name: str = "pairs.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


# --- sources


def test_a_caption_asks_for_its_image(folder: Path) -> None:
    table = write_captions(folder, {"a.png": " a red one ", "deep/b.png": "green, wide"})
    reading = read(table)
    assert reading.pairs == [
        Pair(f"{table}, line 2", Cell("a red one", None), Cell(None, str(folder / "a.png"))),
        Pair(f"{table}, line 3", Cell("green, wide", None), Cell(None, str(folder / "deep/b.png"))),
    ]
    assert (reading.num_rows, reading.num_rows_left_out, reading.name) == (2, 0, str(table))
    assert read(folder).pairs == reading.pairs


@pytest.mark.parametrize("name", ["metadata.jsonl", "Captions.json"])
def test_the_table_of_a_folder(folder: Path, name: str) -> None:
    (folder / "notes.csv").write_text("other")
    write_jsonl(folder, {"file_name": "a.png", "text": "red"}, name=name)
    assert read(folder).pairs[0].anchor.text == "red"


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    for number in (1, 0):
        rows = Dataset.from_dict({"anchor": [f"a{number}"], "positive": ["b"]})
        rows.to_parquet(str(tmp_path / f"{number}.parquet"))
    assert [pair.anchor.text for pair in read(tmp_path).pairs] == ["a0", "a1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"must hold one table called metadata or captions .*; the tables here: none\. Name the file"),
        (["a.csv"], r"the tables here: a\.csv"),
        (["captions.csv", "metadata.csv"], r"the tables here: captions\.csv, metadata\.csv"),
        (["a.csv", "b.parquet"], r"the tables here: a\.csv, b\.parquet"),
    ],
)
def test_folders_without_one_table(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text("a,b\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("none.csv", FileNotFoundError, r"'none\.csv' is neither a file nor a folder\. Check the path"),
        (3, ValueError, r"The source is a int, must be a path or a datasets\.Dataset"),
        (DatasetDict(), ValueError, r"The source is a DatasetDict, .*choose one split"),
        (Dataset.from_dict({"anchor": [], "positive": []}), ValueError, r"the dataset holds no rows\. Name a source"),
    ],
)
def test_sources_that_are_none(source: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        read(source)


def test_a_table_without_a_good_line_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("anchor,positive\na\n")
    with pytest.raises(ValueError, match=r"a\.csv holds no rows \(.*line 2: 1 cells, but the header has 2"):
        read(tmp_path / "a.csv")


def test_a_dataset_may_name_any_path(folder: Path) -> None:
    outside = str(folder.parent / "outside.png")
    rows = Dataset.from_dict({"caption": ["a"], "image": [outside]})
    expected = [Pair("the dataset, row 1", Cell("a", None), Cell(None, outside))]
    assert read(rows).pairs == expected
    assert read(rows.cast_column("image", ImageFeature())).pairs == expected


def test_structs_as_load_pairs_makes_them(folder: Path) -> None:
    path = str(folder / "a.png")
    rows = Dataset.from_dict(
        {
            "anchor": [{"text": "a", "image": path, "instruction": "Find it."}],
            "positive": [{"text": None, "image": path}],
            "negative_1": [{"text": "b", "image": None}],
        }
    )
    expected = Pair("the dataset, row 1", Cell("a", path), Cell(None, path), (Cell("b", None),), "Find it.")
    assert read(rows).pairs == [expected]


# --- rows


def test_a_list_of_captions_makes_as_many_pairs(folder: Path) -> None:
    table = write_jsonl(folder, {"image": "a.png", "captions": ["red", " ", "dark red", None]})
    reading = read(table)
    assert [pair.anchor.text for pair in reading.pairs] == ["red", "dark red"]
    assert len({pair.positive for pair in reading.pairs}) == 1
    assert reading.num_rows == 1


def test_either_part_of_a_composed_side_may_be_empty(folder: Path) -> None:
    rows = [{"query": "in green", "query_image": "a.png"}, {"query": "", "query_image": "a.png"}, {"query": "green"}]
    reading = read(write_jsonl(folder, *({**row, "positive": "x"} for row in rows)))
    assert [pair.anchor.modality for pair in reading.pairs] == ["image,text", "image", "text"]


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"caption": " "}, ANCHOR_MISSING, r"line 2: anchor is empty \(column caption\)\. Fill it"),
        ({"caption": []}, ANCHOR_MISSING, r"line 2: anchor is empty"),
        ({"image": None}, POSITIVE_MISSING, r"line 2: positive is empty \(column image\)"),
        ({"image": ""}, POSITIVE_MISSING, r"line 2: positive is empty"),
        ({"negative_1": ""}, NEGATIVE_MISSING, r"line 2: negative_1 is empty"),
        ({"negative_1": ["a", "b"]}, NO_TEXT, r"line 2: negative_1 is \['a', 'b'\], .*a column of its own"),
        ({"caption": 3}, NO_TEXT, r"line 2: anchor is 3, must be a text or null\. Convert the column"),
        ({"caption": ["a", 3]}, NO_TEXT, r"line 2: anchor is 3, must be a text"),
        ({"caption": "\ud83d"}, NO_TEXT, r"line 2: anchor is '\\ud83d', which holds half a character"),
        ({"instruction": 3}, NO_TEXT, r"line 2: instruction is 3, must be a text"),
        ({"image": 3}, IMAGE_REFUSED, r"line 2: image is 3, must be the path"),
        ({"image": "../outside.png"}, IMAGE_REFUSED, r"line 2: image '\.\./outside\.png' leaves"),
        ({"image": {"path": "../outside.png"}}, IMAGE_REFUSED, r"line 2: image '\.\./outside\.png' leaves"),
        ({"image": "none.png"}, IMAGE_MISSING, r"line 2: there is no image '.*none\.png'"),
        ({"image": "broken.png"}, IMAGE_BROKEN, r"line 2: '.*broken\.png' cannot be read"),
    ],
)
def test_offenders(folder: Path, row: dict[str, Any], kind: str, message: str) -> None:
    good = {"image": "a.png", "caption": "red", "negative_1": "blue"}
    reading = read(write_jsonl(folder, good, {**good, **row}, good))
    assert dict(reading.offenders.counts) == {kind: 1}
    with pytest.raises(ValueError, match=message):
        raise ValueError(reading.offenders.first[kind][0])
    assert [pair.where[-6:] for pair in reading.pairs] == ["line 1", "line 3"]
    assert (reading.num_rows, reading.num_rows_left_out) == (3, 1)


@pytest.mark.parametrize("name", ["caption", "image", "negative_1", "instruction"])
def test_an_error_shows_one_line_of_a_cell(folder: Path, name: str) -> None:
    good = {"image": "a.png", "caption": "red", "negative_1": "blue", "instruction": "Find it."}
    reading = read(write_jsonl(folder, good, {**good, name: [[{"bytes": "0" * 1000}] * 1000]}))
    ((message,),) = reading.offenders.first.values()
    assert len(message) < 600 + len(str(folder))


def test_all_that_is_wrong_with_a_row_counts(folder: Path) -> None:
    row = {"image": "none.png", "caption": "", "negative_1": ""}
    good = {"image": "a.png", "caption": "red", "negative_1": "blue"}
    reading = read(write_jsonl(folder, good, row))
    assert dict(reading.offenders.counts) == {ANCHOR_MISSING: 1, IMAGE_MISSING: 1, NEGATIVE_MISSING: 1}
    assert reading.num_rows_left_out == 1


def test_a_struct_that_is_none(folder: Path) -> None:
    rows = [{"anchor": {"text": "a"}, "positive": "b"}, {"anchor": "a", "positive": "b"}]
    reading = read(write_jsonl(folder, *rows))
    assert reading.offenders.first[NO_TEXT] == [
        f"{folder / 'pairs.jsonl'}, line 2: anchor is 'a', must have text and image as in other rows."
    ]


def test_reading_goes_on_after_broken_lines(tmp_path: Path) -> None:
    table = tmp_path / "pairs.jsonl"
    table.write_text('{"anchor": "a", "positive": "b"}\n{"anchor": \n[1]\n{"anchor": "c", "positive": "d"}\n')
    reading = read(table)
    assert [pair.anchor.text for pair in reading.pairs] == ["a", "c"]
    assert dict(reading.offenders.counts) == {BROKEN_LINE: 2}
    assert (reading.num_rows, reading.num_rows_left_out) == (4, 2)


def test_rows_beyond_the_first_thousand(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "a.csv", ["anchor", "positive"], [(f"a{n}", f"b{n}") for n in range(1500)])
    reading = read(table)
    assert [pair.anchor.text for pair in reading.pairs] == [f"a{n}" for n in range(1500)]


def test_the_first_few_of_each_kind() -> None:
    offenders = Offenders()
    for number in range(7):
        offenders.add("one", f"one {number}")
    offenders.add("other", "other 0")
    assert offenders.first["one"] == [f"one {number}" for number in range(5)]
    assert offenders.some() == ["one 0", "other 0", "one 1", "one 2", "one 3"]
    assert str(offenders) == "7 x one, 1 x other"


# --- instructions and directions


def test_an_instruction_is_a_column_or_a_text(folder: Path) -> None:
    table = write_csv(
        folder / "c.csv", ["image", "caption", "task"], [("a.png", "red", " Find it. "), ("a.png", "x", "")]
    )
    assert [pair.instruction for pair in read(table, instruction="task").pairs] == ["Find it.", None]
    assert [pair.instruction for pair in read(table, instruction=" Find the photo.").pairs] == ["Find the photo."] * 2
    assert [pair.instruction for pair in read(table).pairs] == [None, None]
    with pytest.raises(ValueError, match=r"instruction='taks' must be a text of several words or a column; .*task"):
        read(table, instruction="taks")
    # A sentence need not have blanks.
    assert read(table, instruction="找到图片。").pairs[0].instruction == "找到图片。"


def test_the_column_of_that_name_is_taken(folder: Path) -> None:
    table = write_csv(folder / "c.csv", ["image", "caption", "instruction"], [("a.png", "red", "Find it.")])
    assert read(table).pairs[0].instruction == "Find it."
    assert read(table, instruction="Find the photo.").pairs[0].instruction == "Find the photo."


def test_directions(folder: Path) -> None:
    table = write_captions(folder, {"a.png": "red"})
    text, image = Cell("red", None), Cell(None, str(folder / "a.png"))

    def sides(**options: Any) -> list[tuple[Cell, Cell, str | None]]:
        return [(pair.anchor, pair.positive, pair.instruction) for pair in read(table, **options).pairs]

    assert sides(direction="text-to-image") == [(text, image, None)]
    assert sides(direction="image-to-text", instruction="Find a caption.") == [(image, text, "Find a caption.")]
    assert sides(anchor="file_name", direction="text-to-image") == [(text, image, None)]
    assert sides(direction="both") == [(text, image, None), (image, text, None)]
    both = sides(direction="both", instruction="Find an image.", reverse_instruction="Find a caption.")
    assert both == [(text, image, "Find an image."), (image, text, "Find a caption.")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "both", "instruction": "Find it."}, r"direction='both' with instruction='Find it\.' needs rev"),
        ({"direction": "both", "instruction": "task"}, r"with instruction='task' needs reverse_instruction"),
        (
            {"reverse_instruction": "Find it."},
            r"reverse_instruction='Find it\.' is for direction='both' only, not None",
        ),
        ({"direction": "both", "negatives": "wrong"}, r"direction='both' turns pairs round, but their negatives"),
        ({"direction": "image-to-text", "negatives": "wrong"}, r"direction='image-to-text' turns pairs round"),
        (
            {"direction": "text-to-image", "positive": "wrong"},
            r"direction='text-to-image' needs one side of texts and one of images, found anchor: caption \(text\); pos",
        ),
    ],
)
def test_directions_that_do_not_fit(folder: Path, options: dict[str, Any], message: str) -> None:
    table = write_csv(
        folder / "c.csv", ["image", "caption", "task", "wrong"], [("none.png", "red", "Find it.", "blue")]
    )
    with pytest.raises(ValueError, match=message):
        read(table, **options)


def test_negatives_stay_with_their_direction(folder: Path) -> None:
    table = write_csv(folder / "c.csv", ["image", "caption", "negative"], [("a.png", "red", "blue")])
    assert read(table, direction="text-to-image").pairs[0].negatives == (Cell("blue", None),)
    assert read(table, direction="both", negatives=()).pairs[0].negatives == ()
