"""The `puma-hf` command: it parses, calls one function of the library, and prints the result."""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from puma_hf import __version__

app = typer.Typer(
    name="puma-hf",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
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


class Loss(StrEnum):
    """Loss of the second stage."""

    mac = "mac"
    infonce = "infonce"


class Schedule(StrEnum):
    """How the hard temperature moves."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Metric(StrEnum):
    """Distance of self-distillation."""

    mse = "mse"
    cosine = "cosine"


class Pool(StrEnum):
    """Which candidates a query is compared with."""

    local = "local"
    global_ = "global"
    both = "both"


ModelDir = Annotated[Path, typer.Argument(help="PUMA directory.", show_default=False)]
OutputDir = Annotated[Path, typer.Argument(help="New directory.", show_default=False)]
Data = Annotated[
    Path, typer.Option(help="Folder in the layout of TIGER-Lab/M-BEIR (query/, cand_pool/, ...).", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is not empty.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in the output.")]
BatchSize = Annotated[int, typer.Option(help="Rows per step and device.")]
Accumulation = Annotated[int, typer.Option("--gradient-accumulation-steps", help="Batches per optimizer step.")]
MaxLength = Annotated[int, typer.Option(help="Longest sequence in tokens; only text is cut.")]
MaxPixels = Annotated[int, typer.Option(help="Images are scaled down to so many pixels.")]
MaxSteps = Annotated[int, typer.Option(help="Optimizer steps; -1 for whole epochs.")]
Epochs = Annotated[float, typer.Option(help="Passes over the data, if --max-steps is -1.")]
LearningRate = Annotated[float, typer.Option(help="Peak of the cosine schedule.")]
LoraR = Annotated[int, typer.Option(help="Rank of the adapter; alpha is twice as much.")]
Seed = Annotated[int, typer.Option(help="Seed of order, dropout and wordings.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Train in bfloat16.")]
Workers = Annotated[int, typer.Option(help="Processes that prepare batches.")]
SaveSteps = Annotated[int, typer.Option(help="Steps between checkpoints; 0 for none.")]
LoggingSteps = Annotated[int, typer.Option(help="Steps between two log lines.")]


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


@app.command()
def distill(
    model: ModelDir,
    output: OutputDir,
    data: Data,
    teacher: Annotated[
        str | None, typer.Option(help="Checkpoint that was pruned; default: the one the model names.")
    ] = None,
    metric: Annotated[Metric, typer.Option(help="Distance between student and teacher.")] = Metric.mse,
    max_steps: MaxSteps = -1,
    epochs: Epochs = 1.0,
    batch_size: BatchSize = 64,
    accumulation: Accumulation = 1,
    max_length: MaxLength = 480,
    max_pixels: MaxPixels = 300 * 28 * 28,
    learning_rate: LearningRate = 2e-4,
    lora_r: LoraR = 64,
    train_ret_token: Annotated[bool, typer.Option(help="Also train the embedding row of [RET].")] = True,
    bf16: Bf16 = False,
    workers: Workers = 0,
    logging_steps: LoggingSteps = 10,
    save_steps: SaveSteps = 500,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Stage 1: distil the full model into the pruned one, without labels. Saves a LoRA adapter.

    Example: puma-hf distill puma-k14 puma-k14-lora --data M-BEIR --teacher Qwen/Qwen2-VL-2B-Instruct
    """
    from puma_hf.trainer.stages import StageSettings
    from puma_hf.trainer.stages import distill as run

    settings = StageSettings(
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_length=max_length,
        max_pixels=max_pixels,
        num_train_epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        lora_r=lora_r,
        train_ret_token=train_ret_token,
        seed=seed,
        bf16=bf16,
        dataloader_num_workers=workers,
        logging_steps=logging_steps,
        save_steps=save_steps,
    )
    arguments: dict[str, Any] = {"metric": metric.value, "resume": resume, "overwrite": overwrite}
    saved = run(model, output, data=data, teacher=teacher, settings=settings, **arguments)
    typer.echo(f"saved the adapter to {saved}; merge it with: puma-hf merge {saved} MERGED")


@app.command()
def train(
    model: ModelDir,
    output: OutputDir,
    data: Data,
    loss: Annotated[Loss, typer.Option(help="MAC-Loss, or InfoNCE to compare.")] = Loss.mac,
    temperature: Annotated[float, typer.Option(help="Temperature of inter-modality candidates, or of InfoNCE.")] = 0.05,
    hard_temperature: Annotated[float, typer.Option(help="Where the intra-modality temperature ends.")] = 0.04,
    schedule: Annotated[Schedule, typer.Option(help="How it gets there.")] = Schedule.cosine,
    num_negatives: Annotated[int, typer.Option(help="Hard negatives per query.")] = 0,
    max_steps: MaxSteps = -1,
    epochs: Epochs = 1.0,
    batch_size: BatchSize = 64,
    accumulation: Accumulation = 1,
    max_length: MaxLength = 480,
    max_pixels: MaxPixels = 300 * 28 * 28,
    learning_rate: LearningRate = 1e-4,
    lora_r: LoraR = 128,
    bf16: Bf16 = False,
    workers: Workers = 0,
    logging_steps: LoggingSteps = 10,
    save_steps: SaveSteps = 500,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Stage 2: train on labelled pairs with MAC-Loss. Saves a LoRA adapter.

    Example: puma-hf train puma-k14-distilled puma-k14-mac-lora --data M-BEIR
    """
    from puma_hf.trainer.stages import StageSettings
    from puma_hf.trainer.stages import train as run

    settings = StageSettings(
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_length=max_length,
        max_pixels=max_pixels,
        num_train_epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        lora_r=lora_r,
        seed=seed,
        bf16=bf16,
        dataloader_num_workers=workers,
        logging_steps=logging_steps,
        save_steps=save_steps,
    )
    arguments: dict[str, Any] = {
        "loss": loss.value,
        "temperature": temperature,
        "hard_temperature": hard_temperature,
        "schedule": schedule.value,
        "num_negatives": num_negatives,
        "resume": resume,
        "overwrite": overwrite,
    }
    saved = run(model, output, data=data, settings=settings, **arguments)
    typer.echo(f"saved the adapter to {saved}; merge it with: puma-hf merge {saved} MERGED")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Directory that training saved.", show_default=False)],
    output: OutputDir,
    base: Annotated[
        Path | None, typer.Option(help="PUMA directory it was trained on; default: the one it names.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge a trained adapter into its base, checked, and write a complete directory.

    Example: puma-hf merge puma-k14-lora puma-k14-distilled
    """
    from puma_hf.trainer.lora import merge_adapter

    largest = merge_adapter(adapter, output, base=base, overwrite=overwrite)
    typer.echo(f"merged; embeddings differ by at most {largest:.1e}\nsaved    {output}")


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


def main() -> None:
    """Entry point: errors that a user can mend are one line, not a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "sentence_transformers", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
