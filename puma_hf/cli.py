"""The `puma-hf` command: it parses, calls one function of the library, and prints the result."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from puma_hf import __version__
from puma_hf.cli_options import config_command
from puma_hf.configs import (
    AppConfig,
    CheckConfig,
    DistillConfig,
    EmbedConfig,
    EvaluateConfig,
    ExportConfig,
    IndexConfig,
    MergeConfig,
    PairsConfig,
    PushConfig,
    SearchConfig,
    SweepConfig,
    TrainConfig,
)
from puma_hf.files import is_full_disk
from puma_hf.processes import ends_well_on_sigterm

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
    """Cut a Qwen2-VL, 2.5 or 3 to its first k layers and make it a retrieval embedder for text, images, and both."""


_SOURCE_HELP = "Folder or Hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, or of a PUMA directory to cut further."
_MAX_PIXELS_HELP = (
    "Images are scaled down to so many pixels; source keeps the source's limit. Default: the source's, but "
    "at most 300 visual tokens (235,200 pixels, of Qwen3-VL 307,200); a PUMA directory's own if one is cut further."
)
_READING_HELP = "How inputs are read: this library's prompt, or that of the authors' code with its plain positions."
OutputDir = Annotated[Path, typer.Argument(metavar="OUTPUT", help="New directory.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is not empty.")]


@app.command()
def prune(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=_SOURCE_HELP, show_default=False)],
    output: OutputDir,
    num_kept_layers: Annotated[int | None, typer.Option(help="Decoder layers to keep, from the input.")] = None,
    keep_layers: Annotated[str | None, typer.Option(help="Instead, which layers to keep, such as 0-10,27.")] = None,
    dtype: Annotated[str, typer.Option(help="Data type of the weights, such as bfloat16.")] = "auto",
    max_pixels: Annotated[str | None, typer.Option(metavar="N|source", help=_MAX_PIXELS_HELP)] = None,
    reading: Annotated[str | None, typer.Option(metavar="puma|puma-released", help=_READING_HELP)] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Keep the first layers of a model and write a directory that AutoModel and SentenceTransformer open.

    Example: puma-hf prune Qwen/Qwen2-VL-2B-Instruct puma-k14 --num-kept-layers 14
    """
    from puma_hf.pruning import prune as run

    limit: Any = int(max_pixels) if max_pixels is not None and max_pixels.isdecimal() else max_pixels
    options: dict[str, Any] = {"dtype": dtype, "max_pixels": limit, "revision": revision, "overwrite": overwrite}
    options |= {"num_kept_layers": num_kept_layers, "keep_layers": keep_layers, "reading": reading}
    report = run(source, output, **options)
    typer.echo(str(report))


@config_command(app, DistillConfig)
def distill(config: DistillConfig) -> None:
    """Stage 1 without labels, which is ours: distil the full model into the pruned one. Saves a LoRA adapter.

    Example: puma-hf distill puma-k14 puma-k14-lora --config configs/qwen2_vl_2b_stage1_ours.yaml --data M-BEIR
    """
    from puma_hf.trainer.stages import distill as run

    _echo_saved(run(config))


@config_command(app, TrainConfig)
def train(config: TrainConfig) -> None:
    """Train on labelled pairs: stage 2 with MAC-Loss, stage 1 as released with a teacher. Saves a LoRA adapter.

    Example: puma-hf train puma-k14-distilled puma-k14-mac-lora --data M-BEIR --learning-rate 1e-4
    """
    from puma_hf.trainer.stages import train as run

    _echo_saved(run(config))


@app.command()
def estimate(
    config: Annotated[Path, typer.Option(help="Recipe of distill or train.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="Directory, config.json, or Qwen/Qwen2-VL-7B-Instruct; default: the recipe's.")
    ] = None,
    num_kept_layers: Annotated[int | None, typer.Option(help="Decoder layers that are kept of it.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Such as 'RTX 4090'; default: a table of all that are known.")] = None,
    num_gpus: Annotated[int, typer.Option(help="Devices that the run is started on.")] = 1,
    tokens: Annotated[int | None, typer.Option(help="Length that rows are padded to; default: max_length.")] = None,
    images: Annotated[float | None, typer.Option(help="Images of a row, over all columns.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of the data, where they are not known.")] = None,
) -> None:
    """Tell what a recipe takes before anything is downloaded: memory, operations, and hours on the GPUs we know.

    Example: puma-hf estimate --config configs/qwen2_vl_7b_stage2.yaml --num-gpus 4
    """
    from puma_hf.estimate import GPUS
    from puma_hf.estimate import estimate as run

    sizes: dict[str, Any] = {"tokens": tokens, "images": images, "rows": rows, "num_gpus": num_gpus}
    found = run(config, model=model, num_kept_layers=num_kept_layers, **sizes)
    typer.echo(found.to_markdown(tuple(GPUS) if gpu is None else (gpu,)))


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


@config_command(app, EmbedConfig)
def embed(config: EmbedConfig) -> None:
    """Embed a corpus into files of vectors with ids; stopped at any point, it goes on.

    Example: puma-hf embed photos --model puma-k14-mac --output embeddings
    """
    from puma_hf.embedding.run import embed_corpus as run

    with ends_well_on_sigterm():
        report = run(config)
    if _is_first_process():
        typer.echo(str(report))


@config_command(app, EvaluateConfig)
def evaluate(config: EvaluateConfig) -> None:
    """Measure hit@k, recall@k, nDCG@10, MRR and wrong modalities on M-BEIR, or on data in its layout.

    Example: puma-hf evaluate puma-k14-mac --data M-BEIR --output results
    """
    from puma_hf.evaluation.mbeir import evaluate as run

    with ends_well_on_sigterm():
        results = run(config)
    if _is_first_process():
        typer.echo(results.to_markdown())


@config_command(app, SweepConfig)
def sweep(config: SweepConfig) -> None:
    """Choose k: measure every depth of a model in one pass, with its parameters and operations.

    Example: puma-hf sweep Qwen/Qwen2-VL-2B-Instruct --data M-BEIR --max-params 1.5B --output sweep
    """
    from puma_hf.evaluation.layer_sweep import sweep as run

    typer.echo(run(config).to_markdown())


@config_command(app, PairsConfig)
def pairs(config: PairsConfig) -> None:
    """Look through pairs of your own before training: what there is, and what is wrong with it.

    Example: puma-hf pairs photos/captions.csv --direction both
    """
    from puma_hf.data.pairs_report import pairs as run

    report = run(config)
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)


@config_command(app, IndexConfig)
def index(config: IndexConfig) -> None:
    """Make an index of pictures and texts to search in; run again, it takes in what changed.

    Example: puma-hf index photos --model puma-k14-mac --output photos-index
    """
    from puma_hf.search.index import build_index as run

    with ends_well_on_sigterm():
        report = run(config)
    if _is_first_process():
        typer.echo(str(report))


@config_command(app, SearchConfig)
def search(config: SearchConfig) -> None:
    """Search an index by words, by a picture, or by both.

    Example: puma-hf search photos-index "a red apple" --for image --html answers.html
    """
    from puma_hf.search.query import search as run

    answers = run(config)
    typer.echo(json.dumps(answers.to_dict(), ensure_ascii=False, indent=2) if config.json else str(answers))
    if config.html is not None:
        typer.echo(f"saved    {config.html}", err=config.json)  # which is for programs


@config_command(app, AppConfig, name="app")
def show(config: AppConfig) -> None:
    """Search an index on a page in the browser, or write that page as a Space of the Hub.

    Example: puma-hf app photos-index
    """
    from puma_hf.app.launch import launch as run

    run(config, started=lambda place: typer.echo(_started(config, place)))


def _started(config: AppConfig, place: str) -> str:
    if config.space is None:
        return f"serving {config.index} at {place}; Ctrl-C ends it"
    return f"saved the Space to {place}; look at it first with: GRADIO_SERVER_NAME=127.0.0.1 python {place}/app.py"


@config_command(app, ExportConfig)
def export(config: ExportConfig) -> None:
    """Write a model as a plain Qwen2-VL, 2.5 or 3 checkpoint of fewer layers, for programs such as vLLM, or as ONNX.

    Example: puma-hf export puma-k14-mac puma-k14-stock
    """
    from puma_hf.export import export as run

    typer.echo(str(run(**asdict(config))))


@config_command(app, CheckConfig)
def check(config: CheckConfig) -> None:
    """Compare a model's forms: merged, saved again, exported, padded, in batches, truncated, in bfloat16.

    Example: puma-hf check puma-k14-mac-lora --merged puma-k14-mac
    """
    from puma_hf.hub.check import check as run

    report = run(**asdict(config))
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)


@config_command(app, PushConfig)
def push(config: PushConfig) -> None:
    """Publish a directory on the Hub, after it was loaded where puma_hf is not installed.

    Example: puma-hf push puma-k14-mac org/puma-k14 --dry-run
    """
    from puma_hf.hub.push import push_configured as run

    typer.echo(str(run(config)))


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


def _in_few_lines(error: Exception) -> str:
    """An error in one line, but for a report of several offenders: those have a line each."""
    first, *offenders = str(error).split("\n- ")
    return "\n- ".join(" ".join(part.split()) for part in (first, *offenders))


def main() -> None:
    """Entry point: errors that a user can mend are told in a line or a few, not as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a character that it cannot show must not end the work
    level = logging.INFO if _is_first_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "sentence_transformers", "datasets", "faiss"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
    # peft asks for it; nobody who merges an adapter can change that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    if not _is_first_process():
        os.environ.update(dict.fromkeys(BARS, "1"))  # read when the libraries are imported, which is later
    try:
        app()
    except Exception as error:
        if not (isinstance(error, ValueError | OSError | ImportError) or _is_of_a_file(error)):
            raise
        _close_progress_bars()
        typer.echo(f"error: {_in_few_lines(error)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
