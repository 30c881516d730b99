"""Parameters and floating-point operations of one input, counted on the real model."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: torch.nn.Module) -> int:
    """Number of parameters, each shared one once.

    Example:

    ```python
    >>> import torch
    >>> from puma_hf.flops import count_parameters

    >>> count_parameters(torch.nn.Linear(3, 2))
    8
    ```
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: SentenceTransformer, item: Any, prompt: str | None = None) -> int:
    """Floating-point operations of embedding one input: every matrix product, convolution and attention.

    A multiplication and an addition count as two. Elementwise operations are not counted; they are a small
    part.

    Args:
        model: A SentenceTransformer on any device.
        item: One input, such as a string or `{"image": path}`.
        prompt: Its instruction.

    Returns:
        The count.

    Example:

    ```python
    >>> from puma_hf.flops import count_flops

    >>> count_flops(model, "a red apple") < count_flops(model, {"image": "apple.png"})  # doctest: +SKIP
    True
    ```
    """
    features = model.preprocess([item], prompt=prompt)
    features = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in features.items()}
    # The counter knows products, not every fused attention kernel: let attention be computed as products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(features)
    return int(counter.get_total_flops())
