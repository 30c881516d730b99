"""One shard of embeddings as a file: Parquet, or safetensors with a Parquet file of the ids beside it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pyarrow import parquet
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from puma_hf.configs import FileFormat
from puma_hf.files import write_whole

_KEY = "puma_hf"  # where the files have their description
_IDS_SUFFIX = ".ids.parquet"
_REMEDY = "run puma-hf embed again, which makes it anew"


class BrokenRecord(NamedTuple):
    """An input that could not be embedded.

    Args:
        row: Its number in the corpus, from 0.
        id: Its id.
        message: Why.
    """

    row: int
    id: str
    message: str


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What a shard says of itself.

    Args:
        settings: Hash of what its embeddings depend on besides its inputs.
        shard: Its number, from 0.
        first_row: Number of its first input in the corpus, from 0.
        num_items: How many inputs it is made of.
        num_rows: How many embeddings it holds: fewer where inputs were left out.
        num_errors: How many inputs could not be embedded.
        on_error: What was done about them.
        input_hash: Hash of the inputs.
        content_hash: SHA-256 of ids, rows and embeddings.
    """

    settings: str
    shard: int
    first_row: int
    num_items: int
    num_rows: int
    num_errors: int
    on_error: str
    input_hash: str
    content_hash: str = ""

    def is_of(self, other: ShardInfo) -> bool:
        """Whether it was made of the same inputs, and as another one, still to be made, will be."""
        made = replace(self, content_hash="", num_rows=0, num_errors=0, on_error="")
        wanted = replace(other, content_hash="", num_rows=0, num_errors=0, on_error="")
        # Only where something was broken does it matter what was to be done about it.
        return made == wanted and (self.num_errors == 0 or self.on_error == other.on_error)


class Shard(NamedTuple):
    """The content of a shard.

    Args:
        ids: Id of each embedding.
        rows: Number of its input in the corpus, `(num_rows,)` int64.
        embeddings: `(num_rows, embedding_width)`.
    """

    ids: list[str]
    rows: NDArray[np.int64]
    embeddings: NDArray[Any]

    @property
    def content_hash(self) -> str:
        """SHA-256 of all of it."""
        digest = hashlib.sha256(json.dumps(self.ids).encode())
        digest.update(np.ascontiguousarray(self.rows).tobytes())
        digest.update(f"{self.embeddings.dtype} {self.embeddings.shape}".encode())
        digest.update(np.ascontiguousarray(self.embeddings).tobytes())
        return digest.hexdigest()


class DamagedShardError(ValueError):
    """The files of a shard are missing, cut off, or not those of a shard."""


def shard_files(folder: Path, shard: int, file_format: FileFormat) -> list[Path]:
    """The files of a shard; the last one is written last."""
    name = f"shard-{shard:05d}"
    if file_format == "parquet":
        return [folder / f"{name}.parquet"]
    return [folder / f"{name}{_IDS_SUFFIX}", folder / f"{name}.safetensors"]


def write_shard(
    folder: Path, file_format: FileFormat, info: ShardInfo, content: Shard, errors: Sequence[BrokenRecord] = ()
) -> ShardInfo:
    """Write the files of a shard, each whole or not at all.

    Args:
        folder: Where to.
        file_format: "parquet" or "safetensors".
        info: What is known of it before; its hash of the content is filled in.
        content: Ids, rows and embeddings.
        errors: What could not be embedded.

    Returns:
        What was written of the shard in its files.

    Raises:
        OSError: If the disk is full.
    """
    # Names of files, and JSON, may hold half a character, which no Parquet file can.
    content = content._replace(ids=[name.encode("utf-8", "backslashreplace").decode() for name in content.ids])
    info = replace(info, num_rows=len(content.ids), num_errors=len(errors), content_hash=content.content_hash)
    described = json.dumps({**asdict(info), "errors": [list(error) for error in errors]})
    columns: dict[str, Any] = {
        "id": pyarrow.array(content.ids, pyarrow.string()),
        "row": pyarrow.array(content.rows, pyarrow.int64()),
    }
    files = shard_files(folder, info.shard, file_format)
    if file_format == "parquet":
        width = content.embeddings.shape[1]
        columns["embedding"] = pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(np.ascontiguousarray(content.embeddings).reshape(-1)), width
        )
    table = pyarrow.table(columns).replace_schema_metadata({_KEY: described})
    buffer = io.BytesIO()
    # Parquet has no integers of one byte: only as indices into a dictionary of 256 they take no more.
    small = ["embedding.list.element"] if content.embeddings.dtype.itemsize == 1 else False
    parquet.write_table(table, buffer, compression="none", use_dictionary=small)
    write_whole(files[0], buffer.getvalue())
    if file_format == "safetensors":
        tensors = {"embeddings": np.ascontiguousarray(content.embeddings)}
        write_whole(files[1], save(tensors, metadata={_KEY: described}))
    return info


def read_info(folder: Path, shard: int, file_format: FileFormat) -> tuple[ShardInfo, list[BrokenRecord]]:
    """What a shard says of itself, without its embeddings.

    Raises:
        DamagedShardError: If it is missing or cut off, or its files are not of one shard.
    """
    paths = shard_files(folder, shard, file_format)
    try:
        described = [_description(path) for path in paths]
        values = json.loads(described[0])
        errors = [BrokenRecord(*error) for error in values.pop("errors")]
        info = ShardInfo(**values)
    except (pyarrow.ArrowException, SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedShardError(f"{str(paths[-1])!r} is missing or no whole shard ({error}); {_REMEDY}") from error
    if len(set(described)) > 1:
        raise DamagedShardError(f"{str(paths[0])!r} and {str(paths[1])!r} are not of one run; {_REMEDY}")
    return info, errors


def read_shard(folder: Path, shard: int, file_format: FileFormat) -> Shard:
    """The content of a shard.

    Raises:
        DamagedShardError: If it is missing or cut off.
    """
    paths = shard_files(folder, shard, file_format)
    try:
        table = parquet.read_table(paths[0])
        if file_format == "parquet":
            column = table.column("embedding").combine_chunks()
            width = column.type.list_size
            embeddings = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), width)
        else:
            embeddings = load(paths[1].read_bytes())["embeddings"]
        rows = table.column("row").to_numpy()
        return Shard(table.column("id").to_pylist(), rows, embeddings)
    except (pyarrow.ArrowException, SafetensorError, OSError, ValueError, KeyError) as error:
        raise DamagedShardError(f"{str(paths[-1])!r} is missing or no whole shard ({error}); {_REMEDY}") from error


def read_ids(folder: Path, shard: int, file_format: FileFormat) -> list[str]:
    """The ids of a shard, without its embeddings.

    Raises:
        DamagedShardError: If it is missing or cut off.
    """
    path = shard_files(folder, shard, file_format)[0]
    try:
        ids: list[str] = parquet.read_table(path, columns=["id"]).column("id").to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise DamagedShardError(f"{str(path)!r} is missing or no whole shard ({error}); {_REMEDY}") from error
    return ids


def _description(path: Path) -> str:
    metadata: Mapping[Any, Any] | None
    if path.suffix == ".parquet":
        metadata = parquet.read_schema(path).metadata
        return (metadata or {})[_KEY.encode()].decode()  # type: ignore[no-any-return]
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    return str((metadata or {})[_KEY])
