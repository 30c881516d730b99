"""What every depth of a model costs: parameters, bytes, and operations counted once and split by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from puma_hf.evaluation.layer_states import decoder_of
from puma_hf.flops import plain_forward

TEXT_TOKENS = 64
_SIDE = 16  # tokens along each side of a square image


@dataclass(frozen=True)
class LayerCosts:
    """What the models pruned to k = 1 .. L layers cost; entry k - 1 of each is that of k layers.

    Args:
        parameters: Parameters, each shared one once.
        bytes: Their bytes in the model's own data type.
        flops_text: Operations of a text whose whole prompt has `text_tokens` tokens.
        flops_image: Operations of an image of `image_tokens` visual tokens, vision tower included.
        text_tokens: Length of that text's prompt, 64.
        image_tokens: Visual tokens of that image: 256, or as many as the model's own limits leave of them.
    """

    parameters: tuple[int, ...]
    bytes: tuple[int, ...]
    flops_text: tuple[int, ...]
    flops_image: tuple[int, ...]
    text_tokens: int
    image_tokens: int


def layer_costs(model: SentenceTransformer) -> LayerCosts:
    """Count what each depth costs, on the real model.

    Args:
        model: A `SentenceTransformer` of a PUMA directory of L layers, on any device.

    Returns:
        The costs of all depths; each equals that of the model pruned to it.

    Raises:
        ValueError: If the model is no PUMA model.

    Example:
        >>> layer_costs(model).parameters[-1]  # doctest: +SKIP
        1543714304
    """
    layers = decoder_of(model).layers
    puma: Any = model[0]
    every = list(model.parameters())
    text: dict[str, Any] = model.preprocess([" ".join(["a"] * 8 * TEXT_TOKENS)], max_length=TEXT_TOKENS)
    picture = _picture(puma.processor.image_processor)
    # A model that was trained on short texts alone may have a limit below that of a picture's tokens.
    image: dict[str, Any] = model.preprocess([{"image": picture}], max_length=10 * _SIDE**2)
    return LayerCosts(
        parameters=_cut(_parameters(every), [_parameters(layer.parameters()) for layer in layers]),
        bytes=_cut(_bytes(every), [_bytes(layer.parameters()) for layer in layers]),
        flops_text=flops_by_depth(model, text),
        flops_image=flops_by_depth(model, image),
        text_tokens=int(text["attention_mask"].sum()),
        image_tokens=int((image["input_ids"] == puma.model.config.image_token_id).sum()),
    )


def flops_by_depth(model: SentenceTransformer, features: dict[str, Any]) -> tuple[int, ...]:
    """Operations of one batch at every depth, from one forward pass of the whole model.

    What is counted is what `puma_hf.flops.count_flops` counts: matrix products, convolutions and attention.

    Args:
        model: A `SentenceTransformer` of a PUMA directory of L layers.
        features: What its `preprocess` returned.

    Returns:
        L numbers; number k - 1 equals the count of the model pruned to k layers.
    """
    layers = decoder_of(model).layers
    spent = [0] * len(layers)
    features = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in features.items()}
    # The counter knows products, not every fused attention kernel: let attention be computed as products.
    way = plain_forward(model)
    with way, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:

        def begin(layer: nn.Module, args: Any) -> None:
            spent[index[layer]] -= counter.get_total_flops()

        def end(layer: nn.Module, args: Any, output: Any) -> None:
            spent[index[layer]] += counter.get_total_flops()

        index = {layer: number for number, layer in enumerate(layers)}
        hooks = [layer.register_forward_pre_hook(begin) for layer in layers]
        hooks += [layer.register_forward_hook(end) for layer in layers]
        try:
            model(features)
        finally:
            for hook in hooks:
                hook.remove()
    return _cut(int(counter.get_total_flops()), spent)


def _cut(total: int, by_layer: list[int]) -> tuple[int, ...]:
    """`total` without the layers from k on, for k = 1 .. L."""
    return tuple(total - sum(by_layer[kept:]) for kept in range(1, len(by_layer) + 1))


def _parameters(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _picture(image_processor: Any) -> Image.Image:
    side = _SIDE * image_processor.patch_size * image_processor.merge_size
    return Image.new("RGB", (side, side), "white")
