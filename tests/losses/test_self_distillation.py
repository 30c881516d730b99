from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import Tensor, nn

from puma_hf.losses import SelfDistillationLoss, self_distillation_loss

MakeModel = Callable[[], SentenceTransformer]


class Student(nn.Module):
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"pooler_output": features["states"], "sentence_embedding": features["states"] * 0}


def test_mse_sums_over_the_hidden_dimension_and_averages_over_the_batch() -> None:
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    teacher = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    assert self_distillation_loss(student, teacher).item() == pytest.approx((4 + 25) / 2)
    assert self_distillation_loss(teacher, teacher).item() == 0.0


def test_the_released_mse_is_averaged_over_the_dimensions() -> None:
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[4.0, 2.0], [0.0, 1.0]])
    assert self_distillation_loss(student, teacher, "mse-mean").item() == (9 + 1) / 4
    assert self_distillation_loss(student, teacher, "mse").item() == (9 + 1) / 2


def test_cosine_ignores_lengths() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    teacher = torch.tensor([[5.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    expected = (0 + (1 - math.sqrt(0.5)) + 2) / 3
    assert self_distillation_loss(student, teacher, "cosine").item() == pytest.approx(expected, abs=1e-6)
    scaled = self_distillation_loss(student * 7, teacher * 0.1, "cosine")
    assert scaled.item() == pytest.approx(expected, abs=1e-6)


def test_gradient_reaches_the_student_only() -> None:
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 4.0], [3.0, 4.0]], requires_grad=True)
    self_distillation_loss(student, teacher).backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[0.0, -2.0], [-3.0, -4.0]]  # 2 (h_s - h_t) / batch_size
    assert teacher.grad is None


@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_low_precision_states_are_compared_in_float32(metric: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 64, generator=generator).bfloat16() for _ in range(2))
    loss = self_distillation_loss(student, teacher, metric)
    assert loss.dtype == torch.float32
    expected = self_distillation_loss(student.double(), teacher.double(), metric)
    assert expected.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_function_errors() -> None:
    states = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"student's hidden size is 3 and the teacher's 4.*Use the full model"):
        self_distillation_loss(states, torch.zeros(2, 4))
    for student, teacher in (
        (states, torch.zeros(3, 3)),
        (states[0], states[0]),
        (states, states.unsqueeze(1)),
    ):
        with pytest.raises(ValueError, match=r"student states are .*same batch_size\. Pass one \[RET\] state"):
            self_distillation_loss(student, teacher)
    for value in (math.nan, math.inf):
        teacher = states.clone()
        teacher[1, 2] = value
        with pytest.raises(ValueError, match=r"samples \[1\] of this batch are NaN or infinite.*Run the teacher in"):
            self_distillation_loss(states, teacher)
    with pytest.raises(ValueError, match=r"metric is 'kl', but it must be one of \('mse', 'mse-mean', 'cosine'\)"):
        self_distillation_loss(states, states, "kl")  # type: ignore[arg-type]


def test_columns_are_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = [{"states": torch.randn(4, 3, generator=generator)} for _ in range(3)]
    labels = torch.randn(4, 3, 3, generator=generator)
    each = [self_distillation_loss(column["states"], labels[:, i]).item() for i, column in enumerate(columns)]
    assert len(set(each)) == 3
    assert SelfDistillationLoss(Student())(columns, labels).item() == pytest.approx(sum(each) / 3, rel=1e-6)


@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_one_column_takes_both_label_shapes(metric: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    states, labels = (torch.randn(4, 3, generator=generator) for _ in range(2))
    loss = SelfDistillationLoss(Student(), metric)
    expected = self_distillation_loss(states, labels, metric).item()
    assert loss([{"states": states}], labels).item() == expected
    assert loss([{"states": states}], labels.unsqueeze(1)).item() == expected


class Taught(nn.Module):
    """Returns what a teacher has added to the features, and an embedding of the student's width."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        states = features["states"]
        return {**features, "pooler_output": states, "sentence_embedding": nn.functional.normalize(states, dim=1)}

    def get_embedding_dimension(self) -> int:
        return 6


def taught_columns(columns: int, width: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(4, width, generator=generator) for name in ("states", "teacher_state")}
        for _ in range(columns)
    ]


@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_states_in_the_features_come_before_labels(metric: Any) -> None:
    columns = taught_columns(2)
    expected = [self_distillation_loss(c["states"], c["teacher_state"], metric).item() for c in columns]
    loss = SelfDistillationLoss(Taught(), metric)
    for labels in (None, torch.tensor([1, 0, 1, 0]), torch.zeros(4, 2, 6)):
        assert loss(columns, labels).item() == pytest.approx(sum(expected) / 2, rel=1e-6)
    # Where not every column has them, labels count.
    del columns[1]["teacher_state"]
    labels = torch.zeros(4, 2, 6)
    expected = [self_distillation_loss(c["states"], labels[:, 0], metric).item() for c in columns]
    assert loss(columns, labels).item() == pytest.approx(sum(expected) / 2, rel=1e-6)


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


def test_a_narrow_embedding_hides_no_other_hidden_size() -> None:
    columns = taught_columns(1)
    columns[0]["teacher_state"] = torch.zeros(4, 8)
    model: Any = Taught()
    loss: Any = MatryoshkaLoss(model, SelfDistillationLoss(model), [4])
    with pytest.raises(ValueError, match="hidden size is 4 and the teacher's 8"):
        loss(columns, None)
    with pytest.raises(ValueError, match="hidden size is 6 and the teacher's 8"):
        SelfDistillationLoss(model)(columns)


def test_module_errors() -> None:
    loss, columns = SelfDistillationLoss(Student()), [{"states": torch.zeros(2, 3)}] * 2
    with pytest.raises(
        ValueError, match=r"no 'teacher_state' and labels is None.*Use PumaDistillationTrainer, or add a label column"
    ):
        loss(columns)
    for labels in (torch.zeros(2, 3), torch.zeros(2, 3, 3), torch.zeros(2, 2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"labels are .*for 2 column\(s\).*\(batch_size, 2, hidden_size\)"):
            loss(columns, labels)
    with pytest.raises(ValueError, match="hidden size is 3 and the teacher's 5"):
        loss(columns, torch.zeros(2, 2, 5))
    with pytest.raises(
        ValueError, match=r"returned the features \['states'\].*needs 'pooler_output'.*Use a PUMA model"
    ):
        SelfDistillationLoss(nn.Identity())(columns, torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match="metric is 'kl'"):
        SelfDistillationLoss(Student(), "kl")  # type: ignore[arg-type]


def test_model_card_facts() -> None:
    loss = SelfDistillationLoss(Student(), "cosine")
    assert loss.get_config_dict() == {"metric": "cosine"}
    assert "eprint={2507.08064}" in loss.citation


def test_training_on_cached_states_reaches_the_teacher(tmp_path: Path, make_model: MakeModel, pairs: Dataset) -> None:
    student, teacher = make_model(), make_model()
    nn.init.normal_(teacher[0].bag.weight)
    with torch.no_grad():
        states = teacher(teacher.preprocess(pairs["anchor"]))["pooler_output"]
    dataset = pairs.select_columns(["anchor"]).add_column("label", states.tolist())
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=100,
        per_device_train_batch_size=16,
        learning_rate=0.2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    loss = SelfDistillationLoss(student)
    before = loss([student.preprocess(pairs["anchor"])], states).item()
    SentenceTransformerTrainer(model=student, args=args, train_dataset=dataset, loss=loss).train()
    assert loss([student.preprocess(pairs["anchor"])], states).item() < before / 100
