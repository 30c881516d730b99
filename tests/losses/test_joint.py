from __future__ import annotations

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
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor

from puma_hf.losses import MultimodalMACLoss, SelfDistillationLoss, add_temperature_schedule, find_scheduled_losses
from puma_hf.losses.joint import JointDistillationLoss, LossTerms
from puma_hf.losses.temperature import IDLE_FORWARDS_BEFORE_WARNING
from tests.losses.conftest import DIM

MakeModel = Callable[[], SentenceTransformer]
MakeContrastive = Callable[[SentenceTransformer], Any]

CONTRASTIVE: dict[str, MakeContrastive] = {
    "mac": lambda model: MultimodalMACLoss(model, schedule="constant"),
    "infonce": lambda model: MultipleNegativesRankingLoss(model),
}


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
@pytest.mark.parametrize("kind", CONTRASTIVE)
def test_both_terms_are_those_of_their_own_losses(
    make_model: MakeModel, pairs: Dataset, kind: str, metric: Any
) -> None:
    model = make_model()
    columns = columns_of(model, pairs)
    contrastive = CONTRASTIVE[kind](model)
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


@pytest.mark.parametrize("kind", CONTRASTIVE)
def test_each_column_is_embedded_once(make_model: MakeModel, pairs: Dataset, kind: str) -> None:
    model = make_model()
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    JointDistillationLoss(model, CONTRASTIVE[kind](model))(columns_of(model, pairs))
    assert len(calls) == len(pairs.column_names) == 3


def test_content_ids_reach_the_contrastive_loss(make_model: MakeModel) -> None:
    model = make_model()
    # Both rows have one positive.
    pairs = Dataset.from_dict({"anchor": ["text: 1 2 3", "text: 4 5 6"], "positive": ["image: 7 8 9"] * 2})
    contrastive = MultimodalMACLoss(model, schedule="constant")
    joint = JointDistillationLoss(model, contrastive)
    assert joint(columns_of(model, pairs))["contrastive"].item() > 0.1
    assert joint(columns_of(model, pairs, content=True))["contrastive"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", CONTRASTIVE)
def test_inside_matryoshka(make_model: MakeModel, pairs: Dataset, kind: str) -> None:
    model = make_model()
    columns = columns_of(model, pairs)
    contrastive, dims, weights = CONTRASTIVE[kind](model), [DIM, 4, 2], [1.0, 0.5, 0.25]
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


def test_weights_that_nobody_moves_are_warned_of(
    make_model: MakeModel, pairs: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model().train()
    infonce = MultimodalMACLoss(model, 0.05, 0.05)
    for start in ({}, {"contrastive_weight_start": 0.5}):
        joint = JointDistillationLoss(model, infonce, **start)
        for _ in range(IDLE_FORWARDS_BEFORE_WARNING):
            joint(columns_of(model, pairs))
        assert ("and a weight that moves is at its start" in caplog.text) == bool(start)


def test_terms_add_up() -> None:
    first, second = LossTerms(a=torch.tensor(1.0)), LossTerms(a=torch.tensor(2.0), b=torch.tensor(4.0))
    total = sum([first, second * 0.5], start=0.0)
    assert isinstance(total, LossTerms)
    assert {name: value.item() for name, value in total.items()} == {"a": 2.0, "b": 2.0}
    with pytest.raises(TypeError):
        first + 1.0


def test_the_schedule_is_found(make_model: MakeModel) -> None:
    model = make_model()
    contrastive = MultimodalMACLoss(model)
    assert find_scheduled_losses(JointDistillationLoss(model, contrastive)) == {"": contrastive}


@pytest.mark.parametrize("matryoshka", [False, True])
@pytest.mark.parametrize("kind", CONTRASTIVE)
def test_training_logs_each_term(
    tmp_path: Path, make_model: MakeModel, pairs: Dataset, kind: str, matryoshka: bool
) -> None:
    model = make_model()

    class Trainer(SentenceTransformerTrainer):
        def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], Tensor | None]:
            features, labels = super().collect_features(inputs)
            for column in features:
                column["teacher_state"] = torch.ones(len(column["input_ids"]), DIM)
            return features, labels

    loss: Any = JointDistillationLoss(model, CONTRASTIVE[kind](model), contrastive_weight=0.01)
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
    if kind == "mac":
        add_temperature_schedule(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["distillation"] + entry["contrastive"], abs=1e-3)
    assert logs[-1]["distillation"] < 0.5 * logs[0]["distillation"]
    trainer.evaluate()
    assert {"eval_distillation", "eval_contrastive"} <= set().union(*trainer.state.log_history)


def test_errors(make_model: MakeModel, pairs: Dataset) -> None:
    model = make_model()
    contrastive = MultimodalMACLoss(model, schedule="constant")
    for name in ("contrastive_weight", "distillation_weight", "contrastive_weight_start", "distillation_weight_start"):
        for weight in (-0.5, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=rf"{name} is {weight}, but a weight must be 0 or more and finite"):
                JointDistillationLoss(model, contrastive, **{name: weight})
    for refused in (CachedMultipleNegativesRankingLoss(model), MatryoshkaLoss(model, contrastive, [DIM])):
        with pytest.raises(
            ValueError, match=rf"a {type(refused).__name__}, but .*Pass a MultimodalMACLoss or a Multiple"
        ):
            JointDistillationLoss(model, refused)
    with pytest.raises(ValueError, match=r"distillation_weight_start with a MultipleNegativesRankingLoss, .* Pass a"):
        JointDistillationLoss(model, MultipleNegativesRankingLoss(model), distillation_weight_start=1.0)
    with pytest.raises(ValueError, match="metric is 'kl'"):
        JointDistillationLoss(model, contrastive, "kl")  # type: ignore[arg-type]
    columns = columns_of(model, pairs)
    with pytest.raises(ValueError, match="no 'modality_ids' feature"):
        JointDistillationLoss(model, contrastive)(
            [{key: value for key, value in column.items() if key != "modality_ids"} for column in columns]
        )
    del columns[0]["teacher_state"]
    with pytest.raises(ValueError, match=r"no 'teacher_state' and labels is None"):
        JointDistillationLoss(model, contrastive)(columns)


def test_model_card_facts(make_model: MakeModel) -> None:
    model = make_model()
    loss = JointDistillationLoss(model, MultimodalMACLoss(model, temperature=0.07), "cosine", 1.0, 0.3)
    loss.contrastive.progress = 1.0
    config = loss.get_config_dict()
    assert "contrastive_weight_start" not in config
    assert config["contrastive"] == "MultimodalMACLoss"
    assert (config["temperature"], config["metric"], config["distillation_weight"]) == (0.07, "cosine", 0.3)
    assert "eprint={2507.08064}" in loss.citation
