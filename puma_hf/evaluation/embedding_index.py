"""Which shard, and which row of it, holds the embedding of a key."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Run(NamedTuple):
    """Keys in ascending order, each once; the shard with the lowest name comes before others."""

    keys: Tensor
    shards: Tensor
    places: Tensor


class EmbeddingIndex:
    """Keys of shards in memory, 24 bytes each, quick to add to and to look up in.

    Keys are kept in sorted runs, each at least twice as long as the next, so that n shards are merged about log2(n)
    times each and a look-up goes through as many runs.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._names: dict[int, str] = {}

    def __len__(self) -> int:
        """Number of keys, with those that are in several runs."""
        return sum(len(run.keys) for run in self._runs)

    def name(self, shard: int) -> str:
        """The name of a shard, by the number that `find` gives."""
        return self._names[shard]

    def add(self, name: str, keys: Tensor) -> None:
        """Add the keys of a shard, whose name begins with 15 hexadecimal digits of a hash."""
        # Numbers in the order of the names: which one wins must not depend on the order they are found in.
        shard = int(name[:15], 16)
        self._names[shard] = name
        self._runs.append(_run(keys, torch.full_like(keys, shard), torch.arange(len(keys))))
        while len(self._runs) > 1 and len(self._runs[-2].keys) < 2 * len(self._runs[-1].keys):
            last, before = self._runs.pop(), self._runs.pop()
            merged = (torch.cat(parts) for parts in zip(before, last, strict=True))
            self._runs.append(_run(*merged))

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Shard and row of each key, `(num_keys,)` int64; -1 where there is none."""
        none = torch.iinfo(torch.int64).max
        shards, places = torch.full_like(keys, none), torch.full_like(keys, -1)
        for run in self._runs:
            at = torch.searchsorted(run.keys, keys).clamp(max=len(run.keys) - 1)
            better = (run.keys[at] == keys) & (run.shards[at] < shards)
            shards = torch.where(better, run.shards[at], shards)
            places = torch.where(better, run.places[at], places)
        return shards.masked_fill(shards == none, -1), places


def _run(keys: Tensor, shards: Tensor, places: Tensor) -> _Run:
    by_shard = shards.argsort(stable=True)
    order = by_shard[keys[by_shard].argsort(stable=True)]
    keys = keys[order]
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[1:] = keys[1:] != keys[:-1]
    return _Run(keys[is_first], shards[order][is_first], places[order][is_first])
