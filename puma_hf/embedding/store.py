"""The one store of embeddings on disk: shards of rows that are found by the content they were made of.

`embed` writes a corpus into one, `evaluate` keeps in one what it has embedded. A directory holds

    manifest.json                   the settings that all rows depend on, and what a finished run says of them
    shard-000000000-5f0….parquet    columns key (int64), id (if there are ids) and embedding (a list of fixed size)

With `format: safetensors` the tensor `embeddings` is in `shard-….safetensors` beside it. Parquet is for users, who read
it with whatever reads tables. safetensors is for programs: rows are mapped from the file, so that a few of them are
read at once, where Parquet decodes all of a shard (about 0.1 GB a second).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from pyarrow import parquet
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from puma_hf.files import read_config, write_whole
from puma_hf.settings import shown

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "puma_hf embeddings", 2
_KEY = b"puma_hf"  # where a shard says what it is
_SHARD = re.compile(r"(shard-\d{5,}-[0-9a-f]{24})\.(?:parquet|safetensors)")
_DAMAGES = (pa.ArrowException, SafetensorError, OSError, ValueError, KeyError, IndexError)


class EmbeddingStore:
    """A directory of embeddings, each found by the key of the content that it belongs to.

    A shard is one file, written whole or not at all, and named by a hash of its keys and settings, so that several
    processes may write at once. In memory are the keys alone, 24 bytes each. A shard that is cut off counts as absent;
    what it held is embedded again. Where a key is in several shards, the one that was seen first counts.

    Args:
        folder: The directory, which is made if need be.
        settings: What the embeddings depend on besides the content, such as the model's fingerprint; anything that
            JSON can hold. None takes those that are there.
        dtype: Type of the numbers: what is added is converted to it.
        file_format: "parquet" or "safetensors"; bfloat16 needs the latter.

    Attributes:
        folder: The directory.
        settings: The settings.
        manifest: All that `manifest.json` says.
        embedding_dim: Numbers of one row; None as long as there is none. Packed bits have an eighth of the dimensions.

    Raises:
        ValueError: If the directory holds embeddings of other settings, or of an older version of puma_hf.
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = EmbeddingStore(folder, {"model": "tiny"})
        ...     _ = store.add(torch.tensor([7, 3]), torch.eye(2))
        ...     store.refresh()
        ...     store.has(torch.tensor([3, 4])), store.rows(torch.tensor([3]))
        (tensor([ True, False]), tensor([[0., 1.]]))
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any] | None,
        *,
        dtype: torch.dtype = torch.float32,
        file_format: Literal["parquet", "safetensors"] = "parquet",
    ) -> None:
        self.folder = Path(folder)
        self.embedding_dim: int | None = None
        wanted: dict[str, Any] | None = None
        if settings is not None:
            kind = {"embedding_dtype": str(dtype).removeprefix("torch."), "file_format": file_format}
            # Through JSON, as what is read from the manifest went.
            wanted = json.loads(json.dumps({**settings, **kind}))
            if not (self.folder / MANIFEST).exists():
                head = {"format": FORMAT, "format_version": FORMAT_VERSION}
                content = json.dumps({**head, "settings": wanted, "complete": False}, indent=2)
                write_whole(self.folder / MANIFEST, content.encode())
        # Read in any case: another process may have written another one meanwhile.
        self.manifest = read_manifest(self.folder)
        self.settings: dict[str, Any] = self.manifest["settings"]
        check_settings(self.folder, self.settings, wanted or self.settings)
        self.dtype: torch.dtype = getattr(torch, self.settings["embedding_dtype"])
        self._metadata = {_KEY: json.dumps(self.settings, sort_keys=True).encode()}
        self._shards: dict[str, Tensor] = {}  # the keys of each, in the order in which they were seen
        self._refused: set[str] = set()  # shards that count as absent, which is said once of each
        self.refresh()

    def __len__(self) -> int:
        """Number of rows, as of the last `refresh`."""
        return sum(map(len, self._shards.values()))

    def __iter__(self) -> Iterator[tuple[list[str], NDArray[Any]]]:
        """Ids and rows `(num_rows, embedding_width)` of each shard; a ValueError if one is spoiled."""
        for name, keys in sorted(self._shards.items(), key=lambda shard: shard[0]):
            yield self._ids(name), self._read(name, torch.arange(len(keys))).numpy()

    def refresh(self) -> None:
        """Take in the shards that were written since, by this process or by others."""
        names = sorted(path.stem for path in self.folder.glob("shard-*.parquet") if _SHARD.fullmatch(path.name))
        if not self._shards.keys() <= set(names):  # `keep`, or a user, has removed some
            self._shards = {}
        for name in names:
            if name in self._shards:
                continue
            path, reason = self.folder / f"{name}.{self.settings['file_format']}", "is not of these settings"
            try:
                file = parquet.ParquetFile(self.folder / f"{name}.parquet")
                if path.suffix == ".parquet":
                    dim = file.schema_arrow.field("embedding").type.list_size
                else:
                    dim = self._read(name, torch.tensor([], dtype=torch.int64)).shape[1]
                if file.schema_arrow.metadata == self._metadata and dim == (self.embedding_dim or dim):
                    self.embedding_dim = dim
                    self._shards[name] = torch.from_numpy(file.read(columns=["key"])["key"].to_numpy().copy())
                    continue
            except _DAMAGES as error:
                reason = f"is cut or spoiled ({error.__cause__ or error})"
            if name not in self._refused:
                self._refused.add(name)
                logger.warning("%s %s: it counts as absent, and its embeddings are made anew", path, reason)
        # Rows are numbered over all shards as they came; of equal keys the one that came first stays first.
        self._starts = torch.tensor([0, *map(len, self._shards.values())]).cumsum(0)
        empty = torch.empty(0, dtype=torch.int64)
        self._keys, self._order = torch.cat([empty, *self._shards.values()]).sort(stable=True)

    def has(self, keys: Tensor) -> Tensor:
        """Whether each key, `(num_keys,)` int64, was there at the last `refresh`: `(num_keys,)` bool."""
        return self._find(keys) >= 0

    def add(self, keys: Tensor, embeddings: Tensor, *, ids: Sequence[str] | None = None, order: int = 0) -> str:
        """Write one shard, whole or not at all; `refresh` makes it seen.

        Args:
            keys: `(num_keys,)` int64.
            embeddings: `(num_keys, embedding_width)`, finite.
            ids: The user's names of the rows.
            order: Files come in the order of these numbers.

        Returns:
            The name of the shard.

        Raises:
            ValueError: If a shape or a value is not as said.
            OSError: If it cannot be written; finished shards are kept.
        """
        rows = embeddings.detach().to("cpu", self.dtype).contiguous()
        if rows.ndim != 2 or len(rows) != len(keys) or rows.shape[1] != (self.embedding_dim or rows.shape[1]):
            size = f"(num_keys, {self.embedding_dim or 'embedding_dim'})"
            raise ValueError(f"embeddings is {tuple(rows.shape)} for {len(keys)} keys, must be {size}")
        if rows.is_floating_point() and not bool(rows.isfinite().all()):
            remedy = "look at their inputs, or store float32 or bfloat16"
            raise ValueError(f"embeddings has NaN or infinity as {self.dtype}; {remedy}")
        keys = keys.cpu().contiguous()
        # With the settings: whoever puts embeddings of another model here cannot change those that are being read.
        digest = hashlib.sha256(self._metadata[_KEY] + keys.numpy().tobytes()).hexdigest()[:24]
        path = self.folder / f"shard-{order:09d}-{digest}.parquet"  # names sort as the numbers do
        columns = {"key": pa.array(keys.numpy())}
        if ids is not None:
            # Names of files, and JSON, may hold half a character, which no table can.
            columns["id"] = pa.array([one.encode("utf-8", "backslashreplace").decode() for one in ids], pa.string())
        self.say(complete=False)  # before anything changes
        if self.settings["file_format"] == "parquet":
            columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(rows.numpy().ravel()), rows.shape[1])
        else:  # first, as a shard is there when its Parquet file is
            write_whole(path.with_suffix(".safetensors"), save({"embeddings": rows}))
        # Parquet has no integers of one byte: only as indices into a dictionary of 256 they take no more.
        small = ["embedding.list.element"] if self.dtype.itemsize == 1 and "embedding" in columns else False
        # Nothing is compressed: embeddings are noise, which takes the time and stays as large.
        buffer, table = io.BytesIO(), pa.table(columns).replace_schema_metadata(self._metadata)
        parquet.write_table(table, buffer, compression="none", use_dictionary=small, write_page_checksum=True)
        write_whole(path, buffer.getvalue())
        self.embedding_dim = rows.shape[1]
        return path.stem

    def rows(self, keys: Tensor) -> Tensor:
        """Rows `(num_keys, embedding_width)` in the order of the keys.

        Raises:
            ValueError: If a key is not there, or a shard is no longer what it was.
        """
        places = self._find(keys)
        if bool((places < 0).any()):
            missing = f"{int((places < 0).sum())} of {len(keys)} keys have no embedding in {str(self.folder)!r}"
            raise ValueError(f"{missing}; add them first, or call refresh() if another process did")
        rows = torch.empty(len(keys), self.embedding_dim or 0, dtype=self.dtype)
        # Each shard is opened once, however its rows are spread over the keys.
        names = [*self._shards]
        shards = torch.searchsorted(self._starts, places, right=True) - 1
        for shard in shards.unique().tolist():
            where = (shards == shard).nonzero().flatten()
            rows[where] = self._read(names[shard], places[where] - self._starts[shard])
        return rows

    def blocks(self, keys: Tensor, block_size: int) -> Iterator[tuple[int, Tensor]]:
        """The same rows, `block_size` in memory at a time, each block with the number of its first row."""
        for start in range(0, len(keys), block_size):
            yield start, self.rows(keys[start : start + block_size])

    def keep(self, keys: Tensor) -> None:
        """Remove all rows but those of these keys, and of each key all but one; shards that hold others are rewritten.

        No other process may write meanwhile.
        """
        self.refresh()
        at = self._find(keys.unique())
        is_kept = torch.zeros(int(self._starts[-1]), dtype=torch.bool)
        is_kept[at[at >= 0]] = True
        kept = set()
        for number, (name, own) in enumerate(self._shards.items()):
            places = is_kept[self._starts[number] : self._starts[number + 1]].nonzero().flatten()
            if 0 < len(places) < len(own):
                ids, order = self._ids(name), int(name.split("-")[1])
                some = [ids[place] for place in places.tolist()] if ids else None
                name = self.add(own[places], self._read(name, places), ids=some, order=order)
            kept |= {name} if len(places) else set()
        for path in self.folder.iterdir():
            if (match := _SHARD.fullmatch(path.name)) and match[1] not in kept:
                self.say(complete=False)
                path.unlink()
        for draft in self.folder.glob(".*.tmp"):  # of writers that were killed
            draft.unlink(missing_ok=True)
        self.refresh()

    def say(self, **about: Any) -> None:
        """Change what `manifest.json` says besides the settings; `complete` tells readers that a run has finished."""
        self.manifest = read_manifest(self.folder)  # another process may have changed it
        if (said := {**self.manifest, **about}) != self.manifest:
            self.manifest = said
            write_whole(self.folder / MANIFEST, json.dumps(said, indent=2).encode())

    def _find(self, keys: Tensor) -> Tensor:
        """The number of each key's row, counted over all shards; -1 where there is none."""
        keys = keys.cpu()
        if not len(self._keys):
            return torch.full_like(keys, -1)
        at = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
        return torch.where(self._keys[at] == keys, self._order[at], -1)

    def _read(self, name: str, places: Tensor) -> Tensor:
        path = self.folder / f"{name}.{self.settings['file_format']}"
        with _damage_explained(path):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    # It is mapped: only the pages of these rows are read from the disk.
                    return file.get_tensor("embeddings")[places]  # type: ignore[no-any-return]
            table = parquet.read_table(path, columns=["embedding"], page_checksum_verification=True)
            flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            return torch.from_numpy(flat.reshape(len(table), -1)[places.numpy()])

    def _ids(self, name: str) -> list[str]:
        path = self.folder / f"{name}.parquet"
        with _damage_explained(path):
            file = parquet.ParquetFile(path, page_checksum_verification=True)
            return file.read(columns=["id"])["id"].to_pylist() if "id" in file.schema_arrow.names else []


def check_settings(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """A ValueError that names the settings that differ, and how to go on, if embeddings cannot be compared."""
    # Those that do not say how images were decoded, or after how many layers, are older than the choice.
    there, here = ({"decode": "exact", "num_kept_layers": here.get("num_kept_layers"), **one} for one in (there, here))
    if names := sorted(name for name in {*there, *here} if there.get(name) != here.get(name)):
        pairs = [f"{name} is {shown(there.get(name))} there and {shown(here.get(name))} here" for name in names]
        problem = f"The embeddings in {str(folder)!r} were made with other settings: {'; '.join(pairs)}."
        remedy = "Choose another directory, or delete this one to make them again."
        # Of another depth the fingerprint is another, whatever it is called here.
        own = {*names} - ({"fingerprint", "model"} if "num_kept_layers" in names else set())
        if own <= {"decode", "max_pixels", "num_kept_layers"}:
            flags = [(f"--{name.replace('_', '-')}", there.get(name)) for name in sorted(own)]
            told = [f"with {flag} {value}" if value else f"without {flag}" for flag, value in flags]
            remedy = f"Go on {' and '.join(told)}, as they were made. {remedy}"
        raise ValueError(f"{problem} {remedy}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a store's manifest says; a FileNotFoundError if there is none, a ValueError if it is of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {MANIFEST}. Name a directory that puma-hf embed has written.")
    manifest = read_config(folder, MANIFEST)
    if (manifest.get("format"), manifest.get("format_version")) != (FORMAT, FORMAT_VERSION):
        problem = f"{str(path)!r} is no manifest of this version of puma-hf (version {FORMAT_VERSION} of {FORMAT!r})"
        command = "run the command that made it again"
        if {"model", "data"} <= manifest.keys():
            command += f": puma-hf embed {manifest['data']} --model {manifest['model']} --output {folder}"
        raise ValueError(f"{problem}. To make the embeddings anew, delete the directory and {command}")
    return manifest


def open_embeddings(folder: str | Path) -> EmbeddingStore:
    """Open a directory that `puma-hf embed` has written.

    Args:
        folder: The directory.

    Returns:
        What it holds; iterate over it for `(ids, rows)` of one shard after the other. Its `settings["precision"]` says
        what the numbers are; of int8 and uint8 `settings["ranges"]` are the lowest and highest values `(2,
        embedding_dim)`, which `sentence_transformers.util.quantize_embeddings` needs for the queries, too.

    Raises:
        FileNotFoundError: If it has no manifest.
        ValueError: If its run was not finished, rows are missing, or it is of another version.

    Example:
        >>> for ids, rows in open_embeddings("embeddings"):  # doctest: +SKIP
        ...     index.add_with_ids(rows, ids)
    """
    path = Path(folder)
    manifest = read_manifest(path)
    store = EmbeddingStore(path, None)
    if not manifest["complete"] or len(store) != manifest["num_rows"]:
        problem = f"{str(folder)!r} is not whole: the run that writes it has not finished, or files are missing."
        raise ValueError(f"{problem} Run the same command again: it goes on where it was.")
    return store


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGES as error:
        remedy = "Delete this file and run the same command again: its embeddings are then made anew"
        raise ValueError(f"{str(path)!r} can no longer be read ({error}). {remedy}") from error
