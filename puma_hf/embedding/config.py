"""The settings of an embedding run: one truth for YAML files, the command's flags, and Python.

Nothing heavy is imported here, so that `puma-hf --help` stays quick.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puma_hf.settings import CheckedConfig, SpecialTokens, option, required, special_tokens_option

Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
OnError = Literal["raise", "skip", "zero"]
FileFormat = Literal["parquet", "safetensors"]
WeightsDtype = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(CheckedConfig):
    """Settings of `puma_hf.embedding.run.embed_corpus`; `puma-hf embed --help` explains every field.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:

    ```python
    >>> from puma_hf.embedding.config import EmbedConfig

    >>> EmbedConfig(data="demo/emoji", model="puma-k4-mac", output="embeddings").precision
    'float32'
    ```
    """

    data: str | Path = required(
        "A folder of images; a .txt, .jsonl, .json, .csv, .tsv or .parquet with columns among id, text, image and "
        "instruction; or a folder in M-BEIR's layout, whose pool is embedded.",
        positional=True,
    )
    model: str = required("PUMA directory, here or on the Hub.")
    output: str | Path = required("Directory of the embeddings; a run that was stopped goes on from there.")
    split: str = option("test", "Split of a folder in M-BEIR's layout.")
    pool: str = option("global", "Its pool: global, or that of a task, such as webqa_task1.")
    prompt: str | None = option(None, "Instruction for every input that brings none of its own.")
    truncate_dim: int | None = option(None, "Keep only the first so many dimensions of an embedding.", at_least=1)
    precision: Precision = option("float32", "Numbers that are stored; binary and ubinary pack 8 dimensions a byte.")
    calibration_size: int = option(1024, "Inputs, drawn at random, that int8 and uint8 are scaled by.", at_least=2)
    on_error: OnError = option(
        "raise", "On an input that cannot be read: raise; skip, which leaves it out; or zero, which stores zeros."
    )
    special_tokens: SpecialTokens = special_tokens_option()
    format: FileFormat = option("parquet", "Files to write; safetensors has the ids in a Parquet file beside.")
    shard_size: int = option(10_000, "Inputs a file; those of up to three are in memory at a time.", at_least=1)
    max_batch_tokens: int | None = option(None, "Tokens of a batch; default: by device.", at_least=1)
    num_workers: int | None = option(None, "Processes that read and prepare inputs; default: by device.", at_least=0)
    dtype: WeightsDtype = option("auto", "Data type of the weights; auto is what they are stored in.")
    fast: bool = option(True, "Pack inputs without padding, among other savings; off, they are padded.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")
    trust_remote_code: bool = option(False, "Run the code of a Hub repository; a local directory's is run.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.output).is_file():
            raise ValueError(
                f"output={str(self.output)!r} must be a directory: shards and a manifest go into it. Name a new one."
            )

    @property
    def is_scaled(self) -> bool:
        """Whether the precision needs the range of every dimension."""
        return self.precision in ("int8", "uint8")

    def notes(self) -> list[str]:
        """Options that this combination ignores, one sentence each."""
        default = type(self).__dataclass_fields__["calibration_size"].default
        if self.calibration_size == default or self.is_scaled:
            return []
        return [f"calibration_size={self.calibration_size}: not used with precision={self.precision!r}."]
