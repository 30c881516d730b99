"""The recipes of `configs/` load, say what they claim, and run where they can."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from puma_hf.recipes import load_config
from puma_hf.trainer.config import DistillConfig, StageConfig, TrainConfig

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [*sorted(path.name for path in CONFIGS.glob("*_stage*.yaml")), "demo_distill.yaml", "demo_train.yaml"]


def load(name: str) -> Any:
    """The released first stage has pairs and a loss, so `train` runs it; ours has no labels, so `distill` does."""
    kind = DistillConfig if name.endswith(("_distill.yaml", "_stage1_ours.yaml")) else TrainConfig
    return load_config(kind, CONFIGS / name)


def test_nothing_else_lies_there() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == {*RECIPES, "accelerate_fsdp2.yaml"}
    assert len(RECIPES) == 10


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load(name: str) -> None:
    config = load(name)
    assert isinstance(config, StageConfig)
    assert not config.notes()


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("qwen2")])
def test_every_value_says_where_it_comes_from(name: str) -> None:
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if line and not line.startswith("#") and not line.startswith("output:")]
    assert [line for line in values if not re.search(r" # \S", line)] == []
    assert max(map(len, lines)) <= 120


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


def test_the_demos_numbers() -> None:
    first, second = load("demo_distill.yaml"), load("demo_train.yaml")
    assert (first.max_steps, first.batch_size, first.learning_rate, first.lora_r) == (150, 64, 2e-3, 64)
    assert (second.max_steps, second.batch_size, second.learning_rate, second.lora_r) == (60, 64, 5e-4, 64)
    assert first.train_ret_token
    assert not second.train_ret_token


def test_accelerates_own_configuration_is_read_by_accelerate() -> None:
    from accelerate.commands.config.config_args import ClusterConfig
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    config = ClusterConfig.from_yaml_file(str(CONFIGS / "accelerate_fsdp2.yaml"))
    assert config.distributed_type == "FSDP"
    assert config.fsdp_config["fsdp_version"] == 2
    wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert all(hasattr(modeling_qwen2_vl, name) for name in wrapped)
    assert yaml.safe_load((CONFIGS / "accelerate_fsdp2.yaml").read_text())["mixed_precision"] == "bf16"
