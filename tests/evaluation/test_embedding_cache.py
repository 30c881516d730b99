from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from puma_hf.evaluation.candidate_source import CandidateSource
from puma_hf.evaluation.embedding_cache import MANIFEST, EmbeddingCache
from puma_hf.evaluation.search import exact_search

SETTINGS = {"model": "f00d", "truncate_dim": None, "processing": {"size": [1, 2]}}
NAN = float("nan")
KEYS = torch.tensor([5, -3, 2**62, 0])


def embeddings_of(keys: torch.Tensor, dim: int = 3) -> torch.Tensor:
    """Whole numbers up to 2^8, exact in every type."""
    return (keys[:, None] % 97 + torch.arange(dim)).float()


def filled(folder: Path, *shards: torch.Tensor, dtype: torch.dtype = torch.float32) -> EmbeddingCache:
    cache = EmbeddingCache(folder, SETTINGS, dtype=dtype)
    for keys in shards:
        cache.write(keys, embeddings_of(keys))
    return cache


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_written_is_read_again(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tmp_path / "new" / "cache"
    written = filled(folder, KEYS, torch.tensor([7, 8]), dtype=dtype)
    for cache in (written, EmbeddingCache(folder, SETTINGS, dtype=dtype)):
        assert cache.has(torch.tensor([8, 9, -3])).tolist() == [True, False, True]
        assert (len(cache), cache.embedding_dim) == (6, 3)
        wanted = torch.tensor([8, 5, 0, 7, 5])
        rows = cache.rows(wanted)
        assert rows.dtype == dtype
        assert torch.equal(rows, embeddings_of(wanted).to(dtype))
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".json") == [MANIFEST]
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("block_size", [1, 2, 7, 100])
def test_a_source_streams_its_keys_in_order(tmp_path: Path, block_size: int) -> None:
    cache = filled(tmp_path, *torch.arange(60).split(9))
    keys = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:40]
    source = cache.source(keys)
    assert isinstance(source, CandidateSource)
    assert (len(source), source.embedding_dim) == (40, 3)
    blocks = list(source.blocks(block_size))
    assert [start for start, _ in blocks] == list(range(0, 40, block_size))
    assert torch.equal(torch.cat([block for _, block in blocks]), embeddings_of(keys))
    assert torch.equal(source.rows(torch.tensor([3, 0, 3])), embeddings_of(keys[[3, 0, 3]]))


def test_a_search_in_it_is_that_in_the_tensor(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    pool, queries = torch.randn(300, 8, generator=generator), torch.randn(5, 8, generator=generator)
    cache = EmbeddingCache(tmp_path, SETTINGS)
    for rows in torch.arange(300).split(64):
        cache.write(rows * 11, pool[rows])
    order = torch.randperm(300, generator=generator)
    found = exact_search(queries, cache.source(order * 11), 20, block_size=50)
    expected = exact_search(queries, pool[order], 20)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores)


def test_shards_of_other_processes_are_seen_after_a_refresh(tmp_path: Path) -> None:
    ours, theirs = filled(tmp_path), filled(tmp_path)
    theirs.write(KEYS, embeddings_of(KEYS))
    assert not bool(ours.has(KEYS).any())
    ours.refresh()
    assert bool(ours.has(KEYS).all())
    assert torch.equal(ours.rows(KEYS), embeddings_of(KEYS))


def test_a_shard_written_twice_is_one_file_and_a_key_in_two_is_that_of_the_lowest_name(tmp_path: Path) -> None:
    cache = filled(tmp_path, KEYS)
    cache.write(KEYS, embeddings_of(KEYS))
    assert len(shard_files(tmp_path)) == 1
    other = torch.tensor([5, 99])
    cache.write(other, embeddings_of(other) + 1)
    lowest = shard_files(tmp_path)[0]
    # The first shard says 5 + 0, the second one more.
    expected = embeddings_of(KEYS[:1]) + (lowest.stat().st_size == min(map(size_of, shard_files(tmp_path))))
    for reader in (cache, EmbeddingCache(tmp_path, SETTINGS)):
        assert torch.equal(reader.rows(KEYS[:1]), expected)


def size_of(path: Path) -> int:
    return path.stat().st_size


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda content: content[: len(content) // 2],
    "one byte": lambda content: content[:-1],
    "header": lambda content: content[:20],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\0",
    "no safetensors": lambda content: b"\xff" * len(content),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_shard_counts_as_absent_until_it_is_made_anew(
    tmp_path: Path, cut: str, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, KEYS, torch.tensor([7, 8]))
    path = next(
        path for path in shard_files(tmp_path) if path.stat().st_size == max(map(size_of, shard_files(tmp_path)))
    )
    path.write_bytes(CUTS[cut](path.read_bytes()))
    cache = EmbeddingCache(tmp_path, SETTINGS)
    cache.refresh()
    assert cache.has(KEYS).tolist() == [False] * 4
    assert bool(cache.has(torch.tensor([7, 8])).all())
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1  # said once, not at every refresh
    assert str(path) in messages[0]
    assert "is cut or spoiled" in messages[0]
    assert "counts as absent, and is replaced when its embeddings are made anew" in messages[0]
    cache.write(KEYS, embeddings_of(KEYS))
    assert len(shard_files(tmp_path)) == 2
    assert torch.equal(EmbeddingCache(tmp_path, SETTINGS).rows(KEYS), embeddings_of(KEYS))


def test_a_cut_shard_that_another_process_made_anew_is_taken(tmp_path: Path) -> None:
    filled(tmp_path, KEYS)
    path = shard_files(tmp_path)[0]
    content = path.read_bytes()
    path.write_bytes(content[:100])
    cache = EmbeddingCache(tmp_path, SETTINGS)
    path.write_bytes(content)
    cache.refresh()
    assert bool(cache.has(KEYS).all())


def test_what_is_being_read_is_not_replaced_by_a_run_of_other_settings(tmp_path: Path) -> None:
    cache = filled(tmp_path, KEYS)
    (tmp_path / "manifest.json").unlink()  # as if both had begun in one moment
    other = EmbeddingCache(tmp_path, {"model": "another"})
    other.write(KEYS, embeddings_of(KEYS) + 1)
    torch.testing.assert_close(cache.rows(KEYS), embeddings_of(KEYS), rtol=0, atol=0)
    torch.testing.assert_close(other.rows(KEYS), embeddings_of(KEYS) + 1, rtol=0, atol=0)


def test_foreign_shards_count_as_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path / "other", KEYS)
    EmbeddingCache(tmp_path / "third", {**SETTINGS, "model": "beef"}).write(KEYS, embeddings_of(KEYS))
    folder = tmp_path / "cache"
    cache = filled(folder, torch.tensor([1, 2]))
    of_another_model = shard_files(tmp_path / "third")[0]
    os.rename(of_another_model, folder / of_another_model.name)
    same = shard_files(tmp_path / "other")[0]
    os.rename(same, folder / ("0" * 32 + ".safetensors"))  # of these settings, but its name is not that of its keys
    save_file({"keys": KEYS, "embeddings": embeddings_of(KEYS)}, folder / "mine.safetensors")
    cache.refresh()
    assert not bool(cache.has(KEYS).any())
    assert sum("is not of these settings" in record.getMessage() for record in caplog.records) == 3
    cache.write(KEYS, embeddings_of(KEYS))
    assert torch.equal(cache.rows(KEYS), embeddings_of(KEYS))


def test_shards_of_another_size_count_as_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = (EmbeddingCache(tmp_path, SETTINGS) for _ in range(2))
    one.write(KEYS, embeddings_of(KEYS))
    two.write(KEYS + 1, embeddings_of(KEYS, dim=5))
    one.refresh()
    assert not bool(one.has(KEYS + 1)[0])
    assert "has embeddings (4, 5), not (4, 3)" in caplog.text


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        (
            {"model": "beef"},
            torch.float32,
            "model is 'f00d' there and 'beef' here. Choose another directory",
        ),
        ({"truncate_dim": 64}, torch.float32, "truncate_dim is None there and 64 here"),
        ({"new": 1}, torch.float32, "new is absent there and 1 here"),
        ({}, torch.float16, "embedding_dtype is 'float32' there and 'float16' here"),
        ({"model": "b", "new": 1}, torch.float32, "model is 'f00d' there and 'b' here; new is absent there and 1 here"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype, message: str) -> None:
    filled(tmp_path, KEYS)
    with pytest.raises(ValueError, match=f"were made with other settings: {message}"):
        EmbeddingCache(tmp_path, {**SETTINGS, **settings}, dtype=dtype)
    with pytest.raises(ValueError, match="model is 'f00d' there and absent here"):
        EmbeddingCache(tmp_path, {name: value for name, value in SETTINGS.items() if name != "model"})


@pytest.mark.parametrize("content", ["{", "[]", '{"other": 1}', '{"settings": [1]}', "3"])
def test_a_manifest_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"is no manifest of embeddings .* Delete the directory, or choose another"):
        EmbeddingCache(tmp_path, SETTINGS)


def test_the_manifest_can_be_read_by_people(tmp_path: Path) -> None:
    filled(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest == {"settings": {**SETTINGS, "embedding_dtype": "float32"}}


@pytest.mark.parametrize(
    ("keys", "embeddings", "message"),
    [
        (
            torch.tensor([1.0]),
            torch.ones(1, 3),
            r"keys is \(1,\) of torch.float32, must be \(num_keys,\) of",
        ),
        (torch.tensor([[1]]), torch.ones(1, 3), r"keys is \(1, 1\) of torch.int64"),
        (
            torch.tensor([1]),
            torch.ones(2, 3),
            r"embeddings is \(2, 3\) for 1 keys, must be \(num_keys, ",
        ),
        (torch.tensor([1]), torch.ones(3), r"embeddings is \(3,\) for 1 keys"),
        (torch.empty(0, dtype=torch.int64), torch.ones(0, 3), r"embeddings is \(0, 3\) for 0 keys"),
        (torch.tensor([1]), torch.ones(1, 4), r"embeddings has 4 numbers a row, those in '.*' have 3; name what"),
        (torch.tensor([1, 2, 1]), torch.ones(3, 3), "1 of 3 keys are repeated; write each one once"),
        (
            torch.tensor([1, 2]),
            torch.tensor([[1, 2, 3], [0, float("nan"), 0]]),
            r"1 of 2 rows with NaN or .* rows \[1\]",
        ),
        (
            torch.tensor([1]),
            torch.full((1, 3), 1e5),
            r"1 of 1 rows with NaN or infinity in torch.float16, .*",
        ),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, keys: torch.Tensor, embeddings: torch.Tensor, message: str) -> None:
    cache = filled(tmp_path, KEYS, dtype=torch.float16)
    with pytest.raises(ValueError, match=message):
        cache.write(keys, embeddings)
    assert len(shard_files(tmp_path)) == 1


def test_keys_that_are_not_there(tmp_path: Path) -> None:
    cache = filled(tmp_path, KEYS)
    with pytest.raises(ValueError, match=r"2 of 3 keys have no embedding in .*, first keys \[8, 9\]; encode and write"):
        cache.source(torch.tensor([5, 8, 9]))
    with pytest.raises(ValueError, match=r"1 of 1 keys have no embedding"):
        EmbeddingCache(tmp_path / "empty", SETTINGS).rows(torch.tensor([5]))


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:50])])
def test_a_shard_that_is_lost_while_in_use(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    source = filled(tmp_path, KEYS).source(KEYS)
    spoil(shard_files(tmp_path)[0])
    with pytest.raises(ValueError, match=r"can no longer be read \(.*\); it was whole when this run began\. Delete it"):
        source.rows(torch.tensor([0]))


def test_a_full_disk_is_explained_and_finished_shards_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(tmp_path, KEYS)

    def failing(number: int) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(OSError, match=r"the disk is full .* Finished shards are kept, and the same run") as info:
            cache.write(KEYS + 1, embeddings_of(KEYS))
        assert info.value.errno == errno.ENOSPC
        patch.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):  # anything else is told as it is
            cache.write(KEYS + 1, embeddings_of(KEYS))
    assert len(list(tmp_path.iterdir())) == 2  # nothing half-written is left
    cache.write(KEYS + 1, embeddings_of(KEYS))
    assert bool(cache.has(KEYS + 1).all())


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    stale, recent = tmp_path / ".a.safetensors-x.tmp", tmp_path / ".b.safetensors-y.tmp"
    for path in (stale, recent):
        path.write_bytes(b"half")
    os.utime(stale, (time.time() - 7200, time.time() - 7200))
    cache = filled(tmp_path, KEYS)
    assert not stale.exists()
    assert recent.exists()
    assert bool(cache.has(KEYS).all())


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=r"go into a directory, .* is a file\. Choose another path"):
            EmbeddingCache(folder, SETTINGS)


def test_a_type_that_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.float64, must be one of \[torch.float32"):
        EmbeddingCache(tmp_path, SETTINGS, dtype=torch.float64)


WRITER = """
import sys, torch
from pathlib import Path
from puma_hf.evaluation.embedding_cache import EmbeddingCache
cache = EmbeddingCache(sys.argv[1], {"model": "f00d"})
while True:
    for keys in torch.arange(40_000).split(400):
        cache.write(keys, (keys[:, None] % 97).float().expand(-1, 64))
        print(flush=True)
"""


def test_a_killed_writer_leaves_whole_shards_only(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    for _ in range(5):
        assert writer.stdout.readline()
    writer.kill()
    writer.wait()
    writer.stdout.close()
    keys = torch.arange(40_000)
    cache = EmbeddingCache(tmp_path, {"model": "f00d"})
    there = keys[cache.has(keys)]
    assert len(there) >= 2000
    assert len(there) % 400 == 0
    assert torch.equal(cache.rows(there)[:, 5], (there % 97).float())
