"""The frozen teacher: `[RET]` states of the full model, from the student's weights and the dropped layers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2VLModel

from puma_hf.modeling import PumaModel
from puma_hf.trainer.lora import has_adapter

logger = logging.getLogger(__name__)


class FrozenTeacher:
    """The full, untouched model, which tells `[RET]` states to the student that was cut from it.

    One copy of the weights serves both: with adapters switched off, the student's kept layers are the
    teacher's first layers, and only the dropped ones are held besides. It never enters the optimizer or a
    checkpoint.

    Args:
        student: The pruned model, whose base weights must not be trained (LoRA leaves them alone).
        dropped_layers: The decoder layers that pruning removed, in order.

    Raises:
        ValueError: If the layers do not complete the student to its original depth.

    Example:

    ```python
    >>> from puma_hf.trainer import FrozenTeacher

    >>> teacher = FrozenTeacher.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", student)  # doctest: +SKIP
    >>> teacher.states(features).shape  # doctest: +SKIP
    torch.Size([8, 1536])
    ```

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, layer-pruned self-distillation. The figure leaves open
    whether the teacher is frozen; this one is.
    """

    def __init__(self, student: PumaModel, dropped_layers: nn.ModuleList) -> None:
        depth = len(student.language_model.layers) + len(dropped_layers)
        if depth != student.config.original_num_hidden_layers:
            raise ValueError(
                f"The student keeps {student.config.num_kept_layers} of "
                f"{student.config.original_num_hidden_layers} layers, but {len(dropped_layers)} dropped "
                "layers were given. Load the teacher from the checkpoint that was pruned."
            )
        self.student = student
        modules: list[Any] = list(dropped_layers)
        self._dropped_layer_types = [module.self_attn.layer_type for module in modules]
        self.dropped_layers = dropped_layers.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, source: str | Path, student: PumaModel, *, revision: str | None = None) -> FrozenTeacher:
        """Load what pruning dropped from the original checkpoint (or a PUMA directory with all its layers).

        Args:
            source: Folder or Hub id.
            student: The pruned model.
            revision: Branch, tag or commit on the Hub.

        Raises:
            ValueError: If the checkpoint's weights, the dropped layers and the row of `[RET]` aside, are not
                the student's, or its hidden size differs.
        """
        full = PumaModel.from_pretrained(
            source,
            dtype=student.dtype,
            revision=revision or "main",
            # Both halves see the mask that is built for the student's kind of attention.
            attn_implementation=student.config._attn_implementation,
        )
        ours: Any = student.config.text_config
        theirs: Any = full.config.text_config
        if ours.hidden_size != theirs.hidden_size:
            raise ValueError(
                f"The teacher {str(source)!r} has hidden_size={theirs.hidden_size} and the student "
                f"{ours.hidden_size}. States of different sizes cannot be compared: choose the checkpoint "
                "that was pruned."
            )
        if different := _different_base_weights(student, full):
            raise ValueError(
                f"{str(source)!r} and the student differ in {len(different)} tensors that both have (first: "
                f"{different[0]}), so the two cannot share one copy of the weights. Distil from the "
                "checkpoint that was pruned, before any other training."
            )
        kept = len(student.language_model.layers)
        return cls(student, nn.ModuleList(full.language_model.layers[kept:]).to(student.device))

    @torch.no_grad()
    def states(self, features: dict[str, Any]) -> Tensor:
        """`[RET]` states of the full model after its final norm.

        Args:
            features: Features of one column, as the input module made them.

        Returns:
            `(batch_size, hidden_size)`, without gradient.
        """
        accepted = inspect.signature(self.student.forward).parameters
        inputs = {key: value for key, value in features.items() if key in accepted}
        with self._full_depth():
            states: Tensor = self.student(**inputs, return_dict=True).pooler_output
        return states

    @contextmanager
    def _full_depth(self) -> Iterator[None]:
        student, decoder = self.student, self.student.language_model
        kept, layer_types, has_sliding = (
            decoder.layers,
            decoder.config.layer_types,
            decoder.has_sliding_layers,
        )
        training = [module for module in student.modules() if module.training]
        adapted = has_adapter(student)
        self.dropped_layers.to(student.device)
        try:
            student.eval()
            if adapted:
                student.disable_adapters()
            decoder.layers = nn.ModuleList([*kept, *self.dropped_layers])
            decoder.config.layer_types = [*layer_types, *self._dropped_layer_types]
            decoder.has_sliding_layers = "sliding_attention" in decoder.config.layer_types
            yield
        finally:
            decoder.layers, decoder.config.layer_types = kept, layer_types
            decoder.has_sliding_layers = has_sliding
            if adapted:
                student.enable_adapters()
            for module in training:
                module.training = True


def share_image_features(model: PumaModel, features: dict[str, Any]) -> None:
    """Run the vision tower once for student and teacher, where it is frozen and its output can be passed on.

    `pixel_values` `(num_patches, patch_dim)` in `features` gives way to `mm_encoder_outputs`.
    """
    accepts_features = "mm_encoder_outputs" in inspect.signature(Qwen2VLModel.forward).parameters
    if features.get("pixel_values") is None or not accepts_features:
        return
    if any(parameter.requires_grad for parameter in model.visual.parameters()):
        return
    with torch.no_grad():
        encoded = model.get_image_features(features.pop("pixel_values"), features["image_grid_thw"], return_dict=True)
    features["mm_encoder_outputs"] = {"image": encoded}


def _different_base_weights(student: PumaModel, full: PumaModel) -> list[str]:
    """Names of the student's base weights that are not those of the full model."""
    theirs = {name: parameter.detach() for name, parameter in full.named_parameters()}
    different = []
    for full_name, parameter in student.named_parameters():
        if ".lora_" in full_name or "trainable_tokens" in full_name:
            continue
        # peft wraps the layers that it adapts.
        name = full_name.replace(".base_layer.", ".").replace(".token_adapter.", ".")
        other = theirs.get(name)
        if other is None or not all(
            torch.equal(parameter[rows].cpu(), other[rows].cpu())
            for rows in _compared_rows(name, student, len(parameter), len(other))
        ):
            different.append(name)
    return different


def _compared_rows(name: str, student: PumaModel, ours: int, theirs: int) -> list[slice]:
    if name != "language_model.embed_tokens.weight":
        return [slice(None)]
    # Pruning may have added rows, and made one that of [RET].
    rows, ret_row = min(ours, theirs), student.config.ret_token_id
    return [slice(rows)] if ret_row is None else [slice(min(ret_row, rows)), slice(ret_row + 1, rows)]
