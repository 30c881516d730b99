"""Weights that FSDP has spread over devices, put together for as long as they are saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sentence_transformers import SentenceTransformer
from torch.distributed.tensor import DTensor


@contextmanager
def whole_weights(model: SentenceTransformer) -> Iterator[None]:
    """Let a model under FSDP2 be saved as if it were whole. All processes must enter; else nothing happens.

    sentence-transformers saves what a process holds itself, which is a part. Here the trained tensors, those of the
    adapter, are put together on every device; the frozen ones, which are not saved, stay parts.

    Args:
        model: The model, which the trainer has sharded in place.

    Example:

    ```python
    >>> from puma_hf.trainer.sharding import whole_weights

    >>> with whole_weights(model):  # doctest: +SKIP
    ...     model.save_pretrained("adapter")
    ```
    """
    first: Any = model[0]
    backbone: Any = getattr(first, "model", first)
    parameters = dict(backbone.named_parameters())
    if not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        yield
        return
    whole = {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for name, parameter in parameters.items()
        if parameter.requires_grad
    }
    original = backbone.state_dict
    backbone.state_dict = lambda *args, **kwargs: {**original(*args, **kwargs), **whole}
    try:
        yield
    finally:
        del backbone.state_dict
