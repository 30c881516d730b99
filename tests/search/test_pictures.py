"""Pictures that an index holds itself."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image, UnidentifiedImageError

from puma_hf.search.pictures import IMAGES, keep_picture


def encoded(color: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, kind)
    return buffer.getvalue()


def test_named_by_content(tmp_path: Path) -> None:
    red, blue = encoded("red", "PNG"), encoded("blue", "JPEG")
    names = [keep_picture(tmp_path, content) for content in (red, blue, red)]
    assert names[0] == names[2] != names[1]
    assert [Path(name).parent.name for name in names] == [IMAGES] * 3
    assert [Path(name).suffix for name in names[:2]] == [".png", ".jpeg"]
    assert [(tmp_path / name).read_bytes() for name in names[:2]] == [red, blue]


def test_cut_off_when_the_machine_lost_power(tmp_path: Path) -> None:
    red = encoded("red", "PNG")
    name = keep_picture(tmp_path, red)
    (tmp_path / name).write_bytes(b"")
    assert keep_picture(tmp_path, red) == name
    assert (tmp_path / name).read_bytes() == red


def test_what_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(UnidentifiedImageError):
        keep_picture(tmp_path, b"<svg/>")
    assert not list(tmp_path.iterdir())
