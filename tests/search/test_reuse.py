"""Add and remove items: the model sees only what is new."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puma_hf.embedding.store import open_embeddings
from puma_hf.search import build
from puma_hf.search.build import IndexReport, build_index
from puma_hf.search.config import IndexConfig
from puma_hf.search.index import open_index
from puma_hf.search.reuse import keep_embeddings
from tests.search.small_corpus import write_corpus, write_picture

Make = Callable[..., IndexReport]


@pytest.fixture
def config(puma_dir: Path, tmp_path: Path) -> Callable[..., IndexConfig]:
    def make(data: Path, **values: Any) -> IndexConfig:
        given = {"data": data, "model": str(puma_dir), "output": tmp_path / "out", "shard_size": 3, **values}
        return IndexConfig(**given)

    return make


def rows(folder: Path) -> np.ndarray[Any, Any]:
    return np.concatenate([embeddings for _, embeddings in open_embeddings(folder)])


def test_items_added_and_removed(config: Callable[..., IndexConfig], tmp_path: Path) -> None:
    data = write_corpus(tmp_path)
    lines = data.read_text().splitlines(keepends=True)
    build_index(config(data))
    before = rows(tmp_path / "out")
    new = json.dumps({"id": "new", "text": "an apple on a table"}) + "\n"
    data.write_text("".join([new, *lines[:2], *lines[3:]]))
    report = build_index(config(data))
    assert (report.embedded.num_new_items, report.embedded.num_items) == (1, 8)
    assert report.counts == {"image": 2, "image,text": 1, "text": 5}
    index = open_index(tmp_path / "out")
    assert [item.id for item in index.items(range(8))] == ["new", "t0", "i0", "t2", "b", "t3", "t4", "i1"]
    assert np.array_equal(rows(tmp_path / "out")[1:], before[[0, 1, 3, 4, 5, 6, 7]])
    fresh = tmp_path / "fresh"
    build_index(config(data, output=fresh))
    np.testing.assert_allclose(rows(tmp_path / "out"), rows(fresh), atol=1e-5)
    assert not list((tmp_path / "out").glob(".unfinished-*"))


def test_pictures_added_changed_and_removed(config: Callable[..., IndexConfig], tmp_path: Path) -> None:
    data = tmp_path / "photos"
    pictures = [write_picture(data / f"{name}.png", number) for number, name in enumerate("bcdefg")]
    build_index(config(data))
    write_picture(data / "a.png", 9)
    pictures[0].unlink()
    os.utime(pictures[3], ns=(1, 1))
    assert build_index(config(data)).embedded.num_new_items == 2
    assert [item.id[0] for item in open_index(tmp_path / "out").items(range(6))] == list("acdefg")


def test_what_was_broken_is_tried_again(config: Callable[..., IndexConfig], tmp_path: Path) -> None:
    data = tmp_path / "photos"
    for number, name in enumerate("ac"):
        write_picture(data / f"{name}.png", number)
    (data / "b.png").write_bytes(b"no picture")
    assert build_index(config(data)).counts == {"image": 2}
    write_picture(data / "b.png", 7)
    report = build_index(config(data))
    assert (report.embedded.num_new_items, report.embedded.num_errors) == (1, 0)
    assert report.counts == {"image": 3}


def test_stopped_in_between(
    config: Callable[..., IndexConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_corpus(tmp_path)
    lines = data.read_text().splitlines(keepends=True)
    build_index(config(data))
    data.write_text("".join(lines[1:]))
    with monkeypatch.context() as patch:
        patch.setattr(build, "embed_corpus", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_index(config(data))
    assert len(open_index(tmp_path / "out")) == 8  # it is still the old one, whole
    assert build_index(config(data)).embedded.num_new_items == 0
    assert len(open_index(tmp_path / "out")) == 7


def test_without_a_change_nothing_is_kept_twice(config: Callable[..., IndexConfig], tmp_path: Path) -> None:
    data = write_corpus(tmp_path)
    assert keep_embeddings(config(data)) == 0  # there is no index yet
    build_index(config(data))
    assert keep_embeddings(config(data)) == 0
    data.write_text("not json\n")
    assert keep_embeddings(config(data)) == 0  # embed_corpus says what is wrong


@pytest.mark.parametrize(("precision", "new"), [("float16", 0), ("ubinary", 0), ("binary", 0), ("int8", 7)])
def test_other_numbers(config: Callable[..., IndexConfig], tmp_path: Path, precision: str, new: int) -> None:
    data = write_corpus(tmp_path)
    lines = data.read_text().splitlines(keepends=True)
    build_index(config(data, precision=precision))
    before = rows(tmp_path / "out")
    data.write_text("".join(lines[1:]))
    assert build_index(config(data, precision=precision)).embedded.num_new_items == new
    # What is embedded again is in other batches than before, so a value on the edge of a step may take the next one.
    steps = np.abs(rows(tmp_path / "out").astype(float) - before[1:].astype(float))
    assert steps.max() <= (1 if new else 0)


def test_another_model_is_refused_all_the_same(config: Callable[..., IndexConfig], tmp_path: Path) -> None:
    data = write_corpus(tmp_path)
    build_index(config(data))
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match="are of another model or setting: fingerprint is"):
        build_index(config(data, dtype="bfloat16"))
    assert len(open_index(tmp_path / "out")) == 8
