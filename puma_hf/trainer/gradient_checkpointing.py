"""Gradient checkpointing that leaves a frozen vision tower alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel, TrainingArguments

from puma_hf.modeling import PumaModel
from puma_hf.trainer.lora import puma_model

# transformers 5.23 renamed arguments and methods and keeps the old names of the arguments as mirrors.
PREFIX = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"


def set_non_reentrant(args: TrainingArguments) -> bool:
    """Ask for the kind of checkpointing that needs no gradients of its inputs, if checkpointing is asked for.

    Args:
        args: Training arguments, which are completed.

    Returns:
        Whether checkpointing is asked for.

    Raises:
        ValueError: If the arguments insist on the other kind.
    """
    if not getattr(args, f"{PREFIX}_checkpointing"):
        return False
    options: dict[str, Any] = dict(getattr(args, f"{PREFIX}_checkpointing_kwargs") or {})
    if options.setdefault("use_reentrant", False):
        raise ValueError(
            f"{PREFIX}_checkpointing_kwargs has use_reentrant=True, which needs gradients of the inputs: the frozen "
            "vision tower would be computed twice and propagated through. Leave it out, or pass False."
        )
    setattr(args, f"{PREFIX}_checkpointing_kwargs", options)
    return True


@contextmanager
def enabled_by_backbone(model: SentenceTransformer) -> Iterator[None]:
    """In this block a trainer that enables checkpointing asks the backbone itself.

    The method of `SentenceTransformer` is deprecated in new releases and refuses the arguments in old ones.

    Args:
        model: A SentenceTransformer with a PUMA model.
    """
    backbone: Any = puma_model(model)
    name = f"{PREFIX}_checkpointing_enable"
    setattr(model, name, getattr(backbone, name))
    try:
        yield
    finally:
        delattr(model, name)


def spare_frozen_vision(model: PumaModel) -> None:
    """Undo what enabling checkpointing does to a model beyond its decoder layers.

    `transformers` makes the outputs of every embedding require gradients once a model has an adapter, that of
    the image patches too. The frozen vision tower is then computed twice and propagated through to its first
    layer, for gradients that nobody wants. Checkpointing that is not reentrant needs none of these hooks: the
    gradients of the adapter stay the same.

    Args:
        model: A model whose checkpointing is enabled with `use_reentrant=False`. A vision tower with trainable
            weights stays checkpointed.

    Example:

    ```python
    >>> from puma_hf.trainer.gradient_checkpointing import spare_frozen_vision

    >>> model.gradient_checkpointing_enable({"use_reentrant": False})  # doctest: +SKIP
    >>> spare_frozen_vision(model)  # doctest: +SKIP
    ```
    """
    modules: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for module in modules:
        module.disable_input_require_grads()
    if any(parameter.requires_grad for parameter in model.visual.parameters()):
        return
    for part in model.visual.modules():
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = False
