from __future__ import annotations

import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image

from puma_hf.configs import PairsConfig
from puma_hf.data import MBEIR, DistinctPositivesBatchSampler, check_pairs, load_mbeir, load_pairs
from puma_hf.data.mbeir_write import pairs
from puma_hf.data.pairs import Pair, PairIds, find_columns, read_pairs
from puma_hf.data.records import Record
from tests.data.photos import make_photos, write_captions, write_csv

# --- columns


def row(*names: str, **values: Any) -> list[dict[str, Any]]:
    return [{**dict.fromkeys(names, "x"), **values}]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["image", "caption"], "anchor: text=caption; positive: image=image"),
        (["query", "image", "caption"], "anchor: text=query; positive: image=image; ignored: caption"),
        (["sent0", "sent1", "hard_neg"], "anchor: text=sent0; positive: text=sent1; negative 1: text=hard_neg"),
        (
            ["query", "query_image", "positive_image", "negative_2", "negative_10", "negative_1_image", "instruction"],
            "anchor: text=query,image=query_image; positive: image=positive_image; negative 1: image=negative_1_image; "
            "negative 2: text=negative_2; negative 3: text=negative_10; instruction: instruction",
        ),
    ],
)
def test_names_that_are_guessed(names: list[str], expected: str) -> None:
    assert str(find_columns(row(*names))) == expected


def test_values_tell_images_from_texts() -> None:
    rows = row(anchor="a shoe", positive="shoes/1.JPG")
    assert find_columns(rows).positive == {"image": "positive"}
    rows += row(anchor="a hat", positive="the file 1.jpg shows a hat, no path")
    assert find_columns(rows).positive == {"text": "positive"}
    assert find_columns(row("caption", image={"bytes": None, "path": "1.jpg"})).positive == {"image": "image"}
    assert find_columns(row("anchor", positive={"text": "a", "image": None})).positive == {"both": "positive"}


def test_what_is_given_wins() -> None:
    rows = row("caption", "titel", bild="1.png")
    found = find_columns(rows, anchor="text=caption, image=bild", positive={"text": "titel"})
    assert str(found) == "anchor: text=caption,image=bild; positive: text=titel"


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        (["caption", "id"], {}, r"No column for the positive: the columns are caption, id\. Name another \(positive="),
        (["a", "b"], {"anchor": "c", "positive": "b"}, r"anchor='c' must be a column, .* The columns are a, b\."),
        (["question", "answer", "label"], {}, r"column 'label' may .* are no right pairs\. Name the columns"),
        (["query", "positive", "score"], {}, r"column 'score' may .* are no right pairs"),
    ],
)
def test_what_does_not_fit(columns: list[str], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_columns(row(*columns), **given)


def test_images_of_either_side_are_not_ignored() -> None:
    rows = row(image="a.png", caption="in red", target_image="b.png")
    with pytest.raises(ValueError, match=r"The column 'target_image' may belong to either side"):
        find_columns(rows)
    assert find_columns(rows, anchor={"text": "caption", "image": "image"}, positive="target_image")


# --- ids


def test_equal_content_has_equal_ids(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "photos")
    a, copy, b = (str(folder / name) for name in ("a.png", "copy of a.png", "deep/b.png"))
    images = [Record(image=a), Record(image=copy), Record(image=b), Record(text="x", image=a)]
    cells = [*images, Record(text="x"), Record(text=" X ")]
    ids = PairIds([Pair("", cell, cell) for cell in cells])
    first, second, *others = map(ids.of, cells)
    assert (first, others[-2]) == (second, others[-1])
    assert len({first, *others}) == 4


@pytest.mark.parametrize("seed", range(5))
def test_telling_positives_keep_the_same_rows_apart_as_all(seed: int) -> None:
    draw = random.Random(seed)
    sides = [(f"anchor {draw.randrange(12)}", f"positive {draw.randrange(25)}") for _ in range(40)]
    pairs = [Pair("", Record(text=anchor), Record(text=positive)) for anchor, positive in sides]
    ids = PairIds(pairs)
    for one in pairs:
        telling = ids.telling_positives(one)
        assert telling[0] == ids.of(one.positive)
        assert set(telling) <= set(ids.positives(one.anchor))
        for other in pairs:
            together = set(ids.positives(one.anchor)) & set(ids.positives(other.anchor))
            assert bool(set(telling) & set(ids.telling_positives(other))) == bool(together)


# --- rows


def write_jsonl(folder: Path, *rows: Any, name: str = "pairs.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def test_a_caption_asks_for_its_image(folder: Path) -> None:
    table = write_captions(folder, {"a.png": " a red one ", "deep/b.png": "green, wide"})
    reading = read_pairs(table)
    assert reading.pairs == [
        Pair(f"{table}, line 2", Record(text="a red one"), Record(image=str(folder / "a.png"))),
        Pair(f"{table}, line 3", Record(text="green, wide"), Record(image=str(folder / "deep/b.png"))),
    ]
    assert (reading.num_rows, reading.offenders.counts.total(), reading.source) == (2, 0, str(table))
    assert read_pairs(folder).pairs == reading.pairs
    table.rename(folder / "other.csv")
    with pytest.raises(ValueError, match=r"must hold one table of its images called metadata or captions, or Parquet"):
        read_pairs(folder)


def test_structs_as_load_pairs_makes_them(folder: Path) -> None:
    anchor = {"text": "a", "image": str(folder / "a.png"), "instruction": "Find it."}
    sides = {"positive": {"text": None, "image": anchor["image"]}, "negative_1": {"text": "b", "image": None}}
    pair = Pair("the dataset, row 1", Record(**anchor), Record(image=anchor["image"]), (Record(text="b"),))
    assert read_pairs(Dataset.from_list([{"anchor": anchor, **sides}])).pairs == [pair]


def test_a_list_of_captions_makes_as_many_pairs(folder: Path) -> None:
    reading = read_pairs(write_jsonl(folder, {"image": "a.png", "caption": ["red", " ", "dark red", None]}))
    assert [pair.anchor.text for pair in reading.pairs] == ["red", "dark red"]
    assert len({pair.positive for pair in reading.pairs}) == reading.num_rows == 1


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"caption": [" "]}, "anchor missing", r"line 2: anchor is empty \(column caption\)\. Fill it"),
        ({"caption": ["a", 3]}, "text of another type", r"line 2: anchor is 3, must be a text"),
        ({"image": {"path": "../outside.png"}}, "image refused", r"line 2: image path '\.\./outside\.png' leaves"),
    ],
)
def test_offenders(folder: Path, row: dict[str, Any], kind: str, message: str) -> None:
    good = {"image": "a.png", "caption": "red", "negative_1": "blue"}
    reading = read_pairs(write_jsonl(folder, good, {**good, **row}, good))
    assert dict(reading.offenders.counts) == {kind: 1}
    assert re.search(message, str(reading.offenders.first[kind][0]))
    assert [pair.where[-6:] for pair in reading.pairs] == ["line 1", "line 3"]
    assert reading.num_rows == 3


def test_an_instruction_is_a_column_or_a_text(folder: Path) -> None:
    rows = [("a.png", "red", " Find it. "), ("a.png", "x", "")]
    table = write_csv(folder / "c.csv", ["image", "caption", "task"], rows)
    for given, expected in (
        ("task", ["Find it.", None]),
        (" Find the photo.", ["Find the photo."] * 2),
        ("找到图片。", ["找到图片。"] * 2),  # a sentence need not have blanks
        (None, [None, None]),
    ):
        assert [pair.anchor.instruction for pair in read_pairs(table, instruction=given).pairs] == expected
    with pytest.raises(ValueError, match=r"instruction='taks' must be a text of several words or a column of"):
        read_pairs(table, instruction="taks")


def test_columns_of_other_programs_are_not_read(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text(",query,positive\n0,a,b\n1,c,d\n")  # row numbers, as pandas writes them
    assert load_pairs(table)["anchor"][:] == [{"text": text, "image": None, "instruction": None} for text in "ac"]
    rows = Dataset.from_list([{"item": {"text": "x"}, "query": "a", "positive": "b"}])
    assert load_pairs(rows)["anchor"][0]["text"] == "a"


def test_directions(folder: Path) -> None:
    table = write_captions(folder, {"a.png": "red"})
    text, image = Record(text="red"), Record(image=str(folder / "a.png"))

    def sides(**options: Any) -> list[tuple[Record, Record, str | None]]:
        pairs = read_pairs(table, **options).pairs
        return [(replace(pair.anchor, instruction=None), pair.positive, pair.anchor.instruction) for pair in pairs]

    assert sides(anchor="file_name", direction="text-to-image") == [(text, image, None)]
    assert sides(direction="image-to-text", instruction="Find a caption.") == [(image, text, "Find a caption.")]
    both = sides(direction="both", instruction="Find an image.", reverse_instruction="Find a caption.")
    assert both == [(text, image, "Find an image."), (image, text, "Find a caption.")]


# --- training rows


def test_rows_are_those_of_mbeir(folder: Path, root: Path) -> None:
    write_captions(folder, {"a.png": "red", "deep/b.png": "green"})
    rows = load_pairs(folder, instruction="Find the photo.")
    assert rows.cache_files  # mapped by every process, and in the memory of none
    assert rows[1] == {
        "anchor": {"text": "green", "image": None, "instruction": "Find the photo."},
        "positive": {"text": None, "image": str(folder / "deep/b.png")},
    }
    for given in (False, True):
        pairs, mbeir = load_pairs(folder, with_ids=given), load_mbeir(root, with_ids=given)
        assert pairs.features == mbeir.features
        assert len(concatenate_datasets([pairs, mbeir])) == 2 + len(mbeir)


def test_one_image_with_five_captions(folder: Path) -> None:
    captions = [("a.png", f"red {number}") for number in range(4)] + [("copy of a.png", "crimson")]
    write_captions(folder, [*captions, *(("deep/b.png", f"green {number}") for number in range(5))])
    rows = load_pairs(folder, with_ids=True)
    assert len(set(rows["did"][:5])) == len(set(rows["did"][5:])) == 1
    assert rows["positives"] == [[did] for did in rows["did"]]
    batches = DistinctPositivesBatchSampler(rows, rows["positives"], batch_size=2, drop_last=False, seed=0)
    assert all(sorted(row // 5 for row in batch) == [0, 1] for batch in batches)
    turned = load_pairs(folder, direction="image-to-text", with_ids=True)
    assert set(map(len, turned["positives"])) == {1, 2}  # as many as keep the rows of an image apart
    assert turned["qid"] == rows["did"]


def test_images_inside_of_parquet_are_saved(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2)).save(stream, format="PNG")
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    cells: list[Any] = [{"bytes": stream.getvalue(), "path": None}]
    rows = Dataset.from_dict({"image": cells, "caption": ["black"]}, features=features)
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    for source in (rows, tmp_path / "rows.parquet", tmp_path):
        with pytest.raises(ValueError, match=r"image inside of the dataset: 1:\n.*images_to=FOLDER"):
            load_pairs(source)
        saved = load_pairs(source, images_to=tmp_path.parent / "saved")["positive"][0]["image"]
        assert Path(saved).read_bytes() == stream.getvalue()
    assert len(list((tmp_path.parent / "saved").iterdir())) == 1


# --- the dry run


def test_what_is_worth_a_look(tmp_path: Path) -> None:
    header = ["anchor", "positive", "negative_1"]
    rows = [
        ("red", "apple", "pear"),
        ("Red ", "APPLE", "pear"),  # given again
        ("red", "cherry", "pear"),  # another positive
        ("green", "apple", "plum"),  # another anchor of the same positive
        ("blue", "blue", "plum"),
        ("red", "rose", "cherry"),  # right, by line 4
    ]
    table = write_csv(tmp_path / "pairs.csv", header, rows)
    report = check_pairs(table)
    assert report.ok
    first = {kind: list(map(str, errors)) for kind, errors in report.notes.first.items()}
    assert first == {
        "pair given again": [f"{table}, line 3: the same as {table}, line 2"],
        "anchor that is its own positive": [f"{table}, line 6: 'blue'"],
        "negative that is a right answer of its anchor": [f"{table}, line 7: 'cherry'"],
    }
    assert f"\nWorth a look: {report.notes}:\n- {table}, line 3: the same as" in str(report)


def test_the_layout_of_mbeir(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_captions(folder, {"a.png": "red", "deep/b.png": "green", "none.png": "x"})
    settings: dict[str, Any] = {"data": folder, "mbeir": tmp_path / "mbeir", "test_fraction": 0.5, "val_fraction": 0.0}
    assert not pairs(PairsConfig(**settings)).ok
    assert "mbeir was not written, for rows cannot be used" in caplog.text
    assert not (tmp_path / "mbeir").exists()
    report = pairs(PairsConfig(**settings, bad_pairs="drop", direction="image-to-text", json=tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    data = MBEIR(tmp_path / "mbeir")
    assert [task.arrow for task in data.tasks("test")] == ["i -> t"]
    assert len(data.queries(data.tasks("test")[0], "test")) == 1


def test_special_tokens_are_found_before_training(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("anchor,positive\na,b\nc <|im_end|> d,e\nf,[RET]\n", encoding="utf-8")
    report = check_pairs(table)
    assert report.offenders.counts == {"special token in a text": 2}
    assert "line 3: anchor is 'c <|im_end|> d' with the special token '<|im_end|>'" in report.offenders.quotes()
    with pytest.raises(ValueError, match=r"(?s)2 of 3 rows .*line 4: positive is '\[RET\]'.*tokens split"):
        load_pairs(table)
    assert len(load_pairs(table, on_error="drop")) == 1
    assert len(load_pairs(table, special_tokens="split")) == 3
    config = {"data": table, "special_tokens": "split", "mbeir": tmp_path / "mbeir"}
    assert pairs(PairsConfig(**config, val_fraction=0, test_fraction=0)).ok
    written = [path.read_text(encoding="utf-8") for path in (tmp_path / "mbeir").rglob("*.jsonl")]
    assert any("<|im_end|>" in text for text in written)
