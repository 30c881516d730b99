"""Values from YAML, flags and Python: what fits, what does not, and which place an error names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from puma_hf.configs import TrainConfig
from puma_hf.settings import config_text, convert, from_extra, load_config

Colour = Literal["red", "blue"]
PATHS = "model: pruned\noutput: out\ndata: mbeir\n"


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, 3.0),
        ("2e-4", float, 2e-4),
        (4096, str | None, "4096"),
        (None, int | None, None),
        ("red", Colour, "red"),
        ([1, 2], tuple[int, ...], (1, 2)),
        (7, tuple[int, ...], (7,)),
    ],
)
def test_values_that_fit(value: object, hint: Any, expected: object) -> None:
    converted = convert("x", value, hint)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (True, int, r"x=True must be a whole number, not true or false\."),
        ("8", int, r"x='8' must be a whole number, not text\."),
        (1, bool, r"x=1 must be true or false, not a whole number\."),
        ("rad", Colour, r"x='rad' must be one of 'red', 'blue'\. Did you mean 'red'\?"),
        ([1, "b"], tuple[int, ...], r"x='b' must be a whole number, not text\."),
    ],
)
def test_values_that_do_not_fit(value: object, hint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert("x", value, hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PATHS + "learnig_rate: 1\n", r"recipe\.yaml, line 4: 'learnig_rate' is no key .* mean 'learning_rate'\?"),
        (PATHS + "batch_size: many\n", r"line 4: batch_size='many' must be a whole number, not text\."),
        (PATHS + "seed: 1\nseed: 2\n", r"line 5: 'seed' was given before, on line 4\. Remove one\."),
        ("- model\n- output\n", r"recipe\.yaml is no mapping\. Write one `name: value` a line"),
        ("model: pruned\ndata: [1, 2\nseed: 3\n", r"recipe\.yaml is not YAML: .* line 3"),
        ("model: !!python/object/apply:os.getcwd []\n", r"is not YAML: could not determine .* line 1"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_config(TrainConfig, tmp_path / "recipe.yaml")


def test_what_is_saved_reads_back_the_same(tmp_path: Path) -> None:
    paths = {"model": "mödel", "output": "out", "data": "yes"}  # YAML would read "yes" as a boolean, unquoted
    arguments = {"optim": "adamw_torch"}
    config = TrainConfig(
        **paths, learning_rate=2e-4, matryoshka_dims=(32, 16), training_arguments=arguments, overwrite=True
    )
    (tmp_path / "train.yaml").write_text(config_text(config), encoding="utf-8")
    read = load_config(TrainConfig, tmp_path / "train.yaml")
    assert read.overwrite is False  # how the run was started is not kept
    assert load_config(TrainConfig, tmp_path / "train.yaml", overwrite=True) == config
    assert "resume" not in config_text(config)


def test_what_an_extra_brings_is_named_with_the_line_that_installs_it() -> None:
    assert from_extra("json.decoder", "none").JSONDecoder
    with pytest.raises(ImportError, match=r"nosuch is missing .*\. Run: pip install 'puma-hf\[plot\]'"):
        from_extra("nosuch.figure", "plot")
