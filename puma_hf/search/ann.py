"""Approximate search: one file beside the stored embeddings proposes candidates, and the embeddings decide.

The file is made by faiss from what is stored, so no model is needed. It is bound to the embeddings by their manifest's
hash, and to `index.json` by its own.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from puma_hf.embedding.precision import quantize
from puma_hf.embedding.store import StoredEmbeddings
from puma_hf.files import whole_file
from puma_hf.search.candidates import ShardReader, StoredCandidates
from puma_hf.search.config import AnnKind

logger = logging.getLogger(__name__)

ANN_FILE = "ann.faiss"
ANN_DRAFTS = f".{ANN_FILE}-*.tmp"

_NEIGHBORS = 16  # links of an item to others in the graph of hnsw
_CONSTRUCTION = 64  # items looked at for the links of a new one
_LOOKED_AT = 128  # items that a search in the graph keeps in view, at least
_TRAINING_ROWS = 20_000  # that int8 finds its ranges from
_ROWS_AT_ONCE = 4096


def require_faiss() -> None:
    """Refuse approximate search where faiss is not installed.

    Raises:
        ImportError: If it is not.
    """
    if find_spec("faiss") is None:
        raise ImportError(
            "Approximate search needs faiss: pip install 'puma-hf[faiss]', or leave it out (--ann none, --backend "
            "torch)."
        )


def _faiss() -> Any:
    """The library, without the types of its C++ interface, which Python's differs from."""
    import faiss

    return faiss


class Ann:
    """Proposes items that may be among the best; it is read from the disk once and stays in memory.

    Args:
        folder: The index.
        entry: What `index.json` says of the file.
        num_rows: Items of the index.
        manifest_hash: Hash of the manifest of its embeddings.

    Raises:
        ImportError: If faiss is not installed.
        ValueError: If the file is missing, cut off, or not the one that the index was made with.
    """

    def __init__(self, folder: Path, entry: Mapping[str, Any], num_rows: int, manifest_hash: str) -> None:
        require_faiss()
        self.kind: str = entry["kind"]
        is_newest = entry["manifest_hash"] == manifest_hash
        self._index: Any = _load(folder / ANN_FILE, entry) if is_newest else None
        if self._index is None or self._index.ntotal != num_rows:
            raise ValueError(
                f"{str(folder / ANN_FILE)!r} is missing or not what the index was made with. Run puma-hf index again, "
                "which makes it anew from the stored embeddings, or search without it (--backend torch)."
            )

    def propose(self, query: NDArray[np.float32], positions: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """The nearest items by what the file holds, which is less than the embeddings.

        Args:
            query: `(embedding_dim,)`.
            positions: Which items may be found, ascending, `(num_candidates,)`.
            count: How many to propose.

        Returns:
            Ascending positions, at most `count`; hnsw may miss some where few may be found.
        """
        faiss = _faiss()

        num_rows = self._index.ntotal
        row = _unit(query[None])
        params = faiss.SearchParametersHNSW() if self.kind == "hnsw" else faiss.SearchParameters()
        if self.kind == "hnsw":
            # The walk passes by what may not be found, so it must be so much longer.
            params.efSearch = min(num_rows, math.ceil(max(count, _LOOKED_AT) * num_rows / len(positions)))
        if len(positions) < num_rows:
            wanted = np.zeros(num_rows, np.bool_)
            wanted[positions] = True
            bits = np.packbits(wanted, bitorder="little")
            params.sel = faiss.IDSelectorBitmap(bits)
        _, found = self._index.search(_as_stored(row, self.kind), min(count, len(positions)), params=params)
        return np.sort(found[0][found[0] >= 0])


def write_ann(
    stored: StoredEmbeddings, kind: AnnKind, manifest_hash: str, previous: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Make the file anew, add to it what came after its last item, or leave it as it is.

    It grows only at its end, and only to twice the items that its ranges were found from; otherwise it is made anew.

    Args:
        stored: The embeddings.
        kind: "hnsw", "int8", "binary", or "none", which removes the file.
        manifest_hash: Hash of their manifest.
        previous: What the last `index.json` said of the file, or None.

    Returns:
        What `index.json` is to say of it; None for "none".

    Raises:
        ValueError: If an embedding is not finite.
        OSError: If the disk is full.
    """
    path = stored.folder / ANN_FILE
    entry: dict[str, Any] = {"kind": kind, "manifest_hash": manifest_hash, "num_rows": len(stored)}
    if kind == "none" or not len(stored):
        path.unlink(missing_ok=True)
        return None if kind == "none" else {**entry, "num_trained": 0, "rows_hash": "", "content_hash": ""}
    require_faiss()
    kept = dict(previous) if previous is not None and previous["kind"] == kind else {"num_rows": 0, "num_trained": 0}
    index = _load(path, kept) if 0 < kept["num_rows"] <= len(stored) <= 2 * kept["num_trained"] else None
    if index is not None and kept["manifest_hash"] == manifest_hash:
        return kept
    if index is not None and _hash_rows(stored, kept["num_rows"]) != kept["rows_hash"]:
        index = None
    num_trained = kept["num_trained"] if index is not None else len(stored)
    if index is None:
        index = _new(stored, kind)
    logger.info("%s: adding %d items for approximate search", path, len(stored) - index.ntotal)
    _add(index, stored, kind)
    content_hash = _write(index, path)
    rows_hash = _hash_rows(stored, len(stored))
    return {**entry, "num_trained": num_trained, "rows_hash": rows_hash, "content_hash": content_hash}


def _new(stored: StoredEmbeddings, kind: AnnKind) -> Any:
    """An empty index of faiss, its ranges found."""
    faiss = _faiss()

    dim, eight_bits = stored.embedding_dim, faiss.ScalarQuantizer.QT_8bit
    if kind == "binary":
        return faiss.IndexBinaryFlat(-(-dim // 8) * 8)
    # Vectors of one length are in one order by distance and by cosine.
    if kind == "hnsw":
        index = faiss.IndexHNSWSQ(dim, eight_bits, _NEIGHBORS)
        index.hnsw.efConstruction = _CONSTRUCTION
    else:
        index = faiss.IndexScalarQuantizer(dim, eight_bits, faiss.METRIC_INNER_PRODUCT)
    places = np.linspace(0, len(stored) - 1, min(len(stored), _TRAINING_ROWS)).astype(np.int64)
    rows = StoredCandidates(ShardReader(stored, kept_bytes=0), places).rows(torch.arange(len(places)))
    index.train(_unit(rows.numpy()))
    return index


def _add(index: Any, stored: StoredEmbeddings, kind: str) -> None:
    """Add the rows after those that are there."""
    for rows in _rows_after(stored, index.ntotal):
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            floats = stored.to_float(rows[start : start + _ROWS_AT_ONCE])
            if not np.isfinite(floats).all():
                raise ValueError(
                    f"Embeddings in {str(stored.folder)!r} are not finite, so nothing can be near them. Delete the "
                    "directory, and index in float32 or bfloat16 (--dtype)."
                )
            index.add(_as_stored(_unit(floats), kind))


def _rows_after(stored: StoredEmbeddings, first: int) -> Iterator[NDArray[Any]]:
    start = 0
    for number, entry in enumerate(stored.manifest["shards"]):
        if start + entry["num_rows"] > first:
            yield stored.shard(number).embeddings[max(0, first - start) :]
        start += entry["num_rows"]


def _hash_rows(stored: StoredEmbeddings, count: int) -> str:
    """SHA-256 of the first rows as they are stored, wherever shards end."""
    digest = hashlib.sha256()
    for shard in stored.shards():
        rows = np.ascontiguousarray(shard.embeddings[:count])
        digest.update(rows.tobytes())
        count -= len(rows)
        if not count:
            break
    return digest.hexdigest()


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1; zeros stay zeros."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.ascontiguousarray(rows / np.where(lengths > 0, lengths, 1), np.float32)


def _as_stored(rows: NDArray[np.float32], kind: str) -> NDArray[Any]:
    return quantize(rows, "ubinary") if kind == "binary" else rows


def _load(path: Path, entry: Mapping[str, Any]) -> Any:
    """The index of faiss, or None if the file is not what the entry says."""
    faiss = _faiss()

    try:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["content_hash"]:
                return None
        return (faiss.read_index_binary if entry["kind"] == "binary" else faiss.read_index)(str(path))
    except (OSError, RuntimeError):  # faiss raises the latter
        return None


def _write(index: Any, path: Path) -> str:
    """Write an index of faiss, whole or not at all, without a copy of it in memory; its hash."""
    faiss = _faiss()

    with whole_file(path) as draft:
        try:
            (faiss.write_index_binary if isinstance(index, faiss.IndexBinary) else faiss.write_index)(index, str(draft))
        except RuntimeError as error:
            raise OSError(
                f"{str(path)!r} could not be written ({error}). Is the disk full? Embeddings are kept: make room, and "
                "run the same command again."
            ) from error
        with open(draft, "rb+") as file:
            content_hash = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    return content_hash
