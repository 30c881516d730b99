"""Settings as dataclasses: one truth for YAML files, the command's flags, and Python.

Nothing heavy is imported here, so that `puma-hf --help` stays quick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_type_hints

from puma_hf.values import convert

SpecialTokens = Literal["raise", "split"]


def option(default: Any, text: str, *, remedy: str = "", **bounds: float) -> Any:
    """A field of a `CheckedConfig`.

    Args:
        default: Its value if nothing is given.
        text: Its help.
        remedy: What an error about its value tells the user to do; by default, to leave it out.
        bounds: `at_least`, `at_most`, `above` and `below`.
    """
    return field(default=default, metadata={"help": text, "remedy": remedy, "bounds": bounds})


def required(text: str, *, positional: bool = False) -> Any:
    """A field of a `CheckedConfig` that has no default; the command may take it by its place, too."""
    return field(metadata={"help": text, "positional": positional})


def special_tokens_option() -> Any:
    """The field `special_tokens` of every command that embeds or trains."""
    return option("raise", "On a special token in a text, such as <|im_end|>: raise; or split, which reads it as text.")


def processing_of(special_tokens: SpecialTokens) -> dict[str, dict[str, Any]]:
    """What that field means as `processing_kwargs`; what is not asked for is the model's own choice."""
    return {"text": {"split_special_tokens": True}} if special_tokens == "split" else {}


@dataclass(frozen=True, kw_only=True)
class CheckedConfig:
    """A configuration whose values are checked when it is made."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            flag = entry.metadata.get("flag")  # where it is not the name, errors say both
            shown = f"{entry.name} (--{flag})" if isinstance(flag, str) else entry.name
            value = convert(shown, getattr(self, entry.name), hints[entry.name])
            object.__setattr__(self, entry.name, value)  # the class is frozen
            for item in value if isinstance(value, tuple) else (value,):
                remedy = entry.metadata.get("remedy") or _default_as_remedy(entry)
                _check_bounds(entry.name, item, entry.metadata.get("bounds", {}), remedy)

    def notes(self) -> list[str]:
        """What a person should know before the run: options that this combination ignores."""
        return []

    def _unused(self, why: str, *names: str) -> list[str]:
        """One sentence about those of the fields that were given, though `why` leaves them without effect."""
        defaults = {entry.name: entry.default for entry in fields(self)}
        given = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != defaults[name]]
        return [f"{', '.join(given)}: not used with {why}."] if given else []


def _default_as_remedy(entry: Field[Any]) -> str:
    given = "" if entry.default in (MISSING, None, ()) else f", {entry.default}"
    return f"Leave it out for the default{given}."


def _check_bounds(name: str, value: Any, bounds: Mapping[str, float], remedy: str) -> None:
    if value is None or not bounds:
        return
    kept = {
        "at_least": lambda bound: value >= bound,
        "at_most": lambda bound: value <= bound,
        "above": lambda bound: value > bound,
        "below": lambda bound: value < bound,
    }
    if not math.isfinite(value) or not all(kept[kind](bound) for kind, bound in bounds.items()):
        wanted = " and ".join(f"{kind.replace('_', ' ')} {bound}" for kind, bound in bounds.items())
        raise ValueError(f"{name}={value} must be {wanted}. {remedy}".rstrip())
