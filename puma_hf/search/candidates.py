"""The rows of a directory of embeddings as candidates of a search, read shard by shard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puma_hf.embedding.shards import DamagedShardError, shard_files
from puma_hf.embedding.store import MANIFEST, StoredEmbeddings

KEPT_BYTES = 2**30  # of embeddings, as they are stored, that stay in memory from one search to the next


class Rows(Protocol):
    """Rows of a shard as they are stored; an array is one."""

    def __getitem__(self, places: NDArray[np.int64], /) -> NDArray[Any]:
        """Those at these places, `(len(places), embedding_width)`."""


class ShardReader:
    """Reads shards, each checked by its hash; the first ones stay in memory, as far as they fit.

    Every search reads all shards in their order, so those that were used last would be gone before they are read again;
    the first ones stay instead. Threads may share a reader.

    Args:
        stored: The embeddings.
        kept_bytes: Memory that they may take.
    """

    def __init__(self, stored: StoredEmbeddings, kept_bytes: int = KEPT_BYTES) -> None:
        self.stored = stored
        self._kept: dict[int, NDArray[Any]] = {}
        self._room = kept_bytes
        self._lock = Lock()

    def read(self, shard: int) -> Rows:
        """The rows of a shard.

        Raises:
            DamagedShardError: If it is gone, or no longer what it was.
        """
        kept = self._kept.get(shard)
        if kept is not None:
            return kept
        with self.explained(shard):
            rows = self.stored.shard(shard).embeddings
        with self._lock:
            if (other := self._kept.get(shard)) is not None:  # another thread has read it meanwhile
                return other
            if rows.nbytes <= self._room:
                self._room -= rows.nbytes
                self._kept[shard] = rows
        return rows

    @contextmanager
    def explained(self, shard: int) -> Iterator[None]:
        """Tell what to do of an index, whose embeddings can be made only by its own command."""
        try:
            yield
        except DamagedShardError as error:
            folder = self.stored.folder
            if self._is_newer():
                message = f"The index {str(folder)!r} was made anew while it was open. Open it again."
            else:
                names = ", ".join(self.stored.manifest["shards"][shard]["files"])
                message = (
                    f"{names} in {str(folder)!r} is gone, or changed after the run that made it. Delete it, and run "
                    "puma-hf index again, which makes it anew."
                )
            raise DamagedShardError(message) from error

    def _is_newer(self) -> bool:
        """Whether a later run has written to the index."""
        try:
            return bool(json.loads((self.stored.folder / MANIFEST).read_bytes()) != self.stored.manifest)
        except (OSError, ValueError):
            return False


class RowReader(ShardReader):
    """Reads single rows of safetensors files, whose other rows stay on the disk; of Parquet, whole shards.

    It checks that a file is of the run that made the index, but not its bytes: to hash them would be to read them all.
    """

    def read(self, shard: int) -> Rows:
        file_format = self.stored.manifest["settings"]["file_format"]
        if file_format != "safetensors":
            return super().read(shard)
        return _RowsOnDisk(self, shard, shard_files(self.stored.folder, shard, file_format)[-1])


class _RowsOnDisk:
    def __init__(self, reader: RowReader, shard: int, path: Path) -> None:
        self._reader, self._shard, self._path = reader, shard, path

    def __getitem__(self, places: NDArray[np.int64], /) -> NDArray[Any]:
        expected = self._reader.stored.manifest["shards"][self._shard]["content_hash"]
        with self._reader.explained(self._shard):
            try:
                with safe_open(self._path, framework="np") as file:
                    described = json.loads((file.metadata() or {})["puma_hf"])  # as `write_shard` writes it
                    if described["content_hash"] != expected:
                        raise DamagedShardError(f"{self._path.name} is of another run")
                    rows = file.get_slice("embeddings")
                    return np.concatenate([rows[place : place + 1] for place in places.tolist()])
            except (SafetensorError, OSError, KeyError) as error:
                raise DamagedShardError(str(error)) from error


class StoredCandidates:
    """Some rows of stored embeddings as a `puma_hf.evaluation.search.CandidateSource`.

    Args:
        reader: Where they come from.
        positions: Which rows, counted over all shards, ascending, `(num_candidates,)` int64.

    Example:
        >>> from puma_hf.embedding.store import open_embeddings
        >>> stored = open_embeddings("embeddings")  # doctest: +SKIP
        >>> candidates = StoredCandidates(ShardReader(stored), np.arange(len(stored)))  # doctest: +SKIP
        >>> exact_search(queries, candidates, top_k=10)  # doctest: +SKIP
    """

    def __init__(self, reader: ShardReader, positions: NDArray[np.int64]) -> None:
        self.positions = positions
        self._reader = reader
        sizes = [entry["num_rows"] for entry in reader.stored.manifest["shards"]]
        self._starts = np.cumsum([0, *sizes])  # of the shards, and the end

    @property
    def embedding_dim(self) -> int:
        return self._reader.stored.embedding_dim

    def __len__(self) -> int:
        return len(self.positions)

    def blocks(self, block_size: int) -> Iterator[tuple[int, Tensor]]:
        bounds = np.searchsorted(self.positions, self._starts)
        for shard, (first, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            if first == end:
                continue
            rows = self._reader.read(shard)
            for start in range(first, end, block_size):
                places = self.positions[start : min(start + block_size, end)] - self._starts[shard]
                yield start, self._floats(rows, places)

    def rows(self, indices: Tensor) -> Tensor:
        positions = self.positions[indices.numpy()]
        shards = np.searchsorted(self._starts, positions, side="right") - 1
        rows = torch.empty(len(positions), self.embedding_dim)
        for shard in np.unique(shards).tolist():
            where = np.flatnonzero(shards == shard)
            found = self._floats(self._reader.read(shard), positions[where] - self._starts[shard])
            rows[torch.from_numpy(where)] = found
        return rows

    def _floats(self, rows: Rows, places: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._reader.stored.to_float(rows[places]))
