"""Self-distillation: the pruned model's [RET] state learns the full model's; alone, or with a contrastive loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from torch import Tensor, nn

from .mac_puma import PUMA_CITATION, read_ids, restore_ids
from .progress_puma import is_scheduled
from .schedule_puma import DistillationMetric, check_choice, check_range

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
        teacher: States of the full model after its final norm, likewise; finite. Detached here.
        metric: One of the above.

    Returns:
        The loss, a scalar in float32 (float64 if both states are).

    Example:
        >>> self_distillation_loss(torch.zeros(2, 3), torch.ones(2, 3)).item()
        3.0
    """
    check_choice("metric", metric, DistillationMetric)
    if student.ndim != 2 or student.shape != teacher.shape:
        shapes = f"student states are {tuple(student.shape)} and teacher states {tuple(teacher.shape)}"
        raise ValueError(f"{shapes}, but both must be the same (batch_size, hidden_size).")
    dtype = torch.float64 if student.dtype == teacher.dtype == torch.float64 else torch.float32
    student, teacher = student.to(dtype), teacher.detach().to(device=student.device, dtype=dtype)
    if not torch.isfinite(teacher).all():
        broken = (~torch.isfinite(teacher)).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"the teacher states of the samples {broken} are NaN or infinite. Run it in bfloat16 or float32."
        )
    if metric == "cosine":
        return (1.0 - torch.nn.functional.cosine_similarity(student, teacher, dim=1)).mean()
    # Summed over the dimensions, as the paper has it, the loss grows with the hidden size: 1,536 times the mean at 2B.
    squares = (teacher - student).square()
    return squares.mean() if metric == "mse-mean" else squares.sum(dim=1).mean()


class SelfDistillationLoss(nn.Module):
    """Pull the pruned model's [RET] state towards the full model's: PUMA's self-distillation.

    `L_distill = mean_i ||h_t,i - h_s,i||^2` (ACM MM 2025, arXiv 2507.08064), averaged over the columns: `h_s` is the
    [RET] state after the last kept layer and `h_t` the one after the last layer of the full model, both after the final
    norm. Beware of `hidden_states` here: `hidden_states[k]` of the full model is the state before the norm and
    `hidden_states[-1]` the one after it. The student's state is `features["pooler_output"]`, which the model writes
    after its final norm and before L2 normalisation.

    Alone it needs no labels, and is this library's first stage; the authors' has a contrastive term besides, see
    `JointDistillationLoss`. Inside `MatryoshkaLoss` the first d dimensions of both states are compared.

    Args:
        model: A SentenceTransformer whose input module returns `pooler_output`, `(batch_size, hidden_size)`.
        metric: `"mse"` (the paper), `"mse-mean"` (its released code) or `"cosine"`, see `self_distillation_loss`.

    Requirements:
        1. One or more columns of inputs.
        2. The teacher's states: as `teacher_state` `(batch_size, hidden_size)` in the features of all columns, where
           `PumaDistillationTrainer` puts them, or else as labels, `(batch_size, num_columns, hidden_size)`, or
           `(batch_size, hidden_size)` for one column.

    Example:
        >>> class Student(nn.Module):
        ...     def forward(self, features):
        ...         return {"pooler_output": features["states"]}
        >>> loss = SelfDistillationLoss(Student())
        >>> loss([{"states": torch.zeros(2, 3)}], torch.ones(2, 3)).item()
        3.0
    """

    citation = PUMA_CITATION

    def __init__(self, model: nn.Module, metric: DistillationMetric = "mse") -> None:
        super().__init__()
        check_choice("metric", metric, DistillationMetric)
        self.model = model
        self.metric: DistillationMetric = metric

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Embed every column, a dict of model inputs, and compare its [RET] states with the teacher's: a scalar."""
        return self.compute_loss_from_outputs([self.model(features) for features in sentence_features], labels)

    def compute_loss_from_outputs(self, outputs: list[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The same from what the model returned for each column: `pooler_output` and, as a rule, `teacher_state`."""
        teacher = [output[TEACHER_KEY] for output in outputs if output.get(TEACHER_KEY) is not None]
        if len(teacher) < len(outputs):
            labels = labels.unsqueeze(1) if labels is not None and labels.ndim == 2 and len(outputs) == 1 else labels
            if labels is None or labels.ndim != 3 or labels.shape[1] != len(outputs):
                raise ValueError(
                    f"the features have no {TEACHER_KEY!r} and labels are {None if labels is None else labels.shape}, "
                    f"not states (batch_size, {len(outputs)}, hidden_size). Use PumaDistillationTrainer."
                )
            teacher = list(labels.unbind(1))
        losses = []
        for output, state in zip(outputs, teacher, strict=True):
            student: Tensor = output[STUDENT_KEY]
            # MatryoshkaLoss shortens the embedding; both states follow. Labels come shortened already, and a teacher
            # of another hidden size stays as it is, to be refused.
            width = output.get("sentence_embedding", student).shape[-1]
            state = state[..., :width] if state.shape[-1] == student.shape[-1] else state
            losses.append(self_distillation_loss(student[..., :width], state, self.metric))
        return torch.stack(losses).mean()

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the model card shows."""
        return {"metric": self.metric}


class LossTerms(dict[str, Tensor]):
    """Named terms of a loss, which a sentence-transformers trainer sums and logs one by one.

    Unlike a plain dict they can be weighted and added up term by term, as `MatryoshkaLoss` does.
    """

    def __mul__(self, weight: float) -> LossTerms:
        return LossTerms({name: value * weight for name, value in self.items()})

    __rmul__ = __mul__

    def __add__(self, other: LossTerms | float) -> LossTerms:
        # A sum starts from the number 0.
        return LossTerms(
            {name: value + (other[name] if isinstance(other, LossTerms) else other) for name, value in self.items()}
        )

    __radd__ = __add__


class JointDistillationLoss(nn.Module):
    """Self-distillation and a contrastive loss together: the model embeds each column once for both.

    `contrastive_weight * contrastive + distillation_weight * distillation`, where the distillation is the mean over
    the columns. The first stage of PUMA (ACM MM 2025, arXiv 2507.08064), as its authors released it, is InfoNCE at 0.05
    with the weight 0.9, and `0.1 * 0.05 * (mse(query) + mse(candidate))`, averaged over the dimensions: here the weight
    0.01 of `"mse-mean"`, as a sum of two columns is twice their mean. In its variant both weights move with the share
    of the training that is done, from 0.5 to 0.9 and from 0.5 to 0.1. With MAC-Loss, which is this library's addition,
    the second stage need not forget what the full model knew.

    On several devices the gradient is that of one device with the whole batch. The released code's is this one divided
    by the number of devices.

    Args:
        model: A SentenceTransformer whose input module returns `pooler_output`, `(batch_size, hidden_size)`.
        contrastive: A `MultimodalMACLoss` of the same model; at equal temperatures it is InfoNCE.
        metric: See `self_distillation_loss`.
        contrastive_weight: Weight of the contrastive term. The two terms differ in size: the `"mse"` grows with the
            hidden size, so look at both in the log before choosing.
        distillation_weight: Weight of the distillation term.
        contrastive_weight_start: Where the weight begins, if it is to move in a straight line over the training to
            `contrastive_weight`.
        distillation_weight_start: Likewise for `distillation_weight`.

    It takes (anchor, positive) pairs or (anchor, positive, negative_1, ..., negative_n) tuples, and the teacher's
    states as `teacher_state` features, where `PumaDistillationTrainer` puts them.

    Example:
        >>> infonce = MultimodalMACLoss(model, 0.05, 0.05)  # doctest: +SKIP
        >>> loss = JointDistillationLoss(model, infonce, "mse-mean", 0.9, 0.01)  # doctest: +SKIP
    """

    citation = PUMA_CITATION

    def __init__(
        self,
        model: nn.Module,
        contrastive: nn.Module,
        metric: DistillationMetric = "mse",
        contrastive_weight: float = 1.0,
        distillation_weight: float = 1.0,
        *,
        contrastive_weight_start: float | None = None,
        distillation_weight_start: float | None = None,
    ) -> None:
        super().__init__()
        self.weights = {"contrastive_weight": contrastive_weight, "distillation_weight": distillation_weight}
        starts = {"contrastive_weight": contrastive_weight_start, "distillation_weight": distillation_weight_start}
        self.weights |= {f"{name}_start": start for name, start in starts.items() if start is not None}
        check_range(zero=True, **self.weights)
        if uses_gradient_cache(contrastive) or not is_scheduled(contrastive):
            raise ValueError(f"contrastive is a {type(contrastive).__name__}, but it must be a MultimodalMACLoss.")
        self.model = model
        self.contrastive: Any = contrastive
        self.distillation = SelfDistillationLoss(model, metric)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> LossTerms:
        """Embed every column once and compute `{"distillation": ..., "contrastive": ...}`, both weighted scalars."""
        # Input modules pop ids and teacher states from the features, so what is needed twice is read before.
        columns = list(sentence_features)
        ids = read_ids(columns, labels)
        outputs = [self.model(features) for features in columns]
        restore_ids(columns, *ids)
        self.contrastive.warn_if_schedule_idles(training=self.model.training, moves=len(self.weights) > 2)
        embeddings = [output["sentence_embedding"] for output in outputs]
        contrastive = self.contrastive.compute_loss_from_embeddings(embeddings, *ids)
        return LossTerms(
            distillation=self.weight("distillation_weight") * self.distillation.compute_loss_from_outputs(outputs),
            contrastive=self.weight("contrastive_weight") * contrastive,
        )

    def weight(self, name: str) -> float:
        """The weight `"contrastive_weight"` or `"distillation_weight"` at the present progress."""
        end = self.weights[name]
        start = self.weights.get(f"{name}_start", end)
        return end if start == end else start + (end - start) * (self.contrastive.progress or 0.0)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the model card shows."""
        own = {"metric": self.distillation.metric, **self.weights}
        return {"contrastive": type(self.contrastive).__name__, **self.contrastive.get_config_dict(), **own}
