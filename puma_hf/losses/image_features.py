"""Mini-batches of a PUMA column: rows of like length together, image features computed once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2VLModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from puma_hf.modeling.modeling_puma import PumaModel

# Of each medium: the patches of all samples, their grids, and how many of these a sample has.
_MEDIA = {
    "image": ("pixel_values", "image_grid_thw", "num_images_per_sample"),
    "video": ("pixel_values_videos", "video_grid_thw", "num_videos_per_sample"),
}
_MEDIA_KEYS = {key for keys in _MEDIA.values() for key in keys[:2]}
# Features with one column per token, and so the only ones that lose the padding of a mini-batch.
_TOKEN_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids")
_ENCODED = "mm_encoder_outputs"


def find_puma_model(model: nn.Module) -> PumaModel | None:
    """The `PumaModel` inside a SentenceTransformer, however a trainer has wrapped it; None if there is none."""
    inner: Any = model
    while (wrapped := getattr(inner, "_orig_mod", getattr(inner, "module", None))) is not None:
        inner = wrapped
    first = inner[0] if isinstance(inner, nn.Sequential) and len(inner) else None
    backbone: Any = getattr(first, "model", None)
    is_puma = getattr(getattr(backbone, "config", None), "model_type", None) == "puma"
    return backbone if is_puma else None


def runs_tower_once(puma: PumaModel) -> bool:
    """Whether what the vision tower returns may be used twice: it is frozen, and the model takes it back."""
    accepted = _ENCODED in inspect.signature(Qwen2VLModel.forward).parameters
    return accepted and not any(parameter.requires_grad for parameter in puma.visual.parameters())


def can_keep_image_features(model: nn.Module, puma: PumaModel) -> bool:
    """Whether what the vision tower returns may be used again: it is frozen, and can be read and given back.

    Args:
        model: The model as it is called, perhaps wrapped.
        puma: The `PumaModel` inside it.
    """
    compiled = any(hasattr(module, "_orig_mod") for module in model.modules())  # compiled code passes hooks by
    return not compiled and runs_tower_once(puma)


def take_rows(features: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The features of some samples, without the columns of padding that these do not need.

    Args:
        features: What a PUMA input module made of `batch_size` samples. `mm_encoder_outputs` may stand in for
            the pixels.
        rows: Indices of samples, in the order wanted.

    Returns:
        New features of `len(rows)` samples; media that none of these has are left out.

    Raises:
        ValueError: If it is unknown which image belongs to which sample.

    Example:
        >>> features = {
        ...     "input_ids": torch.tensor([[1, 2, 0], [3, 4, 5]]),
        ...     "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        ... }
        >>> take_rows(features, [0])["input_ids"].tolist()
        [[1, 2]]
    """
    batch_size = num_rows(features)
    if list(rows) == list(range(batch_size)):
        return dict(features)
    devices = {value.device for value in features.values() if isinstance(value, Tensor)}
    index = {device: torch.tensor(rows, device=device) for device in devices}
    tokens = _token_window(features, index)
    taken: dict[str, Any] = {}
    for key, value in features.items():
        if key in _MEDIA_KEYS or key == _ENCODED:
            continue
        if not isinstance(value, Tensor):
            taken[key] = value
        elif key in _TOKEN_KEYS:
            taken[key] = value[index[value.device]][:, tokens]
        elif key == "position_ids":  # (axes, batch_size, sequence_length)
            taken[key] = value[:, index[value.device]][..., tokens]
        else:
            in_rows = value.ndim > 0 and value.shape[0] == batch_size
            taken[key] = value[index[value.device]] if in_rows else value
    for medium in _MEDIA:
        _take_media(taken, features, medium, rows)
    return taken


def row_lengths(features: dict[str, Any]) -> list[int]:
    """Tokens of each sample, visual ones among them; without a mask none is padding."""
    mask = features.get("attention_mask")
    if mask is None:
        return [features["input_ids"].shape[1]] * num_rows(features)
    lengths: list[int] = mask.sum(dim=1).tolist()
    return lengths


def num_rows(features: dict[str, Any]) -> int:
    """Number of samples."""
    return int(_first_tensor(features).shape[0])


class MiniBatches:
    """The mini-batches of one column of a PUMA model, for two passes over them.

    Rows are sorted by length, so that a mini-batch holds little padding, and those with images come last:
    gradients are exchanged between devices in the last mini-batch, which must reach a trained vision tower too. A
    single mini-batch keeps the order of the rows. A token budget counts what is computed: the samples of a
    mini-batch times the tokens of its longest, visual ones among them.

    Args:
        features: Features of the column; they stay as they are.
        mini_batch_size: Samples in a mini-batch, unless there is a budget.
        num_tokens: The budget; a sample that exceeds it forms a mini-batch of its own.
        device_type: Where the model runs. Both passes run under the autocast that is on now, as the second one
            is part of the backward pass, which is usually called outside it.

    Attributes:
        order: The rows in the order of the mini-batches.
        costs: `(batch_size, 1)`, such that a greedy packing of rows with a total cost of at most `num_tokens`
            gives the mini-batches.
    """

    def __init__(
        self, features: dict[str, Any], mini_batch_size: int, num_tokens: int | None, device_type: str
    ) -> None:
        self._features = dict(features)
        self._encoded: dict[int, dict[str, Any]] = {}
        lengths = row_lengths(features)
        batch_size, widest = len(lengths), max(lengths, default=0)
        self.order = list(range(batch_size))
        if batch_size > mini_batch_size if num_tokens is None else batch_size * widest > num_tokens:
            has_media = _has_media(features, batch_size)
            self.order.sort(key=lambda row: (has_media[row], lengths[row]))
        self.costs = torch.ones(batch_size, 1, dtype=torch.long)
        if num_tokens is not None:
            begin = 0
            for size in _pack([lengths[row] for row in self.order], num_tokens):
                self.costs[begin] = num_tokens - (size - 1)
                begin += size
        available = torch.amp.is_autocast_available(device_type)
        self._autocast = (device_type, torch.get_autocast_dtype(device_type)) if available else None
        self._autocast_is_on = available and torch.is_autocast_enabled(device_type)

    def take(self, begin: int, end: int) -> dict[str, Any]:
        """Features of one mini-batch, with the image features of an earlier pass if they were kept."""
        features = take_rows(self._features, self.order[begin:end])
        if begin in self._encoded:
            for pixels, _, _ in _MEDIA.values():
                features.pop(pixels, None)
            features[_ENCODED] = {**features.get(_ENCODED, {}), **self._encoded[begin]}
        return features

    @contextmanager
    def keeping(self, puma: PumaModel, features: dict[str, Any], begin: int) -> Iterator[None]:
        """Keep the image features that the model computes for the mini-batch at `begin` in this context."""
        media = [medium for medium, (pixels, _, _) in _MEDIA.items() if features.get(pixels) is not None]
        outputs: list[Any] = []
        # The model runs its tower itself, under whatever wraps it: autocast, another device's shards.
        handle = puma.visual.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            yield
        finally:
            handle.remove()
        if media and len(outputs) == len(media):
            self._encoded[begin] = {
                medium: _encoded(_per_item(output.pooler_output)) for medium, output in zip(media, outputs, strict=True)
            }

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast of the first pass."""
        if self._autocast is None:
            return nullcontext()
        device_type, dtype = self._autocast
        return torch.autocast(device_type, dtype=dtype, enabled=self._autocast_is_on)


def _pack(lengths: Sequence[int], num_tokens: int) -> Iterator[int]:
    """Sizes of consecutive mini-batches of at most `num_tokens` padded tokens, or of one sample."""
    size = widest = 0
    for length in lengths:
        widest = max(widest, length, 1)
        if size and (size + 1) * widest > num_tokens:
            yield size
            size, widest = 0, max(length, 1)
        size += 1
    if size:
        yield size


def _has_media(features: dict[str, Any], batch_size: int) -> list[bool]:
    counts = [features[key].tolist() for _, _, key in _MEDIA.values() if features.get(key) is not None]
    return [any(column[row] for column in counts) for row in range(batch_size)]


def _take_media(taken: dict[str, Any], features: dict[str, Any], medium: str, rows: Sequence[int]) -> None:
    pixels_key, grid_key, count_key = _MEDIA[medium]
    grid, pixels = features.get(grid_key), features.get(pixels_key)
    encoded = (features.get(_ENCODED) or {}).get(medium)
    if grid is None or (pixels is None and encoded is None):
        return
    items = _items_of(rows, features.get(count_key), len(grid), num_rows(features), count_key)
    if not items:
        return
    taken[grid_key] = grid[torch.tensor(items, device=grid.device)]
    if encoded is not None:
        per_item = _per_item(encoded.pooler_output)
        chosen = _encoded(tuple(per_item[item] for item in items))
        taken[_ENCODED] = {**taken.get(_ENCODED, {}), medium: chosen}
    else:
        patches = pixels.split(grid.prod(dim=1).tolist())  # type: ignore[union-attr]
        taken[pixels_key] = torch.cat([patches[item] for item in items])


def _items_of(rows: Sequence[int], counts: Tensor | None, num_items: int, batch_size: int, count_key: str) -> list[int]:
    """Indices of the images (or videos) of some samples."""
    if counts is None:
        if num_items != batch_size:
            raise ValueError(
                f"the features hold {num_items} images or videos of {batch_size} samples but no {count_key!r}, so they "
                "cannot be cut into mini-batches. Make the features with the model's own preprocess."
            )
        return list(rows)
    ends = counts.cumsum(dim=0).tolist()
    starts = [0, *ends[:-1]]
    return [item for row in rows for item in range(starts[row], ends[row])]


def _per_item(pooled: Any) -> tuple[Tensor, ...]:
    return (pooled,) if isinstance(pooled, Tensor) else tuple(pooled)


def _encoded(pooled: Any) -> BaseModelOutputWithPooling:
    """What the tower returns, without the states of all patches, which are as large and which nobody reads."""
    return BaseModelOutputWithPooling(pooler_output=pooled)


def _token_window(features: dict[str, Any], index: dict[torch.device, Tensor]) -> slice:
    """The positions between the first and the last token that one of the rows has."""
    mask = features.get("attention_mask")
    if mask is None:
        return slice(None)
    positions = mask[index[mask.device]].any(dim=0).nonzero().flatten()
    if len(positions) == 0:
        return slice(None)
    first, last = torch.stack([positions[0], positions[-1]]).tolist()
    return slice(first, last + 1)


def _first_tensor(features: dict[str, Any]) -> Tensor:
    tensor: Tensor = features["input_ids"]
    return tensor
