"""Check a value from a YAML file, a flag or Python against a type hint, in words a user can act on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}
_WORDS_FOR_VALUES: dict[type, str] = {list: "a list", tuple: "a list", dict: "a mapping"}
_MOST_SHOWN = 200  # characters of a value in an error
# What was a choice or a key once, and why it is none now.
_GONE = {
    "one_pass": " 'one_pass' is gone, as that teacher moved with the student and both collapsed. Take 'frozen', the "
    "full model untouched, as PUMA's authors do.",
    "batches": " 'batches' is gone, as twin batches made no loss better: leave it out. No two rows of a batch share a "
    "right answer, as before.",
}
# YAML 1.1 reads 2e-4, without a point, as text.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of `hint`: bool, int, float, str, a path, a mapping, a `Literal`, a tuple, or None of them.

    Whole numbers become floats, so does text such as "2e-4"; one value becomes a tuple of one.

    Raises:
        ValueError: If it is of another type; the message names the value and what was expected.

    Example:

    ```python
    >>> from puma_hf.values import convert

    >>> convert("learning_rate", "2e-4", float)
    0.0002
    ```
    """
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    kind = next(kind for kind in allowed if kind is not type(None) and kind is not Path)
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(convert(name, item, get_args(kind)[0]) for item in items)
    if get_origin(kind) is Literal:
        return _choice(name, value, get_args(kind))
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is float and not isinstance(value, bool):
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            return float(value)
    if get_origin(kind) is Mapping and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{name}={shown(value)} must be {describe(hint)}, not {_kind_of(value)}.")


def describe(hint: Any) -> str:
    """A type hint in words, such as "a whole number or null"."""
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not Path]
        return " or ".join(describe(kind) for kind in kinds)
    if get_origin(hint) is tuple:
        return f"{describe(get_args(hint)[0])}, or a list of such"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    return _WORDS.get(hint, "a mapping of names to values")


def nearest(name: object, names: Iterable[str]) -> str:
    """A sentence that names what may have been meant, or why it is gone, or nothing."""
    if str(name) in _GONE:
        return _GONE[str(name)]
    near = get_close_matches(str(name), list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"{name}={shown(value)} must be one of {', '.join(map(repr, choices))}.{nearest(value, choices)}")


def shown(value: object) -> str:
    """A value as an error shows it, cut to a line: models have pages to say of themselves, cells may be megabytes."""
    return cut(repr(value))


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; JSON, and names of files, may hold half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def cut(text: str) -> str:
    """A text that an error shows, cut to a line of 200 characters."""
    line = text[:_MOST_SHOWN].partition("\n")[0]
    return text if line == text else f"{line}..."


def _kind_of(value: object) -> str:
    name = type(value).__name__
    return (_WORDS | _WORDS_FOR_VALUES).get(type(value), f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}")
