"""The `puma-hf` command: it parses, calls one function of the library, and prints the result."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, fields
from io import TextIOWrapper
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from puma_hf import __version__, configs
from puma_hf.files import is_full_disk
from puma_hf.processes import ends_well_on_sigterm
from puma_hf.settings import field_help, load_config

# Switch off the progress bars of transformers and of datasets.
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")

_CONFIG_HELP = (
    "YAML file with values for the options below, under their names with underscores. Options given here win. "
    "Paths in it are relative to the current directory."
)


class _InOrder(click.Group):
    """Commands in the order in which they are used, as below."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder)
@click.version_option(__version__, message="puma-hf %(version)s", help="Print the version and leave.")
def app() -> None:
    """Cut a Qwen2-VL, 2.5 or 3 to its first k layers and make it a retrieval embedder for text, images, and both."""


# --------------------------------------------------------------------------------------- options from a settings class


def _command(kind: Any, name: str | None = None) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Make a function of one configuration a command that takes its fields as options, a YAML file, or both.

    Names, defaults and help are written in the class alone. A field may have "positional" and "flag" in its metadata:
    `False` for none, or a name of its own.
    """
    entries = [entry for entry in fields(kind) if entry.metadata.get("flag", True)]
    positional = [entry.name for entry in entries if entry.metadata.get("positional")]
    hints, texts = get_type_hints(kind), field_help(kind)

    def decorate(function: Callable[[Any], None]) -> Callable[[Any], None]:
        def run(config: Path | None, **given: Any) -> None:
            for field in positional:
                value = given.pop(f"{field}_argument")
                if None not in (value, given[field]):
                    both = f"as {value!r} and as --{field} {given[field]!r}"
                    raise ValueError(f"{field} is given twice, {both}. Remove one of them.")
                given[field] = given[field] if value is None else value
            # Options that were not given are None, repeated ones empty.
            values = {field: value for field, value in given.items() if value is not None and value != ()}
            function(load_config(kind, config, **values))

        parameters: list[click.Parameter] = [
            *(
                click.Argument([f"{field}_argument"], required=False, metavar=f"[{field.upper()}]")
                for field in positional
            ),
            click.Option(["--config"], type=click.Path(path_type=Path), help=_CONFIG_HELP),
            *(_option(entry, hints[entry.name], texts[entry.name]) for entry in entries),
        ]
        command = click.Command(name or function.__name__, callback=run, params=parameters, help=function.__doc__)
        app.add_command(command)
        return function

    return decorate


def _option(entry: Field[Any], hint: Any, text: str) -> click.Option:
    """The flag of a field. Types are read here, and choices checked with the YAML file's."""
    name = entry.metadata.get("flag", entry.name.replace("_", "-"))
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind not in (type(None), Path))
    attributes: dict[str, Any] = {"type": hint}
    if get_origin(hint) is Literal:
        attributes = {"type": str, "metavar": "|".join(get_args(hint))}
    elif get_origin(hint) is tuple:
        item = get_args(hint)[0]
        attributes = {"type": item, "multiple": True, "metavar": f"<{item.__name__}>, repeatable"}
    if (default := entry.default) is not MISSING and default is not None and default not in ((), ""):
        shown = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
        text += f" Default: {shown:g}." if isinstance(shown, float) else f" Default: {shown}."
    flag = f"--{name}/--no-{name}" if hint is bool else f"--{name}"
    return click.Option([flag, entry.name], help=text, default=None, **attributes)


# ------------------------------------------------------------------------------------------------------------ commands

_SOURCE_HELP = "SOURCE: folder or Hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, or of a PUMA directory to cut further."
_MAX_PIXELS_HELP = (
    "Images are scaled down to so many pixels; source keeps the source's limit. Default: the source's, but "
    "at most 300 visual tokens (235,200 pixels, of Qwen3-VL 307,200); a PUMA directory's own if one is cut further."
)
_READING_HELP = "How inputs are read: this library's prompt, or that of the authors' code with its plain positions."


@app.command(epilog=_SOURCE_HELP)
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--num-kept-layers", type=int, help="Decoder layers to keep, from the input.")
@click.option("--keep-layers", help="Instead, which layers to keep, such as 0-10,27.")
@click.option("--dtype", default="auto", show_default=True, help="Data type of the weights, such as bfloat16.")
@click.option("--max-pixels", metavar="N|source", help=_MAX_PIXELS_HELP)
@click.option("--reading", metavar="puma|puma-released", help=_READING_HELP)
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it is not empty.")
def prune(source: str, output: Path, max_pixels: Any, **options: Any) -> None:
    """Keep the first layers of a model and write a directory that AutoModel and SentenceTransformer open.

    Example: puma-hf prune Qwen/Qwen2-VL-2B-Instruct puma-k14 --num-kept-layers 14
    """
    from puma_hf.pruning import prune as run

    limit = int(max_pixels) if max_pixels is not None and max_pixels.isdecimal() else max_pixels
    click.echo(str(run(source, output, max_pixels=limit, **options)))


@app.command()
@click.option("--config", type=click.Path(path_type=Path), required=True, help="Recipe of distill or train.")
@click.option("--model", help="Directory, config.json, or Qwen/Qwen2-VL-7B-Instruct; default: the recipe's.")
@click.option("--num-kept-layers", type=int, help="Decoder layers that are kept of it.")
@click.option("--gpu", help="Such as 'RTX 4090'; default: a table of all that are known.")
@click.option("--num-gpus", default=1, show_default=True, help="Devices that the run is started on.")
@click.option("--tokens", type=int, help="Length that rows are padded to; default: max_length.")
@click.option("--images", type=float, help="Images of a row, over all columns.")
@click.option("--rows", type=int, help="Rows of the data, where they are not known.")
def estimate(config: Path, gpu: str | None, **sizes: Any) -> None:
    """Tell what a recipe takes before anything is downloaded: memory, operations, and hours on the GPUs we know.

    Example: puma-hf estimate --config configs/qwen2_vl_7b_stage2.yaml --num-gpus 4
    """
    from puma_hf.estimate import GPUS
    from puma_hf.estimate import estimate as run

    click.echo(run(config, **sizes).to_markdown(tuple(GPUS) if gpu is None else (gpu,)))


@_command(configs.DistillConfig)
def distill(config: configs.DistillConfig) -> None:
    """Stage 1 without labels, which is ours: distil the full model into the pruned one. Saves a LoRA adapter.

    Example: puma-hf distill puma-k14 puma-k14-lora --config configs/qwen2_vl_2b_stage1_ours.yaml --data M-BEIR
    """
    from puma_hf.trainer.stages import distill as run

    _echo_saved(run(config))


@_command(configs.TrainConfig)
def train(config: configs.TrainConfig) -> None:
    """Train on labelled pairs: stage 2 with MAC-Loss, stage 1 as released with a teacher. Saves a LoRA adapter.

    Example: puma-hf train puma-k14-distilled puma-k14-mac-lora --data M-BEIR --learning-rate 1e-4
    """
    from puma_hf.trainer.stages import train as run

    _echo_saved(run(config))


def _echo_saved(adapter: Path) -> None:
    _echo_first(f"saved the adapter to {adapter}; merge it with: puma-hf merge {adapter} MERGED")


@_command(configs.MergeConfig)
def merge(config: configs.MergeConfig) -> None:
    """Merge a trained adapter into its base, checked, and write a complete directory.

    Example: puma-hf merge puma-k14-lora puma-k14-distilled
    """
    from puma_hf.trainer.stages import merge as run

    click.echo(f"merged; embeddings differ by at most {run(config):.1e}\nsaved    {config.output}")


@_command(configs.EmbedConfig)
def embed(config: configs.EmbedConfig) -> None:
    """Embed a corpus into files of vectors with ids; stopped at any point, it goes on.

    Example: puma-hf embed photos --model puma-k14-mac --output embeddings
    """
    from puma_hf.embedding.run import embed_corpus as run

    with ends_well_on_sigterm():
        _echo_first(str(run(config)))


@_command(configs.EvaluateConfig)
def evaluate(config: configs.EvaluateConfig) -> None:
    """Measure hit@k, recall@k, nDCG@10, MRR and wrong modalities on M-BEIR, or on data in its layout.

    Example: puma-hf evaluate puma-k14-mac --data M-BEIR --output results
    """
    from puma_hf.evaluation.mbeir import evaluate as run

    with ends_well_on_sigterm():
        _echo_first(run(config).to_markdown())


@_command(configs.SweepConfig)
def sweep(config: configs.SweepConfig) -> None:
    """Choose k: measure every depth of a model in one pass, with its parameters and operations.

    Example: puma-hf sweep Qwen/Qwen2-VL-2B-Instruct --data M-BEIR --max-params 1.5B --output sweep
    """
    from puma_hf.evaluation.layer_sweep import sweep as run

    click.echo(run(config).to_markdown())


@_command(configs.PairsConfig)
def pairs(config: configs.PairsConfig) -> None:
    """Look through pairs of your own before training: what there is, and what is wrong with it.

    Example: puma-hf pairs photos/captions.csv --direction both
    """
    from puma_hf.data.pairs_report import pairs as run

    _echo_checked(run(config))


@_command(configs.IndexConfig)
def index(config: configs.IndexConfig) -> None:
    """Make an index of pictures and texts to search in; run again, it takes in what changed.

    Example: puma-hf index photos --model puma-k14-mac --output photos-index
    """
    from puma_hf.search.build import build_index as run

    with ends_well_on_sigterm():
        _echo_first(str(run(config)))


@_command(configs.SearchConfig)
def search(config: configs.SearchConfig) -> None:
    """Search an index by words, by a picture, or by both.

    Example: puma-hf search photos-index "a red apple" --for image --html answers.html
    """
    from puma_hf.search.query import search as run

    answers = run(config)
    click.echo(json.dumps(answers.to_dict(), ensure_ascii=False, indent=2) if config.json else str(answers))
    if config.html is not None:
        click.echo(f"saved    {config.html}", err=config.json)  # which is for programs


@_command(configs.AppConfig, name="app")
def show(config: configs.AppConfig) -> None:
    """Search an index on a page in the browser, or write that page as a Space of the Hub.

    Example: puma-hf app photos-index
    """
    if config.space is None:
        from puma_hf.search.page import launch

        launch(config, started=lambda url: click.echo(f"serving {config.index} at {url}; Ctrl-C ends it"))
    else:
        from puma_hf.search.space import write_configured

        place, run = write_configured(config), "GRADIO_SERVER_NAME=127.0.0.1 python"
        click.echo(f"saved the Space to {place}; look at it first with: {run} {place}/app.py")


@_command(configs.ExportConfig)
def export(config: configs.ExportConfig) -> None:
    """Write a model as a plain Qwen2-VL, 2.5 or 3 checkpoint of fewer layers, for programs such as vLLM, or as ONNX.

    Example: puma-hf export puma-k14-mac puma-k14-stock
    """
    from puma_hf.export import export as run

    click.echo(str(run(**asdict(config))))


@_command(configs.CheckConfig)
def check(config: configs.CheckConfig) -> None:
    """Compare a model's forms: merged, saved again, exported, padded, in batches, truncated, in bfloat16.

    Example: puma-hf check puma-k14-mac-lora --merged puma-k14-mac
    """
    from puma_hf.hub.check import check as run

    _echo_checked(run(**asdict(config)))


@_command(configs.PushConfig)
def push(config: configs.PushConfig) -> None:
    """Publish a directory on the Hub, after it was loaded where puma_hf is not installed.

    Example: puma-hf push puma-k14-mac org/puma-k14 --dry-run
    """
    from puma_hf.hub.push import push_configured as run

    click.echo(str(run(config)))


# ---------------------------------------------------------------------------------------------------- output and errors


def _is_first_process() -> bool:
    """Whether this is the process that speaks, of those that `torchrun` or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def _echo_first(text: str) -> None:
    if _is_first_process():
        click.echo(text)


def _echo_checked(report: Any) -> None:
    """Print a report, and leave with status 1 if something in it is wrong."""
    click.echo(str(report))
    if not report.ok:
        sys.exit(1)


def _in_few_lines(error: Exception) -> str:
    """An error in one line, but for a report of several bad rows: those have a line each."""
    return "\n- ".join(" ".join(part.split()) for part in str(error).split("\n- "))


def main() -> None:
    """Entry point: errors that a user can mend are told in a line or a few, not as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a character that it cannot show must not end the work
    level = logging.INFO if _is_first_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "sentence_transformers", "datasets"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
    # peft asks for it; nobody who merges an adapter can change that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    if not _is_first_process():
        os.environ.update(dict.fromkeys(BARS, "1"))  # read when the libraries are imported, which is later
    try:
        app()
    except Exception as error:
        # safetensors and torch have errors of their own for a file that cannot be written or read.
        is_of_a_file = type(error).__name__ == "SafetensorError" or is_full_disk(error)
        if not (isinstance(error, ValueError | OSError | ImportError) or is_of_a_file):
            raise
        for bar in list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else ():
            bar.close()  # else the error would be glued to its line
        click.echo(f"error: {_in_few_lines(error)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
