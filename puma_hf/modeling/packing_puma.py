"""Batches without padding: the tokens of all inputs one after another, cut by tokens, laid out on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids

from .attention_puma import Block, Sequences, blocks_of_lengths, mapped, sequences_of

# A prefix is computed by itself, joined to the keys of every sequence, and hides from attention that the rest is
# causal: a short one, such as the template's own first tokens, and few tokens saved do not pay.
_SHORTEST_PREFIX, _LEAST_SAVED = 16, 32
# After a prefix attention takes a mask of a byte for each pair of tokens; for longer inputs it would be large, and an
# instruction is a small part of them.
_LONGEST_SHARED = 2048


@dataclass(frozen=True)
class PackedImages:
    """The images of a packed batch, in the order of their tokens."""

    pixel_values: Tensor  # (num_patches, patch_dim), in the model's data type
    grid_thw: Tensor  # (num_images, 3), time, height and width in patches; stays on the CPU, where it is read
    patch_positions: Tensor  # (num_patches, 2), row and column
    token_index: Tensor  # (num_visual_tokens,), where the images' tokens are among the part's
    sequences: Sequences  # the patches of each image (of each frame, to be exact), which attend to one another


@dataclass(frozen=True)
class PackedPart:
    """Inputs of a batch that are computed at once."""

    rows: tuple[int, ...]  # which inputs of the batch these are, in the order of last_index
    input_ids: Tensor  # (num_tokens,): shared prefixes first, then what is left of each input
    position_ids: Tensor  # (3, 1, num_tokens), in time, height and width
    sequences: Sequences  # which tokens attend to which
    last_sequences: Sequences  # the same for the last token of each input alone
    last_index: Tensor  # (num_inputs,), where the last tokens are
    images: PackedImages | None


@dataclass(frozen=True)
class PackedBatch:
    """Inputs as the fast path takes them: in parts of a bounded number of tokens, each input in one of them."""

    parts: tuple[PackedPart, ...]

    def to(self, device: Any, non_blocking: bool = False) -> PackedBatch:
        """The batch on a device."""
        parts = (mapped(part, lambda tensor: tensor.to(device, non_blocking=non_blocking)) for part in self.parts)
        return PackedBatch(tuple(parts))

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory, from where a GPU copies it while it computes."""
        return PackedBatch(tuple(mapped(part, Tensor.pin_memory) for part in self.parts))


@dataclass(frozen=True)
class Packer:
    """From inputs to batches without the weights, so that other processes can do it; `PumaTransformer.packer` makes it.

    Args:
        processor: A `PumaProcessor`.
        options: How it is called: `prompt`, `max_length`, `split_special_tokens`, `images_kwargs`.
        layout: Options of `pack`; `None` leaves the padding in.
    """

    processor: Any
    options: Mapping[str, Any]
    layout: Mapping[str, Any] | None

    def __call__(self, inputs: Sequence[Any]) -> PackedBatch | dict[str, Any]:
        """What `embed_batch` takes; see `PumaProcessor.process_inputs` for the inputs, and for errors."""
        return self.pack(self.process(inputs))

    def process(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """The processor's features of a batch, padded."""
        return dict(self.processor.process_inputs(list(inputs), **self.options))

    def pack(self, features: dict[str, Any]) -> PackedBatch | dict[str, Any]:
        """The batch without padding; the features themselves where that cannot be, as with videos."""
        if self.layout is None or features.get("pixel_values_videos") is not None:
            return features
        mask = features.get("attention_mask")
        if mask is not None:
            mask = mask.cpu()  # read twice, and brought from the device once
            kept = mask.bool()
            runs = kept[:, 0] + (kept[:, 1:] & ~kept[:, :-1]).sum(dim=1)
            if (runs != 1).any():  # positions count what is masked between tokens, packing would not
                return features
        return pack({**features, "attention_mask": mask}, **self.layout)


def pack(
    features: Mapping[str, Any],
    *,
    image_token_id: int,
    merge_size: int,
    dtype: torch.dtype = torch.float32,
    sequential: bool = False,
    max_tokens: float = float("inf"),
) -> PackedBatch:
    """Take the padding out of a batch, and cut it into parts that suit the device.

    Args:
        features: A batch of `PumaProcessor.process_inputs` without videos: `input_ids` and `attention_mask`
            `(batch_size, sequence_length)` and, where present, `pixel_values` `(num_patches, patch_dim)` and
            `image_grid_thw` `(num_images, 3)`.
        image_token_id: The token that stands for a part of an image.
        merge_size: Patches along each side of what becomes one token.
        dtype: Data type of the pixels.
        sequential: Whether positions count every token, those of images too, instead of M-RoPE.
        max_tokens: Most tokens of a part, but for one input that alone has more.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: If there are more or fewer image tokens than the images have.

    Example:

    ```python
    >>> import torch
    >>> from puma_hf.modeling.packing_puma import pack

    >>> tokens, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    >>> (part,) = pack({"input_ids": tokens, "attention_mask": mask}, image_token_id=1, merge_size=2).parts
    >>> part.rows, part.input_ids.tolist(), part.last_index.tolist()
    ((1, 0), [8, 9, 5, 6, 7], [1, 4])
    ```
    """
    ids, mask = features["input_ids"].cpu().numpy(), features.get("attention_mask")
    kept = np.ones_like(ids, bool) if mask is None else mask.cpu().numpy().astype(bool)
    rows = [row[there] for row, there in zip(ids, kept, strict=True)]
    lengths = [len(row) for row in rows]
    grids = features.get("image_grid_thw")
    grids = torch.empty((0, 3), dtype=torch.long) if grids is None else grids.cpu()
    merged = (grids // torch.tensor([1, merge_size, merge_size])).tolist()
    positions, first_images = [], [0]
    for row in rows:
        found, count = mrope_positions(row == image_token_id, merged[first_images[-1] :])
        positions.append(np.broadcast_to(np.arange(len(row)), (3, len(row))) if sequential else found)
        first_images.append(first_images[-1] + count)
    if first_images[-1] != len(merged):
        message = f"The inputs' tokens belong to {first_images[-1]} images, but image_grid_thw has {len(merged)}."
        raise ValueError(f"{message} Make the features with PumaProcessor.process_inputs.")
    groups = group_by_prefix(rows, [_head_length(row, image_token_id) for row in rows])
    pixels = features["pixel_values"].split(grids.prod(dim=1).tolist()) if len(grids) else ()
    parts = []
    for cut in _cut(groups, lengths, max_tokens):
        order = [row for group in cut for row in group.rows]
        pieces = [(group.rows[0], slice(group.prefix_length)) for group in cut if group.prefix_length]
        pieces += [(row, slice(group.prefix_length, None)) for group in cut for row in group.rows]
        input_ids = torch.from_numpy(np.concatenate([rows[row][piece] for row, piece in pieces]))
        places = np.concatenate([positions[row][:, piece] for row, piece in pieces], axis=1)
        ends = np.cumsum([len(rows[row][piece]) for row, piece in pieces])
        sequences, last_sequences = _lay_out(cut, lengths)
        wanted = [image for row in order for image in range(first_images[row], first_images[row + 1])]
        images = None
        if wanted:
            own = grids[wanted]
            frames = [height * width for time, height, width in own.tolist() for _ in range(time)]
            images = PackedImages(
                pixel_values=torch.cat([pixels[image] for image in wanted]).to(dtype),
                grid_thw=own,
                patch_positions=get_vision_position_ids(own, merge_size),
                token_index=(input_ids == image_token_id).nonzero().flatten(),
                sequences=sequences_of(blocks_of_lengths(frames)),
            )
        parts.append(
            PackedPart(
                rows=tuple(order),
                input_ids=input_ids,
                position_ids=torch.from_numpy(places)[:, None],
                sequences=sequences,
                last_sequences=last_sequences,
                last_index=torch.from_numpy(ends[len(pieces) - len(order) :] - 1),
                images=images,
            )
        )
    return PackedBatch(tuple(parts))


# --- shared prefixes


class Group(NamedTuple):
    """Sequences `rows` that share their first `prefix_length` tokens, and compute them once; 0 for none."""

    rows: list[int]
    prefix_length: int


def group_by_prefix(rows: Sequence[np.ndarray], head_lengths: Sequence[int]) -> list[Group]:
    """Split sequences into groups, each of which computes its first tokens once.

    Args:
        rows: Token ids of each sequence, `(sequence_length,)`, int64.
        head_lengths: How many first tokens of each may be shared; fewer than all of them, and none of an image's,
            which are equal without meaning the same.

    Returns:
        Groups that hold every sequence once.
    """
    # Big-endian bytes sort as the tokens do, so sequences with a common beginning become neighbours.
    heads = [row[:length] for row, length in zip(rows, head_lengths, strict=True)]
    groups: list[Group] = []
    for row in sorted(range(len(rows)), key=lambda number: heads[number].astype(">i8").tobytes()):
        members, length = groups[-1] if groups else ([], 0)
        common = min(length, len(heads[row]))
        if members and not (equal := heads[members[0]][:common] == heads[row][:common]).all():
            common = int(equal.argmin())
        # A neighbour joins unless what it saves is less than what the others lose by a shorter prefix.
        if common >= _SHORTEST_PREFIX and len(members) * common >= (len(members) - 1) * length:
            members.append(row)
            groups[-1] = Group(members, common)
        else:
            groups.append(Group([row], len(heads[row])))
    # One of a group computes the prefix.
    shared = [group for group in groups if (len(group.rows) - 1) * group.prefix_length > _LEAST_SAVED]
    alone = sorted(set(range(len(rows))).difference(*(group.rows for group in shared)))
    return ([Group(alone, 0)] if alone else []) + [Group(sorted(members), length) for members, length in shared]


def _head_length(row: np.ndarray, image_token_id: int) -> int:
    """First tokens that may be shared: at least the last token stays, and nothing after an image is the same."""
    images = np.flatnonzero(row == image_token_id)
    return 0 if len(row) > _LONGEST_SHARED else int(images[0]) if len(images) else len(row) - 1


# --- layout


def _cut(groups: Sequence[Group], lengths: Sequence[int], max_tokens: float) -> list[list[Group]]:
    """The groups of each batch: inputs of a group and of one length side by side, at most so many tokens together.

    A group that is cut pays for its prefix once in each part.
    """
    parts: list[list[Group]] = [[]]
    total = 0
    for rows, prefix_length in groups:
        here: list[int] | None = None
        for row in sorted(rows, key=lambda row: lengths[row]):
            size = lengths[row] - (0 if here is None else prefix_length)
            if parts[-1] and total + size > max_tokens:
                parts.append([])
                here, total, size = None, 0, lengths[row]
            if here is None:
                here = []
                parts[-1].append(Group(here, prefix_length))
            here.append(row)
            total += size
    return parts


def _lay_out(groups: Sequence[Group], lengths: Sequence[int]) -> tuple[Sequences, Sequences]:
    """Prefixes first, then what is left of each input; and the last token of each input."""
    prefixes = [group.prefix_length for group in groups if group.prefix_length]
    blocks = list(blocks_of_lengths(prefixes))
    last: list[Block] = []
    start, prefix_start, number = sum(prefixes), 0, 0
    for rows, prefix_length in groups:
        left = [lengths[row] - prefix_length for row in rows]
        for block in blocks_of_lengths(left, start, prefix_start, prefix_length):
            blocks.append(block)
            last.append(replace(block, num_queries=1, first_query=number))
            number += block.count
        start, prefix_start = start + sum(left), prefix_start + prefix_length
    return sequences_of(blocks), sequences_of(last)


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

    Source: M-RoPE of Qwen2-VL, arXiv 2409.12191, section 2.1.
    """
    if not is_image.any():
        return np.broadcast_to(np.arange(len(is_image)), (3, len(is_image))), 0
    positions = np.empty((3, len(is_image)), dtype=np.int64)
    place, start, count = 0, 0, 0
    while place < len(is_image):
        rest = is_image[place:]
        if not rest[0]:
            length = int(rest.argmax()) if rest.any() else len(rest)
            positions[:, place : place + length] = start + np.arange(length)
            start += length
        else:
            grid = grids[count] if count < len(grids) else (0, 0, 0)
            length = int(np.prod(grid))
            if not length or length > len(rest) or not rest[:length].all():
                message = f"The image tokens of an input do not match its images: grid {list(grid)} in tokens"
                raise ValueError(f"{message} does not fit. Make the features with PumaProcessor.process_inputs.")
            positions[:, place : place + length] = start + np.indices(grid).reshape(3, -1)
            # The next text begins after the longer side, not after the number of tokens.
            start += max(grid[1], grid[2])
            count += 1
        place += length
    return positions, count
