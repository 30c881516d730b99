"""The model that a student was cut from, or another that may teach it: loading and comparing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from puma_hf.modeling import PumaModel
from puma_hf.trainer.teacher_fingerprint import base_tensors, naming_the_teacher, open_teacher


def load_full_model(source: str | Path, student: PumaModel, *, revision: str | None = None) -> PumaModel:
    """Open a checkpoint with all its layers, in the student's data type and with its kind of attention.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If its hidden size differs from the student's.
    """
    checkpoint = open_teacher(source, revision=revision)
    with naming_the_teacher(source):
        full: PumaModel = PumaModel.from_pretrained(
            source,
            dtype=student.dtype,
            revision=checkpoint.revision or revision or "main",
            # Both halves see the mask that is built for the student's kind of attention.
            attn_implementation=student.config._attn_implementation,
        )
    check_hidden_size(student, full, repr(str(source)))
    return full


def check_hidden_size(student: PumaModel, teacher: PumaModel, name: str) -> None:
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


def different_base_weights(student: PumaModel, full: PumaModel) -> list[str]:
    """Names of the student's base weights that are not those of the full model."""
    theirs = {name: parameter.detach() for name, parameter in full.named_parameters()}
    different = []
    for name, parameter in base_tensors(student).items():
        other = theirs.get(name)
        if (
            other is None
            or other.dtype != parameter.dtype
            or not all(
                torch.equal(parameter[rows].cpu(), other[rows].cpu())
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
