"""Settings as dataclasses: one truth for YAML files, the command's flags, and Python.

jsonargparse would read them, too, but it names neither the line of a file nor the nearest key, and its bounds are types
of its own. Nothing heavy is imported here, so that `puma-hf --help` stays quick.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

Config = TypeVar("Config", bound="CheckedConfig")
SpecialTokens = Literal["raise", "split"]
Decode = Literal["fast", "exact"]

_BOUNDS = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
# A field in a docstring, with the lines that go on below it.
_ARGUMENT = re.compile(r"^    (\w+): (.*(?:\n        .*)*)", re.MULTILINE)
# How a run is started, not what it is: left out of the recipe that is kept with its result, so that repeating the run
# replaces nothing.
_NOT_KEPT = ("resume", "overwrite")


# ------------------------------------------------------------------------------------------------------------- fields


def option(default: Any, **bounds: float) -> Any:
    """A field of a `CheckedConfig` whose value has bounds: `at_least`, `at_most`, `above` and `below`."""
    return field(default=default, metadata={"bounds": bounds})


def positional(**metadata: str) -> Any:
    """A field of a `CheckedConfig` that must be given; the command may take it by its place, too."""
    return field(metadata={"positional": True, **metadata})


def field_help(kind: type) -> dict[str, str]:
    """What each field is for, by its name: from the `Args` of the class's docstring, and of those it is made of."""
    found: dict[str, str] = {}
    for part in reversed(kind.__mro__):
        arguments = cleandoc(part.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
        found |= {name: " ".join(text.split()) for name, text in _ARGUMENT.findall(arguments)}
    return found


def processing_of(
    special_tokens: SpecialTokens, max_pixels: int | None = None, decode: Decode | None = None
) -> dict[str, dict[str, Any]]:
    """What these fields mean as `processing_kwargs`; what is not asked for is the model's own choice.

    Example:
        >>> processing_of("raise", max_pixels=50_000), processing_of("split")
        ({'image': {'max_pixels': 50000}}, {'text': {'split_special_tokens': True}})
    """
    image = {name: value for name, value in (("max_pixels", max_pixels), ("decode", decode)) if value is not None}
    text = {"split_special_tokens": True} if special_tokens == "split" else {}
    return {kind: options for kind, options in (("text", text), ("image", image)) if options}


@dataclass(frozen=True, kw_only=True)
class CheckedConfig:
    """A configuration whose values are converted and checked when it is made.

    Args:
        special_tokens: On a special token in a text, such as <|im_end|>: raise; or split, which reads it as text.
        max_pixels: Images are scaled down to so many pixels: fewer are quicker. Default: as the model says.
        decode: How images are decoded: exact, every pixel; or fast, photos only at the scale that is needed. Default:
            as the model says, which is fast.
        revision: Branch, tag or commit of a model on the Hub.
        num_kept_layers: Decoder layers that are run, of a model that was trained at several depths. Default: all of it.
        trust_remote_code: Run the code of a Hub repository; a local directory's is run.
        truncate_dim: Keep only the first so many dimensions of an embedding.
        overwrite: Replace the output if it is not empty.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            value = _checked(entry, getattr(self, entry.name), hints[entry.name])
            object.__setattr__(self, entry.name, value)  # the class is frozen

    def given(self, *names: str) -> dict[str, Any]:
        """These fields by name, as a function takes them that calls them the same."""
        return {name: getattr(self, name) for name in names}


def flag_of(entry: Field[Any]) -> str | None:
    """The flag of a field, without its dashes; None if the command has none."""
    flag = entry.metadata.get("flag", entry.name.replace("_", "-"))
    return str(flag) if flag else None


def _checked(entry: Field[Any], value: Any, hint: Any) -> Any:
    """The value of a field as its type, within its bounds."""
    flag = entry.metadata.get("flag")  # where it is not the name, errors say both
    converted = convert(f"{entry.name} (--{flag})" if flag else entry.name, value, hint)
    bounds = entry.metadata.get("bounds")
    for number in converted if isinstance(converted, tuple) else (converted,):
        if not bounds or number is None:
            continue
        if not (math.isfinite(number) and all(_BOUNDS[kind](number, bound) for kind, bound in bounds.items())):
            wanted = " and ".join(f"{kind.replace('_', ' ')} {bound}" for kind, bound in bounds.items())
            raise ValueError(f"{entry.name}={number} must be {wanted}. Leave it out for the default.")
    return converted


# ------------------------------------------------------------------------------------------------------------- values


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of `hint`: bool, int, float, str, a path, a mapping, a `Literal`, a tuple, or None of them.

    Whole numbers become floats or texts where these are wanted; one value becomes a tuple of one. A text such as "2e-4"
    becomes a float, as YAML 1.1 reads a number without a point as text.

    Raises:
        ValueError: If it is of another type; the message names the value and what was expected.

    Example:
        >>> convert("learning_rate", "2e-4", float)
        0.0002
    """
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    kind = next(kind for kind in allowed if kind is not type(None) and kind is not Path)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(convert(name, item, arguments[0]) for item in items)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        choices = ", ".join(map(repr, arguments))
        raise ValueError(f"{name}={shown(value)} must be one of {choices}.{nearest(value, arguments)}")
    if kind in (float, str) and isinstance(value, int | float | str | os.PathLike) and not isinstance(value, bool):
        with suppress(ValueError, TypeError):
            return kind(value)
    if origin is Mapping and isinstance(value, Mapping):
        return dict(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    wanted = " or ".join(_WORDS.get(kind, "a mapping of names to values") for kind in allowed if kind is not Path)
    raise ValueError(f"{name}={shown(value)} must be {wanted}, not {_WORDS.get(type(value), type(value).__name__)}.")


def parse_numbers(name: str, value: str, at_least: int, wanted: str) -> tuple[int, ...]:
    """Different whole numbers that are separated by commas, the smallest first; else a ValueError says what is wanted.

    Example:
        >>> parse_numbers("depths", "8,4", 1, "must be numbers of layers")
        (4, 8)
    """
    numbers = [int(part) if part.strip().isascii() and part.strip().isdecimal() else 0 for part in value.split(",")]
    if min(numbers) < at_least or len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}={value!r} {wanted}.")
    return tuple(sorted(numbers))


def nearest(name: object, names: Iterable[str]) -> str:
    """A sentence that names what may have been meant, or nothing."""
    near = get_close_matches(str(name), list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """A value as an error shows it, cut to a line: models have pages to say of themselves, cells may be megabytes."""
    return cut(repr(value))


def cut(text: str) -> str:
    """A text that an error shows, cut to a line of 200 characters."""
    line = text[:200].partition("\n")[0]
    return text if line == text else f"{line}..."


def from_extra(module: str, extra: str) -> Any:
    """A module of a package that an extra brings, or an ImportError with the line that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{package} is missing ({error}). Run: pip install 'puma-hf[{extra}]'") from error


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; JSON, and names of files, may hold half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# -------------------------------------------------------------------------------------------------------------- files


def load_config(kind: type[Config], path: str | Path | None = None, **values: Any) -> Config:
    """A configuration from a YAML file, from values, or from both: then the values win.

    Args:
        kind: One of the classes of `puma_hf.configs`.
        path: YAML file, a mapping of the fields' names to values; none for values alone.
        values: Fields by name. Paths here and in the file are relative to the current directory.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no YAML mapping, a key is unknown or given twice, a value is of the wrong type or
            out of range, or a required one is missing; the message names file, line and remedy.

    Example:
        >>> from puma_hf.configs import DistillConfig
        >>> config = load_config(DistillConfig, "configs/demo_distill.yaml", max_steps=10)
        >>> config.batch_size, config.max_steps
        (64, 10)
    """
    read, lines = read_recipe(path) if path is not None else ({}, {})
    given = {**read, **values}
    known, hints, texts = {entry.name: entry for entry in fields(kind)}, get_type_hints(kind), field_help(kind)
    for name, value in given.items():
        try:
            if name not in known:
                raise ValueError(f"{name!r} is no key of {kind.__name__}.{nearest(name, known)}")
            _checked(known[name], value, hints[name])
        except ValueError as error:
            # What comes from the file is told with its line.
            place = "" if name in values else f"{path}, line {lines[name]}: "
            raise ValueError(f"{place}{error}") from None
    missing = [
        f"{name} is missing ({texts[name].rstrip('.')}). Give it as --{flag_of(entry)}, or as {name!r} in a YAML file."
        for name, entry in known.items()
        if entry.default is MISSING and entry.default_factory is MISSING and name not in given
    ]
    if missing:
        raise ValueError(" ".join(missing))
    return kind(**given)


def read_recipe(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML mapping, and the line of each of its keys.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read as YAML, is no mapping, or has a key twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}. Name a YAML file of settings (--config).")
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    try:
        # Not safe_load, which takes the last of two equal keys without a word, and forgets the lines.
        loader = yaml.SafeLoader(Path(path).read_bytes())
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path} is no mapping. Write one `name: value` a line; --help lists the names.")
        for key, node in root.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"{path}, line {line}: {name!r} was given before, on line {lines[name]}. Remove one.")
            values[name], lines[name] = loader.construct_object(node, deep=True), line
    except yaml.YAMLError as error:
        problem = f"{path} is not YAML: {' '.join(str(error).split())}"
        raise ValueError(f"{problem}. Write one `name: value` a line.") from error
    return values, lines


def config_text(config: CheckedConfig) -> str:
    """A configuration as YAML that `load_config` reads."""
    values = {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.name not in _NOT_KEPT}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=False))
