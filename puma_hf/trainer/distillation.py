"""Self-distillation of a pruned model from the model it was cut from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from puma_hf.losses import SelfDistillationLoss
from puma_hf.modeling import PumaModel
from puma_hf.trainer.lora import puma_model
from puma_hf.trainer.puma import PumaTrainer
from puma_hf.trainer.teacher import FrozenTeacher, share_image_features


class PumaDistillationTrainer(PumaTrainer):
    """Trains a pruned model to reach after k layers the `[RET]` state that the full model reaches after all.

    No labels are needed: every column of `train_dataset` holds inputs of any modality, and one column is
    enough. Give the model a LoRA adapter first (`add_lora`): the frozen teacher shares the student's base
    weights, and the vision tower runs once for both.

    Args:
        args: The arguments of `SentenceTransformerTrainer`, and likewise in `kwargs`; the model is a pruned PUMA
            `SentenceTransformer` with an adapter.
        teacher: A [`FrozenTeacher`], or the checkpoint that was pruned; by default the one that the model's
            configuration names.
        loss: By default `SelfDistillationLoss(model)`, the mean squared distance of the states.
        kwargs: See `args`.

    Raises:
        ValueError: If there is no teacher, base weights are trainable, or the teacher is not what was pruned.

    Example:

    ```python
    >>> from puma_hf import PumaDistillationTrainer, add_lora, lora_config

    >>> add_lora(model, lora_config(r=64))  # doctest: +SKIP
    >>> trainer = PumaDistillationTrainer(model=model, teacher="Qwen/Qwen2-VL-2B-Instruct", args=args,
    ...                                   train_dataset=dataset)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    ```

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, layer-pruned self-distillation.
    """

    def __init__(
        self,
        *args: Any,
        teacher: FrozenTeacher | str | Path | None = None,
        loss: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if not isinstance(model, SentenceTransformer):
            raise ValueError(f"model must be a SentenceTransformer, got {type(model).__name__}.")
        super().__init__(*args, loss=SelfDistillationLoss(model) if loss is None else loss, **kwargs)
        backbone = puma_model(model)
        trained = [
            name
            for name, parameter in backbone.named_parameters()
            if parameter.requires_grad and ".lora_" not in name and "trainable_tokens" not in name
        ]
        if trained:
            raise ValueError(
                f"{len(trained)} base weights are trainable (first: {trained[0]}), and the frozen teacher "
                "shares them with the student. Freeze them and add an adapter: "
                "puma_hf.add_lora(model, puma_hf.lora_config())."
            )
        self.teacher = _load_teacher(teacher, backbone)

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Features of each column, and the teacher's states `(batch_size, num_columns, hidden_size)`."""
        features, _ = super().collect_features(inputs)
        # accelerate wraps only the model's own call in autocast; the teacher is asked outside it.
        with self.accelerator.autocast():
            for column in features:
                share_image_features(self.teacher.student, column)
            states = [self.teacher.states(column) for column in features]
        return features, torch.stack(states, dim=1)


def _load_teacher(teacher: FrozenTeacher | str | Path | None, student: PumaModel) -> FrozenTeacher:
    if isinstance(teacher, FrozenTeacher):
        return teacher
    if teacher is not None:
        return FrozenTeacher.from_pretrained(teacher, student)
    source = student.config.source_name_or_path
    if source is None:
        raise ValueError("The model does not name the checkpoint it was pruned from. Pass teacher=<that checkpoint>.")
    # Of a local checkpoint, pruning notes the folder's name alone; a Hub id has an owner.
    if "/" not in source and not Path(source).is_dir():
        raise ValueError(
            f"The model was pruned from a local folder named {source!r}, which is not here. Pass "
            "teacher=<path of that folder> (--teacher)."
        )
    return FrozenTeacher.from_pretrained(source, student, revision=student.config.source_revision)
