"""Which files a query may name; `test_serve.py` asks the same of a server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from puma_hf.app.uploads import is_full, only_uploads


@pytest.fixture
def bound(tmp_path: Path) -> SimpleNamespace:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "a.png").touch()
    (uploads / "link.png").symlink_to("/etc/hostname")
    made = SimpleNamespace(page=SimpleNamespace(), picture=SimpleNamespace(), words=SimpleNamespace(), uploads=uploads)
    only_uploads(made.page, made.picture, [made.words], uploads)
    return made


def test_an_upload_is_a_picture(bound: SimpleNamespace) -> None:
    path = str((bound.uploads / "a.png").resolve())
    assert bound.picture.preprocess(SimpleNamespace(path=path)) == path
    assert asyncio.run(bound.picture.async_move_resource_to_block_cache(path)) == path
    assert bound.picture.preprocess(None) is None
    assert asyncio.run(bound.picture.async_move_resource_to_block_cache(None)) is None


@pytest.mark.parametrize("name", ["../a.png", "link.png", "/etc/hostname", "http://example.org/a.png", ""])
def test_another_file_is_none(bound: SimpleNamespace, name: str) -> None:
    path = str(bound.uploads / name) if name in ("../a.png", "link.png") else name
    with pytest.raises(ValueError, match="was not uploaded"):
        bound.picture.preprocess(SimpleNamespace(path=path))
    with pytest.raises(ValueError, match="was not uploaded"):
        asyncio.run(bound.picture.async_move_resource_to_block_cache(path))


def test_other_fields_take_no_file(bound: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="This field takes no file"):
        asyncio.run(bound.words.async_move_resource_to_block_cache(str(bound.uploads / "a.png")))


def test_gradio_is_told_to_check_as_well(bound: SimpleNamespace) -> None:
    assert bound.page.has_launched


def test_uploads_have_a_share_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puma_hf.app.uploads._MOST_BYTES", 3 * (1 << 16))
    assert not is_full(tmp_path)
    (tmp_path / "a").mkdir()
    for name in ("one", "a/two"):  # small ones count for more than they have
        (tmp_path / name).write_bytes(b"x")
    assert not is_full(tmp_path)
    (tmp_path / "a" / "three").touch()
    assert is_full(tmp_path)
    (tmp_path / "a" / "three").unlink()
    (tmp_path / "a" / "two").write_bytes(bytes(1 << 17))
    assert is_full(tmp_path)
