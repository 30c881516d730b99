"""Open an index: stored embeddings with a text or a picture for each, bound to the model that made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from puma_hf.embedding.store import MANIFEST, StoredEmbeddings, open_embeddings
from puma_hf.modeling.messages_puma import MODALITY_IDS, MODALITY_NAMES
from puma_hf.search.ann import Ann
from puma_hf.search.candidates import KEPT_BYTES, RowReader, ShardReader, StoredCandidates
from puma_hf.search.config import Target
from puma_hf.search.items import Item, read_items, read_modalities

DESCRIPTION = "index.json"
FORMAT = "puma_hf index of a corpus"
FORMAT_VERSION = 1


class Index:
    """What `puma-hf index` has written; embeddings and items are read from the disk as they are asked for.

    Args:
        stored: Its embeddings.
        description: What its own file says.
        kept_bytes: Memory for embeddings that stay from one search to the next.

    Attributes:
        folder: The directory.
        stored: Its embeddings.
        description: The model and how to open it, the counts of each modality, and the files of the items.
    """

    def __init__(
        self, stored: StoredEmbeddings, description: Mapping[str, Any], *, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self.folder = stored.folder
        self.stored = stored
        self.description = description
        self._reader = ShardReader(stored, kept_bytes)
        # One reader where both would read whole shards, so that none is in memory twice.
        reads_rows = stored.manifest["settings"]["file_format"] == "safetensors"
        self._row_reader = RowReader(stored, kept_bytes) if reads_rows else self._reader
        self._modalities: NDArray[np.int8] | None = None
        self._ann: Ann | None = None

    def __len__(self) -> int:
        """Number of items."""
        return len(self.stored)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model that made the embeddings."""
        return str(self.stored.manifest["settings"]["fingerprint"])

    @property
    def counts(self) -> dict[str, int]:
        """Items of each modality that there are some of."""
        return dict(self.description["counts"])

    @property
    def model(self) -> str:
        """Name of the model: an absolute path, or a Hub id."""
        return model_of(self.folder, self.description)

    def candidates(self, target: Target = "any") -> StoredCandidates:
        """The embeddings that a search may find.

        Args:
            target: "text", which is texts alone; "image", which is pictures with or without text; or "any".

        Returns:
            At least one candidate.

        Raises:
            ValueError: If there is none, or no such target.
            DamagedItemsError: If a file of items is gone, or no longer what it was.
        """
        if target not in get_args(Target):
            raise ValueError(f"target is {target!r}, must be one of {', '.join(map(repr, get_args(Target)))}.")
        if not len(self):
            raise ValueError(
                f"The index {str(self.folder)!r} is empty: nothing of its corpus could be embedded. Look into its "
                "errors.jsonl, mend what is there, and run puma-hf index again."
            )
        positions = np.arange(len(self))
        if target != "any":
            if self._modalities is None:
                hashes = self.description["items"]
                parts = [read_modalities(self.folder, shard, value) for shard, value in enumerate(hashes)]
                self._modalities = np.concatenate(parts)
            wanted = [MODALITY_IDS[name] for name in MODALITY_NAMES if _is_of(name, target)]
            positions = np.flatnonzero(np.isin(self._modalities, wanted))
        if not len(positions):
            there = ", ".join(f"{count} of {name}" for name, count in self.counts.items())
            raise ValueError(
                f"The index {str(self.folder)!r} has no {target} to find, only {there}. Look for 'any' (--for any), or "
                f"index a corpus that holds {target}s."
            )
        return StoredCandidates(self._reader, positions)

    @property
    def ann(self) -> Ann:
        """What proposes candidates of an approximate search; read from the disk when it is first asked for.

        Raises:
            ImportError: If faiss is not installed.
            ValueError: If there is none, or its file is damaged.
        """
        if self._ann is None:
            entry = self.description.get("ann")
            if entry is None:
                raise ValueError(
                    f"The index {str(self.folder)!r} has nothing for approximate search. Run puma-hf index again with "
                    "--ann hnsw, int8 or binary: the embeddings are kept. Or search exactly (--backend torch)."
                )
            self._ann = Ann(self.folder, entry, len(self), self.description["manifest_hash"])
        return self._ann

    def nearest(self, query: NDArray[np.float32], candidates: StoredCandidates, count: int) -> StoredCandidates:
        """Those of some candidates that an approximate search proposes.

        Args:
            query: `(embedding_dim,)`.
            candidates: What may be found.
            count: How many to propose.

        Returns:
            At most `count` of them.
        """
        return StoredCandidates(self._row_reader, self.ann.propose(query, candidates.positions, count))

    def items(self, positions: Sequence[int]) -> list[Item]:
        """Items by their rows, counted over all shards, in this order.

        Raises:
            DamagedItemsError: If a file of items is gone, or no longer what it was.
        """
        sizes = [entry["num_rows"] for entry in self.stored.manifest["shards"]]
        starts = np.cumsum([0, *sizes])
        shards = np.searchsorted(starts, np.asarray(positions), side="right") - 1
        found: dict[int, Item] = {}
        for shard in np.unique(shards).tolist():
            mine = [position for position, of in zip(positions, shards.tolist(), strict=True) if of == shard]
            places = [position - int(starts[shard]) for position in mine]
            items = read_items(self.folder, shard, self.description["items"][shard], places)
            found |= dict(zip(mine, items, strict=True))
        return [found[position] for position in positions]


def model_of(folder: Path, description: Mapping[str, Any]) -> str:
    """Name of the model that an index says it was made by: an absolute path, or a Hub id."""
    name = str(description["model"])
    # A portable copy has its model inside, and says where from its own folder.
    return str((folder / name).resolve()) if name.startswith(".") else name


def open_index(folder: str | Path, *, kept_bytes: int = KEPT_BYTES) -> Index:
    """Open a directory that `puma-hf index` has written.

    Args:
        folder: The directory.
        kept_bytes: Memory for embeddings that stay from one search to the next.

    Returns:
        The index.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its run was not finished, or it is of a later version.

    Example:
        >>> from puma_hf.search.index import open_index
        >>> open_index("index").counts  # doctest: +SKIP
        {'text': 62, 'image': 124}
    """
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no index. Name a directory that puma-hf index has written.")
    # What is written last is read first, and the hash at the end: a run may go on meanwhile.
    description = read_description(path)
    stored = open_embeddings(path)
    if description is None:
        raise ValueError(
            f"{str(folder)!r} holds embeddings, but no {DESCRIPTION}, so nothing to show of them: puma-hf embed "
            "has made it, or the run has not finished. Run puma-hf index with it as --output; the embeddings are kept."
        )
    if description["manifest_hash"] != manifest_hash(path):
        raise ValueError(
            f"The embeddings in {str(folder)!r} are newer than its {DESCRIPTION}: the run that makes the index anew "
            "has not finished. Wait for it, or run puma-hf index again."
        )
    return Index(stored, description, kept_bytes=kept_bytes)


def manifest_hash(folder: Path) -> str:
    """SHA-256 of what the embeddings say of themselves, down to the hash of every shard."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def read_description(folder: Path) -> dict[str, Any] | None:
    """What an index says of itself; None if there is none.

    Raises:
        ValueError: If the file is something else, or of a later version.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, version = found["format"], found["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(path)!r} describes no index ({error!r}). Choose another directory.") from error
    if kind != FORMAT or not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} is of format {kind!r}, version {version!r}, must be {FORMAT!r}, at most version "
            f"{FORMAT_VERSION}. Install a newer puma-hf, or choose another directory."
        )
    return found


def _is_of(modality: str, target: Target) -> bool:
    return "image" in modality if target == "image" else modality == "text"
