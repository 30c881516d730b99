from __future__ import annotations

from pathlib import Path

import pytest

from puma_hf.data.mbeir_origin import (
    IMPORT_FILE,
    NANO_FILE,
    file_hash,
    read_origin,
    text_hash,
    verified_content_hash,
    write_origin,
)
from puma_hf.data.mbeir_problems import MBEIRFormatError


def test_what_was_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "query").mkdir()
    (tmp_path / "query" / "a.jsonl").write_text("a")
    write_origin(tmp_path / NANO_FILE, "/images", {"seed": 3}, content_hash="abc")
    origin = read_origin(tmp_path)
    assert origin is not None
    assert (origin.path, origin.image_root) == (tmp_path / NANO_FILE, Path("/images"))
    assert (origin.settings, origin.content_hash) == ({"seed": 3}, "abc")
    assert origin.files == {"query/a.jsonl": file_hash(tmp_path / "query" / "a.jsonl")}
    assert verified_content_hash(origin) == "abc"


def test_a_relative_image_root_counts_from_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    write_origin(folder / IMPORT_FILE, "../..", {})
    origin = read_origin(folder)
    assert origin is not None
    assert origin.image_root == tmp_path.resolve()
    assert (verified_content_hash(origin), origin.files) == (None, {})


def test_a_plain_folder_says_nothing(tmp_path: Path) -> None:
    assert read_origin(tmp_path) is None


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_changed_file_is_found(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("a")
    write_origin(tmp_path / NANO_FILE, ".", {}, content_hash="abc")
    file.write_text("b") if damage == "change" else file.unlink()
    origin = read_origin(tmp_path)
    assert origin is not None
    with pytest.raises(MBEIRFormatError, match=r"a\.jsonl was changed or removed .* remove the folder and build"):
        verified_content_hash(origin)


@pytest.mark.parametrize("text", ["", "[]", '{"image_root": "."}', '{"image_root": 3, "settings": {}}', "{"])
def test_a_broken_description(tmp_path: Path, text: str) -> None:
    (tmp_path / NANO_FILE).write_text(text)
    with pytest.raises(MBEIRFormatError, match=r"nano\.json does not say what the folder holds .* build it anew"):
        read_origin(tmp_path)


def test_hashes_tell_where_values_end(tmp_path: Path) -> None:
    assert text_hash(["ab", "c"]) != text_hash(["a", "bc"])
    assert text_hash([None]) != text_hash(["null"])
    assert text_hash(["\ud800"]) == text_hash(["\ud800"])
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    assert file_hash(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
