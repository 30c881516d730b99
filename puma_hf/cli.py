"""The `puma-hf` command: it parses, calls one function of the library, and prints the result."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from contextlib import nullcontext
from dataclasses import MISSING, Field, asdict, fields
from importlib import import_module
from inspect import cleandoc
from io import TextIOWrapper
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from puma_hf import __version__, configs
from puma_hf.processes import ends_well_on_sigterm
from puma_hf.settings import field_help, load_config

# Switch off the progress bars of transformers and of datasets.
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")

_CONFIG_HELP = "YAML file with values for the options below, under their names with underscores. Options win over it."


class _InOrder(click.Group):
    """Commands in the order in which they are used, as below."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(130)  # as of a program that Ctrl-C has ended; click's own 1 is that of an error


@click.group(cls=_InOrder)
@click.version_option(__version__, message="puma-hf %(version)s", help="Print the version and leave.")
def app() -> None:
    """Cut a Qwen2-VL, 2.5 or 3 to its first k layers and make it a retrieval embedder for text, images, and both."""


# --------------------------------------------------------------------------------------- options from a settings class


def _command(name: str, kind: Any, place: str) -> click.Command:
    """A command that takes the fields of a settings class as options, a YAML file, or both.

    Names, defaults and help are written in the class alone. A field may have "positional" and "flag" in its metadata:
    `False` for none, or a name of its own.
    """
    entries = [entry for entry in fields(kind) if entry.metadata.get("flag", True)]
    positional = [entry.name for entry in entries if entry.metadata.get("positional")]
    hints, texts = get_type_hints(kind), field_help(kind)

    def run(config: Path | None, **given: Any) -> None:
        for field in positional:
            value = given.pop(f"{field}_argument")
            if None not in (value, given[field]):
                raise ValueError(f"{field} is given twice, {value!r} and --{field} {given[field]!r}. Remove one.")
            given[field] = given[field] if value is None else value
        # Options that were not given are None, repeated ones empty.
        values = {field: value for field, value in given.items() if value is not None and value != ()}
        settings = load_config(kind, config, **values)
        module, _, function = place.partition(":")
        work = getattr(import_module(module), function)  # heavy, and only now
        with ends_well_on_sigterm() if name in _KEEP_WORK else nullcontext():
            result = work(**asdict(settings)) if name in _WITH_KEYWORDS else work(settings)
        if _is_first_process():
            click.echo(_told(settings, result))
        if not getattr(result, "ok", True):
            sys.exit(1)

    parameters: list[click.Parameter] = [
        *(click.Argument([f"{field}_argument"], required=False, metavar=f"[{field.upper()}]") for field in positional),
        click.Option(["--config"], type=click.Path(path_type=Path), help=_CONFIG_HELP),
        *(_option(entry, hints[entry.name], texts[entry.name]) for entry in entries),
    ]
    words = cleandoc(kind.__doc__).partition("\n\nArgs:")[0]
    return click.Command(name, callback=run, params=parameters, help=words)


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
_MAX_PIXELS_HELP = "Images are scaled down to so many. Default: the source's limit, but at most 300 visual tokens."
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


def _told(config: Any, result: Any) -> str:
    """A result in the words of the command."""
    if isinstance(config, configs.StageConfig):
        return f"saved the adapter to {result}; merge it with: puma-hf merge {result} MERGED"
    if isinstance(config, configs.MergeConfig):
        return f"merged; embeddings differ by at most {result:.1e}\nsaved    {config.output}"
    if isinstance(config, configs.SearchConfig) and config.json:  # for programs, which read nothing else
        if config.html is not None:
            click.echo(f"saved    {config.html}", err=True)
        return json.dumps(result.to_dict(), ensure_ascii=False, indent=2)
    text = str(result.to_markdown() if hasattr(result, "to_markdown") else result)
    return f"{text}\nsaved    {config.html}" if getattr(config, "html", None) else text


def show_page(config: configs.AppConfig) -> str:
    """Serve the page of an index, or write it as a Space."""
    if config.space is None:
        from puma_hf.search.page import launch

        launch(config, started=lambda url: click.echo(f"serving {config.index} at {url}; Ctrl-C ends it"))
        return "ended"
    from puma_hf.search.space import write_configured

    place, run = write_configured(config), "GRADIO_SERVER_NAME=127.0.0.1 python"
    return f"saved the Space to {place}; look at it first with: {run} {place}/app.py"


# Command, settings, and the function that does it. A command's help stands in its class.
_COMMANDS: tuple[tuple[str, Any, str], ...] = (
    ("distill", configs.DistillConfig, "puma_hf.trainer.stages:distill"),
    ("train", configs.TrainConfig, "puma_hf.trainer.stages:train"),
    ("merge", configs.MergeConfig, "puma_hf.trainer.stages:merge"),
    ("embed", configs.EmbedConfig, "puma_hf.embedding.run:embed_corpus"),
    ("evaluate", configs.EvaluateConfig, "puma_hf.evaluation.mbeir:evaluate"),
    ("sweep", configs.SweepConfig, "puma_hf.evaluation.layer_sweep:sweep"),
    ("pairs", configs.PairsConfig, "puma_hf.data.mbeir_write:pairs"),
    ("index", configs.IndexConfig, "puma_hf.search.build:build_index"),
    ("search", configs.SearchConfig, "puma_hf.search.query:search"),
    ("app", configs.AppConfig, "puma_hf.cli:show_page"),
    ("export", configs.ExportConfig, "puma_hf.export:export"),
    ("check", configs.CheckConfig, "puma_hf.hub.check:check"),
    ("push", configs.PushConfig, "puma_hf.hub.push:push_to_hub"),
)
# These take their settings one by one.
_WITH_KEYWORDS = ("export", "check", "push")
# Of these much may be done when SIGTERM comes. A training has its checkpoints, and dies with its launcher at once.
_KEEP_WORK = ("embed", "evaluate", "index")

for _entry in _COMMANDS:
    app.add_command(_command(*_entry))


# ---------------------------------------------------------------------------------------------------- output and errors


def _is_first_process() -> bool:
    """Whether this is the process that speaks, of those that `torchrun` or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


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
        # safetensors has an error of its own for a file that cannot be written or read.
        if not isinstance(error, ValueError | OSError | ImportError) and type(error).__name__ != "SafetensorError":
            raise
        for bar in list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else ():
            bar.close()  # else the error would be glued to its line
        click.echo(f"error: {_in_few_lines(error)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
