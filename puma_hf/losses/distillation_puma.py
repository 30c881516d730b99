"""Self-distillation: the pruned model's [RET] state learns the full model's; alone, or with a contrastive loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from sentence_transformers.util import all_gather, all_gather_with_grad, cos_sim, get_rank, get_world_size
from torch import Tensor, nn

from .mac_puma import PUMA_CITATION, read_ids, restore_ids
from .schedule_puma import RELATIONAL_TEMPERATURE, DistillationMetric, check_choice, check_range

STUDENT_KEY = "pooler_output"
# Where a teacher puts its states among the features of a column.
TEACHER_KEY = "teacher_state"
OTHER_WIDTH = "A teacher of another width or family needs metric='relational' (--metric relational)."


def self_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    metric: DistillationMetric = "mse",
    temperature: float = RELATIONAL_TEMPERATURE,
    *,
    gather_across_devices: bool = False,
) -> Tensor:
    """Distance between the student's and the teacher's [RET] states, averaged over the batch.

    - `"mse"`: `mean_i ||h_t,i - h_s,i||^2`, L_distill as PUMA's paper writes it (ACM MM 2025, arXiv 2507.08064).
      The squared differences are summed, not averaged, over the hidden dimension.
    - `"mse-mean"`: the same averaged over the hidden dimension, as in the code that its authors released.
    - `"cosine"`: `mean_i (1 - cos(h_t,i, h_s,i))`, which ignores lengths, as retrieval does.
    - `"relational"`: `mean_i KL(p_t,i || p_s,i)` of the distributions `p_i = softmax_j(cos(h_i, h_j) / temperature)`
      over the other rows j of the batch. Only similarities are compared, so the teacher may have another width; the
      student then has a vector space of its own. Relational distillation is of Park et al. (CVPR 2019, arXiv
      1904.05068) and Tung and Mori (ICCV 2019, arXiv 1907.09682), who compare distances, angles and similarities
      themselves; KL divergence of softmaxed in-batch scores of Lin et al. (TCT-ColBERT, arXiv 2010.11386).

    Args:
        student: States of the pruned model after its final norm, `(batch_size, hidden_size)`.
        teacher: States of the full model after its final norm, likewise; finite. Detached here. For `"relational"`
            and `"cosine"` they may be embeddings, for `"relational"` `(batch_size, any_width)`.
        metric: One of the above.
        temperature: Of `"relational"`, for teacher and student alike.
        gather_across_devices: In `"relational"`, j also runs over the rows of the other devices, of equally many each.

    Returns:
        The loss, a scalar in float32 (float64 if both states are).

    Example:
        >>> self_distillation_loss(torch.zeros(2, 3), torch.ones(2, 3)).item()
        3.0
    """
    check_choice("metric", metric, DistillationMetric)
    check_range(temperature=temperature)
    same = student.shape[:1] == teacher.shape[:1] if metric == "relational" else student.shape == teacher.shape
    if student.ndim != 2 or teacher.ndim != 2 or not same:
        shapes = f"student states are {tuple(student.shape)} and teacher states {tuple(teacher.shape)}"
        raise ValueError(f"{shapes}, but both must be the same (batch_size, hidden_size). {OTHER_WIDTH}")
    dtype = torch.float64 if student.dtype == teacher.dtype == torch.float64 else torch.float32
    student, teacher = student.to(dtype), teacher.detach().to(device=student.device, dtype=dtype)
    if not torch.isfinite(teacher).all():
        broken = (~torch.isfinite(teacher)).any(dim=1).nonzero().flatten().tolist()
        problem = f"the teacher states of the samples {broken} are NaN or infinite"
        raise ValueError(f"{problem}. Run it in bfloat16 or float32.")
    if metric == "relational":
        return _relational_loss(student, teacher, temperature, gather_across_devices)
    if metric == "cosine":
        return (1.0 - torch.nn.functional.cosine_similarity(student, teacher, dim=1)).mean()
    # Summed over the dimensions, as the paper has it, the loss grows with the hidden size: 1,536 times the mean at 2B.
    squares = (teacher - student).square()
    return squares.mean() if metric == "mse-mean" else squares.sum(dim=1).mean()


def _relational_loss(student: Tensor, teacher: Tensor, temperature: float, gather_across_devices: bool) -> Tensor:
    # Own rows against everyone's, as in MAC-Loss; gradients flow back to the devices that embedded them.
    students = all_gather_with_grad(student) if gather_across_devices else student
    teachers = all_gather(teacher) if gather_across_devices else teacher
    if len(students) < 3:  # one other row has all of both distributions: nothing to learn
        return 0.0 * student.sum()
    first = get_rank() * len(student) if gather_across_devices else 0
    own = torch.eye(len(students), dtype=torch.bool, device=student.device)[first : first + len(student)]
    # A row is as similar to itself in every model, and at low temperatures nothing else would count. Its logarithm
    # becomes 0 in both, which adds nothing to the sum. Under autocast the cosines would be bfloat16: too coarse.
    with torch.autocast(device_type=student.device.type, enabled=False):
        log_p = [
            (cos_sim(rows, everyone) / temperature).masked_fill(own, -torch.inf).log_softmax(dim=1).masked_fill(own, 0)
            for rows, everyone in ((student, students), (teacher, teachers))
        ]
    return torch.nn.functional.kl_div(log_p[0], log_p[1], log_target=True, reduction="batchmean")


class SelfDistillationLoss(nn.Module):
    """Pull the pruned model's [RET] state towards the full model's: PUMA's self-distillation.

    `L_distill = mean_i ||h_t,i - h_s,i||^2` (ACM MM 2025, arXiv 2507.08064), averaged over the columns: `h_s` is the
    [RET] state after the last kept layer and `h_t` the one after the last layer of the full model, both after the final
    norm. Beware of `hidden_states` here: `hidden_states[k]` of the full model is the state before the norm and
    `hidden_states[-1]` the one after it. The student's state is `features["pooler_output"]`, which the model writes
    after its final norm and before L2 normalisation.

    Alone it needs no labels, and is this library's first stage; the authors' has a contrastive term besides, see
    `JointDistillationLoss`. Inside `MatryoshkaLoss` the first d dimensions of both states are compared. The rows that
    `"relational"` compares are those of all columns and, in a distributed run, of all devices.

    Args:
        model: A SentenceTransformer whose input module returns `pooler_output`, `(batch_size, hidden_size)`.
        metric: `"mse"` (the paper), `"mse-mean"` (its released code), `"cosine"`, or `"relational"`, for a teacher of
            another width; see `self_distillation_loss`.
        relational_temperature: Its `temperature`.

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

    def __init__(
        self,
        model: nn.Module,
        metric: DistillationMetric = "mse",
        *,
        relational_temperature: float = RELATIONAL_TEMPERATURE,
    ) -> None:
        super().__init__()
        check_choice("metric", metric, DistillationMetric)
        check_range(relational_temperature=relational_temperature)
        self.model = model
        self.metric: DistillationMetric = metric
        self.relational_temperature = relational_temperature

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
        pairs = []
        for output, state in zip(outputs, teacher, strict=True):
            student: Tensor = output[STUDENT_KEY]
            # MatryoshkaLoss shortens the embedding; both states follow. Labels come shortened already, and a teacher
            # of another hidden size stays as it is, to be refused, or whole, if similarities are compared.
            width = output.get("sentence_embedding", student).shape[-1]
            follows = self.metric != "relational" and state.shape[-1] == student.shape[-1]
            pairs.append((student[..., :width], state[..., :width] if follows else state))
        if self.metric == "relational":  # the similarities of queries and candidates are those that rank
            students, states = zip(*pairs, strict=True)
            pairs = [(torch.cat(students), torch.cat([state.to(student.device) for state in states]))]
        options: Any = {"metric": self.metric, "temperature": self.relational_temperature}
        options["gather_across_devices"] = get_world_size() > 1
        return torch.stack([self_distillation_loss(*pair, **options) for pair in pairs]).mean()

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the model card shows."""
        more = {"relational_temperature": self.relational_temperature} if self.metric == "relational" else {}
        return {"metric": self.metric, **more}


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
        relational_temperature: See `SelfDistillationLoss`.

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
        relational_temperature: float = RELATIONAL_TEMPERATURE,
    ) -> None:
        super().__init__()
        self.weights = {"contrastive_weight": contrastive_weight, "distillation_weight": distillation_weight}
        starts = {"contrastive_weight": contrastive_weight_start, "distillation_weight": distillation_weight_start}
        self.weights |= {f"{name}_start": start for name, start in starts.items() if start is not None}
        check_range(zero=True, **self.weights)
        # Its class does not tell: from a model's directory transformers loads each file that it is asked for with
        # copies of all that it imports.
        if uses_gradient_cache(contrastive) or "temperature_schedule" not in vars(contrastive):
            raise ValueError(f"contrastive is a {type(contrastive).__name__}, but it must be a MultimodalMACLoss.")
        self.model = model
        self.contrastive: Any = contrastive
        self.distillation = SelfDistillationLoss(model, metric, relational_temperature=relational_temperature)

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
        own = {**self.distillation.get_config_dict(), **self.weights}
        return {"contrastive": type(self.contrastive).__name__, **self.contrastive.get_config_dict(), **own}
