"""Embed many inputs at the speed of the arithmetic: planned batches, worker processes, shards on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puma_hf.lazy import resolver

# `embed` itself is in `puma_hf`: here the module of that name would hide it.
_NAMES = {
    "BrokenInput": "puma_hf.embedding.prepare",
    "BrokenInputError": "puma_hf.embedding.embed",
    "EmbedConfig": "puma_hf.configs",
    "EmbedReport": "puma_hf.embedding.run",
    "EmbedResult": "puma_hf.embedding.embed",
    "embed_corpus": "puma_hf.embedding.run",
    "iterate_embeddings": "puma_hf.embedding.embed",
    "open_embeddings": "puma_hf.embedding.store",
}

__all__ = [
    "BrokenInput",
    "BrokenInputError",
    "EmbedConfig",
    "EmbedReport",
    "EmbedResult",
    "embed_corpus",
    "iterate_embeddings",
    "open_embeddings",
]

__getattr__ = resolver(__name__, _NAMES)


if TYPE_CHECKING:
    from puma_hf.configs import EmbedConfig
    from puma_hf.embedding.embed import BrokenInputError, EmbedResult, iterate_embeddings
    from puma_hf.embedding.prepare import BrokenInput
    from puma_hf.embedding.run import EmbedReport, embed_corpus
    from puma_hf.embedding.store import open_embeddings
