from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from puma_hf.embedding.store import MANIFEST, EmbeddingStore, open_embeddings, read_manifest

Format = Literal["parquet", "safetensors"]
FORMATS: list[Format] = ["parquet", "safetensors"]
SETTINGS = {"model": "f00d", "truncate_dim": None, "processing": {"size": [1, 2]}}
KEYS = torch.tensor([5, -3, 2**62, 0])


def embeddings_of(keys: torch.Tensor, dim: int = 3) -> torch.Tensor:
    """Whole numbers up to 2^7, exact in every type."""
    return (keys[:, None] % 97 + torch.arange(dim)).float()


def filled(folder: Path, *shards: torch.Tensor, **options: Any) -> EmbeddingStore:
    store = EmbeddingStore(folder, SETTINGS, **options)
    for order, keys in enumerate(shards):
        store.add(keys, embeddings_of(keys), ids=[f"id{key}" for key in keys.tolist()], order=order)
    store.refresh()
    return store


def shards_of(folder: Path) -> list[Path]:
    """The files that hold embeddings."""
    return sorted(folder.glob("shard-*.safetensors")) or sorted(folder.glob("shard-*.parquet"))


@pytest.mark.parametrize(
    ("file_format", "dtype"),
    [(f, d) for f in FORMATS for d in (torch.float32, torch.float16, torch.int8, torch.uint8)]
    + [("safetensors", torch.bfloat16)],
)
def test_what_was_added_is_read_again(tmp_path: Path, file_format: Format, dtype: torch.dtype) -> None:
    folder = tmp_path / "new" / "store"
    written = filled(folder, KEYS, torch.tensor([7, 8]), dtype=dtype, file_format=file_format)
    for store in (written, EmbeddingStore(folder, SETTINGS, dtype=dtype, file_format=file_format)):
        assert store.has(torch.tensor([8, 9, -3])).tolist() == [True, False, True]
        assert (len(store), store.embedding_dim) == (6, 3)
        wanted = torch.tensor([8, 5, 0, 7, 5])
        rows = store.rows(wanted)
        assert rows.dtype == dtype
        assert torch.equal(rows, embeddings_of(wanted).to(dtype))
    if dtype is not torch.bfloat16:
        (ids, first), (_, second) = list(written)  # in the order that was given
        assert ids == ["id5", "id-3", f"id{2**62}", "id0"]
        np.testing.assert_array_equal(first, embeddings_of(KEYS).to(dtype).numpy())
        assert second.shape == (2, 3)


def test_pandas_and_safetensors_read_the_files(tmp_path: Path) -> None:
    filled(tmp_path / "a", KEYS)
    table = pd.read_parquet(shards_of(tmp_path / "a")[0])
    assert list(table.columns) == ["key", "id", "embedding"]
    np.testing.assert_array_equal(np.stack(list(table["embedding"])), embeddings_of(KEYS).numpy())
    said = json.loads(parquet.read_schema(shards_of(tmp_path / "a")[0]).metadata[b"puma_hf"])
    assert said == {**SETTINGS, "embedding_dtype": "float32", "file_format": "parquet"}
    filled(tmp_path / "b", KEYS, file_format="safetensors")
    tensors = load_file(shards_of(tmp_path / "b")[0])
    assert torch.equal(tensors["embeddings"], embeddings_of(KEYS))
    ids = pd.read_parquet(next((tmp_path / "b").glob("*.parquet")))
    assert ids["key"].tolist() == KEYS.tolist()
    assert ids["id"].tolist()[0] == "id5"


def test_eight_bits_take_a_byte_on_the_disk(tmp_path: Path) -> None:
    keys = torch.arange(1000)
    store = EmbeddingStore(tmp_path, SETTINGS, dtype=torch.int8)
    store.add(keys, torch.randint(-128, 128, (1000, 256), generator=torch.Generator().manual_seed(0)))
    assert shards_of(tmp_path)[0].stat().st_size < 1000 * (256 + 8) * 1.1


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("block_size", [1, 7, 100])
def test_blocks_come_in_the_order_of_the_keys(tmp_path: Path, block_size: int, file_format: Format) -> None:
    store = filled(tmp_path, *torch.arange(60).split(9), file_format=file_format)
    keys = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:40]
    blocks = list(store.blocks(keys, block_size))
    assert [start for start, _ in blocks] == list(range(0, 40, block_size))
    assert torch.equal(torch.cat([block for _, block in blocks]), embeddings_of(keys))


def test_shards_of_other_processes_are_seen_after_a_refresh(tmp_path: Path) -> None:
    ours, theirs = filled(tmp_path), filled(tmp_path)
    theirs.add(KEYS, embeddings_of(KEYS))
    assert not bool(ours.has(KEYS).any())
    ours.refresh()
    assert torch.equal(ours.rows(KEYS), embeddings_of(KEYS))
    theirs.add(KEYS, embeddings_of(KEYS))
    assert len(shards_of(tmp_path)) == 1  # the same keys make the same file


def test_a_key_in_two_shards_is_that_of_the_first_file(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, SETTINGS)
    for order in (3_000_000, 90_000):
        store.add(torch.tensor([2, order]), torch.full((2, 1), float(order)), ids=["2", str(order)], order=order)
    for reader in (store, EmbeddingStore(tmp_path, SETTINGS)):
        reader.refresh()
        assert reader.rows(torch.tensor([3_000_000, 2, 90_000])).flatten().tolist() == [3_000_000, 90_000, 90_000]
        assert [ids[1] for ids, _ in reader] == ["90000", "3000000"]
    shards_of(tmp_path)[0].unlink()
    store.refresh()
    assert store.has(torch.tensor([2, 90_000])).tolist() == [True, False]


@pytest.mark.parametrize("file_format", FORMATS)
def test_keep_removes_all_other_rows(tmp_path: Path, file_format: Format) -> None:
    store = filled(tmp_path, *torch.arange(12).split(3), torch.tensor([4, 20]), file_format=file_format)
    (tmp_path / f"shard-00009-{'0' * 24}.{file_format}").write_bytes(b"cut")
    (tmp_path / "mine.parquet").write_bytes(b"")
    store.keep(torch.tensor([0, 1, 2, 4, 11, 20, 99]))
    for reader in (store, EmbeddingStore(tmp_path, SETTINGS, file_format=file_format)):
        assert [ids for ids, _ in reader] == [["id0", "id1", "id2"], ["id4"], ["id11"], ["id20"]]
        assert torch.equal(reader.rows(torch.tensor([4, 20])), embeddings_of(torch.tensor([4, 20])))
    assert len(shards_of(tmp_path)) == 4
    assert (tmp_path / "mine.parquet").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    store.keep(torch.tensor([0, 1, 2, 4, 11, 20]))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("left", [0.0, 0.5, 1.0])
def test_a_cut_shard_counts_as_absent_until_it_is_made_anew(
    tmp_path: Path, left: float, file_format: Format, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, KEYS, torch.tensor([7, 8]), file_format=file_format)
    path = shards_of(tmp_path)[0]
    content = path.read_bytes()
    path.write_bytes(content[: int(left * (len(content) - 1))])
    store = EmbeddingStore(tmp_path, SETTINGS, file_format=file_format)
    store.refresh()
    assert store.has(KEYS).tolist() == [False] * 4
    assert bool(store.has(torch.tensor([7, 8])).all())
    (message,) = [record.getMessage() for record in caplog.records]  # said once, not at every refresh
    assert str(path) in message
    assert "cut or spoiled" in message
    store.add(KEYS, embeddings_of(KEYS))
    store.refresh()
    assert len(shards_of(tmp_path)) == 2
    assert torch.equal(store.rows(KEYS), embeddings_of(KEYS))


def test_a_changed_byte_of_a_parquet_file_is_found_when_it_is_read(tmp_path: Path) -> None:
    store = filled(tmp_path, torch.arange(1000))
    path = shards_of(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2 + 1000] ^= 64
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Delete this file and run the same command again"):
        list(store)


def test_shards_of_other_settings_are_never_mixed_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = filled(tmp_path, KEYS)
    (tmp_path / MANIFEST).unlink()  # as if both had begun in one moment
    other = EmbeddingStore(tmp_path, {"model": "another"})
    other.add(KEYS, embeddings_of(KEYS) + 1)
    other.refresh()
    store.refresh()
    assert torch.equal(store.rows(KEYS), embeddings_of(KEYS))
    assert torch.equal(other.rows(KEYS), embeddings_of(KEYS) + 1)
    assert "is not of these settings" in caplog.text


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"model": "beef"}, {}, "model is 'f00d' there and 'beef' here. Choose another directory"),
        ({"new": 1, "truncate_dim": 64}, {}, "new is None there and 1 here; truncate_dim is None there and 64 here"),
        ({}, {"dtype": torch.float16}, "embedding_dtype is 'float32' there and 'float16' here"),
        ({}, {"file_format": "safetensors"}, "file_format is 'parquet' there"),
        (
            {"decode": "fast"},
            {},
            "decode is 'exact' there and 'fast' here. Go on with --decode exact, as they were made",
        ),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, settings: dict[str, Any], options: Any, message: str) -> None:
    filled(tmp_path, KEYS)
    with pytest.raises(ValueError, match=f"were made with other settings: {message}"):
        EmbeddingStore(tmp_path, {**SETTINGS, **settings}, **options)
    assert len(EmbeddingStore(tmp_path, {**SETTINGS, "decode": "exact", "max_pixels": None})) == len(KEYS)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "puma_hf embeddings", "format_version": 3}'])
def test_a_directory_of_another_version_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match="no manifest of this version"):
        EmbeddingStore(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("keys", "embeddings", "message"),
    [
        (torch.tensor([1]), torch.ones(2, 3), r"embeddings is \(2, 3\) for 1 keys, must be \(num_keys, 3\)"),
        (torch.tensor([1]), torch.ones(1, 4), r"must be \(num_keys, 3\)"),
        (torch.tensor([1]), torch.tensor([[1, 2, float("nan")]]), r"NaN or infinity as torch.float16"),
        (torch.tensor([1]), torch.full((1, 3), 1e5), r"NaN or infinity as torch.float16"),
    ],
)
def test_what_cannot_be_added(tmp_path: Path, keys: torch.Tensor, embeddings: torch.Tensor, message: str) -> None:
    store = filled(tmp_path, KEYS, dtype=torch.float16)
    with pytest.raises(ValueError, match=message):
        store.add(keys, embeddings)
    assert len(shards_of(tmp_path)) == 1


def test_keys_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 of 3 keys have no embedding in .*; add them first"):
        filled(tmp_path / "a", KEYS).rows(torch.tensor([5, 8, 9]))
    with pytest.raises(ValueError, match=r"1 of 1 keys have no embedding"):
        EmbeddingStore(tmp_path / "empty", SETTINGS).rows(torch.tensor([5]))


def test_what_embed_has_not_finished_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        open_embeddings(tmp_path)
    store = filled(tmp_path, KEYS)
    with pytest.raises(ValueError, match="is not whole"):
        open_embeddings(tmp_path)
    store.say(complete=True, num_rows=4, ranges=None)
    opened = open_embeddings(tmp_path)
    assert (len(opened), opened.settings["model"], opened.dtype) == (4, "f00d", torch.float32)
    assert read_manifest(tmp_path)["complete"]
    store.add(KEYS + 1, embeddings_of(KEYS))
    assert not read_manifest(tmp_path)["complete"]
    store.say(complete=True, num_rows=8)
    shards_of(tmp_path)[0].unlink()
    with pytest.raises(ValueError, match=r"is not whole: .* or files are missing"):
        open_embeddings(tmp_path)
