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
from inspect import cleandoc, signature
from io import TextIOWrapper
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from puma_hf import __version__, configs
from puma_hf.processes import ends_well_on_sigterm
from puma_hf.settings import field_help, flag_of, load_config

# Switch off the progress bars of transformers and of datasets.
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")

_CONFIG_HELP = "YAML file with values for the options below, under their names with underscores. Options win over it."


class _InOrder(click.Group):
    """Commands in the order in which they are used, as below."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder)
@click.version_option(__version__, message="puma-hf %(version)s", help="Print the version and leave.")
def app() -> None:
    """Cut a Qwen-VL (2 to 3.5) to its first k layers and make it a retrieval embedder for text, images, and both."""


# --------------------------------------------------------------------------------------- options from a settings class


def _command(name: str, kind: Any, place: str) -> click.Command:
    """A command that takes the fields of a settings class as options, a YAML file, or both.

    Names, defaults and help are written in the class alone. A field may have "positional" and "flag" in its metadata:
    `False` for none, or a name of its own.
    """
    flags = {entry.name: flag for entry in fields(kind) if (flag := flag_of(entry))}
    positional = [entry.name for entry in fields(kind) if entry.metadata.get("positional")]
    hints, texts = get_type_hints(kind), field_help(kind)

    def run(config: Path | None = None, **given: Any) -> None:
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
        # Of these much may be done when SIGTERM comes. A training has its checkpoints, and dies with its launcher.
        keeps_work = isinstance(settings, configs.EmbedConfig | configs.EvaluateConfig)
        with ends_well_on_sigterm() if keeps_work else nullcontext():
            # A function takes its settings whole, as `config`, or each by its name.
            result = work(settings) if "config" in signature(work).parameters else work(**asdict(settings))
        if _is_first_process():
            click.echo(_told(settings, result))
        if not getattr(result, "ok", True):
            sys.exit(1)

    parameters: list[click.Parameter] = [
        click.Argument([f"{field}_argument"], required=False, metavar=f"[{flags[field].upper().replace('-', '_')}]")
        for field in positional
    ]
    if "config" not in flags.values():
        parameters.append(click.Option(["--config"], type=click.Path(path_type=Path), help=_CONFIG_HELP))
    entries = [entry for entry in fields(kind) if entry.name in flags]
    parameters += [_option(entry, hints[entry.name], texts[entry.name]) for entry in entries]
    words = cleandoc(kind.__doc__).partition("\n\nArgs:")[0]
    return click.Command(name, callback=run, params=parameters, help=words)


def _option(entry: Field[Any], hint: Any, text: str) -> click.Option:
    """The flag of a field. Types are read here, and choices checked with the YAML file's."""
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
    name = flag_of(entry)
    flag = f"--{name}/--no-{name}" if hint is bool else f"--{name}"
    return click.Option([flag, entry.name], help=text, default=None, **attributes)


# ------------------------------------------------------------------------------------------------------------ commands


def _told(config: Any, result: Any) -> str:
    """A result in the words of the command."""
    if isinstance(config, configs.StageConfig):
        return f"saved the adapter to {result}; merge it with: puma-hf merge {result} MERGED"
    if isinstance(config, configs.MergeConfig):
        return f"merged; embeddings differ by at most {result:.1e}\nsaved    {config.output}"
    if isinstance(config, configs.SearchConfig) and config.json:  # for programs, which read nothing else
        return json.dumps(result.to_dict(), ensure_ascii=False, indent=2)
    return str(result.to_markdown() if hasattr(result, "to_markdown") else result)


def show_page(config: configs.AppConfig) -> str:
    """Serve the page of an index, or write it as a Space."""
    if config.space is None:
        from puma_hf.search.page import launch

        launch(config, started=lambda url: click.echo(f"serving {config.index} at {url}; Ctrl-C ends it"))
        return "ended"
    from puma_hf.search import open_index, write_space

    if config.query_model is not None:
        raise ValueError(f"query_model={config.query_model!r} is for serving, not for a Space. Leave out one of both.")
    settings = config.given("model", "instruction", "num_kept_layers", "trust_remote_code")
    place, run = write_space(open_index(config.index), config.space, **settings), "GRADIO_SERVER_NAME=127.0.0.1 python"
    return f"saved the Space to {place}; look at it first with: {run} {place}/app.py"


# Command, settings, and the function that does it. A command's help stands in its class.
_COMMANDS: tuple[tuple[str, Any, str], ...] = (
    ("prune", configs.PruneConfig, "puma_hf.pruning:prune"),
    ("estimate", configs.EstimateConfig, "puma_hf.estimate:estimate"),
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
for _entry in _COMMANDS:
    app.add_command(_command(*_entry))


# ---------------------------------------------------------------------------------------------------- output and errors


def _is_first_process() -> bool:
    """Whether this is the process that speaks, of those that `torchrun` or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Entry point: errors that a user can mend are told in their own words, not as a traceback."""
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
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
