"""Open an index: what is whole, and what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from puma_hf.embedding.store import StoredEmbeddings, open_embeddings
from puma_hf.search import index as index_module
from puma_hf.search.index import DESCRIPTION, manifest_hash, open_index
from puma_hf.search.items import DamagedItemsError


@pytest.fixture
def copy(index_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(index_dir, tmp_path / "copy"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_it_holds(index_dir: Path, corpus: Path) -> None:
    index = open_index(index_dir)
    assert len(index) == 8
    assert index.counts == {"image": 2, "image,text": 1, "text": 5}
    assert index.description["data"] == str(corpus.resolve())
    found = index.items([7, 0, 4, 0])
    assert [item.id for item in found] == ["i1", "t0", "b", "t0"]
    assert found[2].text == "a red picture"
    assert found[2].image == str((corpus.parent / "b.png").resolve())


def test_targets(index_dir: Path) -> None:
    index = open_index(index_dir)
    assert index.candidates().positions.tolist() == list(range(8))
    assert index.candidates("image").positions.tolist() == [1, 4, 7]
    assert index.candidates("text").positions.tolist() == [0, 2, 3, 5, 6]
    with pytest.raises(ValueError, match="target is 'video', must be one of 'any', 'text', 'image'"):
        index.candidates("video")  # type: ignore[arg-type]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no index. Name a directory that puma-hf index has written"):
        open_index(tmp_path / "nowhere")


def test_embeddings_alone(copy: Path) -> None:
    (copy / DESCRIPTION).unlink()
    with pytest.raises(ValueError, match=r"but no index.json.* Run puma-hf index with it as --output"):
        open_index(copy)


def test_half_written_embeddings(copy: Path) -> None:
    edit(copy / "manifest.json", complete=False)
    with pytest.raises(ValueError, match="has not finished"):
        open_index(copy)


def test_embeddings_made_anew(copy: Path) -> None:
    edit(copy / "manifest.json", num_errors=1)
    with pytest.raises(ValueError, match=r"are newer than its index.json: .* run puma-hf index again"):
        open_index(copy)


def test_made_anew_while_it_is_opened(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_then_change(folder: Path) -> StoredEmbeddings:
        stored = open_embeddings(folder)
        edit(folder / "manifest.json", num_errors=1)
        edit(folder / DESCRIPTION, manifest_hash=manifest_hash(folder))
        return stored

    monkeypatch.setattr(index_module, "open_embeddings", open_then_change)
    with pytest.raises(ValueError, match=r"are newer than its index.json"):
        open_index(copy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 2}, "version 2, must be .* at most version 1. Install a newer puma-hf"),
        ({"format": "something"}, "is of format 'something'"),
        (None, "describes no index"),
    ],
)
def test_another_file_of_that_name(copy: Path, values: dict[str, Any] | None, message: str) -> None:
    if values is None:
        (copy / DESCRIPTION).write_text("[]")
    else:
        edit(copy / DESCRIPTION, **values)
    with pytest.raises(ValueError, match=message):
        open_index(copy)


def test_items_of_another_index(copy: Path) -> None:
    shutil.copy(copy / "items-00001.parquet", copy / "items-00000.parquet")
    index = open_index(copy)
    assert index.items([4])[0].id == "b"
    with pytest.raises(DamagedItemsError, match=r"items-00000.parquet' is missing or not what"):
        index.items([0])
    with pytest.raises(DamagedItemsError, match=r"items-00000.parquet"):
        index.candidates("image")


def test_the_name_of_its_model(copy: Path, puma_dir: Path) -> None:
    assert open_index(copy).model == str(puma_dir.resolve())
    for name, expected in (("./model", str((copy / "model").resolve())), ("org/puma", "org/puma")):
        edit(copy / DESCRIPTION, model=name)
        assert open_index(copy).model == expected
