"""Self-distillation by hand, in features, labels and Matryoshka; and both losses joined in one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from puma_hf.losses import (
    CachedMultimodalMACLoss,
    JointDistillationLoss,
    MultimodalMACLoss,
    SelfDistillationLoss,
    add_temperature_schedule,
    self_distillation_loss,
)
from tests.losses.conftest import DIM

MakeModel = Callable[[], SentenceTransformer]


def contrastive_of(model: SentenceTransformer) -> MultimodalMACLoss:
    return MultimodalMACLoss(model, schedule="constant")


def test_metrics_by_hand() -> None:
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 4.0], [3.0, 4.0]], requires_grad=True)
    loss = self_distillation_loss(student, teacher)
    assert loss.item() == (4 + 25) / 2  # summed over the dimensions, averaged over the batch
    assert self_distillation_loss(student, teacher, "mse-mean").item() == (4 + 25) / 4
    loss.backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[0.0, -2.0], [-3.0, -4.0]]  # 2 (h_s - h_t) / batch_size
    assert teacher.grad is None


def test_cosine_ignores_lengths() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    teacher = torch.tensor([[5.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    expected = (0 + (1 - math.sqrt(0.5)) + 2) / 3
    assert self_distillation_loss(student, teacher, "cosine").item() == pytest.approx(expected, abs=1e-6)
    scaled = self_distillation_loss(student * 7, teacher * 0.1, "cosine")
    assert scaled.item() == pytest.approx(expected, abs=1e-6)


def test_relational_by_hand() -> None:
    """Of similarities with the other two rows: the teacher's are (0, 1), (0, 0) and (1, 0), the student's all 0."""
    student = torch.eye(3, 4).requires_grad_()
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]], requires_grad=True)
    p = math.exp(2) / (1 + math.exp(2))  # at the temperature 0.5
    first = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))  # KL((1 - p, p) || (1/2, 1/2))
    loss = self_distillation_loss(student, teacher, "relational", 0.5)
    assert loss.item() == pytest.approx((first + 0 + first) / 3, abs=1e-6)
    loss.backward()
    assert student.grad is not None
    assert student.grad[0, 2] < 0 < student.grad[0, 1]  # closer to the row that the teacher finds alike
    assert teacher.grad is None
    # Turned, scaled and widened a space has the same similarities; two rows have nothing to compare.
    rows = torch.randn(5, 4)
    wide = torch.cat([rows.flip(1), torch.zeros(5, 3)], dim=1)
    assert self_distillation_loss(rows, 7 * wide, "relational").item() == pytest.approx(0, abs=1e-6)
    for few in (1, 2):
        assert self_distillation_loss(rows[:few], teacher[:few], "relational").item() == 0


def test_relations_are_those_of_all_columns() -> None:
    model: Any = Taught()
    columns: list[dict[str, Any]] = [{**column, "teacher_state": torch.randn(4, 9)} for column in taught_columns(2)]
    student, teacher = (torch.cat([column[name] for column in columns]) for name in ("states", "teacher_state"))
    loss = SelfDistillationLoss(model, "relational", relational_temperature=0.2)
    torch.testing.assert_close(loss(columns), self_distillation_loss(student, teacher, "relational", 0.2))
    assert loss.get_config_dict() == {"metric": "relational", "relational_temperature": 0.2}
    # The first dimensions learn all that the teacher knows.
    short = self_distillation_loss(student[:, :2], teacher, "relational", 0.2)
    torch.testing.assert_close(torch.as_tensor(MatryoshkaLoss(model, loss, [2])(columns, None)), short)


class Taught(nn.Module):
    """Returns what a teacher has added to the features, and an embedding of the student's width."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        states = features["states"]
        return {**features, "pooler_output": states, "sentence_embedding": nn.functional.normalize(states, dim=1)}

    def get_embedding_dimension(self) -> int:
        return 6


def taught_columns(columns: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    names = ("states", "teacher_state")
    return [{name: torch.randn(4, 6, generator=generator) for name in names} for _ in range(columns)]


@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_states_are_those_of_the_features_or_labels(metric: Any) -> None:
    columns, loss = taught_columns(3), SelfDistillationLoss(Taught(), metric)
    each = [self_distillation_loss(column["states"], column["teacher_state"], metric).item() for column in columns]
    for labels in (None, torch.tensor([1, 0, 1, 0]), torch.zeros(4, 3, 6)):
        assert loss(columns, labels).item() == pytest.approx(sum(each) / 3, rel=1e-6)
    # Where not every column has them, labels count.
    labels = torch.stack([column["teacher_state"] for column in columns], dim=1)
    del columns[1]["teacher_state"]
    columns[0]["teacher_state"] = torch.zeros(4, 6)
    assert loss(columns, labels).item() == pytest.approx(sum(each) / 3, rel=1e-6)
    for one in (labels[:, 1], labels[:, 1:2]):
        assert loss(columns[1:2], one).item() == pytest.approx(each[1], rel=1e-6)


@pytest.mark.parametrize("as_labels", [False, True])
@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_inside_matryoshka_the_first_dimensions_are_compared(metric: Any, as_labels: bool) -> None:
    model: Any = Taught()
    weights = {6: 1.0, 4: 0.5, 2: 0.25}
    columns = taught_columns(2)
    expected = sum(
        weight * self_distillation_loss(c["states"][:, :dim], c["teacher_state"][:, :dim], metric) / 2
        for dim, weight in weights.items()
        for c in columns
    )
    labels = torch.stack([c.pop("teacher_state") for c in columns], dim=1) if as_labels else None
    loss: Any = MatryoshkaLoss(model, SelfDistillationLoss(model, metric), list(weights), list(weights.values()))
    torch.testing.assert_close(loss(columns, labels), expected)


# --- joined with a contrastive loss


def columns_of(model: SentenceTransformer, pairs: Dataset, *, content: bool = False) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    columns = []
    for name in pairs.column_names:
        features = dict(model.preprocess(pairs[name]))
        features["teacher_state"] = torch.randn(len(pairs), DIM, generator=generator)
        if content:
            features["content_ids"] = features["input_ids"].sum(dim=1)
        columns.append(features)
    return columns


def copies(columns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(column) for column in columns]


@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_both_terms_are_those_of_their_own_losses(make_model: MakeModel, pairs: Dataset, metric: Any) -> None:
    model = make_model()
    columns = columns_of(model, pairs)
    contrastive = contrastive_of(model)
    joint = JointDistillationLoss(model, contrastive, metric, contrastive_weight=2.0, distillation_weight=0.5)
    terms = joint(copies(columns))
    assert list(terms) == ["distillation", "contrastive"]
    distillation = SelfDistillationLoss(model, metric)(copies(columns))
    torch.testing.assert_close(terms["distillation"], 0.5 * distillation)
    torch.testing.assert_close(terms["contrastive"], 2 * contrastive(copies(columns), None))

    def gradient(loss: Tensor) -> Tensor:
        model.zero_grad()
        loss.backward()
        grad = model[0].bag.weight.grad
        assert grad is not None
        return grad.clone()

    together = gradient(torch.stack(list(joint(copies(columns)).values())).sum())
    apart = 0.5 * gradient(SelfDistillationLoss(model, metric)(copies(columns)))
    apart += 2 * gradient(contrastive(copies(columns), None))
    torch.testing.assert_close(together, apart)


def test_content_ids_reach_the_contrastive_loss(make_model: MakeModel) -> None:
    model = make_model()
    # Both rows have one positive.
    pairs = Dataset.from_dict({"anchor": ["text: 1 2 3", "text: 4 5 6"], "positive": ["image: 7 8 9"] * 2})
    contrastive = MultimodalMACLoss(model, schedule="constant")
    joint = JointDistillationLoss(model, contrastive)
    assert joint(columns_of(model, pairs))["contrastive"].item() > 0.1
    assert joint(columns_of(model, pairs, content=True))["contrastive"].item() == pytest.approx(0, abs=1e-6)


def test_both_inside_matryoshka(make_model: MakeModel, pairs: Dataset) -> None:
    model = make_model()
    columns = columns_of(model, pairs)
    contrastive, dims, weights = contrastive_of(model), [DIM, 4, 2], [1.0, 0.5, 0.25]
    joint = JointDistillationLoss(model, contrastive, contrastive_weight=2.0, distillation_weight=0.1)
    terms: Any = MatryoshkaLoss(model, joint, dims, weights)(copies(columns), None)
    expected = MatryoshkaLoss(model, contrastive, dims, weights)(copies(columns), None)
    torch.testing.assert_close(terms["contrastive"], 2 * expected)
    expected = MatryoshkaLoss(model, SelfDistillationLoss(model), dims, weights)(copies(columns), None)
    torch.testing.assert_close(terms["distillation"], 0.1 * expected)


@pytest.mark.parametrize("start", [{}, {"contrastive_weight_start": 0.5}, {"distillation_weight_start": 0.0}])
def test_weights_move_in_a_straight_line(make_model: MakeModel, pairs: Dataset, start: dict[str, float]) -> None:
    model = make_model()
    columns = columns_of(model, pairs)
    plain = JointDistillationLoss(model, MultimodalMACLoss(model, 0.05, 0.05))(copies(columns))
    joint = JointDistillationLoss(model, MultimodalMACLoss(model, 0.05, 0.05), "mse", 0.9, 0.4, **start)
    for share in (0.0, 0.25, 1.0):
        joint.contrastive.progress = share
        terms = joint(copies(columns))
        weight = 0.5 + 0.4 * share if "contrastive_weight_start" in start else 0.9
        torch.testing.assert_close(terms["contrastive"], weight * plain["contrastive"])
        weight = 0.4 * share if "distillation_weight_start" in start else 0.4
        torch.testing.assert_close(terms["distillation"], weight * plain["distillation"])


@pytest.mark.parametrize("matryoshka", [False, True])
def test_training_logs_each_term(tmp_path: Path, make_model: MakeModel, pairs: Dataset, matryoshka: bool) -> None:
    model = make_model()

    class Trainer(SentenceTransformerTrainer):
        def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], Tensor | None]:
            features, labels = super().collect_features(inputs)
            for column in features:
                column["teacher_state"] = torch.ones(len(column["input_ids"]), DIM)
            return features, labels

    loss: Any = JointDistillationLoss(model, contrastive_of(model), contrastive_weight=0.01)
    if matryoshka:
        loss = MatryoshkaLoss(model, loss, [DIM, 4])
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=20,
        per_device_train_batch_size=8,
        learning_rate=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=pairs, eval_dataset=pairs, loss=loss)
    add_temperature_schedule(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["distillation"] + entry["contrastive"], abs=1e-3)
    assert logs[-1]["distillation"] < 0.5 * logs[0]["distillation"]
    trainer.evaluate()
    assert {"eval_distillation", "eval_contrastive"} <= set().union(*trainer.state.log_history)


def test_what_cannot_be_distilled(make_model: MakeModel) -> None:
    states, broken = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [0.0, math.nan, 0.0]])
    with pytest.raises(
        ValueError, match=r"^student states are \(2, 3\) and .* \(2, 4\), but both must .*metric='relational'"
    ):
        self_distillation_loss(states, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"samples \[1\] are NaN or infinite.*Run it in"):
        self_distillation_loss(states, broken)
    with pytest.raises(ValueError, match=r"metric is 'kl', but it must be one of \('mse', 'mse-mean', 'cosine', "):
        SelfDistillationLoss(nn.Identity(), "kl")  # type: ignore[arg-type]
    columns = [{"states": states}] * 2
    for labels in (None, states, torch.zeros(2, 3, 3)):
        with pytest.raises(ValueError, match=r"no 'teacher_state' and labels are .* not states \(batch_size, 2,"):
            SelfDistillationLoss(Taught())(columns, labels)
    model = make_model()
    with pytest.raises(
        ValueError, match=r"contrastive_weight_start is -1\.0, but it must be a finite number at least 0"
    ):
        JointDistillationLoss(model, MultimodalMACLoss(model), contrastive_weight_start=-1.0)
    for other in (CachedMultimodalMACLoss(model), MultipleNegativesRankingLoss(model)):
        with pytest.raises(ValueError, match=rf"is a {type(other).__name__}, but it must be a MultimodalMACLoss"):
            JointDistillationLoss(model, other)
