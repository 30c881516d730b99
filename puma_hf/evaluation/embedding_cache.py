"""Embeddings on disk as they are made: safetensors shards found by content, and a manifest of what made them."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from puma_hf.evaluation.embedding_index import EmbeddingIndex
from puma_hf.files import write_whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SUFFIX = ".safetensors"
_STALE_SECONDS = 3600.0  # a file half-written for so long is that of a process that died
_SHOWN_ROWS = 5


class EmbeddingCache:
    """A directory of embeddings, each found by the key of the content that it belongs to.

    A shard is named by a hash of the settings and its keys, written under another name and moved into place whole.
    Several processes may write at once: the same keys make the same file. Shards are opened as they are needed; in
    memory are the keys only. Where a key is in several shards, the one with the lowest name counts, in whatever order
    they were written.

    Args:
        folder: The directory, which need not exist yet.
        settings: What the embeddings depend on besides the content, such as the model's fingerprint; anything that
            JSON can hold.
        dtype: Type they are stored in: float32, float16 or bfloat16.

    Attributes:
        folder: The directory.
        dtype: Type they are stored in.
        embedding_dim: Numbers of one embedding; None as long as there is none.

    Raises:
        ValueError: If `dtype` is another, or the directory holds embeddings of other settings.
        NotADirectoryError: If the directory, or a folder above it, is a file.
        OSError: If the directory cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = EmbeddingCache(folder, {"model": "tiny"})
        ...     cache.write(torch.tensor([7, 3]), torch.eye(2))
        ...     cache.has(torch.tensor([3, 4])), cache.rows(torch.tensor([3]))
        (tensor([ True, False]), tensor([[0., 1.]]))

    Source: this library's own.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> None:
        names = {value: name for name, value in _DTYPES.items()}
        if dtype not in names:
            raise ValueError(f"dtype is {dtype}, must be one of {list(names)}")
        self.folder = _check_folder(folder)
        self.dtype = dtype
        self.embedding_dim: int | None = None
        self._settings: dict[str, Any] = json.loads(json.dumps({**settings, "embedding_dtype": names[dtype]}))
        digest = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode()).hexdigest()
        self._metadata = {"format": "puma_hf embeddings", "settings": digest}
        self._index = EmbeddingIndex()
        self._known: set[str] = set()
        self._refused: dict[str, tuple[int, int]] = {}
        self._settle()
        self.refresh()

    def __len__(self) -> int:
        """Number of keys."""
        return len(self._index)

    def has(self, keys: Tensor) -> Tensor:
        """Whether the embedding of each key is there, as far as is known since the last `refresh`.

        Args:
            keys: `(num_keys,)` int64.

        Returns:
            `(num_keys,)` bool.
        """
        return self._index.find(_check_keys(keys))[0] >= 0

    def refresh(self) -> None:
        """Take in the shards that other processes have written. A cut or foreign one is logged and not taken."""
        names = sorted(path.name for path in self.folder.glob(f"*{_SUFFIX}") if not path.name.startswith("."))
        for name in names:
            if name not in self._known:
                self._take(name)

    def write(self, keys: Tensor, embeddings: Tensor) -> None:
        """Write one shard, whole or not at all.

        Args:
            keys: `(num_keys,)` int64, no two equal.
            embeddings: `(num_keys, embedding_dim)`, finite in the type of the cache.

        Raises:
            ValueError: If a shape, a type or a value is not as said.
            OSError: If the disk is full; the shards that are finished are kept.
        """
        keys = _check_keys(keys)
        stored = self._check_embeddings(keys, embeddings)
        name = self._shard_name(keys)
        tensors = {"keys": keys.contiguous(), "embeddings": stored}
        # As bytes, since the file then fails as files do: safetensors' own error is no OSError.
        self._write_whole(name, save(tensors, metadata={**self._metadata, "shard": name}))
        self._refused.pop(name, None)
        self._add(name, keys, stored.shape[1])

    def rows(self, keys: Tensor) -> Tensor:
        """Embeddings `(num_keys, embedding_dim)` in the type of the cache, in the order of the keys.

        Raises:
            ValueError: If one is not there, or a shard is no longer what it was.
        """
        return self.source(keys).rows(torch.arange(len(keys)))

    def source(self, keys: Tensor) -> CachedCandidates:
        """A `CandidateSource` with a row for each key, in their order; it reads from the disk what it is asked for.

        Args:
            keys: `(num_keys,)` int64.

        Raises:
            ValueError: If one is not there.
        """
        shards, places = self._index.find(_check_keys(keys))
        missing = int((shards < 0).sum())
        if missing:
            raise ValueError(
                f"{missing} of {len(keys)} keys have no embedding in {str(self.folder)!r}, first keys "
                f"{keys[shards.cpu() < 0][:_SHOWN_ROWS].tolist()}; encode and write them first, or call refresh() if "
                "another process did"
            )
        return CachedCandidates(self, shards, places)

    def read(self, shard: int, places: Tensor) -> Tensor:
        """Rows of one shard, by the number that the index gives it.

        Raises:
            ValueError: If the shard is gone, or no longer what it was.
        """
        path = self.folder / self._index.name(shard)
        try:
            with safe_open(path, framework="pt") as file:
                embeddings: Tensor = file.get_tensor("embeddings")
                # Mapped from the file: only the pages of these rows are read.
                return embeddings[places]
        except (SafetensorError, OSError, IndexError) as error:
            raise ValueError(
                f"{str(path)!r} can no longer be read ({error}); it was whole when this run began. Delete it and run "
                "again: its embeddings are then made anew"
            ) from error

    def _take(self, name: str) -> None:
        path = self.folder / name
        try:
            state = path.stat()
            if self._refused.get(name) == (state.st_size, state.st_mtime_ns):
                return
            with safe_open(path, framework="pt") as file:
                is_ours = file.metadata() == {**self._metadata, "shard": name}
                # A copy: a view would keep the file mapped.
                keys = file.get_tensor("keys").clone() if is_ours else torch.empty(0)
                shape = tuple(file.get_slice("embeddings").get_shape()) if is_ours else ()
        except FileNotFoundError:  # replaced or removed just now
            return
        except (SafetensorError, OSError) as error:
            self._refuse(name, f"is cut or spoiled ({error})")
            return
        if not is_ours:
            self._refuse(name, "is not of these settings")
        elif len(shape) != 2 or shape[0] != len(keys) or shape[1] != (self.embedding_dim or shape[1]):
            self._refuse(name, f"has embeddings {shape}, not ({len(keys)}, {self.embedding_dim or 'embedding_dim'})")
        else:
            self._add(name, keys, shape[1])

    def _add(self, name: str, keys: Tensor, embedding_dim: int) -> None:
        self.embedding_dim = embedding_dim
        if name not in self._known:
            self._known.add(name)
            self._index.add(name, keys)

    def _shard_name(self, keys: Tensor) -> str:
        # With the settings: whoever puts embeddings of another model here cannot change those that are being read.
        content = self._metadata["settings"].encode() + keys.contiguous().numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:32] + _SUFFIX

    def _refuse(self, name: str, reason: str) -> None:
        path = self.folder / name
        with suppress(FileNotFoundError):
            state = path.stat()
            self._refused[name] = (state.st_size, state.st_mtime_ns)
        logger.warning("%s %s: it counts as absent, and is replaced when its embeddings are made anew", path, reason)

    def _check_embeddings(self, keys: Tensor, embeddings: Tensor) -> Tensor:
        if embeddings.ndim != 2 or len(embeddings) != len(keys) or not embeddings.numel():
            raise ValueError(
                f"embeddings is {tuple(embeddings.shape)} for {len(keys)} keys, must be (num_keys, embedding_dim) with "
                "one row a key and at least one; encode one batch, then write it"
            )
        if self.embedding_dim not in (None, embeddings.shape[1]):
            raise ValueError(
                f"embeddings has {embeddings.shape[1]} numbers a row, those in {str(self.folder)!r} have "
                f"{self.embedding_dim}; name what changed them in the settings, or choose another directory"
            )
        if len(keys.unique()) != len(keys):
            raise ValueError(f"{len(keys) - len(keys.unique())} of {len(keys)} keys are repeated; write each one once")
        stored = embeddings.detach().to("cpu", self.dtype).contiguous()
        bad = (~stored.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"embeddings has {len(bad)} of {len(keys)} rows with NaN or infinity in {self.dtype}, first rows "
                f"{bad[:_SHOWN_ROWS]}; look at their inputs, or encode and store in float32 or bfloat16"
            )
        return stored

    def _settle(self) -> None:
        """Write the manifest, or compare it with the one that is there; remove what dead processes left."""
        with _explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
        path = self.folder / MANIFEST
        if not path.exists():
            text = json.dumps({"settings": self._settings}, indent=2, sort_keys=True) + "\n"
            self._write_whole(MANIFEST, text.encode())
        # Read in any case: another process may have written another one meanwhile.
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["settings"]
            different = sorted(
                name for name in {*found, *self._settings} if found.get(name) != self._settings.get(name)
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{str(path)!r} is no manifest of embeddings ({error!r}). Delete the directory, or choose another"
            ) from error
        if different:
            values = "; ".join(
                f"{name} is {_shown(found, name)} there and {_shown(self._settings, name)} here" for name in different
            )
            raise ValueError(
                f"The embeddings in {str(self.folder)!r} were made with other settings: {values}. Choose another "
                "directory, or delete this one to make them again."
            )

    def _write_whole(self, name: str, content: bytes) -> None:
        with _explained(self.folder):
            write_whole(self.folder / name, content)


class CachedCandidates:
    """Rows of a cache as a `CandidateSource`, made by `EmbeddingCache.source`.

    Args:
        cache: The cache.
        shards: Shard of each row, `(num_rows,)` int64.
        places: Row in its shard, `(num_rows,)` int64.
    """

    def __init__(self, cache: EmbeddingCache, shards: Tensor, places: Tensor) -> None:
        self._cache = cache
        self._shards = shards
        self._places = places

    @property
    def embedding_dim(self) -> int:
        return self._cache.embedding_dim or 0

    def __len__(self) -> int:
        return len(self._shards)

    def blocks(self, block_size: int) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self), block_size):
            yield start, self.rows(torch.arange(start, min(start + block_size, len(self))))

    def rows(self, indices: Tensor) -> Tensor:
        shards, places = self._shards[indices.cpu()], self._places[indices.cpu()]
        rows = torch.empty(len(shards), self.embedding_dim, dtype=self._cache.dtype)
        order = shards.argsort(stable=True)
        numbers, counts = shards[order].unique_consecutive(return_counts=True)
        for number, where in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
            rows[where] = self._cache.read(number, places[where])
        return rows


def _check_keys(keys: Tensor) -> Tensor:
    if keys.ndim != 1 or keys.dtype is not torch.int64:
        raise ValueError(f"keys is {tuple(keys.shape)} of {keys.dtype}, must be (num_keys,) of torch.int64")
    return keys.cpu()


def _check_folder(folder: str | Path) -> Path:
    path = Path(folder)
    existing = next((place for place in (path, *path.parents) if place.exists()), None)
    if existing is not None and not existing.is_dir():
        raise NotADirectoryError(
            f"The embeddings go into a directory, {str(folder)!r}, but {str(existing)!r} is a file. Choose another "
            "path, or move the file away."
        )
    return path


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "absent"


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        explained = OSError(
            f"The embeddings in {str(folder)!r} could not be written: the disk is full ({error}). Finished shards are "
            "kept, and the same run, started again, goes on after them. Free some space first, or move the directory "
            "to another disk."
        )
        explained.errno = error.errno
        raise explained from error
