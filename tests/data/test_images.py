from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from puma_hf.data import MBEIRFormatError
from puma_hf.data.images import Images, image_files


def png(size: tuple[int, int] = (3, 2)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, format="PNG")
    return stream.getvalue()


def test_paths_become_absolute_and_sizes_are_kept(folder: Path) -> None:
    images = Images(folder)
    assert images.read("a.png", "line 2") == images.read(str(folder / "a.png"), "line 3") == str(folder / "a.png")
    assert images.read("./deep/../a.png", "line 4") == str(folder / "a.png")
    assert images.read({"path": "deep/b.png", "bytes": None}, "line 5") == str(folder / "deep/b.png")
    assert images.read_paths == {str(folder / "a.png"), str(folder / "deep/b.png")}
    outside = str(folder.parent / "outside.png")
    assert Images().read(outside, "row 1") == outside


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (3, MBEIRFormatError, r"^line 2: image is 3, must be the path of a file, or null"),
        ("deep/../../outside.png", MBEIRFormatError, r"line 2: image path '.*' leaves .*photos"),
        ("/etc/passwd", MBEIRFormatError, r"line 2: image path '.*etc/passwd' leaves"),
        ("link.png", MBEIRFormatError, r"line 2: .* leaves .* \(hf download .*image_root="),
        ("deep", FileNotFoundError, r"line 2: image 'deep' is not a file .*MBEIR\(image_root=\.\.\.\)"),
        ("broken.png", MBEIRFormatError, r"line 2: '.*broken\.png' cannot be read as an image"),
        ("long.png", MBEIRFormatError, r"line 2: '.*long\.png' has 402 x 2 pixels; .* 200 times as long as wide"),
    ],
)
def test_what_is_refused(folder: Path, value: Any, kind: type[Exception], message: str) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    Image.new("1", (402, 2)).save(folder / "long.png")
    with pytest.raises(kind, match=message):
        Images(folder).read(value, "line 2")


def test_links_may_stay_inside_and_what_is_missing_may_be_so(folder: Path) -> None:
    (folder / "inside.png").symlink_to("a.png")
    images = Images(folder)
    assert images.find("inside.png", "here") == str(folder / "a.png")
    assert images.find("gone.png", "here", may_be_missing=True) == str(folder / "gone.png")
    os.mkfifo(folder / "pipe.png")
    for name in ("pipe.png", "deep"):  # to open one may take for ever
        with pytest.raises(FileNotFoundError, match="is not a file"):
            images.find(name, "here", may_be_missing=True)


def test_damage_behind_the_header_is_found_by_decoding(folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:45])
    assert Images(folder).read("cut.png", "line 2")
    with pytest.raises(MBEIRFormatError, match=r"line 2: .*cut\.png' cannot be read as an image .*truncated"):
        Images(folder, decode=True).read("cut.png", "line 2")
    assert Images(folder, decode=True).read("a.png", "line 2")


def test_images_inside_are_saved_as_they_are(tmp_path: Path) -> None:
    images = Images(save_to=tmp_path / "saved")
    first = images.read({"bytes": png(), "path": "../../x.exe"}, "row 1")
    assert images.read(png(), "row 2") == first
    other = images.read({"bytes": png((5, 5)), "path": None}, "row 3")
    assert sorted(map(str, (tmp_path / "saved").rglob("*.png"))) == sorted([first, other])
    assert (Path(first).read_bytes(), Path(first).suffix) == (png(), ".png")
    for content in (b"abc", png((60, 60))[:60]):
        with pytest.raises(MBEIRFormatError, match=r"row 4: the image inside \(\d+ bytes\).* cannot be read as an"):
            Images(save_to=tmp_path / "none", decode=True).read(content, "row 4")
    assert not (tmp_path / "none").exists()


def test_what_a_folder_holds(folder: Path) -> None:
    """A snapshot in the Hub's cache consists of links; a pipe would be waited for, a linked folder may be a loop."""
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "gone.png").symlink_to("nothing")
    (folder / "loop").symlink_to(folder)
    (folder / ".hidden.png").write_bytes(b"of another system")
    for name in ("notes.HEIX", "README"):
        (folder / name).write_text("")
    os.mkfifo(folder / "pipe.png")
    (folder / os.fsdecode(b"\xe4.png")).write_bytes(png())
    left_out = Counter[str]()
    found = list(image_files(folder, left_out))
    assert found == ["a.png", "broken.png", "copy of a.png", "link.png", "deep/b.png"]
    # A link to nothing, a pipe, and a name that is not UTF-8 count by their ending.
    assert left_out == {"linked folder": 1, ".png": 3, ".heix": 1, "no ending": 1}
