"""The directory of shards and its manifest, without a model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sentence_transformers.util import quantize_embeddings

from puma_hf.configs import FileFormat
from puma_hf.embedding.corpus_store import EmbeddingStore, open_embeddings
from puma_hf.embedding.shards import BrokenRecord, DamagedShardError, Shard, ShardInfo

SETTINGS = {"fingerprint": "f", "prompt": None, "precision": "float32"}
DESCRIBED = {"model": "m", "data": "d", "embedding_dim": 4, "dtype": "float32", "ranges": None}
DAMAGE = "changed after the run that made it"


def store_in(folder: Path, file_format: FileFormat = "parquet", **settings: Any) -> EmbeddingStore:
    return EmbeddingStore(folder, {**SETTINGS, **settings}, file_format)


def values(shard: int) -> NDArray[np.float32]:
    return np.random.default_rng(shard).standard_normal((2, 4)).astype(np.float32)


def fill(store: EmbeddingStore, num_shards: int = 2, errors: int = 0, on_error: str = "raise") -> list[ShardInfo]:
    """Shards of two rows each; one input of the first `errors` shards is broken."""
    shards = []
    for shard in range(num_shards):
        broken = [BrokenRecord(3 * shard + 2, f"x{shard}", "böse")] if shard < errors else []
        info = store.info(shard, 2 * shard, 2, f"hash {shard}", on_error)
        rows = np.array([2 * shard, 2 * shard + 1])
        shards.append(store.write(info, Shard([f"a{shard}", f"b{shard}"], rows, values(shard)), broken))
    store.finish(shards, DESCRIBED)
    return shards


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("file_format", ["parquet", "safetensors"])
def test_what_was_written_is_opened(tmp_path: Path, file_format: FileFormat) -> None:
    fill(store_in(tmp_path, file_format))
    found = open_embeddings(tmp_path)
    assert (len(found), found.embedding_dim, found.precision, found.ranges) == (4, 4, "float32", None)
    assert list(found.ids()) == ["a0", "b0", "a1", "b1"]
    parts = list(found)
    assert [ids for ids, _ in parts] == [["a0", "b0"], ["a1", "b1"]]
    for shard, (_, rows) in enumerate(parts):
        np.testing.assert_array_equal(rows, values(shard))
        np.testing.assert_array_equal(found.to_float(rows), values(shard))
    assert [shard.rows.tolist() for shard in found.shards()] == [[0, 1], [2, 3]]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == found.manifest
    assert manifest["settings"] == {**SETTINGS, "file_format": file_format}
    assert (manifest["num_items"], manifest["num_rows"], manifest["num_errors"]) == (4, 4, 0)
    assert [entry["first_row"] for entry in manifest["shards"]] == [0, 2]
    assert {name for entry in manifest["shards"] for name in entry["files"]} == {*files(tmp_path)} - {"manifest.json"}


def test_a_second_run_finds_its_shards_and_changes_nothing(tmp_path: Path) -> None:
    shards = fill(store_in(tmp_path), errors=1, on_error="skip")
    for path in tmp_path.iterdir():
        os.utime(path, ns=(1, 1))  # two writes may fall into one tick of the clock
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = store_in(tmp_path)
    assert [again.finished(again.info(n, 2 * n, 2, f"hash {n}", "skip")) for n in (0, 1)] == shards
    assert again.finished(again.info(0, 0, 2, "another", "skip")) is None
    assert again.finished(again.info(2, 4, 2, "hash 2", "skip")) is None
    # What was broken was left out; now it is to be an error.
    assert again.finished(again.info(0, 0, 2, "hash 0", "raise")) is None
    assert again.finished(again.info(1, 2, 2, "hash 1", "raise")) == shards[1]
    again.finish(shards, DESCRIBED)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_broken_inputs_are_listed(tmp_path: Path) -> None:
    fill(store_in(tmp_path), errors=2)
    lines = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{"row": 2, "id": "x0", "message": "böse"}, {"row": 5, "id": "x1", "message": "böse"}]
    assert open_embeddings(tmp_path).manifest["num_errors"] == 2
    fill(store_in(tmp_path))
    assert not (tmp_path / "errors.jsonl").exists()


def test_other_settings_are_refused(tmp_path: Path) -> None:
    fill(store_in(tmp_path))
    before = files(tmp_path)
    message = (
        r"are of another model or setting: fingerprint is 'f' there, 'g' here; prompt is None there, 'Find\.' here\. "
        "Choose another directory, or delete this one"
    )
    with pytest.raises(ValueError, match=message):
        store_in(tmp_path, fingerprint="g", prompt="Find.")
    with pytest.raises(ValueError, match="file_format is 'parquet' there, 'safetensors' here"):
        store_in(tmp_path, "safetensors")
    with pytest.raises(ValueError, match="truncate_dim is None there, 4 here"):
        store_in(tmp_path, truncate_dim=4)
    assert files(tmp_path) == before


def test_leftovers_of_a_longer_corpus_are_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(store_in(tmp_path), num_shards=4)
    drafts = (".shard-00000.parquet-x.tmp", ".unfinished-00003.safetensors", "..unfinished-00003.safetensors-x.tmp")
    for name in ("shard-notes.txt", "shard-1.parquet", *drafts):
        (tmp_path / name).write_text("")
    with caplog.at_level("INFO"):
        fill(store_in(tmp_path), num_shards=2)
    assert {*files(tmp_path)} == {
        "manifest.json",
        "shard-00000.parquet",
        "shard-00001.parquet",
        "shard-notes.txt",
        "shard-1.parquet",
    }
    assert "removed 2 files of a longer corpus, from shard-00002.parquet on" in caplog.text


def test_an_unfinished_directory_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json\. Name a directory that puma-hf embed"):
        open_embeddings(tmp_path)
    store = store_in(tmp_path)
    store.begin()
    with pytest.raises(ValueError, match=r"has not finished\. Wait for it, or run the same command again"):
        open_embeddings(tmp_path)
    shards = fill(store)
    open_embeddings(tmp_path)
    # A finished one that is changed is unfinished from the first write on.
    again = store_in(tmp_path)
    again.write(shards[0], Shard(["a"], np.array([0]), values(7)[:1]), [])
    with pytest.raises(ValueError, match="has not finished"):
        open_embeddings(tmp_path)


def test_missing_and_changed_shards_are_told(tmp_path: Path) -> None:
    shards = fill(store_in(tmp_path))
    found = open_embeddings(tmp_path)
    path = tmp_path / "shard-00001.parquet"
    whole = path.read_bytes()
    place = whole.find(values(1).tobytes()[:8])
    path.write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    with pytest.raises(DamagedShardError, match=rf"shard-00001\.parquet in .*{DAMAGE}\. Delete it, and run"):
        list(found)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.parquet \(shard 1 of 2\) is missing in .*\. Copy the whole"):
        open_embeddings(tmp_path)
    assert store_in(tmp_path).finished(shards[1]) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"manifest\.json' is no manifest of embeddings \("),
        ("[]", "is no manifest of embeddings"),
        ('{"format": "f", "format_version": 1}', "is no manifest of embeddings"),
        ('{"format": "f", "format_version": 1, "settings": {}}', "is of format 'f', version 1, must be 'puma_hf emb"),
        (
            '{"format": "puma_hf embeddings of a corpus", "format_version": 2, "settings": {}}',
            r"version 2, must be .* at most version 1\. Install a newer puma-hf",
        ),
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        store_in(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_embeddings(tmp_path)


def test_somebody_elses_shards_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.parquet").write_text("theirs")
    with pytest.raises(ValueError, match=r"holds shard-00000\.parquet, but no manifest\.json: nobody knows what it is"):
        store_in(tmp_path)
    assert files(tmp_path) == {"shard-00000.parquet": b"theirs"}


def test_ranges_are_kept_and_belong_to_the_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_in(tmp_path, precision="int8")
    assert not store.load_ranges()
    without = store.info(0, 0, 2, "h", "raise")
    ranges = np.array([[-1, -2, -3, -4], [1, 2, 3, 4]], np.float32)
    store.save_ranges(ranges)
    again = store_in(tmp_path, precision="int8")
    assert again.load_ranges()
    assert again.ranges is not None
    np.testing.assert_array_equal(again.ranges, ranges)
    first = again.info(0, 0, 2, "h", "raise")
    assert first.settings != without.settings
    again.ranges = ranges + 1
    assert again.info(0, 0, 2, "h", "raise").settings != first.settings
    (tmp_path / "ranges.safetensors").write_bytes(b"cut")
    assert not store_in(tmp_path, precision="int8").load_ranges()
    assert "ranges.safetensors cannot be read" in caplog.text


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_stored_numbers_as_what_they_stand_for(tmp_path: Path, precision: Any) -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, (50, 12)).astype(np.float32)
    is_scaled = precision.endswith("int8")
    ranges = np.stack([rows.min(axis=0), rows.max(axis=0)]) if is_scaled else None
    packed: Any = quantize_embeddings(rows, precision, ranges=ranges)
    store = store_in(tmp_path, precision=precision)
    if ranges is not None:
        store.save_ranges(ranges)
        store.load_ranges()
    info = store.write(store.info(0, 0, 50, "h", "raise"), Shard(list(map(str, range(50))), np.arange(50), packed), [])
    described = {**DESCRIBED, "embedding_dim": 12, "ranges": "ranges.safetensors" if is_scaled else None}
    store.finish([info], described)
    found = open_embeddings(tmp_path)
    ((_, stored),) = list(found)
    floats = found.to_float(stored)
    assert floats.shape == (50, 12)
    if is_scaled:
        # A stored integer stands for the middle of its step: at most half of it off.
        assert np.abs(floats - rows).max() <= 0.5001 * 2 / 255
    else:
        np.testing.assert_array_equal(floats, np.where(rows > 0, 1, -1))
