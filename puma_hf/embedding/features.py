"""Take some inputs out of a batch of the processor's features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# Rows of all inputs in one tensor: how many rows each medium has, and how many media each input.
_MEDIA = (
    ("pixel_values", "image_grid_thw", "num_images_per_sample"),
    ("pixel_values_videos", "video_grid_thw", "num_videos_per_sample"),
)


def take(features: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    """The features of the inputs `start` to `end` of a batch, padded as before.

    Args:
        features: A batch of `PumaProcessor.process_inputs`.
        start: The first input.
        end: The one after the last.

    Example:

    ```python
    >>> import torch
    >>> from puma_hf.embedding.features import take

    >>> take({"input_ids": torch.tensor([[1, 2], [3, 4], [5, 6]])}, 1, 3)["input_ids"].tolist()
    [[3, 4], [5, 6]]
    ```
    """
    taken = dict(features)
    for pixels, grids, counts in _MEDIA:
        if features.get(pixels) is None:
            continue
        first, last = int(features[counts][:start].sum()), int(features[counts][:end].sum())
        ends = [0, *features[grids].prod(dim=1).cumsum(dim=0).tolist()]
        taken[pixels] = features[pixels][ends[first] : ends[last]]
        taken[grids] = features[grids][first:last]
        if first == last:
            del taken[pixels], taken[grids]
    num_inputs = len(features["input_ids"])
    whole = {name for names in _MEDIA for name in names[:2]}
    for name, value in taken.items():
        if name not in whole and isinstance(value, torch.Tensor) and len(value) == num_inputs:
            taken[name] = value[start:end]
    return taken
