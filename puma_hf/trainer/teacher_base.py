"""What every teacher has in common: it puts `[RET]` states beside the features of a column."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from puma_hf.losses.cached_mac_puma import runs_tower_once
from puma_hf.losses.distillation_puma import TEACHER_KEY
from puma_hf.modeling import PumaModel


class Teacher(ABC):
    """Tells the student's trainer the `[RET]` states that the student is to reach.

    A teacher belongs to the trainer alone: never to the model, the loss, the optimizer or a checkpoint.

    Attributes:
        shares_base_weights: Whether training the student's base weights would change this teacher.
    """

    shares_base_weights = False

    @abstractmethod
    def add_states(self, features: dict[str, Any]) -> None:
        """Put `teacher_state` `(batch_size, hidden_size)` into the features of one column, before the student runs."""


class RunningTeacher(Teacher):
    """A teacher with weights of its own, which can be asked for the states of any features."""

    @abstractmethod
    def states(self, features: dict[str, Any]) -> Tensor:
        """`[RET]` states after the final norm, `(batch_size, hidden_size)`, without gradient."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of all weights and settings that the states depend on."""

    def add_states(self, features: dict[str, Any]) -> None:
        """Put `teacher_state` `(batch_size, hidden_size)` into the features of one column."""
        features[TEACHER_KEY] = self.states(features)


def model_inputs(model: PumaModel, features: dict[str, Any]) -> dict[str, Any]:
    """Those features that the model's forward pass takes."""
    accepted = inspect.signature(model.forward).parameters
    return {key: value for key, value in features.items() if key in accepted}


@contextmanager
def decoder_layers(decoder: Any, layers: Iterable[nn.Module], layer_types: list[str]) -> Iterator[None]:
    """Let the decoder run other layers for a while."""
    before = decoder.layers, decoder.config.layer_types, decoder.has_sliding_layers
    try:
        decoder.layers = nn.ModuleList(layers)
        decoder.config.layer_types = layer_types
        decoder.has_sliding_layers = "sliding_attention" in layer_types
        yield
    finally:
        decoder.layers, decoder.config.layer_types, decoder.has_sliding_layers = before


def share_image_features(model: PumaModel, features: dict[str, Any]) -> None:
    """Run the vision tower once for student and teacher, where it is frozen and its output can be passed on.

    `pixel_values` and `pixel_values_videos` `(num_patches, patch_dim)` in `features` give way to
    `mm_encoder_outputs`.
    """
    visual = {"image": "pixel_values", "video": "pixel_values_videos"}
    present = [kind for kind, key in visual.items() if features.get(key) is not None]
    if not present or not runs_tower_once(model):
        return
    encode: dict[str, Any] = {"image": model.get_image_features, "video": model.get_video_features}
    with torch.no_grad():
        features["mm_encoder_outputs"] = {
            kind: encode[kind](features.pop(visual[kind]), features[f"{kind}_grid_thw"], return_dict=True)
            for kind in present
        }
