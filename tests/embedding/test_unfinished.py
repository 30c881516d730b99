"""What is kept of a shard whose run ended early."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from puma_hf.embedding.results import BrokenInput, EmbedResult
from puma_hf.embedding.shards import ShardInfo
from puma_hf.embedding.unfinished import UnfinishedShard

INFO = ShardInfo(
    settings="s", shard=3, first_row=6, num_items=4, num_rows=0, num_errors=0, on_error="raise", input_hash="i"
)
HASHES = [f"{number:032x}" for number in (10, 11, 12, 13)]
ROWS = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)


def result(*places: int, rows: NDArray[Any] = ROWS, errors: tuple[int, ...] = ()) -> EmbedResult:
    return EmbedResult(rows[[*places]], np.array(places), tuple(BrokenInput(place, "") for place in errors))


def load(folder: Path, hashes: list[str] = HASHES, **values: Any) -> tuple[list[int], list[list[float]]]:
    places, rows = UnfinishedShard(folder, replace(INFO, **values), hashes).load(8)
    assert rows.dtype == np.float32
    assert rows.shape == (len(places), 8)
    return places.tolist(), rows.tolist()


def test_rows_are_found_by_their_content(tmp_path: Path) -> None:
    assert load(tmp_path) == ([], [])
    shard = UnfinishedShard(tmp_path, INFO, HASHES)
    shard.save(result(1, 3))
    assert [path.name for path in tmp_path.iterdir()] == [".unfinished-00003.safetensors"]
    assert load(tmp_path) == ([1, 3], ROWS[[1, 3]].tolist())
    # Lines have moved, one is new, and one is there twice.
    moved = [HASHES[3], "f" * 32, HASHES[1], HASHES[3]]
    assert load(tmp_path, moved, input_hash="j") == ([0, 2, 3], ROWS[[3, 1, 3]].tolist())
    assert load(tmp_path, ["f" * 32]) == ([], [])
    shard.load(8)
    assert shard.num_kept == 2
    shard.remove()
    shard.remove()
    assert not [*tmp_path.iterdir()]


def test_zeros_of_broken_inputs_and_nan_are_not_kept(tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[0] = 0
    rows[2, 5] = np.nan
    UnfinishedShard(tmp_path, INFO, HASHES).save(result(0, 1, 2, 3, rows=rows, errors=(0,)))
    assert load(tmp_path) == ([1, 3], ROWS[[1, 3]].tolist())


def test_nothing_to_keep_leaves_what_was_there(tmp_path: Path) -> None:
    shard = UnfinishedShard(tmp_path, INFO, HASHES)
    shard.save(result())
    assert not [*tmp_path.iterdir()]
    shard.save(result(1))
    shard.save(result(2, rows=ROWS * np.nan))
    assert load(tmp_path)[0] == [1]


def test_of_another_shard_setting_or_size_it_is_as_good_as_none(tmp_path: Path) -> None:
    UnfinishedShard(tmp_path, INFO, HASHES).save(result(0, 1))
    assert load(tmp_path, settings="t") == load(tmp_path, shard=4) == ([], [])
    places, rows = UnfinishedShard(tmp_path, INFO, HASHES).load(9)
    assert (places.shape, rows.shape) == ((0,), (0, 9))


def test_a_file_that_is_cut_off_or_foreign_is_as_good_as_none(tmp_path: Path) -> None:
    shard = UnfinishedShard(tmp_path, INFO, HASHES)
    shard.save(result(0, 1))
    whole = shard.path.read_bytes()
    for end in (0, 4, 20, len(whole) // 2, len(whole) - 1):
        shard.path.write_bytes(whole[:end])
        assert load(tmp_path) == ([], [])
    for tensors in ({"embeddings": ROWS}, {"embeddings": ROWS, "content_hashes": ROWS[:3]}):
        for metadata in (None, {"puma_hf": "s"}):
            save_file(tensors, shard.path, metadata=metadata)
            assert load(tmp_path) == ([], [])


def test_a_full_disk_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    UnfinishedShard(tmp_path, INFO, HASHES).save(result(0, 1))
    assert caplog.messages == [
        "2 embeddings of an unfinished shard could not be kept ([Errno 28] No space left on device)"
    ]
    assert not [*tmp_path.iterdir()]
