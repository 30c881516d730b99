from __future__ import annotations

from dataclasses import fields
from inspect import signature
from typing import Any, get_args

import pytest

from puma_hf.data import pairs_config as module
from puma_hf.data.pair_rows import Direction
from puma_hf.data.pairs import load_pairs
from puma_hf.data.pairs_config import PairsConfig, PairSettings


def test_settings_are_the_arguments_of_load_pairs() -> None:
    names = {entry.name for entry in fields(PairSettings)} - {"bad_pairs"}
    assert names <= set(signature(load_pairs).parameters)
    assert get_args(module.PairDirection) == get_args(Direction)
    assert get_args(module.BadPairs) == ("raise", "drop")
    assert PairSettings().bad_pairs == signature(load_pairs).parameters["on_error"].default


def test_only_what_was_given_is_passed_on() -> None:
    assert PairsConfig(data="photos").pair_arguments() == {}
    given: dict[str, Any] = {"anchor": "caption", "negatives": ("a", "b"), "direction": "both", "images_to": "out"}
    assert PairsConfig(data="photos", bad_pairs="drop", decode=True, **given).pair_arguments() == given


def test_every_field_has_help_that_ends_as_a_sentence() -> None:
    for entry in fields(PairsConfig):
        assert entry.metadata["help"][0].isupper(), entry.name
        assert entry.metadata["help"].endswith("."), entry.name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"direction": "text-to-text"}, r"direction='text-to-text' must be one of 'text-to-image'"),
        ({"bad_pairs": "ignore"}, r"bad_pairs='ignore' must be one of 'raise', 'drop'"),
        ({"val_fraction": 1.5}, r"val_fraction=1\.5 must be at least 0 and at most 1"),
        ({"seed": -1}, r"seed=-1 must be at least 0"),
        (
            {"val_fraction": 0.6, "test_fraction": 0.6},
            r"val_fraction=0\.6 and test_fraction=0\.6 must be 1 at most tog",
        ),
    ],
)
def test_values_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairsConfig(data="photos", **values)
