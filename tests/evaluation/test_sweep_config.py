from __future__ import annotations

import pytest

from puma_hf.evaluation.sweep_config import SweepConfig, parse_parameters
from puma_hf.recipes import load_config


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("4B", 4_000_000_000),
        ("1.5b", 1_500_000_000),
        ("2G", 2_000_000_000),
        ("800M", 800_000_000),
        ("800 m", 800_000_000),
        ("300k", 300_000),
        (".5M", 500_000),
        ("1_300_000", 1_300_000),
        ("42", 42),
        (7, 7),
        (4e9, 4_000_000_000),
    ],
)
def test_numbers_as_people_write_them(value: str | float, number: int) -> None:
    assert parse_parameters(value) == number


@pytest.mark.parametrize("value", ["", "4Bn", "four", "-4B", "0", "0.2", "4e9B", "B", -3, 0])
def test_what_is_no_number(value: str | float) -> None:
    with pytest.raises(ValueError, match=r"max_params=.* must be a number of parameters\. Write it as 4B"):
        parse_parameters(value)


def test_defaults() -> None:
    config = SweepConfig(model="full", data="folder")
    assert (config.split, config.pool, config.metric, config.keep) == ("val", "local", "score", 0.97)
    assert (config.nano_queries, config.nano_candidates, config.compare, config.output) == (200, 2000, (), None)


def test_values_are_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="max_params='much' must be a number"):
        SweepConfig(model="full", data="folder", max_params="much")
    with pytest.raises(ValueError, match=r"keep=1\.2 must be above 0 and at most 1"):
        SweepConfig(model="full", data="folder", keep=1.2)
    with pytest.raises(ValueError, match="metric='hits' must be one of 'score'"):
        SweepConfig(model="full", data="folder", metric="hits")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"output='.*test_sweep_config.py' must be a directory"):
        SweepConfig(model="full", data="folder", output=__file__)
    with pytest.raises(ValueError, match="model is missing"):
        load_config(SweepConfig, data="folder")
