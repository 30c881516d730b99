"""Embed many inputs: in memory, as a stream, or a whole corpus into a store on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puma_hf import resolver

__all__ = ["BrokenInput", "BrokenInputError", "EmbedConfig", "EmbedReport", "EmbedResult", "embed_corpus"]
__all__ += ["iterate_embeddings", "open_embeddings"]

# `embed` itself is in `puma_hf`: here the module of that name would hide it.
_NAMES = dict.fromkeys(("BrokenInputError", "EmbedResult", "iterate_embeddings"), "puma_hf.embedding.embed")
_NAMES |= dict.fromkeys(("EmbedReport", "embed_corpus"), "puma_hf.embedding.run")
_NAMES |= {"BrokenInput": "puma_hf.embedding.prepare", "EmbedConfig": "puma_hf.configs"}
_NAMES |= {"open_embeddings": "puma_hf.embedding.store"}

__getattr__ = resolver(__name__, _NAMES)


if TYPE_CHECKING:
    from puma_hf.configs import EmbedConfig
    from puma_hf.embedding.embed import BrokenInputError, EmbedResult, iterate_embeddings
    from puma_hf.embedding.prepare import BrokenInput
    from puma_hf.embedding.run import EmbedReport, embed_corpus
    from puma_hf.embedding.store import open_embeddings
