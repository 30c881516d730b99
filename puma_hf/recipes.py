"""Recipes: a configuration read from a YAML file, with values given besides that win, and written back.

Paths in a recipe are relative to the current directory, as those in flags are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml  # type: ignore[import-untyped]

from puma_hf.values import convert, nearest

Config = TypeVar("Config")

# How a run is started, not what it is: left out of the recipe that is kept with its result.
_NOT_KEPT = ("resume", "overwrite")


def load_config(kind: type[Config], path: str | Path | None = None, **values: Any) -> Config:
    """A configuration from a YAML file, from values, or from both: then the values win.

    Args:
        kind: `DistillConfig`, `TrainConfig` or `MergeConfig`.
        path: YAML file, a mapping of the fields' names to values; none for values alone.
        values: Fields by name. Paths here and in the file are relative to the current directory.

    Returns:
        A `kind`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no YAML mapping, a key is unknown or given twice, a value is of the wrong type or
            out of range, or a required one is missing; the message names file, line and remedy.

    Example:

    ```python
    >>> from puma_hf.recipes import load_config
    >>> from puma_hf.configs import DistillConfig

    >>> config = load_config(DistillConfig, "configs/demo_distill.yaml", max_steps=10)
    >>> config.batch_size, config.max_steps
    (64, 10)
    ```
    """
    read, lines = read_recipe(path) if path is not None else ({}, {})
    known: dict[str, Field[Any]] = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ValueError(f"{name!r} is no field of {kind.__name__}.{nearest(name, known)}")
    hints = get_type_hints(kind)
    for name, value in read.items():
        where = f"{path}, line {lines[name]}: "
        if name not in known:
            raise ValueError(f"{where}{name!r} is no key of {kind.__name__}.{nearest(name, known)}")
        try:
            read[name] = convert(name, value, hints[name])
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
    missing = [
        entry
        for entry in known.values()
        if entry.default is MISSING and entry.default_factory is MISSING and entry.name not in {**read, **values}
    ]
    if missing:
        raise ValueError(" ".join(_missing(entry, path) for entry in missing))
    try:
        return kind(**{**read, **values})
    except ValueError as error:
        name = str(error).partition("=")[0]
        if name in lines and name not in values:
            raise ValueError(f"{path}, line {lines[name]}: {error}") from None
        raise


def _missing(entry: Field[Any], path: str | Path | None) -> str:
    flag, what = "--" + entry.name.replace("_", "-"), entry.metadata["help"].rstrip(".")
    place = f"as the key {entry.name!r} in {path}" if path is not None else f"as the key {entry.name!r} of --config"
    return f"{entry.name} is missing ({what}). Give it {place}, or as {flag}."


def read_recipe(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML mapping, and the line of each of its keys.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read as YAML, is no mapping, or has a key twice.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{str(path)!r} is a folder. Name a YAML file in it.")
    if not file.is_file():
        found = [other.name for other in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise FileNotFoundError(f"There is no file {str(path)!r}.{nearest(file.name, found)}")
    try:
        loader = yaml.SafeLoader(file.read_bytes())
        try:
            root = loader.get_single_node()
            if root is None:
                raise ValueError(f"{path} is empty. Write one `name: value` a line; --help lists the names.")
            if not isinstance(root, yaml.MappingNode):
                what = "a list" if isinstance(root, yaml.SequenceNode) else "text"
                raise ValueError(f"{path} is {what}, not a mapping. Write one `name: value` a line.")
            _refuse_duplicates(path, root)
            lines = {str(key.value): key.start_mark.line + 1 for key, _ in root.value}
            content = {str(key.value): loader.construct_object(value, deep=True) for key, value in root.value}
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(_syntax_error(path, error)) from error
    return content, lines


def _syntax_error(path: str | Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{place}: this is not YAML ({problem}). Write one `name: value` a line."


def _mappings(node: Any) -> Iterator[Any]:
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)


def _refuse_duplicates(path: str | Path, root: Any) -> None:
    for mapping in _mappings(root):
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(
                    f"{path}, line {line}: {key.value!r} was given before, on line {lines[key.value]}. Remove one of "
                    "them."
                )
            lines[str(key.value)] = line


def config_text(config: Any) -> str:
    """A configuration as YAML that `load_config` reads.

    How the run was started (`resume`, `overwrite`) is left out, so that repeating it replaces nothing.
    """
    values = {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.name not in _NOT_KEPT}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return text


def save_config(config: Any, path: str | Path) -> None:
    """Write `config_text` to a file, whole or not at all."""
    file = Path(path)
    # The hidden sibling takes the place of the file in one step: a killed run leaves no half of it.
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(config_text(config))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
