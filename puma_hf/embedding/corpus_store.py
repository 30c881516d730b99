"""A directory of embeddings: shards of consecutive inputs, and a manifest that says what they are."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

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
from puma_hf.embedding.unfinished import LEFTOVERS
from puma_hf.files import write_whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ERRORS = "errors.jsonl"
RANGES = "ranges.safetensors"
FORMAT = "puma_hf embeddings of a corpus"
FORMAT_VERSION = 1

_SHARD_FILE = re.compile(r"shard-(\d{5,})\.(?:parquet|safetensors|ids\.parquet)")
_DRAFTS = (".shard-*.tmp", f".{MANIFEST}-*.tmp", f".{ERRORS}-*.tmp", f".{RANGES}-*.tmp", *LEFTOVERS)


class EmbeddingStore:
    """The directory that a run writes to; several processes may, shards of their own.

    What is there of the same settings is kept, so a run that was stopped goes on.

    Args:
        folder: The directory, which exists.
        settings: What the embeddings depend on besides the inputs; anything that JSON can hold.
        file_format: "parquet" or "safetensors".

    Raises:
        ValueError: If it holds embeddings of other settings, or shards without a manifest.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], file_format: FileFormat) -> None:
        self.folder = folder
        self.file_format = file_format
        self.settings: dict[str, Any] = json.loads(json.dumps({**settings, "file_format": file_format}))
        self.ranges: NDArray[np.float32] | None = None
        self._has_begun = False
        self._check_settings()

    def _check_settings(self) -> None:
        path = self.folder / MANIFEST
        if not path.is_file():
            if strange := sorted(file.name for file in self.folder.iterdir() if _SHARD_FILE.fullmatch(file.name)):
                raise ValueError(
                    f"{str(self.folder)!r} holds {strange[0]}, but no {MANIFEST}: nobody knows what it is. Choose "
                    "another directory, or remove the shards."
                )
            return
        found = _read_manifest(path)["settings"]
        names = sorted(name for name in {*found, *self.settings} if found.get(name) != self.settings.get(name))
        if names:
            values = "; ".join(
                f"{name} is {found.get(name)!r} there, {self.settings.get(name)!r} here" for name in names
            )
            raise ValueError(
                f"The embeddings in {str(self.folder)!r} are of another model or setting: {values}. Choose another "
                "directory, or delete this one to make them again."
            )

    def begin(self) -> None:
        """Mark the directory as unfinished, before anything in it changes."""
        if not self._has_begun:
            self._write_manifest({"complete": False})
            self._has_begun = True

    def load_ranges(self) -> bool:
        """Take the ranges that an earlier run has written; whether there are any."""
        path = self.folder / RANGES
        if self.ranges is None and path.is_file() and (self.folder / MANIFEST).is_file():
            try:
                self.ranges = load(path.read_bytes())["ranges"]
            except (SafetensorError, KeyError) as error:
                logger.warning("%s cannot be read (%s): the ranges are made anew", path, error)
        return self.ranges is not None

    def save_ranges(self, ranges: NDArray[np.float32]) -> None:
        """Write the least and the largest value of every dimension, `(2, embedding_dim)`."""
        self.begin()
        write_whole(self.folder / RANGES, save({"ranges": np.ascontiguousarray(ranges, np.float32)}))

    def info(self, shard: int, first_row: int, num_items: int, input_hash: str, on_error: str) -> ShardInfo:
        """What a shard that is still to be made will say of itself."""
        ranges = "" if self.ranges is None else hashlib.sha256(self.ranges.tobytes()).hexdigest()
        settings = hashlib.sha256(json.dumps([self.settings, ranges], sort_keys=True).encode()).hexdigest()
        return ShardInfo(
            settings=settings,
            shard=shard,
            first_row=first_row,
            num_items=num_items,
            num_rows=0,
            num_errors=0,
            on_error=on_error,
            input_hash=input_hash,
        )

    def finished(self, wanted: ShardInfo) -> ShardInfo | None:
        """The shard, if it is there and of the same inputs and settings."""
        try:
            found, _ = read_info(self.folder, wanted.shard, self.file_format)
        except DamagedShardError:
            return None
        return found if found.is_of(wanted) else None

    def write(self, info: ShardInfo, content: Shard, errors: Sequence[BrokenRecord]) -> ShardInfo:
        """Write a shard, whole or not at all.

        Raises:
            OSError: If the disk is full; finished shards are kept.
        """
        self.begin()
        return write_shard(self.folder, self.file_format, info, content, errors)

    def finish(self, shards: Sequence[ShardInfo], described: Mapping[str, Any]) -> None:
        """Write the manifest and the list of errors; remove what a longer corpus or a killed run has left.

        Args:
            shards: All shards of the corpus, in order.
            described: What else is told of the embeddings, such as `embedding_dim`.

        Raises:
            DamagedShardError: If one is no longer there.
        """
        lines: list[bytes] = []
        for info in shards:
            if info.num_errors:
                _, errors = read_info(self.folder, info.shard, self.file_format)
                lines += [json.dumps(error._asdict(), ensure_ascii=False).encode() + b"\n" for error in errors]
        text = b"".join(lines)
        self._remove_leftovers(len(shards))
        path = self.folder / ERRORS
        if not text:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.read_bytes() != text:
            write_whole(path, text)
        counts = {
            "num_items": sum(info.num_items for info in shards),
            "num_rows": sum(info.num_rows for info in shards),
            "num_errors": sum(info.num_errors for info in shards),
        }
        entries = [_entry(info, self.folder, self.file_format) for info in shards]
        self._write_manifest({"complete": True, **described, **counts, "shards": entries})

    def _remove_leftovers(self, num_shards: int) -> None:
        others = [
            file
            for file in sorted(self.folder.iterdir())
            if (match := _SHARD_FILE.fullmatch(file.name)) and int(match[1]) >= num_shards
        ]
        if others:
            self.begin()
            logger.info("%s: removed %d files of a longer corpus, from %s on", self.folder, len(others), others[0].name)
        for file in [*others, *(draft for pattern in _DRAFTS for draft in self.folder.glob(pattern))]:
            file.unlink(missing_ok=True)

    def _write_manifest(self, values: Mapping[str, Any]) -> None:
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        text = json.dumps({**head, "settings": self.settings, **values}, indent=2, ensure_ascii=False) + "\n"
        path = self.folder / MANIFEST
        content = text.encode("utf-8", "backslashreplace")
        if not path.is_file() or path.read_bytes() != content:
            write_whole(path, content)


class StoredEmbeddings:
    """Embeddings that `puma-hf embed` has written; rows are read from the disk as they are asked for.

    Args:
        folder: The directory.
        manifest: Its manifest.

    Attributes:
        folder: The directory.
        manifest: What it says: model, fingerprint, settings, and each shard's files and hashes.
        embedding_dim: Dimensions of an embedding; packed ones have an eighth as many numbers.
        precision: What the numbers are: float32, float16, int8, uint8, binary or ubinary.
        ranges: For int8 and uint8 the least and the largest value of every dimension, `(2, embedding_dim)`, that
            `sentence_transformers.util.quantize_embeddings` needs for the queries, too; None otherwise.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.embedding_dim: int = manifest["embedding_dim"]
        self.precision: str = manifest["settings"]["precision"]
        self.ranges: NDArray[np.float32] | None = None
        if manifest.get("ranges"):
            self.ranges = load((folder / manifest["ranges"]).read_bytes())["ranges"]

    def __len__(self) -> int:
        """Number of embeddings."""
        return int(self.manifest["num_rows"])

    def __iter__(self) -> Iterator[tuple[list[str], NDArray[Any]]]:
        """Ids and embeddings `(num_rows, embedding_width)` of one shard after the other.

        Raises:
            DamagedShardError: If a shard is gone, or no longer what it was.
        """
        for shard in self.shards():
            yield shard.ids, shard.embeddings

    def shards(self) -> Iterator[Shard]:
        """The shards, with the number of each row's input, too; their contents are checked by their hashes.

        Raises:
            DamagedShardError: If one is gone, or no longer what it was.
        """
        for number in range(len(self.manifest["shards"])):
            yield self.shard(number)

    def shard(self, number: int) -> Shard:
        """One of the shards, checked by its hash.

        Raises:
            DamagedShardError: If it is gone, or no longer what it was.
        """
        entry = self.manifest["shards"][number]
        shard = read_shard(self.folder, number, self.manifest["settings"]["file_format"])
        if shard.content_hash != entry["content_hash"]:
            raise DamagedShardError(
                f"{', '.join(entry['files'])} in {str(self.folder)!r} changed after the run that made it. Delete "
                "it, and run puma-hf embed again."
            )
        return shard

    def ids(self) -> Iterator[str]:
        """The ids of all rows, one after the other; no embedding is read.

        Raises:
            DamagedShardError: If a shard is gone or cut off.
        """
        for number in range(len(self.manifest["shards"])):
            yield from read_ids(self.folder, number, self.manifest["settings"]["file_format"])

    def to_float(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Stored rows as the numbers that they stand for: the middle of each step of an integer, the sign of each bit.

        Args:
            rows: `(num_rows, embedding_width)`.

        Returns:
            `(num_rows, embedding_dim)`.
        """
        if self.precision in ("binary", "ubinary"):
            packed = (rows.astype(np.int16) + 128).astype(np.uint8) if self.precision == "binary" else rows
            return np.unpackbits(packed, axis=1, count=self.embedding_dim).astype(np.float32) * 2 - 1
        if self.ranges is None:
            return rows.astype(np.float32)
        steps = (self.ranges[1] - self.ranges[0]) / 255
        places = rows.astype(np.float32) + (128 if self.precision == "int8" else 0)
        return np.asarray(self.ranges[0] + (places + 0.5) * steps, np.float32)


def open_embeddings(folder: str | Path) -> StoredEmbeddings:
    """Open a directory that `puma-hf embed` has written.

    Args:
        folder: The directory.

    Returns:
        What it holds; iterate over it for `(ids, rows)` of one shard after the other.

    Raises:
        FileNotFoundError: If it has no manifest.
        ValueError: If its run was not finished, a shard is missing, or it is of a later version.

    Example:
        >>> from puma_hf.embedding.corpus_store import open_embeddings
        >>> for ids, rows in open_embeddings("embeddings"):  # doctest: +SKIP
        ...     index.add_with_ids(rows, ids)
    """
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {MANIFEST}. Name a directory that puma-hf embed has written.")
    manifest = _read_manifest(path / MANIFEST)
    if not manifest.get("complete"):
        raise ValueError(
            f"The run that writes {str(folder)!r} has not finished. Wait for it, or run the same command again: it "
            "goes on where it was."
        )
    for number, entry in enumerate(manifest["shards"]):
        if gone := [name for name in entry["files"] if not (path / name).is_file()]:
            raise ValueError(
                f"{gone[0]} (shard {number} of {len(manifest['shards'])}) is missing in {str(folder)!r}. Copy the "
                "whole directory, or run puma-hf embed again."
            )
    return StoredEmbeddings(path, manifest)


def _entry(info: ShardInfo, folder: Path, file_format: FileFormat) -> dict[str, Any]:
    names = ("first_row", "num_items", "num_rows", "num_errors", "input_hash", "content_hash")
    values = asdict(info)
    files = [path.name for path in shard_files(folder, info.shard, file_format)]
    return {"files": files, **{name: values[name] for name in names}}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, version, _ = manifest["format"], manifest["format_version"], dict(manifest["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(path)!r} is no manifest of embeddings ({error!r}). Choose another directory."
        ) from error
    if kind != FORMAT or not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} is of format {kind!r}, version {version!r}, must be {FORMAT!r}, at most version "
            f"{FORMAT_VERSION}. Install a newer puma-hf, or choose another directory."
        )
    return manifest
