"""The rows of a directory of embeddings as candidates of a search, read shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puma_hf.embedding.store import StoredEmbeddings

KEPT_BYTES = 2**30  # of embeddings, as they are stored, that stay in memory from one search to the next


class ShardReader:
    """Reads shards, each checked by its hash; the first ones stay in memory, as far as they fit.

    Which stay is not a matter of which were used last: every search reads all of them, from first to last.

    Args:
        stored: The embeddings.
        kept_bytes: Memory that they may take.
    """

    def __init__(self, stored: StoredEmbeddings, kept_bytes: int = KEPT_BYTES) -> None:
        self.stored = stored
        self._kept: dict[int, NDArray[Any]] = {}
        self._room = kept_bytes

    def read(self, shard: int) -> NDArray[Any]:
        """The rows of a shard as they are stored, `(num_rows, embedding_width)`.

        Raises:
            DamagedShardError: If it is gone, or no longer what it was.
        """
        if shard in self._kept:
            return self._kept[shard]
        rows = self.stored.shard(shard).embeddings
        if rows.nbytes <= self._room:
            self._room -= rows.nbytes
            self._kept[shard] = rows
        return rows


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

    def _floats(self, rows: NDArray[Any], places: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._reader.stored.to_float(rows[places]))
