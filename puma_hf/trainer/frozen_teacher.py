"""The frozen teacher: `[RET]` states of the full model, from the student's weights and the dropped layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from puma_hf.modeling import PumaModel
from puma_hf.trainer.full_model import StoredModel, check_depth, different_base_weights, dropped_layers, renumbered
from puma_hf.trainer.lora import has_adapter
from puma_hf.trainer.teacher_base import RunningTeacher, decoder_layers, model_inputs, share_image_features
from puma_hf.trainer.teacher_fingerprint import base_tensors, settings_of, tensors_sha256


class FrozenTeacher(RunningTeacher):
    """The full, untouched model, which tells `[RET]` states to the student that was cut from it.

    One copy of the weights serves both: with adapters switched off, the student's kept layers are the teacher's,
    and only the dropped ones are held besides. It never enters the optimizer or a checkpoint.

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

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, layer-pruned self-distillation, whose released code has a frozen
    teacher, too; there it is a second model.
    """

    shares_base_weights = True

    def __init__(self, student: PumaModel, dropped_layers: nn.ModuleList) -> None:
        check_depth(student, len(dropped_layers))
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
        full = StoredModel(source, student, revision=revision)
        if different := different_base_weights(student, full):
            raise ValueError(
                f"{str(source)!r} and the student differ in {len(different)} tensors that both have (first: "
                f"{different[0]}), so the two cannot share one copy of the weights. Distil from the "
                "checkpoint that was pruned, before any other training; or give PumaDistillationTrainer this one as "
                "teacher, which it holds whole, or asks once with teacher_mode='cached'."
            )
        return cls(student, dropped_layers(full, student))

    def add_states(self, features: dict[str, Any]) -> None:
        """Put `teacher_state` into the features, and run the vision tower once for student and teacher."""
        share_image_features(self.student, features)
        super().add_states(features)

    @torch.no_grad()
    def states(self, features: dict[str, Any]) -> Tensor:
        """`[RET]` states of the full model after its final norm.

        Args:
            features: Features of one column, as the input module made them.

        Returns:
            `(batch_size, hidden_size)`, without gradient.
        """
        inputs = model_inputs(self.student, features)
        with self._full_depth():
            states: Tensor = self.student(**inputs, return_dict=True).pooler_output
        return states

    def fingerprint(self) -> str:
        """SHA-256 of the full model's weights and settings, whatever the adapter has learned."""
        kept = self.student.config.layers_of_original
        numbers = [number for number in range(len(kept) + len(self.dropped_layers)) if number not in kept]
        others = {f"language_model.layers.{name}": tensor for name, tensor in self.dropped_layers.named_parameters()}
        tensors = renumbered(base_tensors(self.student), kept) | renumbered(others, numbers)
        return tensors_sha256(tensors, settings_of(self.student, self._layer_types()))

    def _in_order(self, kept: Iterable[Any], dropped: Iterable[Any]) -> list[Any]:
        """What belongs to the student's layers, and what to the dropped ones, in the order of the original."""
        there, others = dict(zip(self.student.config.layers_of_original, kept, strict=True)), iter(dropped)
        total = len(there) + len(self.dropped_layers)
        return [there[number] if number in there else next(others) for number in range(total)]

    def _layer_types(self) -> list[str]:
        return self._in_order(self.student.language_model.config.layer_types, self._dropped_layer_types)

    @contextmanager
    def _full_depth(self) -> Iterator[None]:
        student, decoder = self.student, self.student.language_model
        training = [module for module in student.modules() if module.training]
        adapted = has_adapter(student)
        self.dropped_layers.to(student.device)
        layers = self._in_order(decoder.layers, self.dropped_layers)
        try:
            student.eval()
            if adapted:
                student.disable_adapters()
            with decoder_layers(decoder, layers, self._layer_types()):
                yield
        finally:
            if adapted:
                student.enable_adapters()
            for module in training:
                module.training = True
