"""What was embedded of a shard when its run ended early, kept for the next run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from puma_hf.embedding.results import EmbedResult
from puma_hf.embedding.shards import ShardInfo
from puma_hf.files import write_whole

logger = logging.getLogger(__name__)

LEFTOVERS = (".unfinished-*.safetensors", "..unfinished-*.tmp")  # files, and drafts of them
_KEY = "puma_hf"


class UnfinishedShard:
    """Rows of a shard that its run could not finish, in a hidden file beside the shards until a run does.

    Rows are found by what was embedded, so other lines of the corpus may be mended, added or removed meanwhile. A file
    that is cut off, or of another model or setting, is as good as none.

    Args:
        folder: The directory of the shards.
        info: What the shard will say of itself.
        content_hashes: For each of its inputs, the hash of what the model sees of it.

    Attributes:
        num_kept: For how many of them `load` has found an embedding.
    """

    def __init__(self, folder: Path, info: ShardInfo, content_hashes: Sequence[str]) -> None:
        self.path = folder / f".unfinished-{info.shard:05d}.safetensors"
        self._settings = info.settings
        self._hashes = content_hashes
        self.num_kept = 0

    def load(self, dim: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Places of inputs in the shard, `(num_rows,)`, and their embeddings, `(num_rows, dim)`."""
        hashes, rows = self._read()
        if rows.shape != (len(hashes), dim) or rows.dtype != np.float32:
            hashes, rows = [], np.zeros((0, dim), np.float32)
        row_of = {value: row for row, value in enumerate(hashes)}
        places = [place for place, value in enumerate(self._hashes) if value in row_of]
        self.num_kept = len(places)
        return np.array(places, np.int64), rows[[row_of[self._hashes[place]] for place in places]]

    def _read(self) -> tuple[list[str], NDArray[Any]]:
        try:
            with safe_open(self.path, framework="np") as file:
                if (file.metadata() or {}).get(_KEY) == self._settings:
                    hashes = [bytes(value).hex() for value in file.get_tensor("content_hashes")]
                    return hashes, file.get_tensor("embeddings")
        except (SafetensorError, OSError, ValueError, TypeError):
            pass  # it is as good as none
        return [], np.zeros((0, 0), np.float32)

    def save(self, result: EmbedResult) -> None:
        """Write what there is, but for zeros in the place of broken inputs, and NaN; a full disk is a warning.

        Args:
            result: Float32 embeddings, by the place of their input in the shard.
        """
        good = np.isfinite(result.embeddings).all(axis=1)
        good &= ~np.isin(result.indices, [error.index for error in result.errors])
        if not good.any():
            return
        hashes = b"".join(bytes.fromhex(self._hashes[place]) for place in result.indices[good])
        tensors = {
            "content_hashes": np.frombuffer(hashes, np.uint8).reshape(int(good.sum()), -1),
            "embeddings": result.embeddings[good],
        }
        try:
            write_whole(self.path, save(tensors, metadata={_KEY: self._settings}))
        except OSError as error:
            logger.warning("%d embeddings of an unfinished shard could not be kept (%s)", good.sum(), error)

    def remove(self) -> None:
        """Forget it: the shard is finished."""
        self.path.unlink(missing_ok=True)
