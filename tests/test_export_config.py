from __future__ import annotations

from dataclasses import fields

import pytest

from puma_hf.export_config import ExportConfig
from puma_hf.recipes import load_config


def test_every_field_has_help_and_only_two_must_be_given() -> None:
    assert all(entry.metadata["help"] for entry in fields(ExportConfig))
    with pytest.raises(ValueError, match=r"source is missing .* output is missing"):
        load_config(ExportConfig)
    assert not ExportConfig(source="a", output="b").overwrite


def test_another_format() -> None:
    with pytest.raises(ValueError, match=r"format='gguf' must be one of 'stock', 'onnx'"):
        ExportConfig(source="a", output="b", format="gguf")  # type: ignore[arg-type]
