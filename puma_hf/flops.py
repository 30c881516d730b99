"""Parameters and floating-point operations of one input, counted on the real model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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


@contextmanager
def plain_forward(model: SentenceTransformer) -> Iterator[None]:
    """Within the block, a PUMA model computes every layer for every token, as `AutoModel` does.

    Args:
        model: A SentenceTransformer; of another kind it stays as it is.

    Example:

    ```python
    >>> from puma_hf.flops import plain_forward

    >>> with plain_forward(model):  # doctest: +SKIP
    ...     slow = model.encode(["a red apple"])
    ```
    """
    module: Any = model[0]
    if not hasattr(module, "fast_path"):
        yield
        return
    fast_path, module.fast_path = module.fast_path, None
    try:
        yield
    finally:
        module.fast_path = fast_path


def count_flops(model: SentenceTransformer, item: Any, prompt: str | None = None, *, fast: bool = False) -> int:
    """Floating-point operations of embedding one input: every matrix product, convolution and attention.

    A multiplication and an addition count as two. Elementwise operations are not counted; they are a small
    part.

    Args:
        model: A SentenceTransformer on any device.
        item: One input, such as a string or `{"image": path}`.
        prompt: Its instruction.
        fast: Whether to count what `encode` spends, with the savings of a PUMA model's `fast_path`, instead of every
            layer for every token.

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
    way = nullcontext() if fast else plain_forward(model)
    with way, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(features)
    return int(counter.get_total_flops())
