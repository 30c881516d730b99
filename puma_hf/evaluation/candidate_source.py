"""Where a search finds its candidates: a tensor, or anything that gives its rows block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor

from puma_hf.embedding.store import EmbeddingStore


@runtime_checkable
class CandidateSource(Protocol):
    """Embeddings of candidates `(num_candidates, embedding_dim)` that need not be in memory as a whole.

    Rows are of any length and floating type, and the same whenever they are read.
    """

    @property
    def embedding_dim(self) -> int:
        """Numbers of one embedding."""

    def __len__(self) -> int:
        """Number of candidates."""

    def blocks(self, block_size: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in order, at most `block_size` at a time, each block with the number of its first row."""

    def rows(self, indices: Tensor) -> Tensor:
        """The rows of `indices`, int64 on the CPU, in that order: `(len(indices), embedding_dim)`."""


class TensorCandidates:
    """Candidates that are all in one tensor.

    Args:
        embeddings: `(num_candidates, embedding_dim)`, on any device.
    """

    def __init__(self, embeddings: Tensor) -> None:
        self.embeddings = embeddings

    @property
    def embedding_dim(self) -> int:
        return self.embeddings.shape[1]

    def __len__(self) -> int:
        return len(self.embeddings)

    def blocks(self, block_size: int) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self.embeddings), block_size):
            yield start, self.embeddings[start : start + block_size]

    def rows(self, indices: Tensor) -> Tensor:
        return self.embeddings[indices.to(self.embeddings.device)]


class StoredCandidates:
    """The rows of some keys of a store, `(num_keys,)`, in their order; they stay on the disk until asked for."""

    def __init__(self, store: EmbeddingStore, keys: Tensor) -> None:
        self._store, self._keys = store, keys

    @property
    def embedding_dim(self) -> int:
        return self._store.embedding_dim or 0

    def __len__(self) -> int:
        return len(self._keys)

    def blocks(self, block_size: int) -> Iterator[tuple[int, Tensor]]:
        return self._store.blocks(self._keys, block_size)

    def rows(self, indices: Tensor) -> Tensor:
        return self._store.rows(self._keys[indices.cpu()])
