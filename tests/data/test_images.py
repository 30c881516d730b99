from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from puma_hf.data import MBEIRFormatError
from puma_hf.data.images import BrokenImageError, ImageFiles, ImageFinder
from tests.data.photos import make_photos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def png(size: tuple[int, int] = (3, 2)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, format="PNG")
    return stream.getvalue()


def test_paths_become_absolute_and_sizes_are_kept(folder: Path) -> None:
    images = ImageFiles(folder)
    assert images.find("a.png", "line 2") == str(folder / "a.png")
    assert images.find("./deep/../a.png", "line 3") == str(folder / "a.png")
    assert images.find({"path": "deep/b.png", "bytes": None}, "line 4") == str(folder / "deep/b.png")
    assert images.sizes == {str(folder / "a.png"): (4, 6), str(folder / "deep/b.png"): (10, 5)}


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (3, ValueError, r"^line 2: image is 3, must be the path of a file, or null"),
        ({"bytes": "text"}, ValueError, r"line 2: image is \{'bytes': 'text'\}, must be the path"),
        ("a\0.png", ValueError, r"line 2: image 'a\\x00\.png' has a NUL byte"),
        (
            "../outside.png",
            ValueError,
            r"line 2: image path '\.\./outside\.png' leaves .*photos; .* names them up",
        ),
        ("/etc/passwd", ValueError, r"line 2: image path '.*etc/passwd' leaves"),
        ("link.png", ValueError, r"line 2: image path 'link\.png' passes a symbolic link that leaves .* \(hf download"),
        ("none.png", FileNotFoundError, r"line 2: image 'none\.png' is not a file below .*\. Check the path"),
        ("deep", FileNotFoundError, r"line 2: image 'deep' is not a file"),
        ("broken.png", BrokenImageError, r"line 2: '.*broken\.png' cannot be read as an image"),
        ("long.png", BrokenImageError, r"line 2: '.*long\.png' has 402 x 2 pixels; Qwen2-VL takes at most 200 times"),
    ],
)
def test_what_is_refused(folder: Path, value: Any, kind: type[Exception], message: str) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    Image.new("1", (402, 2)).save(folder / "long.png")
    with pytest.raises(kind, match=message):
        ImageFiles(folder).find(value, "line 2")


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


def test_images_inside_are_saved_as_they_are(tmp_path: Path) -> None:
    images = ImageFiles(None, save_to=tmp_path / "saved")
    first = images.find({"bytes": png(), "path": "../../x.exe"}, "row 1")
    assert images.find({"bytes": png(), "path": None}, "row 2") == first
    other = images.find({"bytes": png((5, 5)), "path": None}, "row 3")
    assert sorted(map(str, (tmp_path / "saved").iterdir())) == sorted([first, other])
    assert Path(first).read_bytes() == png()
    assert Path(first).suffix == ".png"
    assert images.sizes == {first: (3, 2), other: (5, 5)}


def test_broken_images_inside(tmp_path: Path) -> None:
    images = ImageFiles(None, save_to=tmp_path, decode=True)
    with pytest.raises(BrokenImageError, match=r"row 1: the image inside \(3 bytes\) cannot be read as an image"):
        images.find({"bytes": b"abc"}, "row 1")
    with pytest.raises(BrokenImageError, match=r"row 1: .* cannot be read as an image"):
        images.find({"bytes": png((60, 60))[:60]}, "row 1")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def images(tmp_path: Path) -> ImageFinder:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dog.png").write_bytes(b"")
    return ImageFinder(folder)


@pytest.mark.parametrize(
    "path", ["../secret.png", "a/../../secret.png", "/etc/passwd", "C:\\secret.png", "..\\secret.png", "a\0b"]
)
def test_image_path_that_leaves_the_folder(images: ImageFinder, path: str) -> None:
    with pytest.raises(MBEIRFormatError, match=r"^here: image path .* leaves .* without"):
        images.find(path, "here")


def test_symbolic_links_may_stay_inside_but_not_leave(images: ImageFinder, tmp_path: Path) -> None:
    root = tmp_path / "data"
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "cat.png").write_bytes(b"")
    (root / "file.png").symlink_to(tmp_path / "outside" / "cat.png")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "inside.png").symlink_to("dog.png")
    (root / "broken.png").symlink_to("nothing.png")
    assert images.find("inside.png", "here") == str((root / "dog.png").resolve())
    for path in ("file.png", "folder/cat.png"):
        with pytest.raises(
            MBEIRFormatError,
            match=r"^here: image path .* symbolic link that leaves .*MBEIR\(\.\.\., image_root=\.\.\.\), in Python",
        ):
            images.find(path, "here")
    with pytest.raises(FileNotFoundError, match=r"^here: image 'broken.png' is not a file"):
        images.find("broken.png", "here")


@pytest.mark.parametrize("path", ["cat.png", "folder/cat.png", ".", "half \ud800.png", "half \ud800/cat.png"])
def test_missing_image(images: ImageFinder, path: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^here: image .* is not a file below .*MBEIR\(\.\.\., image_root=\.\.\.\), in Python"
    ):
        images.find(path, "here")
