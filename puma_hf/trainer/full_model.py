"""The model that a student was cut from, or another that may teach it: loading and comparing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from puma_hf.checkpoint import StoredWeights
from puma_hf.modeling import PumaConfig, PumaModel
from puma_hf.pruning import place_ret_token
from puma_hf.trainer.teacher_fingerprint import base_tensors, naming_the_teacher, open_teacher

_LAYER = re.compile(r"(?<=^language_model\.layers\.)\d+")


class StoredModel:
    """A checkpoint with all its layers, in the student's data type and with its kind of attention; read in parts.

    Attributes:
        config: Its configuration.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If its hidden size differs from the student's.
    """

    def __init__(self, source: str | Path, student: PumaModel, *, revision: str | None = None) -> None:
        self._checkpoint = open_teacher(source, revision=revision)
        self._loading: dict[str, Any] = {
            "dtype": student.dtype,
            # Both halves see the mask that is built for the student's kind of attention.
            "attn_implementation": student.config._attn_implementation,
        }
        self._source, self._device, self._positions = source, student.device, student.config.positions
        with naming_the_teacher(source):
            self.config = PumaConfig.from_pretrained(self._checkpoint.folder, **self._loading)
        check_hidden_size(student, self, repr(str(source)))

    def tensors(self) -> StoredWeights:
        """All tensors, each read when it is asked for."""
        return StoredWeights(self._checkpoint)

    def layers(self, numbers: Sequence[int]) -> nn.ModuleList:
        """The decoder layers of these numbers, on the student's device; nothing else is read.

        Raises:
            ValueError: If the checkpoint lacks a tensor of theirs.
        """
        with torch.device("meta"):
            every = PumaModel(self.config).language_model.layers
        layers = nn.ModuleList(every[number] for number in numbers)
        stored, tensors = self.tensors(), {}
        for name, parameter in layers.named_parameters():
            index, _, rest = name.partition(".")
            number = numbers[int(index)]
            tensor = stored.get(f"language_model.layers.{number}.{rest}")
            if tensor is None or tensor.shape != parameter.shape:
                raise ValueError(
                    f"The teacher {str(self._source)!r} lacks a tensor that its config.json promises, or has one of "
                    f"another shape (layer {number}, {rest}). Download it again."
                )
            tensors[name] = tensor.to(self._device, self._loading["dtype"], copy=True)
        layers.load_state_dict(tensors, assign=True)
        return layers

    def load(self) -> PumaModel:
        """The whole model; if its tokenizer has no `[RET]`, that gets the row that pruning would give it."""
        with naming_the_teacher(self._source):
            revision = self._checkpoint.revision or "main"
            full: PumaModel = PumaModel.from_pretrained(self._source, revision=revision, **self._loading)
            if full.config.ret_token_id is None:
                place_ret_token(full, AutoTokenizer.from_pretrained(self._checkpoint.folder))
                full.config.positions = self._positions
        return full


def dropped_layers(full: PumaModel | StoredModel, student: PumaModel) -> nn.ModuleList:
    """The layers of a full model that the student does not have, in order, on its device."""
    kept, text_config = set(student.config.layers_of_original), cast(Any, full.config.text_config)
    dropped = [number for number in range(text_config.num_hidden_layers) if number not in kept]
    if isinstance(full, StoredModel):
        return full.layers(dropped)
    return nn.ModuleList(full.language_model.layers[number] for number in dropped).to(student.device)


def renumbered(tensors: Mapping[str, Tensor], numbers: Sequence[int]) -> dict[str, Tensor]:
    """Tensors by the numbers that their layers have in the original, given in order."""
    return {_LAYER.sub(lambda old: str(numbers[int(old[0])]), name): tensor for name, tensor in tensors.items()}


def check_hidden_size(student: PumaModel, teacher: PumaModel | StoredModel, name: str) -> None:
    """Raise ValueError if the states of the two cannot be compared."""
    ours: Any = student.config.text_config
    theirs: Any = teacher.config.text_config
    if ours.hidden_size != theirs.hidden_size:
        raise ValueError(
            f"The teacher {name} has hidden_size={theirs.hidden_size} and the student "
            f"{ours.hidden_size}. States of different sizes cannot be compared: choose the checkpoint "
            "that was pruned, or another of the student's hidden size."
        )


def check_depth(student: PumaModel, num_dropped_layers: int) -> None:
    """Raise ValueError if so many layers do not complete the student to its original depth."""
    if len(student.language_model.layers) + num_dropped_layers != student.config.original_num_hidden_layers:
        raise ValueError(
            f"The student keeps {student.config.num_kept_layers} of "
            f"{student.config.original_num_hidden_layers} layers, but {num_dropped_layers} dropped "
            "layers were given. Load the teacher from the checkpoint that was pruned."
        )


def different_base_weights(student: PumaModel, full: PumaModel | StoredModel) -> list[str]:
    """Names of the student's base weights that are not those of the full model."""
    theirs: Mapping[str, Tensor] = full.tensors() if isinstance(full, StoredModel) else dict(full.named_parameters())
    different, ours = [], base_tensors(student)
    depth: Any = full.config.text_config
    if depth.num_hidden_layers == student.config.original_num_hidden_layers:  # else it may be the student itself
        ours = renumbered(ours, student.config.layers_of_original)
    for name, parameter in ours.items():
        other = theirs.get(name)
        if other is not None and isinstance(full, StoredModel):
            other = other.to(student.dtype)
        if (
            other is None
            or other.dtype != parameter.dtype
            or not all(
                torch.equal(parameter[rows].cpu(), other[rows].detach().cpu())
                for rows in _compared_rows(name, student, len(parameter), len(other))
            )
        ):
            different.append(name)
    return different


def _compared_rows(name: str, student: PumaModel, ours: int, theirs: int) -> list[slice]:
    if name != "language_model.embed_tokens.weight":
        return [slice(None)]
    # Pruning may have added rows, and made one that of [RET].
    rows, ret_row = min(ours, theirs), student.config.ret_token_id
    return [slice(rows)] if ret_row is None else [slice(min(ret_row, rows)), slice(ret_row + 1, rows)]
