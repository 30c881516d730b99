"""Copy an index to where nothing of the original is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from puma_hf.embedding.store import open_embeddings
from puma_hf.search.build import build_index
from puma_hf.search.config import IndexConfig
from puma_hf.search.index import Index, open_index
from puma_hf.search.portable import copy_index
from puma_hf.search.query import Query, open_searcher
from tests.search.small_corpus import write_picture


@pytest.fixture
def own_index(puma_dir: Path, tmp_path: Path) -> Index:
    """Of a folder with two pictures of one name, one broken, and of a model, all of which can be taken away."""
    there = tmp_path / "there"
    for number, name in enumerate(("a.png", "sub/a.png", "sub/b.png")):
        write_picture(there / "photos" / name, number)
    (there / "photos" / "c.png").write_bytes(b"no picture")
    shutil.copytree(puma_dir, there / "puma")
    values = {"data": there / "photos", "model": str(there / "puma"), "output": there / "index"}
    build_index(IndexConfig(**values, shard_size=2))
    return open_index(there / "index")


def test_a_copy_needs_nothing_else(own_index: Index, tmp_path: Path) -> None:
    with Image.open(tmp_path / "there" / "photos" / "sub" / "a.png") as opened:
        query = Query(image=opened.copy())
    before = open_searcher(own_index).search(query).to_dict()["answers"]
    assert copy_index(own_index.folder, tmp_path / "copy") == tmp_path / "copy"  # an index, or where it is
    shutil.move(tmp_path / "copy", tmp_path / "moved")
    shutil.rmtree(tmp_path / "there")
    searcher = open_searcher(tmp_path / "moved")
    after = searcher.search(query).to_dict()["answers"]
    pictures = [answer.pop("image") for answer in after]
    assert [{**answer, "image": None} for answer in after] == [{**answer, "image": None} for answer in before]
    assert len(set(pictures)) == 3
    assert {Path(path).parent for path in pictures} == {tmp_path / "moved" / "images"}
    assert searcher.index.model == str(tmp_path / "moved" / "model")


def test_a_copy_is_made_again_by_the_model_that_it_holds(
    own_index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = copy_index(own_index, tmp_path / "copy")
    (tmp_path / "here" / "model").mkdir(parents=True)  # not the index's, which has one of this name, too
    monkeypatch.chdir(tmp_path / "here")
    build_index(IndexConfig(data=tmp_path / "there" / "photos", output=copy, shard_size=2))
    assert open_index(copy).model == str(copy / "model")
    assert "becomes one of" not in caplog.text  # of the same corpus, which a copy calls by its name alone


def test_no_path_leads_outside(own_index: Index, tmp_path: Path) -> None:
    copy_index(own_index, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "index.json").read_text())["model"] == "./model"
    assert (own_index.folder / "errors.jsonl").is_file()  # it names paths
    for path in (tmp_path / "copy").rglob("*"):
        for name in (str(tmp_path), "c.png"):  # the latter is broken
            assert path.is_dir() or name.encode() not in path.read_bytes(), path.name
    assert open_embeddings(tmp_path / "copy").manifest["num_errors"] == 1


def test_the_name_of_a_model_on_the_hub(index_dir: Path, tmp_path: Path) -> None:
    index = open_index(index_dir)
    copy_index(index, tmp_path / "copy", model="org/puma")
    copied = open_index(tmp_path / "copy")
    assert copied.model == "org/puma"
    assert copied.description["revision"] is None
    assert not (tmp_path / "copy" / "model").exists()
    again = copy_index(copied, tmp_path / "again")
    assert open_index(again).description == copied.description
    assert [item.id for item in open_index(again).items(range(8))] == [item.id for item in index.items(range(8))]


def test_indexed_again_nothing_is_embedded(own_index: Index, tmp_path: Path) -> None:
    copy_index(own_index, tmp_path / "copy")
    photos, model = tmp_path / "there" / "photos", str(tmp_path / "copy" / "model")
    report = build_index(IndexConfig(data=photos, model=model, output=tmp_path / "copy", shard_size=2))
    assert (report.embedded.num_new_items, report.counts) == (0, {"image": 3})


def test_whole_or_not_at_all(own_index: Index, tmp_path: Path) -> None:
    photos = tmp_path / "there" / "photos"
    photos.joinpath("sub", "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"the picture of item 'sub/b.png', cannot be copied .* Run puma-hf index"):
        copy_index(own_index, tmp_path / "copy")
    photos.joinpath("sub", "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"the picture of item 'sub/b.png', is gone. Run puma-hf index again"):
        copy_index(own_index, tmp_path / "copy")
    shutil.rmtree(tmp_path / "there" / "puma")
    with pytest.raises(FileNotFoundError, match=r"is gone\. Name it on the Hub \(model=\.\.\., --model\)"):
        copy_index(own_index, tmp_path / "copy")
    assert os.listdir(tmp_path) == ["there"]


def test_a_picture_that_was_replaced(own_index: Index, tmp_path: Path) -> None:
    copied = open_index(copy_index(own_index, tmp_path / "copy"))
    picture = tmp_path / "there" / "photos" / "sub" / "a.png"
    for path, index in ((picture, own_index), (Path(str(copied.items([1])[0].image)), copied)):
        write_picture(path, 8)
        with pytest.raises(ValueError, match=r"item 'sub/a.png', changed after it was indexed.* index again"):
            copy_index(index, tmp_path / "again")
    photos, model = tmp_path / "there" / "photos", str(tmp_path / "there" / "puma")
    values = {"data": photos, "model": model, "output": own_index.folder, "shard_size": 2}
    assert build_index(IndexConfig(**values)).embedded.num_new_items == 1
    again = open_index(copy_index(open_index(own_index.folder), tmp_path / "again"))
    assert Path(str(again.items([1])[0].image)).read_bytes() == picture.read_bytes()


def test_an_index_that_was_made_anew_meanwhile(own_index: Index, tmp_path: Path) -> None:
    photos, model = tmp_path / "there" / "photos", str(tmp_path / "there" / "puma")
    write_picture(photos / "sub" / "z.png", 7)  # a shard more; those that were there stay as they were
    build_index(IndexConfig(data=photos, model=model, output=own_index.folder, shard_size=2))
    with pytest.raises(ValueError, match=r"index' was made anew while it was open\. Open it again"):
        copy_index(own_index, tmp_path / "copy")
    assert os.listdir(tmp_path) == ["there"]


def test_what_is_there_is_kept(index_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        copy_index(open_index(index_dir), tmp_path / "copy")
    with pytest.raises(ValueError, match="is, or holds, the source itself"):
        copy_index(open_index(index_dir), index_dir)
