"""The one-pass teacher: the dropped layers go on where the student's last kept layer ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from puma_hf.losses.self_distillation import TEACHER_KEY
from puma_hf.modeling.modeling_puma import last_token_state
from puma_hf.trainer.full_model import check_depth
from puma_hf.trainer.lora import puma_model
from puma_hf.trainer.teacher_base import Teacher, decoder_layers


class OnePassTeacher(Teacher):
    """Runs the dropped layers on the student's own states after layer k, without gradient, and the final norm.

    Nothing is computed twice, so a step costs the student's plus one forward pass of the dropped layers. The teacher
    moves with the student: at the start of training, while the adapter changes nothing, it is the frozen one. The
    student's base weights need not be the original ones.

    It can collapse: the student may come near its teacher by making all states alike. On the demo's backbone, cut to
    3 of 8 layers, 60 steps at a learning rate of 2e-3 brought the effective rank of the states down to 6 to 10 (with
    the frozen teacher: 30) and local hit@1 from 31 to 3 (benchmarks/ablation.py). For that reason the frozen teacher
    is the default.

    Args:
        model: The pruned model.
        dropped_layers: The decoder layers that pruning removed, in order.

    Raises:
        ValueError: If the model is no PUMA model, or the layers do not complete it to its original depth.

    Source: one reading of the figure in PUMA, ACM MM 2025, arXiv 2507.08064, layer-pruned self-distillation.
    """

    def __init__(self, model: SentenceTransformer, dropped_layers: nn.ModuleList) -> None:
        self.student = puma_model(model)
        check_depth(self.student, len(dropped_layers))
        self._input_module: nn.Module = model[0]
        modules: list[Any] = list(dropped_layers)
        self._dropped_layer_types = [module.self_attn.layer_type for module in modules]
        self.dropped_layers = dropped_layers.requires_grad_(False).eval()
        self._kept_output: Tensor | None = None
        self._state: Tensor | None = None

    def add_states(self, features: dict[str, Any]) -> None:
        """Nothing yet: the state is there after the student's forward pass."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, every forward pass of the student adds `teacher_state` `(batch_size, hidden_size)`."""
        decoder: Any = self.student.language_model
        # The decoder and its norm run outside of gradient checkpointing: nothing here runs again in the backward
        # pass, when the hooks are gone besides.
        hooks = (
            decoder.norm.register_forward_pre_hook(self._keep_output),
            decoder.register_forward_hook(self._go_on, with_kwargs=True),
            self._input_module.register_forward_hook(self._add_state),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._kept_output = self._state = None

    def _keep_output(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        self._kept_output = args[0].detach()

    @torch.no_grad()
    def _go_on(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.dropped_layers.to(self.student.device)
        inputs = {key: value for key, value in kwargs.items() if not key.startswith("output_")}
        inputs["inputs_embeds"] = self._kept_output
        # The decoder's own forward pass makes masks and rotary angles as the dropped layers knew them.
        with decoder_layers(decoder, self.dropped_layers, self._dropped_layer_types):
            states = decoder.forward(**inputs).last_hidden_state
        self._state = last_token_state(states, kwargs.get("attention_mask"))
        self._kept_output = None

    def _add_state(self, module: nn.Module, args: tuple[Any, ...], features: dict[str, Any]) -> None:
        features[TEACHER_KEY], self._state = self._state, None
