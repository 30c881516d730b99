"""Approximate search: what is proposed, and a file that is bound to the embeddings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from puma_hf.embedding.config import FileFormat, Precision
from puma_hf.embedding.precision import quantize, ranges_of
from puma_hf.embedding.shards import DamagedShardError, Shard
from puma_hf.embedding.store import EmbeddingStore, StoredEmbeddings, open_embeddings
from puma_hf.evaluation.search import exact_search
from puma_hf.search import ann as ann_module
from puma_hf.search.ann import ANN_FILE, Ann, write_ann
from puma_hf.search.build import build_index
from puma_hf.search.candidates import RowReader, ShardReader, StoredCandidates
from puma_hf.search.config import AnnKind, IndexConfig, SearchConfig
from puma_hf.search.index import open_index
from puma_hf.search.query import Query, Searcher, search

pytest.importorskip("faiss")

KINDS: list[AnnKind] = [kind for kind in get_args(AnnKind) if kind != "none"]
DIM = 60  # no multiple of 8
CENTERS = np.random.default_rng(0).standard_normal((20, DIM))


def make_rows(count: int, seed: int) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    near = CENTERS[generator.integers(0, len(CENTERS), count)]
    return np.asarray(near + 0.7 * generator.standard_normal((count, DIM)), np.float32)


ROWS = make_rows(600, 1)


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., StoredEmbeddings]:
    def make(
        rows: Any = ROWS, precision: Precision = "float32", file_format: FileFormat = "safetensors", size: int = 250
    ) -> StoredEmbeddings:
        store = EmbeddingStore(tmp_path, {"precision": precision}, file_format)
        if precision == "int8" and not store.load_ranges():
            store.ranges = ranges_of(rows, precision)
            store.save_ranges(store.ranges)
        infos = []
        for shard, start in enumerate(range(0, len(rows), size)):
            part = quantize(rows[start : start + size], precision, store.ranges)
            places = np.arange(start, start + len(part))
            content = Shard([str(place) for place in places], places, part)
            infos.append(store.write(store.info(shard, start, len(part), "", "skip"), content, ()))
        ranges = "ranges.safetensors" if precision == "int8" else None
        store.finish(infos, {"embedding_dim": DIM, "ranges": ranges})
        return open_embeddings(tmp_path)

    return make


def best(stored: StoredEmbeddings, entry: Any, query: Any, allowed: Any, top_k: int = 10) -> list[int]:
    found = Ann(stored.folder, entry, len(stored), entry["manifest_hash"]).propose(query, allowed, 10 * top_k)
    assert len(found) == min(10 * top_k, len(allowed))
    assert set(found) <= set(allowed)
    assert (np.diff(found) > 0).all()
    source = StoredCandidates(RowReader(stored), found)
    result: list[int] = found[exact_search(torch.from_numpy(query[None]), source, top_k).indices[0].numpy()].tolist()
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_the_best_are_among_what_is_proposed(
    store: Callable[..., StoredEmbeddings], kind: AnnKind, precision: Precision
) -> None:
    stored = store(precision=precision)
    entry = write_ann(stored, kind, "m", None)
    for allowed in (np.arange(600), np.arange(0, 600, 3), np.arange(40, 52)):
        exact = StoredCandidates(ShardReader(stored), allowed)
        hits = 0
        for query in make_rows(10, 2):
            rows = exact_search(torch.from_numpy(query[None]), exact, 10).indices[0].numpy()
            hits += len(set(best(stored, entry, query, allowed)) & set(allowed[rows]))
        assert hits >= 90, f"{hits} of 100"


@pytest.mark.parametrize("kind", KINDS)
def test_it_grows_at_its_end(
    store: Callable[..., StoredEmbeddings], kind: AnnKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = write_ann(store(ROWS[:400]), kind, "m", None)
    made: list[Any] = []
    plain = ann_module._new
    monkeypatch.setattr(ann_module, "_new", lambda *values: [made.append(1), plain(*values)][1])
    stored = store()  # 600 rows now, the first 400 as they were
    grown = write_ann(stored, kind, "n", entry)
    assert grown is not None
    assert (made, grown["num_rows"], grown["num_trained"]) == ([], 600, 400)
    assert best(stored, grown, ROWS[555], np.arange(600), 1) == [555]
    changed = ROWS.copy()
    changed[3] *= -1
    assert write_ann(store(changed), kind, "o", grown)["num_trained"] == 600  # type: ignore[index]
    assert len(made) == 1
    assert write_ann(store(ROWS[:500]), kind, "p", grown)["num_rows"] == 500  # type: ignore[index]
    assert len(made) == 2


def test_far_beyond_its_ranges_it_is_made_anew(store: Callable[..., StoredEmbeddings]) -> None:
    entry = write_ann(store(ROWS[:200]), "int8", "m", None)
    assert write_ann(store(), "int8", "n", entry)["num_trained"] == 600  # type: ignore[index]


def test_without_a_change_it_is_left_alone(store: Callable[..., StoredEmbeddings]) -> None:
    stored = store()
    entry = write_ann(stored, "int8", "m", None)
    os.utime(stored.folder / ANN_FILE, ns=(1, 1))
    assert write_ann(stored, "int8", "m", entry) == entry
    assert (stored.folder / ANN_FILE).stat().st_mtime_ns == 1
    (stored.folder / ANN_FILE).write_bytes(b"something")
    again = write_ann(stored, "int8", "m", entry)
    assert again == entry
    assert (stored.folder / ANN_FILE).stat().st_size > 600 * DIM
    assert write_ann(stored, "none", "m", again) is None
    assert not (stored.folder / ANN_FILE).exists()


def test_rows_that_are_not_finite(store: Callable[..., StoredEmbeddings]) -> None:
    rows = ROWS.copy()
    rows[7, 3] = np.nan
    with pytest.raises(ValueError, match=r"are not finite, so nothing can be near them. Delete the directory"):
        write_ann(store(rows), "binary", "m", None)


@pytest.mark.parametrize("file_format", ["safetensors", "parquet"])
def test_single_rows(store: Callable[..., StoredEmbeddings], file_format: FileFormat) -> None:
    stored = store(file_format=file_format)
    source = StoredCandidates(RowReader(stored), np.array([3, 4, 249, 250, 599]))
    assert np.array_equal(source.rows(torch.tensor([4, 0, 3])).numpy(), ROWS[[599, 3, 250]])
    blocks = list(source.blocks(2))
    assert [start for start, _ in blocks] == [0, 2, 3, 4]
    assert np.array_equal(torch.cat([rows for _, rows in blocks]).numpy(), ROWS[[3, 4, 249, 250, 599]])


def test_rows_of_another_run(store: Callable[..., StoredEmbeddings]) -> None:
    opened = store()
    store(ROWS[::-1])
    with pytest.raises(DamagedShardError, match=r"was made anew while it was open. Open it again"):
        StoredCandidates(RowReader(opened), np.arange(3)).rows(torch.arange(3))


# --- of an index


@pytest.fixture
def make(corpus: Path, puma_dir: Path, index_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """The small index with such a file; its embeddings are those that are there already."""
    output = Path(shutil.copytree(index_dir, tmp_path / "index"))

    def run(**values: Any) -> Path:
        build_index(IndexConfig(data=corpus, model=str(puma_dir), output=output, shard_size=3, **values))
        return output

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_exact_search(
    make: Callable[..., Path], sentence_transformer: SentenceTransformer, kind: AnnKind
) -> None:
    index = open_index(make(ann=kind))
    exact = Searcher(index, sentence_transformer)
    searcher = Searcher(index, sentence_transformer, backend="ann")
    query = Query(text="a red apple")
    for target in ("any", "text", "image"):
        for top_k in (2, 100):
            assert searcher.search(query, target=target, top_k=top_k) == exact.search(  # type: ignore[arg-type]
                query,
                target=target,
                top_k=top_k,  # type: ignore[arg-type]
            )


def test_where_too_few_are_proposed_all_are_compared(
    make: Callable[..., Path], sentence_transformer: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(make(ann="hnsw"))
    expected = Searcher(index, sentence_transformer).search(Query(text="on"), top_k=3)
    monkeypatch.setattr(Ann, "propose", lambda *_: np.array([1, 2]))
    assert Searcher(index, sentence_transformer, backend="ann").search(Query(text="on"), top_k=3) == expected


def test_it_stays_what_it_is(make: Callable[..., Path]) -> None:
    folder = make(ann="binary")
    assert open_index(make()).description["ann"]["kind"] == "binary"
    assert open_index(make(ann="int8")).ann.kind == "int8"
    assert open_index(make(ann="none")).description["ann"] is None
    assert not (folder / ANN_FILE).exists()


def test_an_index_without(index_dir: Path, make: Callable[..., Path]) -> None:
    message = r"has nothing for approximate search. Run puma-hf index again with --ann hnsw, int8 or binary"
    with pytest.raises(ValueError, match=message):
        search(SearchConfig(index=index_dir, query="a", backend="ann"))
    older = make()
    described = json.loads((older / "index.json").read_text())
    del described["ann"]  # of an index that was made before there was any
    (older / "index.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=message):
        search(SearchConfig(index=older, query="a", backend="ann"))


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "stale"])
def test_a_damaged_file(make: Callable[..., Path], damage: str) -> None:
    folder = make(ann="int8")
    path = folder / ANN_FILE
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "stale":
        described = json.loads((folder / "index.json").read_text())
        described["ann"]["manifest_hash"] = "0" * 64
        (folder / "index.json").write_text(json.dumps(described))
    else:
        stored = open_embeddings(folder)
        write_ann(stored, "binary", "m", None)
    message = r"ann.faiss' is missing or not what the index was made with. Run puma-hf index again, .* without it"
    with pytest.raises(ValueError, match=message):
        search(SearchConfig(index=folder, query="a", backend="ann"))
    assert open_index(make()).ann.kind == "int8"


def test_no_faiss(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(ann="hnsw")
    monkeypatch.setattr(ann_module, "find_spec", lambda name: None)
    for backend in ("ann", "faiss"):
        with pytest.raises(ImportError, match=r"needs faiss: pip install 'puma-hf\[faiss\]', or leave it out"):
            search(SearchConfig(index=folder, query="a", backend=backend))  # type: ignore[arg-type]
    with pytest.raises(ImportError, match="needs faiss"):
        make()


def test_values_out_of_range(index_dir: Path, sentence_transformer: SentenceTransformer) -> None:
    index = open_index(index_dir)
    with pytest.raises(ValueError, match="backend is 'annoy', must be one of 'torch', 'faiss', 'ann'"):
        Searcher(index, sentence_transformer, backend="annoy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rescore_multiplier is 0, must be 1 or more"):
        Searcher(index, sentence_transformer, rescore_multiplier=0)
