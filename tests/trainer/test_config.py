from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from puma_hf.losses import MultimodalMACLoss
from puma_hf.trainer import config as module
from puma_hf.trainer.config import DistillConfig, MergeConfig, StageConfig, TrainConfig

PATHS: dict[str, Any] = {"model": "pruned", "output": "out", "data": "mbeir"}


def distill_config(**values: Any) -> DistillConfig:
    return DistillConfig(**{**PATHS, **values})


def train_config(**values: Any) -> TrainConfig:
    return TrainConfig(**{**PATHS, **values})


def test_the_defaults_of_the_two_stages_are_lamras() -> None:
    first, second = distill_config(), train_config()
    assert (first.lora_r, first.learning_rate, first.train_ret_token) == (64, 2e-4, True)
    assert (second.lora_r, second.learning_rate, second.train_ret_token) == (128, 1e-4, False)
    for stage in (first, second):
        assert (stage.lora_alpha, stage.lora_dropout, stage.warmup) == (None, 0.05, 0.03)
        assert (stage.max_length, stage.max_pixels) == (None, None)
        assert (stage.max_steps, stage.num_train_epochs) == (-1, 1.0)
    assert (first.teacher_mode, first.metric) == ("frozen", "mse")
    assert (second.loss, second.temperature, second.distillation_weight) == ("mac", 0.03, 0.0)


def test_defaults_and_choices_of_the_loss_are_the_losses() -> None:
    defaults = {entry.name: entry.default for entry in fields(TrainConfig)}
    arguments = signature(MultimodalMACLoss).parameters
    for name in ("temperature", "hard_temperature", "schedule", "schedule_end", "grouping", "split_weight"):
        assert defaults[name] == arguments[name].default, name
    assert defaults["false_negative_margin"] is arguments["false_negative_margin"].default is None


@pytest.mark.parametrize("kind", [DistillConfig, TrainConfig, MergeConfig])
def test_every_field_has_help_that_ends_as_a_sentence(kind: Any) -> None:
    for entry in fields(kind):
        assert entry.metadata["help"][0].isalnum(), entry.name
        assert entry.metadata["help"].endswith("."), entry.name
        assert get_type_hints(kind)[entry.name] is not Any


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0 must be at least 1\."),
        ({"gradient_accumulation_steps": 0}, r"gradient_accumulation_steps=0 must be at least 1"),
        ({"max_length": 0}, r"max_length=0 must be at least 1"),
        ({"max_pixels": 783}, r"max_pixels=783 must be at least 784\. One visual token is 28 x 28 pixels\."),
        ({"lora_r": 0}, r"lora_r=0 must be at least 1"),
        ({"lora_alpha": 0}, r"lora_alpha=0 must be at least 1\. Leave it out for the default\.$"),
        ({"logging_steps": 0}, r"logging_steps=0 must be at least 1"),
        ({"max_steps": 0}, r"max_steps=0 must be at least 1, or -1 for whole epochs"),
        ({"max_steps": -2}, r"max_steps=-2 must be at least -1\. Take -1 for whole epochs\."),
        ({"num_train_epochs": 0}, r"num_train_epochs=0\.0 must be above 0"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0 must be above 0\. LamRA takes"),
        ({"learning_rate": float("nan")}, r"learning_rate=nan must be above 0"),
        ({"learning_rate": float("inf")}, r"learning_rate=inf must be above 0"),
        ({"warmup": 1.0}, r"warmup=1\.0 must be at least 0 and below 1"),
        ({"warmup": -0.1}, r"warmup=-0\.1 must be at least 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0 must be at least 0 and below 1\. LamRA takes 0\.05\."),
        ({"dataloader_num_workers": -1}, r"dataloader_num_workers=-1 must be at least 0"),
        ({"save_steps": -1}, r"save_steps=-1 must be at least 0"),
        ({"seed": -1}, r"seed=-1 must be at least 0 and at most 4294967295\. Leave it out for the default, 0\."),
        ({"seed": 99999999999}, r"seed=99999999999 must be at least 0 and at most 4294967295\. Leave it out"),
        ({"batch_size": "8"}, r"batch_size='8' must be a whole number, not text"),
        ({"bf16": "false"}, r"bf16='false' must be true or false, not text"),
        ({"model": None}, r"model=None must be text, not null"),
        ({"teacher_mode": "frosen"}, r"teacher_mode='frosen' must be one of .*Did you mean 'frozen'\?"),
        ({"teacher_mode": "one_pass"}, r"teacher_mode='one_pass' must .*both collapsed\. Take 'frozen', the full"),
        ({"metric": "l1"}, r"metric='l1' must be one of 'mse', 'mse-mean', 'cosine'"),
        ({"first_layer_learning_rate": 0}, r"first_layer_learning_rate=0\.0 must be above 0\. PUMA takes 1e-4\."),
        ({"adam_beta2": 1}, r"adam_beta2=1\.0 must be at least 0 and below 1\. Leave it out for the default, 0\.999"),
        ({"adam_epsilon": 0}, r"adam_epsilon=0\.0 must be above 0"),
        ({"training_arguments": {"adam_beta2": 0.98}}, r"may not set 'adam_beta2': it is the field 'adam_beta2'"),
        (
            {"first_layer_learning_rate": 1e-4, "training_arguments": {"learning_rate_mapping": {"lora_A": 1e-5}}},
            r"first_layer_learning_rate=0\.0001 may not stand beside learning_rate_mapping in .*\. Put it there, as '",
        ),
        ({"teacher_cache": "x"}, r"teacher_cache='x' is read with teacher_mode='cached' only, not 'frozen'"),
        ({"training_arguments": {"max_steps": 3}}, r"may not set 'max_steps': it is the field 'max_steps'"),
        ({"training_arguments": {"per_device_train_batch_size": 3}}, r"it is the field 'batch_size'\. Set that"),
    ],
)
def test_values_that_both_stages_refuse(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill_config(**values)
    with pytest.raises(ValueError, match=message):
        train_config(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0}, r"temperature=0\.0 must be above 0"),
        ({"hard_temperature": -1}, r"hard_temperature=-1\.0 must be above 0"),
        ({"loss": "triplet"}, r"loss='triplet' must be one of 'mac', 'mac-split', 'infonce'"),
        ({"schedule": "sudden"}, r"schedule='sudden' must be one of"),
        ({"schedule_end": 0}, r"schedule_end=0\.0 must be above 0 and at most 1\. Take 1\.0 to let it fall to the end"),
        ({"schedule_end": 1.1}, r"schedule_end=1\.1 must be above 0 and at most 1\. Take 1\.0"),
        ({"num_negatives": -1}, r"num_negatives=-1 must be at least 0"),
        ({"split_weight": 1.5}, r"split_weight=1\.5 must be at least 0 and at most 1"),
        ({"train_fraction": 0}, r"train_fraction=0\.0 must be above 0 and at most 1"),
        ({"mini_batch_size": 0}, r"mini_batch_size=0 must be at least 1"),
        ({"mini_batch_num_tokens": 0}, r"mini_batch_num_tokens=0 must be at least 1"),
        ({"false_negative_margin": -0.1}, r"false_negative_margin=-0\.1 must be at least 0"),
        ({"matryoshka_dims": [8, 0]}, r"matryoshka_dims=0 must be at least 1"),
        ({"matryoshka_dims": [8, 8]}, r"matryoshka_dims=\[8, 8\] must not repeat a size"),
        ({"distillation_weight": -1}, r"distillation_weight=-1\.0 must be at least 0"),
        (
            {"distillation_weight": 1, "mini_batch_size": 8},
            r"mini_batch_size=8 .* need distillation_weight=0, got 1\.0: .*Leave one of them out",
        ),
        ({"distillation_weight_start": 1, "mini_batch_size": 8}, r"mini_batch_size=8 .* need distillation_weight=0"),
        ({"contrastive_weight": 0}, r"contrastive_weight=0\.0 and distillation_weight=0\.0 leave no loss\. Give"),
        ({"contrastive_weight": -1}, r"contrastive_weight=-1\.0 must be at least 0"),
        ({"contrastive_weight_start": -1}, r"contrastive_weight_start=-1\.0 must be at least 0"),
    ],
)
def test_values_that_the_second_stage_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_config(**values)


def test_values_are_made_uniform() -> None:
    config = train_config(model=Path("a/b"), matryoshka_dims=[16, 8], learning_rate="2e-4", report_to="wandb")
    assert (config.model, config.matryoshka_dims, config.learning_rate) == ("a/b", (16, 8), 2e-4)
    assert config.report_to == ("wandb",)
    assert config == train_config(model="a/b", matryoshka_dims=(16, 8), learning_rate=2e-4, report_to=["wandb"])
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("values", [{"mini_batch_size": 8}, {"mini_batch_num_tokens": 100}])
def test_a_mini_batch_means_gradient_caching(values: dict[str, int]) -> None:
    assert train_config(**values).cached
    assert not train_config().cached


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"loss": "infonce"}, []),
        ({"split_weight": 0.3}, ["split_weight=0.3: not used with loss='mac'."]),
        ({"split_weight": 0.3, "loss": "mac-split"}, []),
        (
            {"loss": "infonce", "hard_temperature": 0.02, "schedule": "linear"},
            ["hard_temperature=0.02, schedule='linear': not used with loss='infonce'."],
        ),
        ({"schedule": "constant"}, []),
        ({"schedule": "constant", "schedule_end": 1}, ["schedule_end=1.0: not used with schedule='constant'."]),
        ({"loss": "infonce", "schedule_end": 1}, ["schedule_end=1.0: not used with loss='infonce'."]),
        ({"loss": "infonce", "grouping": "query"}, ["grouping='query': not used with loss='infonce'."]),
        ({"teacher": "t"}, ["teacher='t': not used with distillation_weight=0."]),
        ({"teacher": "t", "distillation_weight": 0.5}, []),
        ({"teacher": "t", "distillation_weight_start": 0.5}, []),
        ({"contrastive_weight": 0.9}, ["contrastive_weight=0.9: not used with distillation_weight=0."]),
        ({"negatives": "wrong"}, ["negatives=('wrong',): not used with num_negatives=0."]),
        ({"negatives": "wrong", "num_negatives": 1}, []),
        (
            {"mini_batch_size": 8, "mini_batch_num_tokens": 64},
            ["mini_batch_size=8: not used with mini_batch_num_tokens."],
        ),
    ],
)
def test_options_that_a_combination_ignores_are_named(values: dict[str, Any], expected: list[str]) -> None:
    assert train_config(**values).notes() == expected


def test_training_arguments_may_not_repeat_a_field() -> None:
    names = {entry.name for entry in fields(StageConfig)}
    assert set(module.SET_BY_FIELDS.values()) <= names
    assert train_config(training_arguments={"optim": "adamw_torch"}).training_arguments == {"optim": "adamw_torch"}


def test_importing_the_settings_is_light() -> None:
    code = "import sys, puma_hf.trainer.config; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"
