from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from puma_hf.cli_options import config_command
from puma_hf.embedding.config import EmbedConfig
from puma_hf.recipes import config_text, load_config


def config(**values: Any) -> EmbedConfig:
    return EmbedConfig(**{"data": "d", "model": "m", "output": "o", **values})


def test_yaml_round_trip(tmp_path: Path) -> None:
    given = config(pool="webqa_task1", prompt="Find it.", precision="int8", on_error="skip", fast=False)
    path = tmp_path / "embed.yaml"
    path.write_text(config_text(given))
    assert load_config(EmbedConfig, path) == given


def test_every_field_has_help_and_only_three_must_be_given() -> None:
    assert all(entry.metadata["help"] for entry in fields(EmbedConfig))
    with pytest.raises(ValueError, match=r"data is missing .* model is missing .* output is missing"):
        load_config(EmbedConfig)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "int4"}, "precision='int4' must be one of 'float32', 'float16', 'int8', 'uint8', 'binary', "),
        ({"on_error": "skipp"}, r"on_error='skipp' must be one of 'raise', 'skip', 'zero'. Did you mean 'skip'\?"),
        ({"format": "npy"}, "format='npy' must be one of 'parquet', 'safetensors'"),
        ({"dtype": "int8"}, "dtype='int8' must be one of 'auto', 'float32', 'float16', 'bfloat16'"),
        ({"shard_size": 0}, "shard_size=0 must be at least 1. Leave it out for the default, 10000."),
        ({"truncate_dim": 0}, "truncate_dim=0 must be at least 1"),
        ({"max_batch_tokens": 0}, "max_batch_tokens=0 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"calibration_size": 1}, "calibration_size=1 must be at least 2"),
    ],
)
def test_wrong_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"taken' must be a directory: shards and a manifest go into it\. Name a new"):
        config(output=tmp_path / "taken")


def test_options_that_are_not_used() -> None:
    assert config(calibration_size=8).notes() == ["calibration_size=8: not used with precision='float32'."]
    assert config(calibration_size=8, precision="uint8").notes() == config().notes() == []
    assert [config(precision=name).is_scaled for name in ("int8", "uint8", "float16", "binary")] == [
        True,
        True,
        *[False] * 2,
    ]


def test_as_a_command() -> None:
    app = typer.Typer()
    found = []

    @config_command(app, EmbedConfig)
    def embed(config: EmbedConfig) -> None:
        found.append(config)

    words = ["d", "--model", "m", "--output", "o", "--no-fast", "--on-error", "skip", "--format", "safetensors"]
    ended = CliRunner().invoke(app, [*words, "--num-workers", "2"])
    assert ended.exit_code == 0, ended.output
    assert found == [config(fast=False, on_error="skip", format="safetensors", num_workers=2)]
