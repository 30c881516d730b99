from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from puma_hf.values import convert, cut, describe, nearest, shown

Colour = Literal["red", "blue"]


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (0.5, float, 0.5),
        ("2e-4", float, 2e-4),
        ("1E3", float, 1000.0),
        ("-.5", float, -0.5),
        (True, bool, True),
        ("text", str, "text"),
        (Path("a/b"), str | Path, "a/b"),
        (None, int | None, None),
        (4, int | None, 4),
        ("red", Colour, "red"),
        ([1, 2], tuple[int, ...], (1, 2)),
        (7, tuple[int, ...], (7,)),
        ([], tuple[str, ...], ()),
        ("none", tuple[str, ...], ("none",)),
        ({"a": 1}, Mapping[str, Any], {"a": 1}),
    ],
)
def test_values_that_fit(value: object, hint: Any, expected: object) -> None:
    converted = convert("x", value, hint)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (2.0, int, r"x=2\.0 must be a whole number, not a number\."),
        (True, int, r"x=True must be a whole number, not true or false\."),
        ("8", int, r"x='8' must be a whole number, not text\."),
        (True, float, r"x=True must be a number, not true or false\."),
        ("fast", float, r"x='fast' must be a number, not text\."),
        ("nan", float, r"x='nan' must be a number, not text\."),
        (1, bool, r"x=1 must be true or false, not a whole number\."),
        ("yes", bool, r"x='yes' must be true or false, not text\."),
        (5, str | Path, r"x=5 must be text, not a whole number\."),
        (None, int, r"x=None must be a whole number, not null\."),
        ("a", int | None, r"x='a' must be a whole number or null, not text\."),
        ("rad", Colour, r"x='rad' must be one of 'red', 'blue'\. Did you mean 'red'\?"),
        (1, Colour, r"x=1 must be one of 'red', 'blue'\.$"),
        ([1, "b"], tuple[int, ...], r"x='b' must be a whole number, not text\."),
        ([1], Mapping[str, Any], r"x=\[1\] must be a mapping of names to values, not a list\."),
        (b"a" * 300, str, r"x=b'a{198}\.\.\. must be text, not a bytes\."),
        (2 + 1j, str, r"x=\(2\+1j\) must be text, not a complex\."),
        (OrderedDict(a=1), str, r"x=OrderedDict\(.*\) must be text, not an OrderedDict\."),
        ({1: 2}, Mapping[str, Any], r"x=\{1: 2\} must be a mapping of names to values"),
    ],
)
def test_values_that_do_not_fit(value: object, hint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert("x", value, hint)


def test_types_in_words() -> None:
    assert describe(tuple[int, ...]) == "a whole number, or a list of such"
    assert describe(str | Path | None) == "text or null"
    assert describe(Colour) == "one of 'red', 'blue'"


def test_the_nearest_name() -> None:
    assert nearest("learnig_rate", ["learning_rate", "lora_r"]) == " Did you mean 'learning_rate'?"
    assert nearest("zzz", ["learning_rate"]) == ""


def test_an_error_shows_one_line_of_a_value() -> None:
    assert shown([1, "b"]) == "[1, 'b']"
    assert shown("a" * 1000) == f"'{'a' * 199}..."
    assert cut("first\nsecond") == "first..."
    with pytest.raises(ValueError, match=r"^x='b{199}\.\.\. must be one of 'red', 'blue'\.$"):
        convert("x", "b" * 1000, Colour)
