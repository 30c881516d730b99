"""The settings of an evaluation: one truth for YAML files, the command's flags, and Python.

Nothing heavy is imported here, so that `puma-hf --help` stays quick.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puma_hf.settings import CheckedConfig, SpecialTokens, option, required, special_tokens_option

Benchmark = Literal["mbeir", "nano"]
Pool = Literal["local", "global", "both"]
EmbeddingDtype = Literal["float32", "float16", "bfloat16"]
SearchBackend = Literal["torch", "faiss"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(CheckedConfig):
    """Settings of `puma_hf.evaluation.run.evaluate`; `puma-hf evaluate --help` explains every field.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:

    ```python
    >>> from puma_hf.evaluation.config import EvaluateConfig

    >>> EvaluateConfig(model="puma-k4-mac", data="demo/emoji").pool
    'both'
    ```
    """

    model: str = required("PUMA directory, or any SentenceTransformer here or on the Hub.", positional=True)
    data: str | Path = required(
        "Folder in M-BEIR's layout, folder of parquet copies, or a Hub id (mteb/mbeir_cirr_task7, or mteb for all)."
    )
    benchmark: Benchmark = option(
        "mbeir", "mbeir: all of the data; nano: a fixed, seeded subset, quick enough to train by."
    )
    split: str = option("test", "Split to evaluate.")
    tasks: tuple[str, ...] = option((), "Tasks such as webqa_task1; repeat for more. Default: all of the split.")
    pool: Pool = option("both", "Each task's own pool, that of all tasks, or both.")
    batch_size: int = option(32, "Inputs per forward pass.", at_least=1)
    output: str | Path | None = option(
        None, "Directory for results, run files and embeddings; a run that was stopped goes on from there."
    )
    instruction_seed: int | None = option(
        None, "Draws one wording of the instruction a query; default: always the first wording.", at_least=0
    )
    popularity_penalty: float | None = option(
        None,
        "Also report figures by similarity less this share, such as 0.2, of the candidate's mean similarity to all "
        "test queries of the task, as PUMA's released code has it. Transductive: no query can be answered alone.",
        at_least=0,
        at_most=1,
    )
    nano_queries: int = option(200, "Queries a task of the nano benchmark; 0 for all.", at_least=0)
    nano_candidates: int = option(2000, "Candidates a task of the nano benchmark; 0 for all.", at_least=0)
    nano_seed: int = option(0, "Seed of what the nano benchmark holds.", at_least=0)
    nano_folder: str | Path | None = option(
        None, "Where the nano benchmark is kept for other runs; default: nano in the output."
    )
    embedding_dtype: EmbeddingDtype = option(
        "float32", "Data type that embeddings are stored in; two bytes halve the disk space."
    )
    search_backend: SearchBackend = option("torch", "Both are exact; faiss needs pip install 'puma-hf[faiss]'.")
    truncate_dim: int | None = option(None, "Keep only the first so many dimensions of an embedding.", at_least=1)
    special_tokens: SpecialTokens = special_tokens_option()
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")
    data_revision: str | None = option(None, "Branch, tag or commit of data on the Hub.")
    trust_remote_code: bool = option(False, "Run the code of a Hub repository; a local directory's is run.")

    def __post_init__(self) -> None:
        super().__post_init__()
        output = None if self.output is None else Path(self.output)
        if output is not None and (output.is_file() or (output.suffix == ".json" and not output.exists())):
            raise ValueError(
                f"output={str(output)!r} must be a directory: results.json, results.md and run files go into it. Name "
                f"one, such as {str(output.with_suffix(''))!r}."
            )

    def notes(self) -> list[str]:
        """Options that this combination ignores, one sentence each."""
        names = ("nano_queries", "nano_candidates", "nano_seed", "nano_folder")
        defaults = {entry: type(self).__dataclass_fields__[entry].default for entry in names}
        given = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != defaults[name]]
        return [f"{', '.join(given)}: not used with benchmark='mbeir'."] if given and self.benchmark == "mbeir" else []
