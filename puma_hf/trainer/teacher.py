"""Choosing a teacher: where its weights come from, and how often it is asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from puma_hf.configs import TeacherMode
from puma_hf.modeling import PumaModel
from puma_hf.settings import convert
from puma_hf.trainer.frozen_teacher import FrozenTeacher
from puma_hf.trainer.full_model import StoredModel, check_hidden_size, different_base_weights, dropped_layers
from puma_hf.trainer.lora import puma_model
from puma_hf.trainer.quantization import is_quantized
from puma_hf.trainer.teacher_base import RunningTeacher, Teacher
from puma_hf.trainer.whole_teacher import WholeTeacher

logger = logging.getLogger(__name__)

TeacherSource = str | Path | PumaModel | SentenceTransformer | Teacher

__all__ = [
    "FrozenTeacher",
    "TeacherMode",
    "TeacherSource",
    "check_teacher_mode",
    "frozen_teacher",
    "teacher_loader",
]


def check_teacher_mode(mode: str, cache: str | Path | None, teacher: Any) -> None:
    """Raise ValueError if the mode is unknown, or does not go with the other arguments."""
    convert("teacher_mode", mode, TeacherMode)
    if cache is not None and mode != "cached":
        raise ValueError(
            f"teacher_cache={str(cache)!r} is where teacher_mode='cached' stores states, but teacher_mode is {mode!r}. "
            "Choose teacher_mode='cached', or leave teacher_cache out."
        )
    if mode == "cached" and isinstance(teacher, Teacher) and not isinstance(teacher, RunningTeacher):
        raise ValueError(
            f"teacher_mode='cached' asks a teacher before training, but a {type(teacher).__name__} is no "
            "RunningTeacher, which computes states. Pass the checkpoint that was pruned, a model, or a FrozenTeacher."
        )


def frozen_teacher(teacher: TeacherSource | None, student: PumaModel, *, revision: str | None = None) -> Teacher:
    """A teacher that never moves: one copy of the weights with the student where that is possible.

    Args:
        teacher: Path or Hub id of a checkpoint (by default the one that was pruned, which the student's configuration
            names), a model of the student's hidden size, or a teacher, which is returned. What does not share its
            weights with the student is held whole beside it, and a warning says why and what that takes.
        student: The pruned model.
        revision: Branch, tag or commit of a teacher on the Hub.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If there is no teacher, it is the student, or its hidden size or token ids differ from the
            student's.
    """
    if isinstance(teacher, Teacher):
        return teacher
    full: PumaModel | StoredModel
    if isinstance(teacher, PumaModel | SentenceTransformer):
        full, name = _model_of(teacher), f"a {type(teacher).__name__}"
    else:
        source, revision = _source_of(teacher, student, revision)
        full, name = StoredModel(source, student, revision=revision), repr(str(source))
    return _teacher_of_model(full, student, warn_of=name)


def teacher_loader(
    teacher: TeacherSource | None, student: PumaModel, *, revision: str | None = None
) -> tuple[Callable[[], RunningTeacher], str | Path | None, str | None]:
    """A teacher to ask once, any of the student's hidden size.

    Args:
        teacher: As for `frozen_teacher`, but a path may be that of another checkpoint.
        student: The pruned model.
        revision: Branch, tag or commit of a teacher on the Hub.

    Returns:
        What loads the teacher; its path or Hub id, if it comes from one, and the revision.
    """
    if isinstance(teacher, RunningTeacher):
        running = teacher
        return (lambda: running), None, None
    if isinstance(teacher, PumaModel | SentenceTransformer):
        model = _model_of(teacher)
        return (lambda: _teacher_of_model(model, student)), None, None
    source, revision = _source_of(teacher, student, revision)

    def load() -> RunningTeacher:
        return _teacher_of_model(StoredModel(source, student, revision=revision), student)

    return load, source, revision


def _teacher_of_model(
    full: PumaModel | StoredModel, student: PumaModel, *, warn_of: str | None = None
) -> RunningTeacher:
    """One copy of the weights if the student was cut from this model, else both models whole."""
    check_hidden_size(student, full, type(full).__name__)
    # The student itself is refused.
    reason = "" if full is student else _why_not_shared(full, student)
    if reason is None:
        return FrozenTeacher(student, dropped_layers(full, student))
    full = full.load() if isinstance(full, StoredModel) else full
    whole = WholeTeacher(full, student)
    if warn_of is not None:
        logger.warning(
            "The teacher, %s, is held whole beside the student and takes %.1f MiB more: %s. "
            "teacher_mode='cached' avoids that: it asks the teacher once, before training, and then frees it.",
            warn_of,
            sum(parameter.numel() * parameter.element_size() for parameter in full.parameters()) / 2**20,
            reason,
        )
    return whole


def _why_not_shared(full: PumaModel | StoredModel, student: PumaModel) -> str | None:
    """Why one copy of the weights cannot serve both, or None if it can."""
    if is_quantized(student):
        return "the student's base is held in 4 bits and the teacher is not"
    ours, theirs = student.config._attn_implementation, full.config._attn_implementation
    if ours != theirs:
        return f"its attn_implementation is {theirs!r} and the student's {ours!r}"
    if different := different_base_weights(student, full):
        return f"its weights are not the student's in {len(different)} tensors (first: {different[0]})"
    text_config: Any = full.config.text_config
    depth, original = text_config.num_hidden_layers, student.config.original_num_hidden_layers
    if depth != original:
        if depth == len(student.language_model.layers):
            raise ValueError(
                f"The teacher has {depth} layers and the student's weights: it is the student itself. Pass the "
                f"checkpoint that was pruned, of {original} layers, or another."
            )
        return f"it has {depth} layers, and the student was cut from {original}"
    return None


def _model_of(teacher: PumaModel | SentenceTransformer) -> PumaModel:
    return teacher if isinstance(teacher, PumaModel) else puma_model(teacher)


def _source_of(teacher: Any, student: PumaModel, revision: str | None) -> tuple[str | Path, str | None]:
    """Path or Hub id, and revision."""
    if isinstance(teacher, str | Path):
        return teacher, revision
    if teacher is not None:
        raise ValueError(
            f"teacher is a {type(teacher).__name__}, but it must be a path, a Hub id, a PumaModel, a "
            "SentenceTransformer or a teacher. Pass one of these, or nothing for the checkpoint that was pruned."
        )
    source = student.config.source_name_or_path
    if source is None:
        raise ValueError(
            "The model does not name the checkpoint it was pruned from. Pass teacher=<that checkpoint> (--teacher)."
        )
    # Of a local checkpoint, pruning notes the folder's name alone; a Hub id has an owner.
    if "/" not in source and not Path(source).is_dir():
        raise ValueError(
            f"The model was pruned from a local folder named {source!r}, which is not here. Pass "
            "teacher=<path of that folder> (--teacher)."
        )
    return source, revision or student.config.source_revision
