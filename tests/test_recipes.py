from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from puma_hf.configs import DistillConfig, MergeConfig, TrainConfig
from puma_hf.recipes import config_text, load_config, save_config

PATHS = "model: pruned\noutput: out\ndata: mbeir\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_recipe_becomes_a_configuration(recipe: Any) -> None:
    text = PATHS + (
        "learning_rate: 2e-4\nwarmup: 0\nlora_alpha: null\nbf16: true\nmatryoshka_dims: [32, 16]\nreport_to: wandb\n"
        "training_arguments:\n  optim: adamw_torch\n"
    )
    expected = TrainConfig(
        model="pruned",
        output="out",
        data="mbeir",
        learning_rate=2e-4,
        warmup=0.0,
        bf16=True,
        matryoshka_dims=(32, 16),
        report_to=("wandb",),
        training_arguments={"optim": "adamw_torch"},
    )
    assert load_config(TrainConfig, recipe(text)) == expected


def test_values_win_over_the_file_and_suffice_alone(recipe: Any) -> None:
    config = load_config(DistillConfig, recipe(PATHS + "seed: 1\nbf16: true\n"), seed=2, bf16=False, output="other")
    assert (config.seed, config.bf16, config.output, config.model) == (2, False, "other", "pruned")
    alone = load_config(DistillConfig, model="m", output="o", data="d", max_steps=3)
    assert alone == DistillConfig(model="m", output="o", data="d", max_steps=3)


def test_a_bad_value_in_the_file_does_not_matter_if_another_wins(recipe: Any) -> None:
    assert load_config(DistillConfig, recipe(PATHS + "batch_size: 0\n"), batch_size=4).batch_size == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PATHS + "learnig_rate: 1\n", r"recipe\.yaml, line 4: 'learnig_rate' is no key .* mean 'learning_rate'\?"),
        (PATHS + "qqq: 1\n", r"line 4: 'qqq' is no key of TrainConfig\.$"),
        (PATHS + "1: 1\n", r"line 4: '1' is no key of TrainConfig"),
        (PATHS + "batch_size: many\n", r"line 4: batch_size='many' must be a whole number, not text\."),
        (PATHS + "bf16: 1\n", r"line 4: bf16=1 must be true or false, not a whole number\."),
        (PATHS + "seed: null\n", r"line 4: seed=None must be a whole number, not null\."),
        (PATHS + "loss: mack\n", r"line 4: loss='mack' must be one of .* Did you mean 'mac'\?"),
        (PATHS + "matryoshka_dims: [8, x]\n", r"line 4: matryoshka_dims='x' must be a whole number"),
        (PATHS + "batch_size: 0\n", r"recipe\.yaml, line 4: batch_size=0 must be at least 1\."),
        (PATHS + "seed: 1\nseed: 2\n", r"line 5: 'seed' was given before, on line 4\. Remove one of them\."),
        (PATHS + "training_arguments: {optim: a, optim: b}\n", r"line 4: 'optim' was given before, on line 4"),
        (PATHS + "training_arguments: [optim]\n", r"training_arguments=\['optim'\] must be a mapping of names"),
        ("- model\n- output\n", r"recipe\.yaml is a list, not a mapping\. Write one `name: value` a line\."),
        ("just text\n", r"recipe\.yaml is text, not a mapping\."),
        ("", r"recipe\.yaml is empty\. Write one `name: value` a line"),
        ("# only a comment\n", r"recipe\.yaml is empty"),
        ("model: pruned\ndata: [1, 2\nseed: 3\n", r"recipe\.yaml, line \d: this is not YAML \(.+\)"),
        ("model: pruned\n\tdata: x\n", r"recipe\.yaml, line 2: this is not YAML"),
        ("model: !!python/object/apply:os.getcwd []\n", r"line 1: this is not YAML .*could not determine"),
        ("a: 1\n---\nb: 2\n", r"this is not YAML .*another document"),
    ],
)
def test_mistakes_in_a_recipe(recipe: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(TrainConfig, recipe(text))


def test_a_value_out_of_range_that_was_given_besides_is_not_blamed_on_the_file(recipe: Any) -> None:
    with pytest.raises(ValueError, match=r"^batch_size=0 must be at least 1"):
        load_config(TrainConfig, recipe(PATHS + "batch_size: 8\n"), batch_size=0)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model: \xff\xfe\x00")
    with pytest.raises(ValueError, match=r"recipe\.yaml: this is not YAML"):
        load_config(TrainConfig, path)


def test_a_file_that_is_not_there(recipe: Any, tmp_path: Path) -> None:
    recipe("")
    with pytest.raises(FileNotFoundError, match=r"no file '.*recipes\.yaml'\. Did you mean 'recipe\.yaml'\?"):
        load_config(TrainConfig, tmp_path / "recipes.yaml")
    with pytest.raises(FileNotFoundError, match=r"no file '.*zzz'\.$"):
        load_config(TrainConfig, tmp_path / "folder" / "zzz")
    with pytest.raises(ValueError, match=r"is a folder\. Name a YAML file in it\."):
        load_config(TrainConfig, tmp_path)


def test_what_is_missing_is_named_with_key_and_flag(recipe: Any) -> None:
    message = r"data is missing \(Folder .*\)\. Give it as the key 'data' in .*recipe\.yaml, or as --data\."
    with pytest.raises(ValueError, match=message):
        load_config(TrainConfig, recipe("model: m\noutput: o\n"))
    with pytest.raises(ValueError, match=r"adapter is missing .* 'adapter' of --config, or as --adapter\. output is"):
        load_config(MergeConfig)


def test_an_unknown_value_besides_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'sed' is no field of MergeConfig"):
        load_config(MergeConfig, sed=1)


def test_what_is_saved_reads_back_the_same(tmp_path: Path) -> None:
    config = TrainConfig(
        model="mödel",
        output="out",
        data="yes",  # YAML would read it as a boolean, were it not quoted
        learning_rate=2e-4,
        matryoshka_dims=(32, 16),
        training_arguments={"optim": "adamw_torch"},
        overwrite=True,
    )
    save_config(config, tmp_path / "train.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["train.yaml"]
    read = load_config(TrainConfig, tmp_path / "train.yaml")
    assert read.overwrite is False  # how the run was started is not kept
    assert load_config(TrainConfig, tmp_path / "train.yaml", overwrite=True) == config
    assert "resume" not in config_text(config)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "merge.yaml"
    save_config(MergeConfig(adapter="a", output="b"), file)
    before = file.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_config(MergeConfig(adapter="c", output="d"), file)
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]


def test_a_key_that_is_gone_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("model: a\noutput: b\ndata: c\nbatches: twin\n")
    with pytest.raises(ValueError, match=r"line 4: 'batches' is no key of .*'batches' is gone, .*leave it out"):
        load_config(TrainConfig, tmp_path / "train.yaml")
