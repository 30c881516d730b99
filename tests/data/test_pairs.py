from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image

from puma_hf.data import load_mbeir
from puma_hf.data.pairs import load_pairs
from puma_hf.data.sampler import DistinctPositivesBatchSampler
from tests.data.photos import make_photos, write_captions, write_csv


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def test_rows_are_those_of_mbeir(folder: Path, root: Path) -> None:
    write_captions(folder, {"a.png": "red", "deep/b.png": "green"})
    rows = load_pairs(folder, instruction="Find the photo.")
    assert rows[1] == {
        "anchor": {"text": "green", "image": None, "instruction": "Find the photo."},
        "positive": {"text": None, "image": str(folder / "deep/b.png")},
    }
    for given in (False, True):
        pairs, mbeir = load_pairs(folder, with_ids=given), load_mbeir(root, with_ids=given)
        assert pairs.features == mbeir.features
        assert len(concatenate_datasets([pairs, mbeir])) == 2 + len(mbeir)


def test_nli_pairs_are_pairs(tmp_path: Path, root: Path) -> None:
    table = write_csv(tmp_path / "nli.csv", ["sent0", "sent1", "hard_neg"], [("a", "b", "c"), ("d", "e", " f")])
    rows = load_pairs(table)
    assert rows[1] == {
        "anchor": {"text": "d", "image": None, "instruction": None},
        "positive": {"text": "e", "image": None},
        "negative_1": {"text": "f", "image": None},
    }
    assert rows.features == load_mbeir(root, num_negatives=1).features
    assert load_pairs(table, negatives=()).column_names == ["anchor", "positive"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_kind_of_table(folder: Path, suffix: str) -> None:
    expected = load_pairs(write_captions(folder, {"a.png": "red"}))
    table = folder / f"table{suffix}"
    row = {"file_name": "a.png", "caption": "red"}
    if suffix == ".parquet":
        Dataset.from_list([row]).to_parquet(str(table))
    elif suffix.startswith(".json"):
        table.write_text(json.dumps([row] if suffix == ".json" else row))
    else:
        table.write_text("\n".join("\t,"[suffix == ".csv"].join(line) for line in (row.keys(), row.values())))
    assert load_pairs(table)[:] == expected[:]


def test_its_own_rows_again(folder: Path) -> None:
    write_captions(folder, {"a.png": "red", "deep/b.png": "green"})
    rows = load_pairs(folder, instruction="Find the photo.", with_ids=True)
    assert load_pairs(rows, with_ids=True)[:] == rows[:]


# --- ids


def test_one_image_with_five_captions(folder: Path) -> None:
    captions = [("a.png", f"red {number}") for number in range(4)] + [("copy of a.png", "crimson")]
    write_captions(folder, [*captions, *(("deep/b.png", f"green {number}") for number in range(5))])
    rows = load_pairs(folder, with_ids=True)
    assert [len(ids) for ids in rows["positives"]] == [1] * 10
    assert len(set(rows["did"][:5])) == len(set(rows["did"][5:])) == 1
    assert rows["positives"] == [[did] for did in rows["did"]]
    sampler = DistinctPositivesBatchSampler(rows, rows["positives"], batch_size=2, drop_last=False, seed=0)
    for batch in sampler:
        assert sorted(row // 5 for row in batch) == [0, 1]
    turned = load_pairs(folder, direction="image-to-text", with_ids=True)
    assert set(map(len, turned["positives"])) == {1, 2}  # as many as keep the rows of an image apart
    assert turned["qid"] == rows["did"]


# --- offenders


def offending(folder: Path) -> Path:
    captions = [("a.png", "red"), ("none.png", "x"), ("broken.png", "x"), ("../outside.png", "x"), ("a.png", "")]
    return write_captions(folder, [*captions, ("none.png", "y"), ("deep/b.png", "green")])


def test_offenders_are_counted_in_one_error(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"captions\.csv: 5 of 7 rows cannot be used: ") as caught:
        load_pairs(offending(folder))
    message = str(caught.value)
    counts = "2 x image missing, 1 x image broken, 1 x image refused, 1 x anchor missing. The first: "
    assert counts in message
    shown = [message.index(f"captions.csv, line {line}: ") for line in (3, 4, 5, 6, 7)]
    assert shown == sorted(shown)
    assert "Mend them (puma-hf pairs lists more), or leave them out" in message
    assert message.endswith("(on_error='drop', in a command --bad-pairs drop).")


def test_no_more_than_five_are_shown(folder: Path) -> None:
    table = write_captions(folder, [(f"{number}.png", "x") for number in range(9)])
    with pytest.raises(ValueError, match=r"9 of 9 rows cannot be used: 9 x image missing") as caught:
        load_pairs(table)
    assert str(caught.value).count("there is no image") == 5


def test_offenders_can_be_dropped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="puma_hf"):
        rows = load_pairs(offending(folder), on_error="drop")
    assert [anchor["text"] for anchor in rows["anchor"]] == ["red", "green"]
    assert "captions.csv: left out 5 of 7 rows: 2 x image missing, 1 x image broken" in caplog.text
    assert "captions.csv: 2 pairs; anchor: caption (text); positive: file_name (image)" in caplog.text


def test_dropping_all_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of 1 rows cannot be used: 1 x image missing"):
        load_pairs(write_captions(folder, {"none.png": "x"}), on_error="drop")


def test_on_error_is_checked() -> None:
    with pytest.raises(ValueError, match=r"on_error='ignore' must be 'raise' or 'drop'"):
        load_pairs("none.csv", on_error="ignore")  # type: ignore[arg-type]


# --- images


def test_images_are_decoded_if_wanted(folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:45])
    table = write_captions(folder, {"cut.png": "red"})
    assert len(load_pairs(table)) == 1
    with pytest.raises(ValueError, match=r"1 x image broken"):
        load_pairs(table, decode=True)


def test_images_inside_of_parquet_are_saved(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2)).save(stream, format="PNG")
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    cells: list[Any] = [{"bytes": stream.getvalue(), "path": None}]
    rows = Dataset.from_dict({"image": cells, "caption": ["black"]}, features=features)
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    for source in (rows, tmp_path / "rows.parquet"):
        with pytest.raises(ValueError, match=r"1 x image inside of the dataset.*images_to=FOLDER"):
            load_pairs(source)
        saved = load_pairs(source, images_to=tmp_path / "saved")["positive"][0]["image"]
        assert Path(saved).read_bytes() == stream.getvalue()
    assert len(list((tmp_path / "saved").iterdir())) == 1
