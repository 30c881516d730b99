from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import Tensor

from puma_hf import PumaDistillationTrainer, PumaModel, PumaTrainer
from puma_hf.configs import TrainConfig
from puma_hf.losses import CachedMultimodalMACLoss, JointDistillationLoss, MultimodalMACLoss
from puma_hf.trainer import FrozenTeacher
from puma_hf.trainer.stages import training_arguments, training_loss
from tests import released
from tests.trainer.conftest import MakeArguments, MakeStudent


def config(**values: Any) -> TrainConfig:
    return TrainConfig(model="model", output="out", data="data", **values)


def test_values_of_a_file_become_those_of_the_trainer() -> None:
    made = training_arguments(config(training_arguments={"weight_decay": "1e-2", "optim": "sgd", "data_seed": None}))
    assert (made.weight_decay, str(made.optim.value), made.data_seed) == (0.01, "sgd", None)
    assert made.save_strategy == "steps"
    assert training_arguments(config(save_steps=0)).save_strategy == "no"


def test_the_optimiser_is_the_one_that_was_asked_for(make_student: MakeStudent) -> None:
    """As released: the adapter of layer 0 at half the rate, and AdamW's numbers."""
    model = make_student()
    values = {"first_layer_learning_rate": 1e-4, "adam_beta1": 0.8, "adam_beta2": 0.98, "adam_epsilon": 1e-7}
    made = training_arguments(config(learning_rate=2e-4, **values, training_arguments={"use_cpu": True}))
    rows = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})
    trainer = PumaTrainer(model=model, args=made, train_dataset=rows, loss=MultimodalMACLoss(model))
    optimizer = trainer.create_optimizer()
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    slower = {name for name, weight in trained.items() if rates[id(weight)] == 1e-4}
    assert slower == {name for name in trained if "language_model.layers.0." in name}
    assert {name.split(".layers.")[1].split(".lora_")[1][0] for name in slower} == {"A", "B"}
    assert {rates[id(trained[name])] for name in trained.keys() - slower} == {2e-4}
    assert any("token_adapter" in name for name in trained.keys() - slower)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.98), 1e-7)}
    assert not training_arguments(config()).learning_rate_mapping


@pytest.mark.parametrize(
    ("values", "message"),
    [({"weight_decai": 1}, r"has 'weight_decai', .* Did you mean 'weight_decay'\?$"), ({"optim": "adamm"}, r"adamm")],
)
def test_what_the_trainer_would_fail_on(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_arguments(config(training_arguments=values))


def test_bfloat16_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    made = training_arguments(config(bf16=True))
    assert (made.bf16, made.use_cpu) == (True, True)
    assert not training_arguments(config()).use_cpu


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({}, MultimodalMACLoss),
        ({"loss": "mac-split"}, MultimodalMACLoss),
        ({"loss": "infonce"}, MultimodalMACLoss),
        ({"mini_batch_size": 4}, CachedMultimodalMACLoss),
        ({"mini_batch_num_tokens": 64}, CachedMultimodalMACLoss),
        ({"loss": "infonce", "mini_batch_size": 4}, CachedMultimodalMACLoss),
        ({"matryoshka_dims": [16, 8]}, MatryoshkaLoss),
        ({"distillation_weight": 0.5}, JointDistillationLoss),
        ({"loss": "infonce", "distillation_weight": 0.5}, JointDistillationLoss),
        ({"matryoshka_dims": [16, 8], "distillation_weight": 0.5}, MatryoshkaLoss),
    ],
)
def test_the_loss_is_of_the_kind_that_was_asked_for(
    sentence_transformer: SentenceTransformer, values: dict[str, Any], kind: type
) -> None:
    assert type(training_loss(sentence_transformer, config(**values))) is kind


def test_settings_reach_the_loss(sentence_transformer: SentenceTransformer) -> None:
    values = {"temperature": 0.1, "hard_temperature": 0.07, "schedule": "linear", "grouping": "query"}
    values |= {"schedule_end": 0.7}
    values |= {"loss": "mac-split", "split_weight": 0.3, "false_negative_margin": 0.2, "mini_batch_num_tokens": 64}
    settings = training_loss(sentence_transformer, config(**values)).get_config_dict()  # type: ignore[operator]
    assert settings["temperature"] == 0.1
    assert settings["hard_temperature"] == 0.07
    assert (settings["schedule"], settings["schedule_end"]) == ("linear", 0.7)
    assert settings["grouping"] == "query"
    assert settings["objective"] == "split"
    assert settings["split_weight"] == 0.3
    assert settings["false_negative_margin"] == 0.2
    assert settings["mini_batch_num_tokens"] == 64


@pytest.mark.parametrize("cache", [{}, {"mini_batch_size": 2}])
def test_infonce_is_the_ranking_loss_where_nothing_is_copied(
    sentence_transformer: SentenceTransformer, cache: dict[str, Any]
) -> None:
    model = sentence_transformer.eval()
    image = Image.new("RGB", (56, 56), "red")
    rows: list[list[Any]] = [["a", "b", "c"], ["red", image, "blue"]]
    copies: list[list[Any]] = [["a", "b", "c"], ["red", "red", "blue"]]

    def value(loss: Any, columns: list[list[Any]]) -> float:
        return float(loss([model.preprocess(column) for column in columns], None).detach())

    infonce = training_loss(model, config(loss="infonce", temperature=0.1, **cache))
    ranking = MultipleNegativesRankingLoss(model, scale=10.0)
    assert value(infonce, rows) == pytest.approx(value(ranking, rows), rel=1e-5)
    assert value(infonce, copies) < value(ranking, copies) - 1e-3  # a copy of the positive is no negative


@pytest.mark.parametrize("loss", ["mac", "infonce"])
@pytest.mark.parametrize(("num_devices", "wanted", "expected"), [(1, True, False), (2, True, True), (2, False, False)])
def test_candidates_are_gathered_where_there_are_others(
    sentence_transformer: SentenceTransformer, loss: str, num_devices: int, wanted: bool, expected: bool
) -> None:
    settings = config(loss=loss, gather_across_devices=wanted)
    built: Any = training_loss(sentence_transformer, settings, num_devices=num_devices)
    assert built.gather_across_devices is expected


def test_sizes_of_the_embedding(sentence_transformer: SentenceTransformer) -> None:
    joint: Any = training_loss(sentence_transformer, config(matryoshka_dims=[8, 32], distillation_weight=0.5))
    assert list(joint.matryoshka_dims) == [32, 8]
    assert type(joint.loss) is JointDistillationLoss
    with pytest.raises(ValueError, match=r"matryoshka_dims cannot exceed the model's embedding dimension of 32"):
        training_loss(sentence_transformer, config(matryoshka_dims=[64]))


class Compared:
    """Part of a trainer: compares the loss and the gradients of each step with what `expected` computes."""

    compared = 0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        columns = self.collect_features(inputs)[0]  # type: ignore[attr-defined]
        expected = self.expected(columns, self.state.global_step / self.state.max_steps)  # type: ignore[attr-defined]
        weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}  # type: ignore[attr-defined]
        gradients = torch.autograd.grad(expected, list(weights.values()))
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-9)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=1e-9, msg=f"{name}, step {self.compared}")
        assert max(gradient.abs().max() for gradient in gradients) > 0.1
        self.compared += 1
        return loss


@pytest.mark.parametrize("growing", [False, True])
def test_stage_1_is_the_released_loss(
    full_dir: Path, qwen_dir: Path, make_student: MakeStudent, make_arguments: MakeArguments, growing: bool
) -> None:
    """Four steps of a run in float64, teacher and student; the teacher is compared with the full model."""
    model = make_student(disturbed=True).append(released.InFloat64()).double()
    full = PumaModel.from_pretrained(full_dir, dtype=torch.float64).eval()
    recipe = released.STAGE_1_GROWING if growing else released.STAGE_1

    class Trainer(Compared, PumaDistillationTrainer):
        def expected(self, columns: list[dict[str, Any]], share: float) -> Tensor:
            with torch.no_grad():
                texts = [{name: column[name] for name in ("input_ids", "attention_mask")} for column in columns]
                teachers = [full(**text).pooler_output for text in texts]
            students = [model(dict(column))["pooler_output"] for column in columns]
            return released.stage_1(students, teachers, share if growing else None)

    words = ["red", "green", "blue", "an apple", "a pear", "a cat", "a table", "one"]
    trainer = Trainer(
        model=model,
        args=make_arguments(learning_rate=1e-3),
        train_dataset=Dataset.from_dict({"anchor": words, "positive": [f"{word}, two" for word in words]}),
        loss=training_loss(model, config(**recipe)),
        teacher=qwen_dir,
    )
    assert type(trainer.teacher) is FrozenTeacher
    trainer.train()
    assert trainer.compared == 4


def test_stage_2_is_the_released_loss(
    make_student: MakeStudent, make_arguments: MakeArguments, images: list[Image.Image], tmp_path: Path
) -> None:
    """At the defaults, with right answers of three modalities."""
    model = make_student(disturbed=True).append(released.InFloat64()).double()

    class Trainer(Compared, PumaTrainer):
        def expected(self, columns: list[dict[str, Any]], share: float) -> Tensor:
            modalities = columns[1]["modality_ids"].tolist()
            students = [model(dict(column))["pooler_output"] for column in columns]
            return released.stage_2(students, modalities, share, decay=math.log(0.03 / 0.018))

    for number, image in enumerate(images[:2]):
        image.save(tmp_path / f"{number}.png")
    pictures = [None, str(tmp_path / "0.png"), None, str(tmp_path / "1.png")]
    answers = [{"text": text, "image": path} for text, path in zip(["a", "b", "c", None], pictures, strict=True)]
    trainer = Trainer(
        model=model,
        args=make_arguments(learning_rate=1e-3),
        train_dataset=Dataset.from_dict({"anchor": ["red", "green", "blue", "one"], "positive": answers}),
        loss=training_loss(model, config()),
    )
    trainer.train()
    assert trainer.compared == 4
