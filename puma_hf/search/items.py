"""What an index shows of its items: one file beside each shard of embeddings, row by row."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pyarrow import parquet

from puma_hf.files import write_whole
from puma_hf.modeling.messages_puma import MODALITY_IDS

_KEY = b"puma_hf"  # where a file has the hash of its content
_COLUMNS = ("id", "modality", "text", "image", "image_state")
_SHOWN = tuple(name for name in _COLUMNS if name != "modality")
_SEEN = "seen_hash"


@dataclass(frozen=True, slots=True)
class Item:
    """One item of an index.

    Args:
        id: Its id.
        text: Its text, or None.
        image: Path of its picture, or None. In the files of an index a relative path is below the index.
        image_state: `image_state` of a picture elsewhere when it was embedded; None for one that the index holds.
    """

    id: str
    text: str | None = None
    image: str | None = None
    image_state: str | None = field(default=None, compare=False)

    @property
    def modality(self) -> str:
        """text, image, or image,text."""
        present = {"image": self.image, "text": self.text}
        return ",".join(name for name, value in present.items() if value is not None)


class DamagedItemsError(ValueError):
    """A file of items is missing, cut off, or not the one that the index was made with."""


def image_state(path: str) -> str | None:
    """Size and time of change of a file, by which it is known again; None if it is gone."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the latter if it is no name of a file
        return None
    return f"{status.st_size} {status.st_mtime_ns}"


def items_file(folder: Path, shard: int) -> Path:
    """The items of a shard."""
    return folder / f"items-{shard:05d}.parquet"


def write_items(folder: Path, shard: int, items: Sequence[Item], seen_hashes: Sequence[str]) -> str:
    """Write the items of a shard, whole or not at all; a file that holds them already is left alone.

    Args:
        folder: The index.
        shard: Number of the shard.
        items: Its items, in the order of its embeddings.
        seen_hashes: For each, the hash of what the model has seen of it.

    Returns:
        A hash of them.

    Raises:
        OSError: If the disk is full.
    """
    rows = [
        [*(_storable(getattr(item, name)) for name in _COLUMNS), seen]
        for item, seen in zip(items, seen_hashes, strict=True)
    ]
    content_hash = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    path = items_file(folder, shard)
    if _content_hash(path) == content_hash:
        return content_hash
    columns = {
        name: pyarrow.array([row[place] for row in rows], pyarrow.string())
        for place, name in enumerate((*_COLUMNS, _SEEN))
    }
    table = pyarrow.table(columns).replace_schema_metadata({_KEY: content_hash.encode()})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd", use_dictionary=["modality"])
    write_whole(path, buffer.getvalue())
    return content_hash


def read_items(folder: Path, shard: int, content_hash: str, places: Sequence[int]) -> list[Item]:
    """Some items of a shard, by their places in it.

    Raises:
        DamagedItemsError: If the file is gone, cut off, or another one.
    """
    table = _read(folder, shard, content_hash, _SHOWN).take(pyarrow.array(places, pyarrow.int64()))
    rows = [dict.fromkeys(_SHOWN) | row for row in table.to_pylist()]  # older files have no state
    for row in rows:
        row["image"] = None if row["image"] is None else os.path.join(folder, row["image"])
    return [Item(**row) for row in rows]


def read_modalities(folder: Path, shard: int, content_hash: str) -> NDArray[np.int8]:
    """Number of the modality of each item of a shard, as in `MODALITY_IDS`; nothing else is read.

    Raises:
        DamagedItemsError: If the file is gone, cut off, or another one.
    """
    names = _read(folder, shard, content_hash, ["modality"]).column("modality").to_pylist()
    return np.array([MODALITY_IDS[name] for name in names], np.int8)


def read_seen_hashes(folder: Path, shard: int, content_hash: str) -> list[str]:
    """For each item of a shard the hash of what the model has seen of it; nothing else is read.

    Raises:
        DamagedItemsError: If the file is gone, cut off, or another one.
    """
    found: list[str] = _read(folder, shard, content_hash, [_SEEN]).column(_SEEN).to_pylist()
    return found


def _storable(value: str | None) -> str | None:
    """JSON, and names of files, may hold half a character, which no Parquet file can."""
    return None if value is None else value.encode("utf-8", "backslashreplace").decode()


def _content_hash(path: Path) -> str | None:
    try:
        with parquet.ParquetFile(path) as file:
            return _hash_in(file)
    except (pyarrow.ArrowException, OSError, KeyError):
        return None


def _hash_in(file: Any) -> str:
    return (file.schema_arrow.metadata or {})[_KEY].decode()  # type: ignore[no-any-return]


def _read(folder: Path, shard: int, content_hash: str, columns: Sequence[str]) -> Any:
    path = items_file(folder, shard)
    reason = "it is another one"
    try:
        with parquet.ParquetFile(path) as file:  # opened once: a run may put another in its place
            if _hash_in(file) == content_hash:
                return file.read(columns=list(columns))
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        reason = str(error)
    raise DamagedItemsError(
        f"{str(path)!r} is missing or not what the index was made with ({reason}). Run puma-hf index again, which "
        "makes it anew; or open the index again, if that has been done meanwhile."
    )
