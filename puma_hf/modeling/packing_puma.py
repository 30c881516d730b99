"""Batches without padding: the tokens of all inputs one after another, with their positions, laid out on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids

from .attention_puma import Block, Sequences, blocks_of_lengths, sequences_of
from .shared_prefix_puma import Group, group_by_prefix


@dataclass(frozen=True)
class PackedImages:
    """The images of a packed batch, in the order of their tokens.

    Args:
        pixel_values: `(num_patches, patch_dim)`, in the model's data type.
        grid_thw: `(num_images, 3)` time, height and width in patches; stays on the CPU.
        patch_positions: `(num_patches, 2)` row and column of each patch.
        token_index: `(num_visual_tokens,)` where the images' tokens are among the batch's.
        sequences: The patches of each image (of each frame, to be exact), which attend to one another.
    """

    pixel_values: Tensor
    grid_thw: Tensor
    patch_positions: Tensor
    token_index: Tensor
    sequences: Sequences


@dataclass(frozen=True)
class PackedBatch:
    """Inputs as the fast path takes them.

    Args:
        input_ids: `(num_tokens,)`: shared prefixes first, then what is left of each input.
        position_ids: `(3, 1, num_tokens)` positions in time, height and width.
        sequences: Which tokens attend to which.
        last_sequences: The same for the last token of each input alone, in the same order.
        last_index: `(num_inputs,)` where the last tokens are.
        order: `(num_inputs,)` for each input, which of those last tokens is its own.
        images: The images, `None` without any.
    """

    input_ids: Tensor
    position_ids: Tensor
    sequences: Sequences
    last_sequences: Sequences
    last_index: Tensor
    order: Tensor
    images: PackedImages | None

    @property
    def num_inputs(self) -> int:
        """Number of inputs."""
        return len(self.order)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the decoder computes."""
        return len(self.input_ids)

    def to(self, device: Any, non_blocking: bool = False) -> PackedBatch:
        """The batch on a device. Its images' grid stays on the CPU, where it is read."""
        packed: PackedBatch = _map(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return packed

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory, from where a GPU copies it while it computes."""
        packed: PackedBatch = _map(self, lambda tensor: tensor.pin_memory())
        return packed


def _map(packed: Any, function: Any) -> Any:
    changes: dict[str, Any] = {}
    for field in fields(packed):
        value = getattr(packed, field.name)
        if isinstance(value, (PackedImages, Sequences)):
            changes[field.name] = _map(value, function)
        elif isinstance(value, Tensor) and field.name != "grid_thw":
            changes[field.name] = function(value)
    return replace(packed, **changes)


def pack(
    features: Mapping[str, Any],
    *,
    image_token_id: int,
    merge_size: int,
    dtype: torch.dtype = torch.float32,
    shared_prefix: bool = True,
    sequential: bool = False,
) -> PackedBatch:
    """Take the padding out of a batch.

    Args:
        features: A batch of `PumaProcessor.process_inputs` without videos: `input_ids` and `attention_mask`
            `(batch_size, sequence_length)` and, where present, `pixel_values` `(num_patches, patch_dim)` and
            `image_grid_thw` `(num_images, 3)`.
        image_token_id: The token that stands for a part of an image.
        merge_size: Patches along each side of what becomes one token.
        dtype: Data type of the pixels.
        shared_prefix: Whether first tokens that inputs share are computed once for all of them.
        sequential: Whether positions count every token, those of images too, instead of M-RoPE.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: If there are more or fewer image tokens than the images have.

    Example:

    ```python
    >>> import torch
    >>> from puma_hf.modeling.packing_puma import pack

    >>> tokens, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    >>> batch = pack({"input_ids": tokens, "attention_mask": mask}, image_token_id=1, merge_size=2)
    >>> batch.input_ids.tolist(), batch.last_index.tolist(), batch.order.tolist()
    ([8, 9, 5, 6, 7], [1, 4], [1, 0])
    ```
    """
    rows = _rows(features)
    grids = features["image_grid_thw"].cpu() if features.get("image_grid_thw") is not None else None
    positions, num_images = _all_positions(rows, grids, image_token_id, merge_size)
    if sequential:
        positions = [np.broadcast_to(np.arange(len(row)), (3, len(row))) for row in rows]
    groups = [Group(list(range(len(rows))), 0)]
    if shared_prefix:
        groups = group_by_prefix(rows, [_head_length(row, image_token_id) for row in rows])
    # Inputs of one length become one block.
    groups = [Group(sorted(group.rows, key=lambda row: len(rows[row])), group.prefix_length) for group in groups]
    sequences, last_sequences = _lay_out(groups, [len(row) for row in rows])
    pieces = [(group.rows[0], slice(group.prefix_length)) for group in groups if group.prefix_length]
    pieces += [(row, slice(group.prefix_length, None)) for group in groups for row in group.rows]
    order = [row for group in groups for row in group.rows]
    ends = np.cumsum([len(rows[row][part]) for row, part in pieces])
    input_ids = np.concatenate([rows[row][part] for row, part in pieces])
    images = None
    if grids is not None:
        token_index = torch.from_numpy(np.flatnonzero(input_ids == image_token_id))
        images = _pack_images(features["pixel_values"], grids, num_images, order, token_index, merge_size, dtype)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(np.concatenate([positions[row][:, part] for row, part in pieces], axis=1))[
            :, None
        ],
        sequences=sequences,
        last_sequences=last_sequences,
        last_index=torch.from_numpy(ends[len(pieces) - len(order) :] - 1),
        order=torch.from_numpy(np.argsort(order)),
        images=images,
    )


def _rows(features: Mapping[str, Any]) -> list[np.ndarray]:
    """Token ids of each input without padding."""
    ids, mask = features["input_ids"].cpu().numpy(), features.get("attention_mask")
    if mask is None:
        return list(ids)
    return [row[kept] for row, kept in zip(ids, mask.cpu().numpy().astype(bool), strict=True)]


def _head_length(row: np.ndarray, image_token_id: int) -> int:
    """First tokens that may be shared: at least the last token stays, and nothing after an image is the same."""
    images = np.flatnonzero(row == image_token_id)
    return int(images[0]) if len(images) else len(row) - 1


def _lay_out(groups: Sequence[Group], lengths: Sequence[int]) -> tuple[Sequences, Sequences]:
    """Prefixes first, then what is left of each input; and the last token of each input."""
    prefixes = [group.prefix_length for group in groups if group.prefix_length]
    blocks = list(blocks_of_lengths(prefixes))
    last: list[Block] = []
    start, prefix_start, number = sum(prefixes), 0, 0
    for group in groups:
        left = [lengths[row] - group.prefix_length for row in group.rows]
        for block in blocks_of_lengths(left):
            shifted = replace(
                block,
                first_query=start + block.first_query,
                first_key=start + block.first_key,
                first_prefix_key=prefix_start,
                num_prefix_keys=group.prefix_length,
            )
            blocks.append(shifted)
            last.append(replace(shifted, num_queries=1, first_query=number))
            number += block.count
        start += sum(left)
        prefix_start += group.prefix_length
    return sequences_of(blocks), sequences_of(last)


def _all_positions(
    rows: Sequence[np.ndarray], grids: Tensor | None, image_token_id: int, merge_size: int
) -> tuple[list[np.ndarray], list[int]]:
    """M-RoPE positions `(3, sequence_length)` of each input, and how many images it has."""
    merged = [] if grids is None else (grids // torch.tensor([1, merge_size, merge_size])).tolist()
    positions, counts, used = [], [], 0
    for row in rows:
        is_image = row == image_token_id
        if not is_image.any():
            positions.append(np.broadcast_to(np.arange(len(row)), (3, len(row))))
            counts.append(0)
            continue
        found, count = mrope_positions(is_image, merged[used:])
        positions.append(found)
        counts.append(count)
        used += count
    if used != len(merged):
        raise ValueError(
            f"The inputs' tokens belong to {used} images, but image_grid_thw has {len(merged)}. Make the features with "
            "PumaProcessor.process_inputs."
        )
    return positions, counts


def mrope_positions(is_image: np.ndarray, grids: Sequence[Sequence[int]]) -> tuple[np.ndarray, int]:
    """Positions in time, height and width of an input's tokens, as transformers' `get_rope_index` has them.

    Args:
        is_image: `(sequence_length,)`, which tokens stand for parts of images.
        grids: Time, height and width in tokens of its images, and of any that come after them.

    Returns:
        The positions, `(3, sequence_length)`, int64, and how many of the images it has.

    Raises:
        ValueError: If it has more or fewer image tokens than its images.

    Example:

    ```python
    >>> import numpy as np
    >>> from puma_hf.modeling.packing_puma import mrope_positions

    >>> positions, count = mrope_positions(np.array([False, True, True, False]), [(1, 1, 2)])
    >>> positions.tolist()
    [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    ```
    """
    positions = np.empty((3, len(is_image)), dtype=np.int64)
    place, start, count = 0, 0, 0
    while place < len(is_image):
        if not is_image[place]:
            rest = is_image[place:]
            length = int(rest.argmax()) if rest.any() else len(rest)
            positions[:, place : place + length] = start + np.arange(length)
            start += length
        else:
            grid = grids[count] if count < len(grids) else (0, 0, 0)
            length = int(np.prod(grid))
            if not length or not is_image[place : place + length].all() or place + length > len(is_image):
                raise ValueError(
                    f"The image tokens of an input do not match its images: grid {list(grid)} in tokens does not fit. "
                    "Make the features with PumaProcessor.process_inputs."
                )
            positions[:, place : place + length] = start + np.indices(grid).reshape(3, -1)
            start += max(grid[1], grid[2])
            count += 1
        place += length
    return positions, count


def _pack_images(
    pixel_values: Tensor,
    grids: Tensor,
    num_images: Sequence[int],
    order: Sequence[int],
    token_index: Tensor,
    merge_size: int,
    dtype: torch.dtype,
) -> PackedImages:
    firsts = np.cumsum([0, *num_images])
    wanted = [image for row in order for image in range(firsts[row], firsts[row + 1])]
    if wanted != list(range(len(wanted))):
        parts = pixel_values.split(grids.prod(dim=1).tolist())
        pixel_values, grids = torch.cat([parts[image] for image in wanted]), grids[wanted]
    frames = [height * width for time, height, width in grids.tolist() for _ in range(time)]
    return PackedImages(
        pixel_values=pixel_values.to(dtype),
        grid_thw=grids,
        patch_positions=get_vision_position_ids(grids, merge_size),
        token_index=token_index,
        sequences=sequences_of(blocks_of_lengths(frames)),
    )


__all__ = ["PackedBatch", "PackedImages", "mrope_positions", "pack"]
