"""A tiny original checkpoint cut to every depth, one by one: what a sweep must equal."""

from __future__ import annotations

from pathlib import Path

from sentence_transformers import SentenceTransformer

from puma_hf import prune
from tests.tiny import NUM_LAYERS


def pruned_to_every_depth(source: Path, folder: Path) -> list[SentenceTransformer]:
    """The models of k = 1 .. 4 layers, each pruned from the original and loaded by itself."""
    models = []
    for k in range(1, NUM_LAYERS + 1):
        prune(source, folder / f"k{k}", num_kept_layers=k)
        models.append(SentenceTransformer(str(folder / f"k{k}"), trust_remote_code=True, device="cpu"))
    return models
