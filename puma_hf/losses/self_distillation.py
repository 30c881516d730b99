"""Self-distillation: the pruned model's [RET] state learns the full model's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from puma_hf.losses.citation import PUMA_CITATION
from puma_hf.settings import DistillationMetric

STUDENT_KEY = "pooler_output"
# Where a teacher puts its states among the features of a column.
TEACHER_KEY = "teacher_state"


def self_distillation_loss(student: Tensor, teacher: Tensor, metric: DistillationMetric = "mse") -> Tensor:
    """Distance between the student's and the teacher's [RET] states, averaged over the batch.

    - `"mse"`: `mean_i ||h_t,i - h_s,i||^2`, L_distill as PUMA's paper writes it (ACM MM 2025, arXiv 2507.08064).
      The squared differences are summed, not averaged, over the hidden dimension.
    - `"mse-mean"`: the same averaged over the hidden dimension, as in the code that its authors released.
    - `"cosine"`: `mean_i (1 - cos(h_t,i, h_s,i))`, which ignores lengths, as retrieval does.

    Args:
        student: States of the pruned model after its final norm, `(batch_size, hidden_size)`.
        teacher: States of the full model after its final norm, `(batch_size, hidden_size)`. Detached here.
        metric: `"mse"`, `"mse-mean"` or `"cosine"`.

    Returns:
        The loss, a scalar in float32 (float64 if both states are).

    Raises:
        ValueError: If the metric is unknown, the shapes differ, or the teacher has NaN or infinite values.

    Example:
        >>> self_distillation_loss(torch.zeros(2, 3), torch.ones(2, 3)).item()
        3.0
    """
    _check_metric(metric)
    if student.ndim != 2 or teacher.ndim != 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student states are {tuple(student.shape)} and teacher states {tuple(teacher.shape)}, but both "
            "must be (batch_size, hidden_size) with the same batch_size. Pass one [RET] state per sample on "
            "both sides."
        )
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student's hidden size is {student.shape[1]} and the teacher's {teacher.shape[1]}, but "
            "self-distillation compares states of one backbone. Use the full model that the student was "
            "pruned from as the teacher, or recompute the cached states with it."
        )
    precise = student.dtype == teacher.dtype == torch.float64
    dtype = torch.float64 if precise else torch.float32
    student, teacher = student.to(dtype), teacher.detach().to(device=student.device, dtype=dtype)
    if not torch.isfinite(teacher).all():
        broken = (~torch.isfinite(teacher)).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"the teacher states of the samples {broken} of this batch are NaN or infinite, but they must be "
            "finite. Run the teacher in bfloat16 or float32 instead of float16, or recompute the cached "
            "states."
        )
    if metric == "cosine":
        return (1.0 - torch.nn.functional.cosine_similarity(student, teacher, dim=1)).mean()
    squares = (teacher - student).square()
    return squares.mean() if metric == "mse-mean" else squares.sum(dim=1).mean()


class SelfDistillationLoss(nn.Module):
    """Pull the pruned model's [RET] state towards the full model's: PUMA's self-distillation.

    Alone it needs no labels, and is this library's first stage; the authors' has a contrastive term besides, see
    `JointDistillationLoss`.

    `L_distill = mean_i ||h_t,i - h_s,i||^2` (ACM MM 2025, arXiv 2507.08064): `h_s` is the [RET] state after
    the last kept layer and `h_t` the one after the last layer of the full model, both after the final norm.
    Beware of `hidden_states` here: `hidden_states[k]` of the full model is the state before the norm and
    `hidden_states[-1]` the one after it, so comparing those two would mix both. This loss reads the student's
    state from `features["pooler_output"]`, which the model writes after its final norm and before L2
    normalisation.

    Args:
        model: A SentenceTransformer whose input module returns `pooler_output`, `(batch_size, hidden_size)`.
        metric: `"mse"` (the paper), `"mse-mean"` (its released code) or `"cosine"`, see `self_distillation_loss`.

    Requirements:
        1. One or more columns of inputs; their losses are averaged.
        2. The teacher's states: as `teacher_state` `(batch_size, hidden_size)` in the features, where
           `PumaDistillationTrainer` puts them, or else as labels.

    Inputs:
        +----------------------------------------+--------------------------------------------------------------+
        | Inputs                                 | Labels                                                       |
        +========================================+==============================================================+
        | n columns with `teacher_state` features | any, unused                                                  |
        +----------------------------------------+--------------------------------------------------------------+
        | one column without                     | `(batch_size, hidden_size)` or `(batch_size, 1, hidden_size)` |
        +----------------------------------------+--------------------------------------------------------------+
        | n columns without                      | `(batch_size, n, hidden_size)`                               |
        +----------------------------------------+--------------------------------------------------------------+

    Recommendations:
        - Inside `MatryoshkaLoss`, which shortens `sentence_embedding` to the first d dimensions, the first d
          dimensions of both states are compared. So the shortened student is pulled to the shortened teacher.

    Relations:
        - `sentence_transformers.losses.MSELoss` compares `sentence_embedding` instead, which is L2-normalised
          here and averages over the hidden dimension.

    Raises:
        ValueError: If the metric is unknown.

    Example:
        >>> class Student(nn.Module):
        ...     def forward(self, features):
        ...         return {"pooler_output": features["states"]}
        >>> loss = SelfDistillationLoss(Student())
        >>> loss([{"states": torch.zeros(2, 3)}], torch.ones(2, 3)).item()
        3.0
    """

    def __init__(self, model: nn.Module, metric: DistillationMetric = "mse") -> None:
        super().__init__()
        _check_metric(metric)
        self.model = model
        self.metric: DistillationMetric = metric

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Embed every column and compare its [RET] states with the teacher's.

        Args:
            sentence_features: One dict of model inputs per column.
            labels: If the features have no `teacher_state`: the teacher's states, `(batch_size, num_columns,
                hidden_size)`, or `(batch_size, hidden_size)` for one column.

        Returns:
            The loss averaged over the columns, a scalar.

        Raises:
            ValueError: If the teacher's states are missing or misshapen, or the model returns no `pooler_output`.
        """
        return self.compute_loss_from_outputs([self.model(features) for features in sentence_features], labels)

    def compute_loss_from_outputs(self, outputs: list[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Compare the states in what the model returned for each column.

        Args:
            outputs: Features of each column with `pooler_output` and, as a rule, `teacher_state`.
            labels: As for `forward`.

        Returns:
            The loss averaged over the columns, a scalar.

        Raises:
            ValueError: As for `forward`.
        """
        student = [_student_state(output) for output in outputs]
        in_features = [output[TEACHER_KEY] for output in outputs if output.get(TEACHER_KEY) is not None]
        teacher = in_features if len(in_features) == len(outputs) else _teacher_columns(labels, len(outputs))
        losses = [
            self_distillation_loss(*_to_width(output, ours, theirs), self.metric)
            for output, ours, theirs in zip(outputs, student, teacher, strict=True)
        ]
        return torch.stack(losses).mean()

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the model card shows."""
        return {"metric": self.metric}

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return PUMA_CITATION


def _student_state(output: dict[str, Any]) -> Tensor:
    if STUDENT_KEY not in output:
        raise ValueError(
            f"the model returned the features {sorted(output)}, but self-distillation needs "
            f"{STUDENT_KEY!r}, the [RET] state after the final norm. Use a PUMA model, or an input "
            "module that returns this feature."
        )
    state: Tensor = output[STUDENT_KEY]
    return state


def _to_width(output: dict[str, Any], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both states, cut to the width of the embedding where `MatryoshkaLoss` has shortened it."""
    embedding = output.get("sentence_embedding")
    width = student.shape[-1] if embedding is None else embedding.shape[-1]
    if width >= student.shape[-1]:
        return student, teacher
    # States of another hidden size stay apart, to be refused; labels come shortened already.
    fits = teacher.shape[-1] == student.shape[-1]
    return student[..., :width], teacher[..., :width] if fits else teacher


def _teacher_columns(labels: Tensor | None, num_columns: int) -> list[Tensor]:
    if labels is None:
        raise ValueError(
            f"the features have no {TEACHER_KEY!r} and labels is None, but self-distillation needs the teacher's "
            "[RET] states. Use PumaDistillationTrainer, or add a label column with the cached states to the dataset."
        )
    if labels.ndim == 2 and num_columns == 1:
        labels = labels.unsqueeze(1)
    if labels.ndim != 3 or labels.shape[1] != num_columns or not labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}, but for {num_columns} column(s) "
            f"they must be floating-point teacher states (batch_size, {num_columns}, hidden_size). Pass "
            "one state per sample and column, in the order of the columns."
        )
    return list(labels.unbind(1))


def _check_metric(metric: str) -> None:
    metrics = get_args(DistillationMetric)
    if metric not in metrics:
        raise ValueError(f"metric is {metric!r}, but it must be one of {metrics}. Choose one of these.")
