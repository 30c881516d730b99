"""What an index shows of its items, on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from puma_hf.modeling.messages_puma import MODALITY_IDS
from puma_hf.search import items as items_module
from puma_hf.search.items import (
    DamagedItemsError,
    Item,
    image_state,
    items_file,
    read_items,
    read_modalities,
    read_seen_hashes,
    write_items,
)

ITEMS = [
    Item("a", "red"),
    Item("b", None, os.path.join(os.sep, "pictures", "b.png")),
    Item("c", "<b>é\n", os.path.join("images", "c.png")),
]
SEEN = ["00", "11", "22"]


def test_modalities() -> None:
    assert [item.modality for item in ITEMS] == ["text", "image", "image,text"]


def test_written_and_read(tmp_path: Path) -> None:
    key = write_items(tmp_path, 3, ITEMS, SEEN)
    assert [file.name for file in tmp_path.iterdir()] == ["items-00003.parquet"]
    found = read_items(tmp_path, 3, key, [2, 0, 1])
    # A path without a root is below the index.
    assert found == [Item("c", "<b>é\n", str(tmp_path / "images" / "c.png")), ITEMS[0], ITEMS[1]]
    assert read_seen_hashes(tmp_path, 3, key) == SEEN
    assert read_modalities(tmp_path, 3, key).tolist() == [MODALITY_IDS[item.modality] for item in ITEMS]


def test_the_same_items_are_not_written_again(tmp_path: Path) -> None:
    key = write_items(tmp_path, 0, ITEMS, SEEN)
    os.utime(items_file(tmp_path, 0), ns=(1, 1))
    assert write_items(tmp_path, 0, list(ITEMS), list(SEEN)) == key
    assert items_file(tmp_path, 0).stat().st_mtime_ns == 1
    assert write_items(tmp_path, 0, ITEMS, [*SEEN[:2], "33"]) != key
    assert items_file(tmp_path, 0).stat().st_mtime_ns != 1


def test_the_state_of_a_picture(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"123")
    os.utime(file, ns=(7, 8))
    state = image_state(str(file))
    assert state == "3 8"
    assert image_state("\0") is image_state(str(tmp_path / "b.png")) is None
    key = write_items(tmp_path, 0, [Item("a", None, str(file), state), Item("b", "red")], ["00", "11"])
    assert [item.image_state for item in read_items(tmp_path, 0, key, [1, 0])] == [None, state]


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = write_items(tmp_path, 0, ITEMS, SEEN)
    write_items(tmp_path, 1, ITEMS[::-1], SEEN)
    plain = items_module._hash_in

    def replace_then(file: Any) -> str:
        found = plain(file)
        if items_file(tmp_path, 1).exists():
            os.replace(items_file(tmp_path, 1), items_file(tmp_path, 0))
        return found

    monkeypatch.setattr(items_module, "_hash_in", replace_then)
    assert [item.id for item in read_items(tmp_path, 0, key, [0, 1, 2])] == ["a", "b", "c"]


def test_half_a_character(tmp_path: Path) -> None:
    key = write_items(tmp_path, 0, [Item("a\udc80", "b\ud800")], ["00"])
    assert read_items(tmp_path, 0, key, [0]) == [Item("a\\udc80", "b\\ud800")]


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damaged(tmp_path: Path, damage: str) -> None:
    key = write_items(tmp_path, 0, ITEMS, SEEN)
    path = items_file(tmp_path, 0)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        write_items(tmp_path, 0, ITEMS[:1], SEEN[:1])
    with pytest.raises(DamagedItemsError, match=r"items-00000.parquet' is missing or not .* Run puma-hf index again"):
        read_items(tmp_path, 0, key, [0])
    with pytest.raises(DamagedItemsError, match="Run puma-hf index again"):
        read_modalities(tmp_path, 0, key)
