"""A teacher held whole: another model of the student's hidden size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from puma_hf.modeling import PumaModel
from puma_hf.trainer.full_model import check_hidden_size
from puma_hf.trainer.teacher_base import RunningTeacher, model_inputs
from puma_hf.trainer.teacher_fingerprint import base_tensors, settings_of, tensors_sha256


class WholeTeacher(RunningTeacher):
    """A second model, such as a trained one of all layers, whose `[RET]` states the student is to reach.

    It is held beside the student, in evaluation mode and without gradients, and reads the student's own token ids.

    Args:
        model: The teacher. It is frozen.
        student: The pruned model.

    Raises:
        ValueError: If the two are one, or differ in hidden size, reading, or the ids of `[RET]` and of image tokens.

    Source: PUMA, ACM MM 2025, arXiv 2507.08064 distils from the model that was pruned; another teacher is this
    library's addition.
    """

    def __init__(self, model: PumaModel, student: PumaModel) -> None:
        if model is student:
            raise ValueError("The teacher is the student itself. Pass the model that was pruned, or another.")
        check_hidden_size(student, model, type(model).__name__)
        for name in ("ret_token_id", "image_token_id", "video_token_id"):
            ours, theirs = getattr(student.config, name), getattr(model.config, name)
            if ours != theirs:
                raise ValueError(
                    f"The teacher has {name}={theirs} and the student {ours}, but it reads the student's token ids. "
                    "Choose a teacher with the same tokenizer; an original Qwen2-VL gets its [RET] from puma_hf.prune "
                    "with num_kept_layers=<all of its layers>."
                )
        if model.config.positions != student.config.positions:
            raise ValueError(
                f"The teacher has {model.config.positions} positions and the student {student.config.positions}, so it "
                "reads inputs in another way than the student's, which it is given (prune --reading). Choose a teacher "
                "of the student's reading, or the original checkpoint."
            )
        self.student = student
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def states(self, features: dict[str, Any]) -> Tensor:
        """`[RET]` states of the teacher after its final norm, `(batch_size, hidden_size)`, without gradient."""
        model: Any = self.model.to(self.student.device)
        states: Tensor = model.eval()(**model_inputs(self.model, features), return_dict=True).pooler_output
        return states

    def fingerprint(self) -> str:
        """SHA-256 of the teacher's weights, an adapter among them, and settings."""
        layer_types = list(self.model.language_model.config.layer_types)
        tensors = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        return tensors_sha256(base_tensors(self.model) | tensors, settings_of(self.model, layer_types))
