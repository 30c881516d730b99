"""Stored teacher states: safetensors shards keyed by content, and a manifest that says whose they are."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puma_hf.files import is_full_disk

MANIFEST = "manifest.json"
SHARD_SIZE = 4096

# What a reader is told is wrong, and what else could be meant.
_DIFFERENCES = {
    "teacher": "of another teacher",
    "dataset": "of another dataset",
    "hidden_size": "of another hidden size",
    "precision": "computed in another data type",
    "processing": "made with other processing settings",
}


@dataclass(frozen=True)
class CacheManifest:
    """Whose states a cache holds.

    Attributes:
        dataset: Fingerprint of the dataset's content.
        hidden_size: Size of one state.
        precision: Data type that the states were computed in; on disk they are float32.
        processing: Settings that turn a row into model inputs.
        num_items: Cells of the dataset, equal ones counted each time.
        teacher: SHA-256 of the teacher's weights and settings; None if they were not at hand.
        checkpoint: SHA-256 of the checkpoint files it was loaded from; None if it was given as an object.
        shard_size: Cells per shard.
        complete: Whether every shard has been written.
    """

    dataset: str
    hidden_size: int
    precision: str
    processing: dict[str, Any]
    num_items: int
    teacher: str | None = None
    checkpoint: str | None = None
    shard_size: int = SHARD_SIZE
    complete: bool = field(default=False, compare=False)


class TeacherCache:
    """A directory of teacher states, each found by the id of the content that it belongs to.

    Shards are written under another name and moved into place whole, so one that is there is whole; the manifest
    says last of all that nothing is missing.

    Args:
        folder: The directory, which need not exist yet.

    Raises:
        NotADirectoryError: If it, or a folder above it, is a file.

    Source: this library's own; the teacher of PUMA (ACM MM 2025, arXiv 2507.08064), asked once.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = check_cache_folder(folder)

    def manifest(self) -> CacheManifest | None:
        """The manifest, or None if there is no cache yet.

        Raises:
            ValueError: If there is one that is none of ours.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            return None
        try:
            return CacheManifest(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} is no manifest of teacher states ({error}). Delete the directory, or choose another: "
                "teacher_cache=..."
            ) from error

    def check(self, expected: CacheManifest) -> CacheManifest | None:
        """The manifest, if it says what is expected. A teacher that is not known on either side is not compared.

        Raises:
            ValueError: If the cache is of another teacher, dataset, hidden size, data type or processing.
        """
        found = self.manifest()
        for name, difference in _DIFFERENCES.items() if found is not None else ():
            theirs, ours = getattr(found, name), getattr(expected, name)
            if theirs != ours and theirs is not None and ours is not None:
                raise ValueError(
                    f"The teacher states in {str(self.folder)!r} are {difference}: {name} is {_short(theirs)} there "
                    f"and {_short(ours)} here. Choose another directory (teacher_cache=...), or delete this one "
                    "to compute them again."
                )
        return found

    def write_manifest(self, manifest: CacheManifest) -> None:
        """Write the manifest in one step.

        Raises:
            OSError: If the disk is full.
        """
        temporary = self.folder / f".{MANIFEST}.tmp"
        with self._explain_full_disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(manifest), indent=2) + "\n")
                _flush(file)
            os.replace(temporary, self.folder / MANIFEST)

    def write_shard(self, number: int, content_ids: Tensor, states: Tensor, dataset: str) -> None:
        """Write one shard in one step.

        Args:
            number: Number of the shard.
            content_ids: `(num_states,)` int64.
            states: `(num_states, hidden_size)`; stored in float32.
            dataset: Fingerprint of the dataset's content, which binds the shard to its cache.

        Raises:
            OSError: If the disk is full.
        """
        temporary = self.folder / f".{self._name(number)}.tmp"
        tensors = {"content_ids": content_ids.contiguous(), "states": states.float().contiguous()}
        with self._explain_full_disk():
            save_file(tensors, temporary, metadata={"shard": str(number), "dataset": dataset})
            with temporary.open("rb+") as file:
                _flush(file)
            os.replace(temporary, self.folder / self._name(number))

    def read_shard(self, number: int, manifest: CacheManifest) -> tuple[Tensor, Tensor] | None:
        """Content ids and states of one shard, mapped into memory; None if it is missing, cut off or another's."""
        path = self.folder / self._name(number)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata() != {"shard": str(number), "dataset": manifest.dataset}:
                    return None
                ids, states = file.get_tensor("content_ids"), file.get_tensor("states")
        except (SafetensorError, OSError):
            return None
        fits = ids.dtype == torch.int64 and states.shape == (len(ids), manifest.hidden_size)
        return (ids, states) if fits else None

    def remove_temporary(self) -> None:
        """Remove what a killed run left half-written."""
        for path in self.folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                path.unlink()

    @contextmanager
    def _explain_full_disk(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # that of safetensors is no OSError
            if not is_full_disk(error):
                raise
            explained = OSError(
                f"The teacher states in {str(self.folder)!r} could not be written, as on a full disk "
                f"({error}). Finished shards are kept, and the same run, started again, goes on after them. "
                "Free some space first; or choose a directory on another disk (teacher_cache=...), to which the shards "
                "can be moved."
            )
            explained.errno = errno.ENOSPC
            raise explained from error

    @staticmethod
    def _name(number: int) -> str:
        return f"states-{number:06d}.safetensors"


class StoredStates:
    """The states of a complete cache, found by content id.

    Args:
        shards: Content ids `(num_states,)` and states `(num_states, hidden_size)` of each shard.
        folder: Where they come from, for errors.
    """

    def __init__(self, shards: list[tuple[Tensor, Tensor]], folder: Path) -> None:
        self.folder = folder
        # The states stay where they are, mapped from the files; only the ids are held.
        self._states = [states for _, states in shards]
        ids = torch.cat([ids for ids, _ in shards])
        shard = torch.cat([torch.full_like(ids, number) for number, (ids, _) in enumerate(shards)])
        row = torch.cat([torch.arange(len(ids)) for ids, _ in shards])
        self._ids, order = ids.sort()
        self._shard, self._row = shard[order], row[order]

    def __len__(self) -> int:
        return len(self._ids)

    def lookup(self, content_ids: Tensor) -> Tensor:
        """States `(batch_size, hidden_size)` in float32 of contents `(batch_size,)`, on the CPU.

        Raises:
            ValueError: If one was never computed.
        """
        wanted = content_ids.cpu()
        places = torch.searchsorted(self._ids, wanted).clamp(max=len(self._ids) - 1)
        missing = (self._ids[places] != wanted).nonzero().flatten().tolist()
        if missing:
            raise ValueError(
                f"The teacher states in {str(self.folder)!r} lack the samples {missing} of this batch: their content "
                "is not that of any cell the cache was made of. Pass the rows as train_dataset or eval_dataset, with "
                "the same prompts and processing settings and without a random transform, and give the cache a new "
                "directory (teacher_cache=...); or choose teacher_mode='frozen'."
            )
        pairs = zip(self._shard[places].tolist(), self._row[places].tolist(), strict=True)
        return torch.stack([self._states[shard][row] for shard, row in pairs])


def check_cache_folder(folder: str | Path) -> Path:
    """The path of a cache, if it is a directory or can become one.

    Raises:
        NotADirectoryError: If it, or a folder above it, is a file.
    """
    path = Path(folder)
    existing = next((place for place in (path, *path.parents) if place.exists()), None)
    if existing is not None and not existing.is_dir():
        raise NotADirectoryError(
            f"teacher_cache={str(folder)!r} must be a directory, new or of stored teacher states, but "
            f"{str(existing)!r} is a file. Choose another path, or move the file away."
        )
    return path


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _short(value: Any) -> str:
    text = value[:12] if isinstance(value, str) else str(value)
    return repr(text) if isinstance(value, str) else text
