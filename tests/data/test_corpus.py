from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from puma_hf.data.corpus import dataset_items, file_items, folder_items
from puma_hf.data.images import BrokenImageError


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


# --- folders


def test_every_image_below_a_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "notes.md").write_text("no image")
    (folder / "README").write_text("no image")
    (folder / "._b.png").write_bytes(b"of another system")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "b.png").write_bytes(b"hidden")
    with caplog.at_level(logging.INFO, logger="puma_hf"):
        items = list(folder_items(folder))
    names = ["a.webp", "b.png", "deep/er/a.JPG"]
    assert items == [(None, str(folder / name), None) for name in names]
    assert f"{folder}: left out what is no image here: 1 x no ending, 1 x .md" in caplog.text


def test_paths_are_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert all(Path(str(image)).is_absolute() for _, image, _ in folder_items(Path("corpus")))


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no image")
    with pytest.raises(
        ValueError, match=r"holds no image \(such as \.jpg, .*\) and is no M-BEIR folder, which has query/"
    ):
        list(folder_items(tmp_path))


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_a_file_that_is_no_image(folder: Path, content: bytes) -> None:
    (folder / "c.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.jpg' cannot be read as an image \(.*\)\. Replace it or leave it out"):
        list(folder_items(folder))


def test_all_broken_images_of_a_folder_are_told_at_once(folder: Path) -> None:
    for number in range(6):
        (folder / f"broken{number}.png").write_bytes(b"no image")
    with pytest.raises(BrokenImageError, match=r"corpus: 6 of 9 images cannot be used\. The first 5:\n- ") as caught:
        list(folder_items(folder))
    assert [f"broken{number}.png" in str(caught.value) for number in range(6)] == [True] * 5 + [False]
    (folder / "broken5.png").unlink()
    with pytest.raises(BrokenImageError, match=r"corpus: 5 of 8 images cannot be used:\n- .*broken0\.png"):
        list(folder_items(folder))


# --- files


def test_texts_and_images_of_a_file(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(
        folder,
        {"text": " a shoe ", "image": None, "id": 7},
        {"image": "b.png", "instruction": "Find it."},
        {"text": "both", "image": "deep/er/a.JPG", "instruction": None, "score": 0.5},
        {"text": "", "image": str(folder / "b.png")},
    )
    with caplog.at_level(logging.INFO, logger="puma_hf"):
        items = list(file_items(path))
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
        assert [text for text, _, _ in file_items(path)] == ["a", "b", "c", "a", "d", "e"]
    assert "ignored the columns id" in caplog.text
    path.write_text("sent0,sent1,hard_neg\na,b,\n")
    with pytest.raises(ValueError, match=r"nli\.csv, line 2: hard_neg is '', must be a text"):
        list(file_items(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": "a", "url": "b"}, r"line 2: no column text or image, nor sent0, sent1, hard_neg\. .*caption, url"),
        ({}, r"line 2: no column text or image.* The columns here are none"),
        ({"text": " ", "image": ""}, r"line 2: text and image are both empty\. Fill one of them"),
        ({"text": 3}, r"line 2: text is 3, must be a text or null"),
        ({"text": "a", "instruction": ["b"]}, r"line 2: instruction is \['b'\], must be a text or null"),
        ({"image": 3}, r"line 2: image is 3, must be the path of a file, or null"),
        ({"image": "../outside.png"}, r"line 2: image '\.\./outside\.png' leaves .*corpus\. .*move that file up"),
        ({"image": "/elsewhere/a.png"}, r"line 2: image '/elsewhere/a\.png' leaves"),
        ({"image": "link.png"}, r"line 2: image 'link\.png' leaves"),
        ({"image": "a\0.png"}, r"line 2: image 'a\\x00\.png' has a NUL byte"),
        ({"image": "broken.png"}, r"line 2: '.*broken\.png' cannot be read as an image"),
    ],
)
def test_bad_rows(folder: Path, row: dict[str, Any], message: str) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "broken.png").write_bytes(b"broken")
    path = write_jsonl(folder, {"text": "good"}, row)
    with pytest.raises(ValueError, match=message):
        list(file_items(path))


@pytest.mark.parametrize("image", ["none.png", "deep", "https://example.org/a.png"])
def test_missing_images(folder: Path, image: str) -> None:
    path = write_jsonl(folder, {"text": "good"}, {"image": image})
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl, line 2: there is no image '.*'\. Check the path"):
        list(file_items(path))


# --- datasets


def test_a_dataset_may_name_any_path(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    outside = str(folder.parent / "outside.png")
    rows = Dataset.from_dict({"text": ["a", None], "image": [None, outside], "label": [0, 1]})
    with caplog.at_level(logging.INFO, logger="puma_hf"):
        assert list(dataset_items(rows)) == [("a", None, None), (None, outside, None)]
    assert "The dataset: ignored the columns label" in caplog.text


def test_paths_in_a_column_of_images_are_not_decoded(folder: Path) -> None:
    rows = Dataset.from_dict({"image": [str(folder / "b.png")]}).cast_column("image", ImageFeature())
    assert list(dataset_items(rows)) == [(None, str(folder / "b.png"), None)]


def test_images_inside_a_dataset_are_refused(folder: Path) -> None:
    features = Features({"image": ImageFeature()})
    rows = Dataset.from_dict({"image": [Image.new("RGB", (4, 4))]}, features=features)
    with pytest.raises(ValueError, match=r"the dataset, row 1: the image is inside the dataset, .*Save the images"):
        list(dataset_items(rows))


def test_a_column_of_items(folder: Path) -> None:
    string = Value("string")
    features = Features({"item": {"text": string, "image": string, "instruction": string}})
    row = {"text": "a", "image": str(folder / "b.png"), "instruction": "Find it."}
    rows = Dataset.from_dict({"item": [row]}, features=features)
    assert list(dataset_items(rows)) == [("a", str(folder / "b.png"), "Find it.")]


def test_a_dataset_without_such_columns() -> None:
    with pytest.raises(ValueError, match=r"the dataset, row 1: no column text or image.*The columns here are caption"):
        list(dataset_items(Dataset.from_dict({"caption": ["a"]})))
