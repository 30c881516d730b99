"""The `puma-hf` command: it parses, calls one function of the library, and prints the result."""

from __future__ import annotations

import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from puma_hf import __version__
from puma_hf.cli_options import config_command
from puma_hf.trainer.checkpoints import is_full_disk
from puma_hf.trainer.config import DistillConfig, MergeConfig, TrainConfig

# Switch off the progress bars of transformers and of datasets.
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")

app = typer.Typer(
    name="puma-hf",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut off the longer names
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"puma-hf {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Cut a Qwen2-VL to its first k layers and make it a retrieval embedder for text, images, and both."""


class Pool(StrEnum):
    """Which candidates a query is compared with."""

    local = "local"
    global_ = "global"
    both = "both"


OutputDir = Annotated[Path, typer.Argument(help="New directory.", show_default=False)]
Data = Annotated[
    Path, typer.Option(help="Folder in the layout of TIGER-Lab/M-BEIR (query/, cand_pool/, ...).", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is not empty.")]


@app.command()
def prune(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a Qwen2-VL checkpoint.", show_default=False)],
    output: OutputDir,
    num_kept_layers: Annotated[int, typer.Option(help="Decoder layers to keep, from the input.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="Data type of the weights, such as bfloat16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Keep the first layers of a Qwen2-VL and write a directory that AutoModel and SentenceTransformer open.

    Example: puma-hf prune Qwen/Qwen2-VL-2B-Instruct puma-k14 --num-kept-layers 14
    """
    from puma_hf.pruning import prune as run

    report = run(source, output, num_kept_layers=num_kept_layers, dtype=dtype, revision=revision, overwrite=overwrite)
    typer.echo(str(report))


@config_command(app, DistillConfig)
def distill(config: DistillConfig) -> None:
    """Stage 1: distil the full model into the pruned one, without labels. Saves a LoRA adapter.

    Example: puma-hf distill puma-k14 puma-k14-lora --config configs/qwen2_vl_2b_distill.yaml --data M-BEIR
    """
    from puma_hf.trainer.stages import distill as run

    _echo_saved(run(config))


@config_command(app, TrainConfig)
def train(config: TrainConfig) -> None:
    """Stage 2: train on labelled pairs with MAC-Loss. Saves a LoRA adapter.

    Example: puma-hf train puma-k14-distilled puma-k14-mac-lora --data M-BEIR --learning-rate 1e-4
    """
    from puma_hf.trainer.stages import train as run

    _echo_saved(run(config))


@config_command(app, MergeConfig)
def merge(config: MergeConfig) -> None:
    """Merge a trained adapter into its base, checked, and write a complete directory.

    Example: puma-hf merge puma-k14-lora puma-k14-distilled
    """
    from puma_hf.trainer.stages import merge as run

    largest = run(config)
    typer.echo(f"merged; embeddings differ by at most {largest:.1e}\nsaved    {config.output}")


def _echo_saved(adapter: Path) -> None:
    if _is_first_process():
        typer.echo(f"saved the adapter to {adapter}; merge it with: puma-hf merge {adapter} MERGED")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="PUMA directory or any SentenceTransformer.", show_default=False)],
    data: Data,
    split: Annotated[str, typer.Option(help="Split to evaluate.")] = "test",
    pool: Annotated[Pool, typer.Option(help="Each task's own pool, that of all tasks, or both.")] = Pool.both,
    task: Annotated[list[str] | None, typer.Option(help="Such as webqa_task1; repeat for more. Default: all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs per forward pass.")] = 32,
    output: Annotated[Path | None, typer.Option(help="Also write the results as JSON.")] = None,
    rankings: Annotated[bool, typer.Option("--rankings", help="Write each query's answers into the JSON.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code of a Hub repository; a local directory's is run.")
    ] = False,
) -> None:
    """Measure hit@k, recall@k and nDCG@10 on a dataset in M-BEIR's layout.

    Example: puma-hf evaluate puma-k14-mac --data M-BEIR --output results.json
    """
    from sentence_transformers import SentenceTransformer

    from puma_hf.evaluation import evaluate_mbeir

    if output is not None and output.is_dir():
        raise ValueError(f"--output {str(output)!r} is a directory. Name a JSON file.")
    encoder = SentenceTransformer(model, trust_remote_code=trust_remote_code or Path(model).is_dir())
    arguments: dict[str, Any] = {"split": split, "pool": pool.value, "tasks": task, "batch_size": batch_size}
    results = evaluate_mbeir(encoder, data, **arguments)
    if output is not None:
        results.to_json(output, include_rankings=rankings)
    typer.echo(results.to_markdown())


def _is_first_process() -> bool:
    """Whether this is the process that speaks, of those that `torchrun` or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def _is_of_a_file(error: Exception) -> bool:
    """Whether a file could not be written or read: safetensors and torch have errors of their own for that."""
    return type(error).__name__ == "SafetensorError" or is_full_disk(error)


def _close_progress_bars() -> None:
    """End the lines of open progress bars, which an error would else be glued to."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()


def main() -> None:
    """Entry point: errors that a user can mend are one line, not a traceback."""
    level = logging.INFO if _is_first_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "sentence_transformers", "datasets"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
    if not _is_first_process():
        os.environ.update(dict.fromkeys(BARS, "1"))  # read when the libraries are imported, which is later
    try:
        app()
    except Exception as error:
        if not (isinstance(error, ValueError | OSError | ImportError) or _is_of_a_file(error)):
            raise
        _close_progress_bars()
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
