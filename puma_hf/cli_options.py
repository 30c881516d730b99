"""Commands whose options are the fields of a configuration: names, defaults and help are written there alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from puma_hf.settings import load_config

Config = TypeVar("Config")

_CONFIG_HELP = (
    "YAML file with values for the options below, under their names with underscores. Options given here win. "
    "Paths in it are relative to the current directory."
)


def config_command(
    app: typer.Typer, kind: type[Config], name: str | None = None
) -> Callable[[Callable[[Config], None]], Callable[..., None]]:
    """Make a function of one configuration a command that takes its fields as options, a YAML file, or both.

    Args:
        app: Where the command goes, with the function's docstring as help.
        kind: A dataclass whose fields have "help" in their metadata, and may have "positional" and "flag":
            `False` for none, or a name of its own.
        name: Of the command; that of the function if None.
    """
    entries = [entry for entry in fields(kind) if entry.metadata.get("flag", True)]  # type: ignore[arg-type]
    positional = [entry for entry in entries if entry.metadata.get("positional")]
    hints = get_type_hints(kind)

    def decorate(function: Callable[[Config], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            path = given.pop("config")
            for entry in positional:
                _merge_positional(given, entry.name)
            # Options that were not given are None, repeated ones empty.
            values = {name: value for name, value in given.items() if value is not None and value != []}
            function(load_config(kind, path, **values))

        config = Annotated[Path | None, typer.Option("--config", help=_CONFIG_HELP, show_default=False)]
        parameters = [
            *(_parameter(f"{entry.name}_argument", _argument(entry)) for entry in positional),
            _parameter("config", config),
            *(_parameter(entry.name, _flag(entry, hints[entry.name])) for entry in entries),
        ]
        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        app.command(name)(command)
        return command

    return decorate


def _parameter(name: str, annotation: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _argument(entry: Field[Any]) -> Any:
    text = f"{entry.metadata['help']} The same as --{entry.name}; may stand in --config instead."
    return Annotated[str | None, typer.Argument(metavar=entry.name.upper(), help=text, show_default=False)]


def _flag(entry: Field[Any], hint: Any) -> Any:
    flag = entry.metadata.get("flag", True)
    name = flag if isinstance(flag, str) else entry.name.replace("_", "-")
    names = (f"--{name}/--no-{name}",) if hint is bool else (f"--{name}",)
    plain, metavar = _plain(hint)
    text = entry.metadata["help"]
    if (default := _shown(entry)) is not None:
        text += f" Default: {default}."
    return Annotated[plain | None, typer.Option(*names, help=text, metavar=metavar, show_default=False)]


def _plain(hint: Any) -> tuple[Any, str | None]:
    """What typer reads a field as, and how the help shows its values; choices are checked with the YAML file's."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind not in (type(None), Path))
    if get_origin(hint) is Literal:
        return str, "|".join(get_args(hint))
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return list[item], f"<{item.__name__}>, repeatable"  # type: ignore[valid-type]
    return hint, None


def _shown(entry: Field[Any]) -> str | None:
    default = entry.default
    if default is MISSING or default is None or default in ((), ""):
        return None
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _merge_positional(given: dict[str, Any], name: str) -> None:
    """One value of a field that may be given by its place or by its name."""
    value = given.pop(f"{name}_argument")
    if value is None:
        return
    if given[name] is not None:
        raise ValueError(f"{name} is given twice, as {value!r} and as --{name} {given[name]!r}. Remove one of them.")
    given[name] = value
