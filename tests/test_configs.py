"""Every settings class: its defaults, what it refuses, what it notes; and the recipes of `configs/`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from puma_hf import cli
from puma_hf.configs import (
    DistillConfig,
    EmbedConfig,
    IndexConfig,
    PushConfig,
    StageConfig,
    SweepConfig,
    TrainConfig,
    parse_parameters,
)
from puma_hf.settings import config_text, field_help, load_config

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [*sorted(path.name for path in CONFIGS.glob("*_stage*.yaml")), "demo_distill.yaml", "demo_train.yaml"]

CLASSES = [kind for _, kind, _ in cli._COMMANDS]


def needed(kind: Any) -> list[str]:
    """The fields of a class that have no default."""
    return [entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING]


def make(kind: Any, **values: Any) -> Any:
    return kind(**{**dict.fromkeys(needed(kind), "org/name"), **values})


def load(name: str) -> Any:
    """The released first stage has pairs and a loss, so `train` runs it; ours has no labels, so `distill` does."""
    kind = DistillConfig if name.endswith(("_distill.yaml", "_stage1_ours.yaml")) else TrainConfig
    return load_config(kind, CONFIGS / name)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_has_help_and_a_way_through_yaml(kind: Any, tmp_path: Path) -> None:
    config = make(kind)
    assert set(field_help(kind)) >= {entry.name for entry in fields(kind)}
    (tmp_path / "recipe.yaml").write_text(config_text(config))
    assert load_config(kind, tmp_path / "recipe.yaml") == config
    missing = " .*".join(f"{name} is missing" for name in needed(kind))
    with pytest.raises(ValueError, match=missing):
        load_config(kind)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (DistillConfig, {"max_pixels": 783}, r"max_pixels=783 must be at least 784\."),
        (DistillConfig, {"max_steps": 0}, r"max_steps=0 must be at least 1, or -1 for whole epochs"),
        (DistillConfig, {"learning_rate": float("nan")}, "learning_rate=nan must be above 0"),
        (TrainConfig, {"warmup": 1.0}, r"warmup=1\.0 must be at least 0 and below 1"),
        (TrainConfig, {"teacher_mode": "one_pass"}, r"teacher_mode='one_pass' must be one of 'frozen', 'cached'\."),
        (TrainConfig, {"training_arguments": {"adam_beta2": 0.98}}, r"may not set \['adam_beta2'\]"),
        (
            DistillConfig,
            {"first_layer_learning_rate": 1e-4, "training_arguments": {"learning_rate_mapping": {"lora_A": 1e-5}}},
            r"first_layer_learning_rate=0\.0001 may not stand beside learning_rate_mapping\. Put it there, as '",
        ),
        (TrainConfig, {"schedule_end": 1.1}, r"schedule_end=1\.1 must be above 0 and at most 1\."),
        (TrainConfig, {"distillation_weight": 1, "mini_batch_size": 8}, r"mini_batch_size=8 .*=0, .*Leave"),
        (TrainConfig, {"contrastive_weight": 0}, r"contrastive_weight=0\.0 and distillation_weight=0\.0 leave no loss"),
        (EmbedConfig, {"on_error": "skipp"}, r"on_error='skipp' must be one of .* Did you mean 'skip'\?"),
        (
            SweepConfig,
            {"max_pixels": "50000,few"},
            "max_pixels='50000,few' must be different numbers of pixels, each at",
        ),
        (SweepConfig, {"max_pixels": "784,784"}, "max_pixels='784,784' must be different numbers of pixels, each at"),
        (SweepConfig, {"max_params": "much"}, "max_params='much' must be a number of parameters. Write it as 4B, 800M"),
        (IndexConfig, {"precision": "int8"}, r"precision='int8' must be one of 'float32', 'float16'"),
        (IndexConfig, {"shard_size": 10_000}, "shard_size=10000 must be at least 1 and at most 4096"),
        (PushConfig, {"repo_id": "name"}, "'name' must be a Hub id of the form organisation/name"),
    ],
)
def test_values_that_are_refused(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, **values)


@pytest.mark.parametrize(("value", "number"), [("1.5b", 1.5e9), ("2G", 2e9), ("1_300_000", 1.3e6), (7, 7)])
def test_numbers_of_parameters_as_people_write_them(value: str | float, number: float) -> None:
    assert parse_parameters(value) == number
    with pytest.raises(ValueError, match=r"max_params=.* must be a number of parameters\. Write it as 4B"):
        parse_parameters(f"-{value}")


def test_importing_the_settings_is_light() -> None:
    code = "import sys, puma_hf.configs; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"


# ------------------------------------------------------------------------------------------------ the files of configs/


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load(name: str) -> None:
    assert isinstance(load(name), StageConfig)


@pytest.mark.parametrize("size", ["2b", "7b"])
def test_the_released_stages_have_the_released_numbers(size: str) -> None:
    first, second = load(f"qwen2_vl_{size}_stage1.yaml"), load(f"qwen2_vl_{size}_stage2.yaml")
    assert (first.loss, first.temperature, first.contrastive_weight, first.metric) == ("infonce", 0.05, 0.9, "mse-mean")
    assert first.distillation_weight == pytest.approx(2 * 0.1 * 0.05)  # theirs is the sum of two columns, ours the mean
    assert (first.teacher, first.teacher_mode) == (f"Qwen/Qwen2-VL-{size.upper()}-Instruct", "frozen")
    assert (first.batch_size * 4, first.learning_rate, first.first_layer_learning_rate) == (288, 2e-4, 1e-4)
    assert (second.loss, second.temperature, second.hard_temperature) == ("mac", 0.03, 0.018)
    assert (second.schedule, second.schedule_end, second.grouping) == ("exponential", 0.5, "target")
    assert (second.batch_size * 4, second.learning_rate, second.max_pixels) == (600, 3e-4, 300 * 28 * 28)
    assert (first.lora_dropout, second.lora_dropout) == (0.05, 0.1)
    for config in (first, second):
        assert (config.lora_r, config.lora_alpha, config.num_train_epochs, config.warmup) == (128, 256, 2, 0.03)
        assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.98, 1e-7)
        assert config.gradient_checkpointing
        assert not config.train_ret_token
    # The second stage goes on where the first, merged, ends.
    assert second.model == first.model + "-stage1"


@pytest.mark.parametrize("size", ["2b", "7b"])
def test_ours_see_as_many_items_a_step(size: str) -> None:
    first, second = load(f"qwen2_vl_{size}_stage1_ours.yaml"), load(f"qwen2_vl_{size}_stage2_ours.yaml")
    assert (first.batch_size * first.gradient_accumulation_steps, second.batch_size) == (288, 600)
    assert second.mini_batch_num_tokens
    assert second.model == first.model + "-distilled"
