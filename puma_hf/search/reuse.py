"""Keep the embeddings of an index whose corpus has changed: what was embedded once is not embedded again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from puma_hf.embedding.records import Corpus, input_hash, open_corpus
from puma_hf.embedding.results import EmbedResult
from puma_hf.embedding.shards import read_info
from puma_hf.embedding.unfinished import UnfinishedShard
from puma_hf.search.config import IndexConfig
from puma_hf.search.index import Index, open_index
from puma_hf.search.items import read_seen_hashes

logger = logging.getLogger(__name__)


def keep_embeddings(config: IndexConfig) -> int:
    """Put what an index has of a corpus where `embed_corpus` looks before it embeds a shard.

    An item added or removed moves all that follow into other rows, and so into shards that are made again. Rows are
    found by what the model has seen of an item: text, instruction, and path, size and time of change of its picture.
    int8 and uint8 lose too much for that: their rows are embedded again. About 150 bytes an item are in memory.

    Args:
        config: How the index is to be made again.

    Returns:
        How many embeddings of shards that will be made again are kept. 0 if there is no whole index, or no change.
    """
    if config.is_scaled:
        return 0
    try:
        index = open_index(config.output)
        corpus = open_corpus(config.data, split=config.split, pool=config.pool, on_error=config.on_error)
        num_kept = sum(_changed_shards(index, corpus, config.shard_size)) if len(index) else 0
    except (ValueError, OSError) as error:  # there is none, or what is wrong is told by embed_corpus
        logger.debug("no embeddings are kept: %s", error)
        return 0
    if num_kept:
        logger.info("%s: kept %d embeddings of shards that change", config.output, num_kept)
    return num_kept


def _changed_shards(index: Index, corpus: Corpus, shard_size: int) -> Iterator[int]:
    """How many embeddings are kept of each shard that changes."""
    entries = index.stored.manifest["shards"]
    position_of: dict[bytes, int] = {}
    lines = enumerate(corpus.lines())
    number = 0
    while records := [corpus.record(row, line) for row, line in islice(lines, shard_size)]:
        hashes = [corpus.content_hash(record) for record in records]
        if number >= len(entries) or input_hash(records, hashes) != entries[number]["input_hash"]:
            position_of = position_of or _positions(index)
            yield _keep(index, number, hashes, position_of)
        number += 1


def _positions(index: Index) -> dict[bytes, int]:
    """Where the embedding of each item is, by the hash of what the model has seen of it."""
    parts = (
        read_seen_hashes(index.folder, shard, content_hash)
        for shard, content_hash in enumerate(index.description["items"])
    )
    return {bytes.fromhex(seen): row for row, seen in enumerate(seen for part in parts for seen in part)}


def _keep(index: Index, shard: int, hashes: list[str], position_of: dict[bytes, int]) -> int:
    found = [position_of.get(bytes.fromhex(value), -1) for value in hashes]
    places = np.array([place for place, row in enumerate(found) if row >= 0], np.int64)
    if len(places):
        rows = index.candidates().rows(torch.tensor([row for row in found if row >= 0]))
        info, _ = read_info(index.folder, 0, index.stored.manifest["settings"]["file_format"])
        UnfinishedShard(index.folder, replace(info, shard=shard), hashes).save(EmbedResult(rows.numpy(), places))
    return len(places)
