"""One shard as a file, in both formats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet
from safetensors.numpy import load_file

from puma_hf.configs import FileFormat
from puma_hf.embedding.shards import (
    BrokenRecord,
    DamagedShardError,
    Shard,
    ShardInfo,
    read_ids,
    read_info,
    read_shard,
    shard_files,
    write_shard,
)

FORMATS: tuple[FileFormat, ...] = ("parquet", "safetensors")
INFO = ShardInfo(
    settings="s", shard=3, first_row=6, num_items=3, num_rows=0, num_errors=0, on_error="skip", input_hash="i"
)
ERRORS = [BrokenRecord(7, "b", "it is broken")]


def content(dtype: Any = np.float32, width: int = 4) -> Shard:
    values = np.random.default_rng(0).integers(0, 100, (2, width)).astype(dtype)
    return Shard(["a", "ü"], np.array([6, 8]), values)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.uint8])
def test_what_is_written_is_read(tmp_path: Path, file_format: FileFormat, dtype: Any) -> None:
    written = write_shard(tmp_path, file_format, INFO, content(dtype), ERRORS)
    assert written == replace(INFO, num_rows=2, num_errors=1, content_hash=content(dtype).content_hash)
    assert read_info(tmp_path, 3, file_format) == (written, ERRORS)
    found = read_shard(tmp_path, 3, file_format)
    assert (found.ids, found.rows.tolist(), found.embeddings.dtype) == (["a", "ü"], [6, 8], dtype)
    np.testing.assert_array_equal(found.embeddings, content(dtype).embeddings)
    assert found.content_hash == written.content_hash
    assert read_ids(tmp_path, 3, file_format) == ["a", "ü"]


def test_any_parquet_or_safetensors_reader_reads_them(tmp_path: Path) -> None:
    write_shard(tmp_path, "parquet", INFO, content())
    write_shard(tmp_path, "safetensors", INFO, content())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard-00003.ids.parquet",
        "shard-00003.parquet",
        "shard-00003.safetensors",
    ]
    table = parquet.read_table(tmp_path / "shard-00003.parquet")
    assert table.schema.names == ["id", "row", "embedding"]
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 4)
    assert table.to_pylist()[1] == {"id": "ü", "row": 8, "embedding": content().embeddings[1].tolist()}
    np.testing.assert_array_equal(load_file(tmp_path / "shard-00003.safetensors")["embeddings"], content().embeddings)
    assert parquet.read_table(tmp_path / "shard-00003.ids.parquet").to_pylist()[0] == {"id": "a", "row": 6}


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_shard_without_rows(tmp_path: Path, file_format: FileFormat) -> None:
    empty = Shard([], np.zeros(0, np.int64), np.zeros((0, 4), np.float16))
    write_shard(tmp_path, file_format, INFO, empty)
    found = read_shard(tmp_path, 3, file_format)
    assert (found.ids, found.embeddings.shape, found.embeddings.dtype) == ([], (0, 4), np.float16)


def test_a_byte_takes_a_byte_in_parquet(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (1000, 256)).astype(np.uint8)
    many = Shard([str(row) for row in range(1000)], np.arange(1000), values)
    write_shard(tmp_path, "parquet", INFO, many)
    assert (tmp_path / "shard-00003.parquet").stat().st_size < 1.3 * values.nbytes


def test_the_same_shard_is_the_same_bytes_and_another_hash_tells_another(tmp_path: Path) -> None:
    (path,) = shard_files(tmp_path, 3, "parquet")
    write_shard(tmp_path, "parquet", INFO, content(), ERRORS)
    first = path.read_bytes()
    write_shard(tmp_path, "parquet", INFO, content(), ERRORS)
    assert path.read_bytes() == first
    other = content().embeddings.copy()
    other[0, 0] += 1
    shard = content()
    hashes = {shard.content_hash}
    hashes |= {part.content_hash for part in (shard._replace(ids=["a", "b"]), shard._replace(rows=np.array([6, 7])))}
    hashes |= {shard._replace(embeddings=values).content_hash for values in (other, other.reshape(4, 2))}
    assert len(hashes) == 5


def test_an_id_with_half_a_character(tmp_path: Path) -> None:
    write_shard(tmp_path, "parquet", INFO, content()._replace(ids=["a", "b\udcff"]))
    found = read_shard(tmp_path, 3, "parquet")
    assert found.ids == ["a", "b\\udcff"]
    assert read_info(tmp_path, 3, "parquet")[0].content_hash == found.content_hash


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_shard_that_is_cut_off_or_gone(tmp_path: Path, file_format: FileFormat) -> None:
    write_shard(tmp_path, file_format, INFO, content())
    for path in shard_files(tmp_path, 3, file_format):
        whole = path.read_bytes()
        for broken in (whole[: len(whole) // 2], b"", None):
            path.unlink()
            if broken is not None:
                path.write_bytes(broken)
            with pytest.raises(DamagedShardError, match=r"is missing or no whole shard"):
                read_info(tmp_path, 3, file_format)
            with pytest.raises(DamagedShardError, match=r"is missing or no whole shard"):
                read_shard(tmp_path, 3, file_format)
        path.write_bytes(whole)
        read_info(tmp_path, 3, file_format)
    shard_files(tmp_path, 3, file_format)[0].unlink()
    with pytest.raises(DamagedShardError, match=r"is missing or no whole shard"):
        read_ids(tmp_path, 3, file_format)


def test_files_of_two_runs_are_no_shard(tmp_path: Path) -> None:
    write_shard(tmp_path, "safetensors", INFO, content())
    ids, _ = shard_files(tmp_path, 3, "safetensors")
    old = ids.read_bytes()
    write_shard(tmp_path, "safetensors", replace(INFO, input_hash="j"), content())
    ids.write_bytes(old)
    with pytest.raises(DamagedShardError, match=r"ids\.parquet' and .*safetensors' are not of one run"):
        read_info(tmp_path, 3, "safetensors")


def test_somebody_elses_parquet_file_is_no_shard(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"id": ["a"]}), tmp_path / "shard-00003.parquet")
    with pytest.raises(DamagedShardError, match="no whole shard"):
        read_info(tmp_path, 3, "parquet")
    with pytest.raises(DamagedShardError, match="no whole shard"):
        read_shard(tmp_path, 3, "parquet")


def test_when_a_shard_is_what_was_wanted() -> None:
    made = replace(INFO, num_rows=3, content_hash="c")
    assert made.is_of(INFO)
    assert made.is_of(replace(INFO, on_error="raise"))
    for change in ({"input_hash": "j"}, {"settings": "t"}, {"first_row": 5}, {"num_items": 4}, {"shard": 2}):
        assert not made.is_of(replace(INFO, **change))  # type: ignore[arg-type]
    broken = replace(made, num_rows=2, num_errors=1)
    assert broken.is_of(INFO)
    assert not broken.is_of(replace(INFO, on_error="zero"))
