from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from puma_hf.data.images import BrokenImageError, ContentHashes, ImageFiles
from tests.data.photos import make_photos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def png(size: tuple[int, int] = (3, 2)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, format="PNG")
    return stream.getvalue()


# --- paths


def test_paths_become_absolute_and_sizes_are_kept(folder: Path) -> None:
    images = ImageFiles(folder)
    assert images.find("a.png", "line 2") == str(folder / "a.png")
    assert images.find("./deep/../a.png", "line 3") == str(folder / "a.png")
    assert images.find({"path": "deep/b.png", "bytes": None}, "line 4") == str(folder / "deep/b.png")
    assert images.sizes == {str(folder / "a.png"): (4, 6), str(folder / "deep/b.png"): (10, 5)}


def test_a_file_is_looked_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageFiles(folder)
    images.find("a.png", "line 2")
    monkeypatch.delattr("PIL.Image.open")
    assert images.find("a.png", "line 3") == images.find("./a.png", "line 4")


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (3, ValueError, r"^line 2: image is 3, must be the path of a file, or null"),
        ({"bytes": "text"}, ValueError, r"line 2: image is \{'bytes': 'text'\}, must be the path"),
        ("a\0.png", ValueError, r"line 2: image 'a\\x00\.png' has a NUL byte"),
        ("../outside.png", ValueError, r"line 2: image '\.\./outside\.png' leaves .*photos\. .*move that file up"),
        ("/etc/passwd", ValueError, r"line 2: image '/etc/passwd' leaves"),
        ("link.png", ValueError, r"line 2: image 'link\.png' leaves .* put files in the place of links \(hf download"),
        ("none.png", FileNotFoundError, r"line 2: there is no image '.*none\.png'\. Check the path"),
        ("deep", FileNotFoundError, r"line 2: there is no image"),
        ("broken.png", BrokenImageError, r"line 2: '.*broken\.png' cannot be read as an image"),
        ("long.png", BrokenImageError, r"line 2: '.*long\.png' has 402 x 2 pixels; Qwen2-VL takes at most 200 times"),
    ],
)
def test_what_is_refused(folder: Path, value: Any, kind: type[Exception], message: str) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    Image.new("1", (402, 2)).save(folder / "long.png")
    with pytest.raises(kind, match=message):
        ImageFiles(folder).find(value, "line 2")


def test_the_size_that_the_processor_takes_is_taken(folder: Path) -> None:
    Image.new("1", (400, 2)).save(folder / "long.png")
    assert ImageFiles(folder).find("long.png", "line 2")


def test_more_pixels_than_pillow_decodes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 49)
    images = ImageFiles(folder)
    images.find("a.png", "line 2")
    # Up to twice the limit Pillow only warns.
    with pytest.raises(BrokenImageError, match=r"b\.png' has 10 x 5 pixels, more than Pillow's limit of 49\. Scale it"):
        images.find("deep/b.png", "line 2")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    images.find("deep/b.png", "line 2")


def test_damage_behind_the_header_is_found_by_decoding(folder: Path) -> None:
    content = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(content[:45])
    assert ImageFiles(folder).find("cut.png", "line 2")
    with pytest.raises(BrokenImageError, match=r"line 2: '.*cut\.png' cannot be read as an image .* cut off"):
        ImageFiles(folder, decode=True).find("cut.png", "line 2")
    assert ImageFiles(folder, decode=True).find("a.png", "line 2")


# --- images inside of a dataset


def test_images_inside_are_refused_without_a_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2: the image is inside the dataset, .*Save the images to a folder"):
        ImageFiles(folder).find({"bytes": png(), "path": "a.png"}, "line 2")


def test_images_inside_are_saved_as_they_are(tmp_path: Path) -> None:
    images = ImageFiles(None, save_to=tmp_path / "saved")
    first = images.find({"bytes": png(), "path": "../../x.exe"}, "row 1")
    assert images.find({"bytes": png(), "path": None}, "row 2") == first
    other = images.find({"bytes": png((5, 5)), "path": None}, "row 3")
    assert sorted(map(str, (tmp_path / "saved").iterdir())) == sorted([first, other])
    assert Path(first).read_bytes() == png()
    assert Path(first).suffix == ".png"
    assert images.sizes == {first: (3, 2), other: (5, 5)}


def test_a_dry_run_saves_nothing(tmp_path: Path) -> None:
    images = ImageFiles(None, save_to=tmp_path / "saved", dry=True)
    assert images.sizes[images.find({"bytes": png()}, "row 1")] == (3, 2)
    assert not (tmp_path / "saved").exists()


def test_broken_images_inside(tmp_path: Path) -> None:
    images = ImageFiles(None, save_to=tmp_path, decode=True)
    with pytest.raises(BrokenImageError, match=r"row 1: the image inside \(3 bytes\) cannot be read as an image"):
        images.find({"bytes": b"abc"}, "row 1")
    with pytest.raises(BrokenImageError, match=r"row 1: .* cannot be read as an image"):
        images.find({"bytes": png((60, 60))[:60]}, "row 1")
    assert not list(tmp_path.iterdir())


# --- copies


def test_copies_have_one_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, copy = (str(folder / name) for name in ("a.png", "deep/b.png", "copy of a.png"))
    third = folder / "third.png"
    third.write_bytes((folder / "a.png").read_bytes()[:-1] + b"x")  # as large, but not the same
    hashes = ContentHashes()
    for path in (b, a, copy, str(third), a):
        hashes.add(path)
    assert hashes[a] == hashes[copy]
    assert len({hashes[path] for path in (a, b, str(third))}) == 3
    # Nothing is read of a file whose size no other has.
    assert hashes[b] == b
