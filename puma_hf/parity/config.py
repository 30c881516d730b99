"""The settings of a parity check: one truth for YAML files, the command's flags, and Python.

Nothing heavy is imported here, so that `puma-hf --help` stays quick.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from puma_hf.settings import CheckedConfig, option, required


@dataclass(frozen=True, kw_only=True)
class CheckConfig(CheckedConfig):
    """Settings of `puma_hf.parity.check.check`; `puma-hf check --help` explains every field.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:

    ```python
    >>> from puma_hf.parity.config import CheckConfig

    >>> CheckConfig(directory="puma-k14-mac").seed
    0
    ```
    """

    directory: str | Path = required("PUMA directory, or one of an adapter. Its code is run.", positional=True)
    merged: str | Path | None = option(
        None, "PUMA directory that the adapter was merged into; default: it is merged for the check."
    )
    base: str | Path | None = option(None, "PUMA directory that the adapter was trained on; default: the one it names.")
    exported: str | Path | None = option(
        None, "Directory that puma-hf export wrote; default: the model is exported for the check."
    )
    seed: int = option(0, "Draws the texts and pictures.", at_least=0)
    device: str = option("cpu", "Device that the model runs on, such as cuda; bounds are for float32 on it.")
