"""A number for what a model sees of each input, so that copies of an input can be told in a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Pixels, grid and number of items per sample, for each medium.
_MEDIA = (
    ("pixel_values", "image_grid_thw", "num_images_per_sample"),
    ("pixel_values_videos", "video_grid_thw", "num_videos_per_sample"),
)


def content_ids(features: Mapping[str, Any]) -> Tensor:
    """64-bit hash of exactly what the model sees of each sample: its tokens, its images and its videos.

    Equal inputs have equal ids in every batch, whatever its padding or order, and in every process; that two
    different ones share an id is as unlikely as for any hash of this length, unless someone contrives it.

    Args:
        features: A batch of `PumaProcessor.process_inputs`: `input_ids` and `attention_mask`
            `(batch_size, sequence_length)` and, where present, `pixel_values` `(num_patches, patch_dim)`,
            `image_grid_thw` `(num_images, 3)` and `num_images_per_sample` `(batch_size,)`, likewise for videos.

    Returns:
        Integers of shape `(batch_size,)`, int64, on the CPU.

    Example:

    ```python
    >>> from puma_hf.modeling.content_ids_puma import content_ids

    >>> tokens, mask = torch.tensor([[5, 6, 0], [0, 5, 6], [5, 7, 0]]), torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 0]])
    >>> ids = content_ids({"input_ids": tokens, "attention_mask": mask}).tolist()
    >>> ids[0] == ids[1], ids[0] == ids[2]
    (True, False)
    ```
    """
    tokens, mask = _array(features["input_ids"]), _array(features["attention_mask"]).astype(bool)
    # Processors have instructions for SHA-256: 2 GB a second, twice as much as BLAKE2.
    hashes = [hashlib.sha256(row[kept].tobytes()) for row, kept in zip(tokens, mask, strict=True)]
    for pixel_key, grid_key, count_key in _MEDIA:
        if features.get(pixel_key) is None:
            continue
        grid, pixels = _array(features[grid_key]), _array(features[pixel_key])
        items = [0, *_array(features[count_key]).cumsum().tolist()]
        ends = [0, *grid.prod(axis=1).cumsum().tolist()]
        for one, (first, last) in zip(hashes, pairwise(items), strict=True):
            if last > first:
                # With kind and shape before them, the same patches in another arrangement are another content.
                one.update(f"{pixel_key} {grid[first:last].tolist()}".encode())
                one.update(pixels[ends[first] : ends[last]].data)
    digests = b"".join(one.digest()[:8] for one in hashes)
    return torch.from_numpy(np.frombuffer(digests, dtype="<i8").astype(np.int64))


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    # numpy has no bfloat16; only the bytes matter.
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
