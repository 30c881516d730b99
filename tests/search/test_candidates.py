"""Stored embeddings as candidates of a search."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from puma_hf.embedding.config import Precision
from puma_hf.embedding.precision import quantize, ranges_of
from puma_hf.embedding.shards import DamagedShardError, Shard
from puma_hf.embedding.store import EmbeddingStore, StoredEmbeddings, open_embeddings
from puma_hf.evaluation.search import CandidateSource, exact_search
from puma_hf.search.candidates import ShardReader, StoredCandidates
from tests.patience import PATIENCE

SIZES = (4, 0, 3, 5)
ROWS = np.random.default_rng(0).standard_normal((sum(SIZES), 16)).astype(np.float32)

Stored = Callable[..., StoredEmbeddings]


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """Twelve rows in four shards, of which one is empty."""

    def make(precision: Precision = "float32") -> StoredEmbeddings:
        store = EmbeddingStore(tmp_path, {"precision": precision}, "parquet")
        if precision == "int8":
            store.ranges = ranges_of(ROWS, precision)
            store.save_ranges(store.ranges)
        infos, start = [], 0
        for number, size in enumerate(SIZES):
            rows = quantize(ROWS[start : start + size], precision, store.ranges)
            places = np.arange(start, start + size)
            content = Shard([str(place) for place in places], places, rows)
            infos.append(store.write(store.info(number, start, size, "", "skip"), content, ()))
            start += size
        ranges = "ranges.safetensors" if precision == "int8" else None
        store.finish(infos, {"embedding_dim": 16, "ranges": ranges})
        return open_embeddings(tmp_path)

    return make


def candidates(stored: StoredEmbeddings, positions: NDArray[np.int64] | None = None) -> StoredCandidates:
    return StoredCandidates(ShardReader(stored), np.arange(len(stored)) if positions is None else positions)


@pytest.mark.parametrize("block_size", [1, 3, 100])
@pytest.mark.parametrize("positions", [None, [1, 2, 5, 6, 11], [7], [4, 5, 6]])
def test_blocks_and_rows(stored: Stored, block_size: int, positions: list[int] | None) -> None:
    wanted = np.arange(12) if positions is None else np.array(positions)
    source = candidates(stored(), wanted)
    assert isinstance(source, CandidateSource)
    assert (len(source), source.embedding_dim) == (len(wanted), 16)
    blocks = list(source.blocks(block_size))
    assert [start for start, _ in blocks] == np.cumsum([0, *(len(rows) for _, rows in blocks)])[:-1].tolist()
    assert all(0 < len(rows) <= block_size for _, rows in blocks)
    assert np.array_equal(torch.cat([rows for _, rows in blocks]).numpy(), ROWS[wanted])
    order = torch.tensor([len(wanted) - 1, 0])
    assert np.array_equal(source.rows(order).numpy(), ROWS[wanted][order.numpy()])


def test_a_search_is_that_of_the_rows_themselves(stored: Stored) -> None:
    queries = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32))
    wanted = np.array([0, 2, 3, 6, 8, 9, 11])
    found = exact_search(queries, candidates(stored(), wanted), 4)
    expected = exact_search(queries, torch.from_numpy(ROWS[wanted]), 4)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize(("precision", "least"), [("float16", 0.99999), ("int8", 0.999), ("binary", 0.6)])
def test_other_numbers_stand_for_floats(stored: Stored, precision: Precision, least: float) -> None:
    rows = candidates(stored(precision)).rows(torch.arange(12))
    assert rows.dtype is torch.float32
    assert torch.cosine_similarity(rows, torch.from_numpy(ROWS)).min() > least


def test_shards_are_read_once_as_far_as_they_fit(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = stored()
    read: list[int] = []
    plain = StoredEmbeddings.shard
    monkeypatch.setattr(StoredEmbeddings, "shard", lambda self, number: [read.append(number), plain(self, number)][1])
    source = StoredCandidates(ShardReader(opened, kept_bytes=7 * 16 * 4), np.arange(12))
    for _ in range(2):
        list(source.blocks(100))
    assert read == [0, 2, 3, 3]


def test_threads_share_a_reader(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, both = stored(), Barrier(2, timeout=PATIENCE)
    plain = StoredEmbeddings.shard
    monkeypatch.setattr(StoredEmbeddings, "shard", lambda self, number: [both.wait(), plain(self, number)][1])
    reader = ShardReader(opened, kept_bytes=8 * 16 * 4)  # room for it twice
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(reader.read, [0, 0])
    assert first is second
    monkeypatch.undo()
    assert reader.read(2) is reader.read(2)  # there is room left


def test_a_shard_that_changed(stored: Stored, tmp_path: Path) -> None:
    opened = stored()
    (tmp_path / "shard-00000.parquet").write_bytes((tmp_path / "shard-00002.parquet").read_bytes())
    with pytest.raises(DamagedShardError, match=r"shard-00000.parquet in .* Delete it, and run puma-hf index again"):
        list(candidates(opened).blocks(100))


def test_a_shard_of_a_run_that_came_later(stored: Stored, tmp_path: Path) -> None:
    opened = stored()
    for path in tmp_path.iterdir():
        path.unlink()
    stored("float16")
    with pytest.raises(DamagedShardError, match=r"was made anew while it was open. Open it again"):
        list(candidates(opened).blocks(100))
