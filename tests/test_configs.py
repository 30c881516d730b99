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
RECIPES = sorted(path.name for path in CONFIGS.glob("*_distill.yaml")) + sorted(
    path.name for path in CONFIGS.glob("*_train.yaml")
)


def load(name: str) -> Any:
    return load_config(DistillConfig if name.endswith("_distill.yaml") else TrainConfig, CONFIGS / name)


def test_nothing_else_lies_there() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == {*RECIPES, "accelerate_fsdp2.yaml"}
    assert len(RECIPES) == 6


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
def test_the_published_stages_have_lamras_numbers(size: str) -> None:
    first, second = load(f"qwen2_vl_{size}_distill.yaml"), load(f"qwen2_vl_{size}_train.yaml")
    assert (first.lora_r, first.lora_alpha, first.learning_rate) == (64, 128, 2e-4)
    assert (first.batch_size * 8, first.num_train_epochs) == (72 * 8, 2)
    assert (second.lora_r, second.lora_alpha, second.learning_rate) == (128, 256, 1e-4)
    assert (second.batch_size * 16, second.num_train_epochs, second.temperature) == (60 * 16, 1, 0.05)
    for config in (first, second):
        assert (config.lora_dropout, config.warmup, config.bf16) == (0.05, 0.03, True)
        assert (config.max_length, config.max_pixels) == (480, 300 * 28 * 28)
    # The second stage goes on where the first, merged, ends.
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
