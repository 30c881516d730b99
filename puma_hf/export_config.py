"""The settings of an export: one truth for YAML files, the command's flags, and Python.

Nothing heavy is imported here, so that `puma-hf --help` stays quick.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puma_hf.settings import CheckedConfig, option, required

ExportFormat = Literal["stock", "onnx"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig(CheckedConfig):
    """Settings of `puma_hf.export.export`; `puma-hf export --help` explains every field.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:

    ```python
    >>> from puma_hf.export_config import ExportConfig

    >>> ExportConfig(source="puma-k14-mac", output="puma-k14-stock").format
    'stock'
    ```
    """

    source: str = required("PUMA directory, here or on the Hub.", positional=True)
    output: str | Path = required("New directory for the plain checkpoint.", positional=True)
    format: ExportFormat = option(
        "stock",
        "stock: a Qwen2-VL, 2.5 or 3 checkpoint of fewer layers, without code; onnx: a graph that embeds texts.",
    )
    revision: str | None = option(None, "Branch, tag or commit on the Hub.")
    overwrite: bool = option(False, "Replace the output if it is not empty.")
