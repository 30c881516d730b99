"""An index whose runs were killed comes to what one run comes to, and is refused until then."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from puma_hf.search.index import open_index
from puma_hf.search.query import Query, Searcher
from tests.forks import run_worker
from tests.search.small_corpus import write_corpus

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, puma_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    run_worker("tests.search.index_worker", puma_dir, write_corpus(folder), folder)
    return folder


def test_it_comes_to_the_same_files(folder: Path) -> None:
    whole, killed = (
        {path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in ("whole", "killed")
    )
    assert {"index.json", "manifest.json", "ann.faiss", "shard-00003.parquet", "items-00003.parquet"} <= set(whole)
    assert killed == whole


def test_it_gives_the_same_answers(folder: Path, sentence_transformer: SentenceTransformer) -> None:
    whole, killed = (
        Searcher(open_index(folder / name), sentence_transformer, backend="ann").search(Query(text="a red apple"))
        for name in ("whole", "killed")
    )
    assert killed.answers == whole.answers
    assert len(killed.answers) == 7


def test_until_then_it_is_refused_with_the_remedy(folder: Path) -> None:
    first, then = json.loads((folder / "refused.json").read_text())
    assert len(first) == len(then) == 3
    for said in (first["shard-00002.parquet"], then["shard-00001.parquet"], then["manifest.json"]):
        assert "has not finished. Wait for it, or run the same command again" in said
    assert "or the run has not finished. Run puma-hf index" in first["items-00001.parquet"]
    assert "or the run has not finished. Run puma-hf index" in first["index.json"]
    assert "has not finished. Wait for it, or run puma-hf index again" in then["ann.faiss"]
