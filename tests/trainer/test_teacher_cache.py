from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import puma_hf.trainer.teacher_cache as teacher_cache
from puma_hf.trainer.teacher_cache import CacheManifest, StoredStates, TeacherCache

MANIFEST = CacheManifest(
    dataset="d" * 64, hidden_size=3, precision="float32", processing={}, num_items=4, teacher="t" * 64
)


def test_manifest_comes_back(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "new" / "cache")
    assert cache.manifest() is None
    assert cache.check(MANIFEST) is None
    cache.write_manifest(replace(MANIFEST, complete=True))
    found = cache.check(MANIFEST)
    assert found == MANIFEST
    assert found.complete
    assert [path.name for path in cache.folder.iterdir()] == ["manifest.json"]


def test_what_is_not_known_is_not_compared(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path)
    cache.write_manifest(MANIFEST)
    assert cache.check(replace(MANIFEST, teacher=None)) == MANIFEST
    with pytest.raises(
        ValueError, match=r"of another teacher: teacher is 'tttttttttttt' there and 'xxxxxxxxxxxx' here"
    ):
        cache.check(replace(MANIFEST, teacher="x" * 64))


def test_shards_come_back_in_float32(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path)
    ids, states = torch.tensor([5, -(2**63)]), torch.randn(2, 3).bfloat16()
    cache.write_shard(1, ids, states, MANIFEST.dataset)
    shard = cache.read_shard(1, MANIFEST)
    assert shard is not None
    assert torch.equal(shard[0], ids)
    assert shard[1].dtype == torch.float32
    assert torch.equal(shard[1], states.float())
    assert cache.read_shard(0, MANIFEST) is None
    # Of another dataset, or of another size.
    assert cache.read_shard(1, replace(MANIFEST, dataset="x" * 64)) is None
    assert cache.read_shard(1, replace(MANIFEST, hidden_size=4)) is None


@pytest.mark.parametrize("length", [0, 3, 40, -1])
def test_a_shard_that_was_cut_off_is_none(tmp_path: Path, length: int) -> None:
    cache = TeacherCache(tmp_path)
    cache.write_shard(0, torch.tensor([5]), torch.randn(1, 3), MANIFEST.dataset)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    assert cache.read_shard(0, MANIFEST) is None


FULL_DISK = (
    r"as on a full disk \(.*No space left.*\)\. Finished shards are kept, .* goes on .*Free some space.*teacher_cache"
)


def test_safetensors_has_its_own_error_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "Error while serializing: I/O error: No space left on device (os error 28)"

    def fails(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError(message)

    cache = TeacherCache(tmp_path)
    cache.write_shard(0, torch.tensor([5]), torch.randn(1, 3), MANIFEST.dataset)
    monkeypatch.setattr(teacher_cache, "save_file", fails)
    with pytest.raises(OSError, match=FULL_DISK) as caught:
        cache.write_shard(1, torch.tensor([6]), torch.randn(1, 3), MANIFEST.dataset)
    assert caught.value.errno == 28
    assert isinstance(caught.value.__cause__, SafetensorError)
    assert cache.read_shard(0, MANIFEST) is not None
    # Anything else stays what it is.
    message = "invalid header"
    with pytest.raises(SafetensorError, match="invalid header"):
        cache.write_shard(1, torch.tensor([6]), torch.randn(1, 3), MANIFEST.dataset)


def test_a_folder_that_may_not_be_written_is_not_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(PermissionError, match="Permission denied"):
        TeacherCache(tmp_path).write_manifest(MANIFEST)


@pytest.mark.parametrize("below", ["", "run/cache"])
def test_a_cache_in_place_of_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(
        NotADirectoryError, match=r"teacher_cache='.*' must be a directory, .* but '.*notes' is a file\. Choose another"
    ):
        TeacherCache(tmp_path / "notes" / below)
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_failed_write_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    cache = TeacherCache(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=FULL_DISK) as caught:
        cache.write_shard(0, torch.tensor([5]), torch.randn(1, 3), MANIFEST.dataset)
    assert caught.value.errno == 28
    assert repr(str(tmp_path)) in str(caught.value)
    with pytest.raises(OSError, match=FULL_DISK):
        cache.write_manifest(MANIFEST)
    assert cache.read_shard(0, MANIFEST) is None
    assert cache.manifest() is None
    assert len(list(tmp_path.iterdir())) == 2
    cache.remove_temporary()
    assert list(tmp_path.iterdir()) == []


def test_lookup(tmp_path: Path) -> None:
    shards: list[Any] = [
        (torch.tensor([7, -3]), torch.tensor([[1.0], [2.0]])),
        (torch.tensor([], dtype=torch.long), torch.empty(0, 1)),
        (torch.tensor([2**62, 0]), torch.tensor([[3.0], [4.0]])),
    ]
    stored = StoredStates(shards, tmp_path)
    assert len(stored) == 4
    assert stored.lookup(torch.tensor([0, 7, 2**62, -3, 7])).flatten().tolist() == [4, 1, 3, 2, 1]
    with pytest.raises(ValueError, match=r"lack the samples \[1, 2\] of this batch"):
        stored.lookup(torch.tensor([0, 1, 2**62 + 1]))
