from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from puma_hf.evaluation.config import EvaluateConfig
from puma_hf.recipes import config_text, load_config


def config(**values: Any) -> EvaluateConfig:
    return EvaluateConfig(model="m", data="d", **values)


def test_yaml_round_trip(tmp_path: Path) -> None:
    given = config(tasks=["webqa_task1"], pool="local", instruction_seed=3, output="out", truncate_dim=64)
    path = tmp_path / "evaluate.yaml"
    path.write_text(config_text(given))
    assert load_config(EvaluateConfig, path) == given
    assert given.tasks == ("webqa_task1",)


def test_every_field_has_help_and_only_two_must_be_given() -> None:
    assert all(entry.metadata["help"] for entry in fields(EvaluateConfig))
    with pytest.raises(ValueError, match=r"model is missing .* data is missing"):
        load_config(EvaluateConfig)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"benchmark": "mteb"}, "benchmark='mteb' must be one of 'mbeir', 'nano'"),
        ({"pool": "locl"}, "pool='locl' must be one of 'local', 'global', 'both'. Did you mean 'local'?"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"nano_queries": -1}, "nano_queries=-1 must be at least 0"),
        ({"embedding_dtype": "int8"}, "embedding_dtype='int8' must be one of 'float32', 'float16', 'bfloat16'"),
        ({"search_backend": "scann"}, "search_backend='scann' must be one of 'torch', 'faiss'"),
        ({"truncate_dim": 0}, "truncate_dim=0 must be at least 1"),
        ({"instruction_seed": "first"}, "instruction_seed='first' must be a whole number or null"),
        ({"output": "results.json"}, "output='results.json' must be a directory: .* such as 'results'"),
    ],
)
def test_wrong_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        config(**values)


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="taken' must be a directory"):
        config(output=tmp_path / "taken")


def test_options_that_are_not_used() -> None:
    assert config(nano_seed=3).notes() == ["nano_seed=3: not used with benchmark='mbeir'."]
    assert config().notes() == config(benchmark="nano", nano_seed=3).notes() == []
