"""The settings of a layer sweep: one truth for YAML files, the command's flags, and Python.

Nothing heavy is imported here, so that `puma-hf --help` stays quick.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puma_hf.settings import CheckedConfig, SpecialTokens, option, required, special_tokens_option

PoolChoice = Literal["local", "global", "both"]
QualityMetric = Literal["score", "hit@1", "hit@5", "hit@10", "ndcg@10", "mrr@10"]

_COUNT = re.compile(r"(\d+\.?\d*|\.\d+)\s*([KMBG]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def parse_parameters(value: str | int | float) -> int:
    """A number of parameters, as people write it.

    Args:
        value: Such as "4B", "800M", "1.5b", "300000" or 4e9.

    Returns:
        The number.

    Raises:
        ValueError: If it is no such number, or below 1.

    Example:
        >>> parse_parameters("1.5B"), parse_parameters("800M"), parse_parameters(4e9)
        (1500000000, 800000000, 4000000000)
    """
    match = _COUNT.fullmatch(f"{value:.0f}" if isinstance(value, int | float) else value.strip().replace("_", ""))
    number = round(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if number < 1:
        raise ValueError(f"max_params={value!r} must be a number of parameters. Write it as 4B, 800M or 300000.")
    return number


@dataclass(frozen=True, kw_only=True)
class SweepConfig(CheckedConfig):
    """Settings of `puma_hf.evaluation.layer_sweep.sweep`, which measures every depth of a model at once.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:

    ```python
    >>> from puma_hf.evaluation.sweep_config import SweepConfig

    >>> SweepConfig(model="demo/backbone", data="demo/emoji", max_params="800M").keep
    0.97
    ```
    """

    model: str | Path = required(
        "The full model: folder or Hub id of an original Qwen2-VL, 2.5 or 3, or of a PUMA directory.", positional=True
    )
    data: str | Path = required("Folder in M-BEIR's layout, or what else evaluate takes as --data.")
    split: str = option("val", "Split to measure on; choose k on val, and report test.")
    tasks: tuple[str, ...] = option((), "Such as webqa_task1; default: all of the split.")
    pool: PoolChoice = option("local", "Each task's own pool, that of all tasks, or both; with both, local decides.")
    metric: QualityMetric = option("score", "Quality that decides; score is hit@5, and hit@10 on fashion datasets.")
    compare: tuple[str, ...] = option((), "Further models, such as a distilled PUMA directory, swept beside the full.")
    output: str | Path | None = option(None, "Directory for sweep.json, sweep.md and sweep.png.")
    max_params: str | None = option(None, "Budget of parameters for the recommendation, such as 4B or 800M.")
    keep: float = option(
        0.97, "Share of the full model's quality that k must keep.", above=0, at_most=1, remedy="Take 0.97, or less."
    )
    keep_last: bool = option(False, "Measure the first k - 1 layers with the last one, too, for every k.")
    batch_size: int = option(32, "Inputs per forward pass.", at_least=1)
    nano_queries: int = option(200, "Queries a task, drawn by nano_seed; 0 for all.", at_least=0)
    nano_candidates: int = option(2000, "Candidates a task, all relevant ones among them; 0 for all.", at_least=0)
    nano_seed: int = option(0, "Seed of that choice.", at_least=0)
    special_tokens: SpecialTokens = special_tokens_option()
    trust_remote_code: bool = option(False, "Run the code of a Hub repository; a local directory's is run.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_params is not None:
            parse_parameters(self.max_params)
        if self.output is not None and Path(self.output).is_file():
            raise ValueError(
                f"output={str(self.output)!r} must be a directory: three files go into it. Name a new one."
            )
