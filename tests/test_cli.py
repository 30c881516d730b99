from __future__ import annotations

import inspect
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from puma_hf import cli
from puma_hf.evaluation import evaluate_mbeir
from puma_hf.losses import MultimodalMACLoss
from puma_hf.pruning import prune
from puma_hf.trainer import stages
from tests.data.mbeir_builder import build_mbeir

COMMANDS = ("prune", "distill", "train", "merge", "evaluate")
QUICK = ["--batch-size", "4", "--max-steps", "2", "--logging-steps", "1", "--lora-r", "2"]

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    def run(*words: object) -> Result:
        result = CliRunner().invoke(cli.app, list(map(str, words)))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_mbeir(tmp_path_factory.mktemp("data") / "mbeir")


@pytest.fixture
def restored_logging() -> Iterator[None]:
    names = ("httpx", "sentence_transformers", "datasets")
    levels = {name: logging.getLogger(name).level for name in names}
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    for name, value in levels.items():
        logging.getLogger(name).setLevel(value)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def options_of(command: str) -> dict[str, Any]:
    """Default of each parameter of a command."""
    group: Any = typer.main.get_command(cli.app)
    assert set(group.commands) == set(COMMANDS)
    return {parameter.name: parameter.default for parameter in group.commands[command].params}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(invoke: Invoke, command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: puma-hf {command} " in " ".join(result.output.split())


def test_help_lists_the_commands(invoke: Invoke) -> None:
    output = invoke("--help").output
    assert all(command in output for command in COMMANDS)


def test_the_whole_way(
    invoke: Invoke, qwen_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("prune", qwen_dir, "pruned", "--num-kept-layers", 2)
    assert result.exit_code == 0
    assert "decoder layers 0 to 1 of 4" in result.output
    assert result.output.rstrip().endswith("saved    pruned")

    result = invoke("distill", "pruned", "lora", "--data", data, "--teacher", qwen_dir, *QUICK)
    assert "saved the adapter to lora; merge it with: puma-hf merge lora MERGED" in result.output
    result = invoke("merge", "lora", "distilled")
    assert "merged; embeddings differ by at most " in result.output
    assert "saved    distilled" in result.output

    invoke("train", "distilled", "mac-lora", "--data", data, "--num-negatives", 1, *QUICK)
    result = invoke("merge", "mac-lora", "mac", "--base", "distilled")
    assert result.exit_code == 0
    result = invoke("evaluate", "mac", "--data", data, "--output", "results.json", "--rankings")
    assert result.exit_code == 0
    results = json.loads(Path("results.json").read_text())
    assert results["split"] == "test"
    assert set(results["mean"]) == {"local", "global"}
    assert len(results["rows"]) == 16
    assert len(results["rankings"]["local"]["toys_task0"]["11:1000"]) == 6
    assert "| **mean** |" in result.output


def test_options_arrive(
    invoke: Invoke, data: Path, tmp_path: Path, puma_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def record(*args: Any, **kwargs: Any) -> Path:
        seen.update(kwargs, paths=args)
        return Path("out")

    monkeypatch.setattr(stages, "train", record)
    monkeypatch.setattr(stages, "distill", record)
    shared = ["--epochs", 2, "--learning-rate", 0.5, "--bf16", "--workers", 3, "--save-steps", 7]
    shared += ["--seed", 5, "--overwrite"]
    invoke("train", puma_dir, "out", "--data", data, "--loss", "infonce", "--schedule", "linear", *shared)
    assert seen["paths"] == (puma_dir, Path("out"))
    assert (seen["loss"], seen["schedule"], seen["overwrite"], seen["resume"]) == ("infonce", "linear", True, False)
    settings = seen["settings"]
    assert (settings.num_train_epochs, settings.learning_rate, settings.bf16) == (2.0, 0.5, True)
    assert (settings.dataloader_num_workers, settings.save_steps, settings.seed) == (3, 7, 5)
    invoke("distill", puma_dir, "out", "--data", data, "--metric", "cosine", "--no-train-ret-token", "--resume")
    assert (seen["metric"], seen["resume"], seen["teacher"]) == ("cosine", True, None)
    assert seen["settings"].train_ret_token is False


def test_one_task_and_pool(invoke: Invoke, data: Path, puma_dir: Path) -> None:
    words = ["--pool", "local", "--task", "toys_task1", "--task", "toys_task3", "--batch-size", "8"]
    output = invoke("evaluate", puma_dir, "--data", data, *words).output
    assert "| t -> t | toys | local |" in output
    assert "| i -> t | toys | local |" in output
    assert "global" not in output
    assert "| t -> i |" not in output


# --- defaults


@pytest.mark.parametrize("stage", ["distill", "train"])
def test_defaults_of_the_stages_are_the_librarys(stage: str) -> None:
    options = options_of(stage)
    settings = stages.DISTILL_SETTINGS if stage == "distill" else stages.TRAIN_SETTINGS
    names = {
        "num_train_epochs": "epochs",
        "dataloader_num_workers": "workers",
        "gradient_accumulation_steps": "accumulation",
    }
    compared = 0
    for name, value in vars(settings).items():
        if (option := names.get(name, name)) in options:
            assert options[option] == value, name
            compared += 1
    assert compared == (14 if stage == "distill" else 13)
    for name, parameter in inspect.signature(getattr(stages, stage)).parameters.items():
        if parameter.default is not inspect.Parameter.empty and name != "settings":
            assert options[name] == parameter.default, name


def test_other_defaults_are_the_librarys() -> None:
    options, parameters = options_of("prune"), inspect.signature(prune).parameters
    for name in ("dtype", "revision", "overwrite"):
        assert options[name] == parameters[name].default
    options, parameters = options_of("evaluate"), inspect.signature(evaluate_mbeir).parameters
    for name in ("split", "batch_size"):
        assert options[name] == parameters[name].default
    mac = inspect.signature(MultimodalMACLoss).parameters
    for name in ("temperature", "hard_temperature", "schedule"):
        assert options_of("train")[name] == mac[name].default


@pytest.mark.parametrize(
    ("choices", "function", "argument"),
    [
        (cli.Loss, stages.train, "loss"),
        (cli.Schedule, stages.train, "schedule"),
        (cli.Metric, stages.distill, "metric"),
        (cli.Pool, evaluate_mbeir, "pool"),
    ],
)
def test_choices_are_the_librarys(choices: Any, function: Any, argument: str) -> None:
    hint = next(h for name, h in get_type_hints(function).items() if name == argument)
    assert {choice.value for choice in choices} == set(get_args(hint))


# --- errors


def run_main(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["puma-hf", *words])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return int(exit_info.value.code or 0), capsys.readouterr().err


@pytest.mark.usefixtures("restored_logging")
def test_errors_are_one_line(
    qwen_dir: Path,
    puma_dir: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    mistakes = {
        f"prune {qwen_dir} out --num-kept-layers 9": "num_kept_layers=9 is outside",
        "prune nothing out --num-kept-layers 2": "nothing",
        f"distill {puma_dir} out --data {data}": "Pass teacher=<path of that folder> (--teacher).",
        f"distill {puma_dir} out --data nowhere --teacher {qwen_dir}": "nowhere is not a folder",
        f"train {puma_dir} out --data {data} --temperature 0 --loss infonce": "temperature is 0.0",
        f"train {puma_dir} out --data {data} --batch-size 0": "batch_size=0 must be at least 1",
        f"merge {puma_dir} out": "has no adapter_config.json",
        f"evaluate {puma_dir} --data {data} --split dev": "the splits here are",
    }
    for words, message in mistakes.items():
        code, errors = run_main(words.split(), monkeypatch, capsys)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert code == 1, words
        assert len(lines) == 1, errors
        assert message in lines[0]
        assert errors.rstrip().endswith(lines[0])
        assert "Traceback" not in errors
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.usefixtures("restored_logging")
def test_errors_of_several_lines_become_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise OSError("cannot reach the Hub\n\n  and so on")

    monkeypatch.setattr(cli, "app", fail)
    assert run_main([], monkeypatch, capsys) == (1, "error: cannot reach the Hub and so on\n")


@pytest.mark.usefixtures("restored_logging")
def test_mistakes_in_the_library_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(KeyError, match="a bug"):
        cli.main()


def test_fresh_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "puma_hf.cli", "merge", str(tmp_path), str(tmp_path / "out")]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr == (
        f"error: {str(tmp_path)!r} has no adapter_config.json. Point to a directory that training saved.\n"
    )


def test_importing_the_command_is_light() -> None:
    code = "import sys, puma_hf.cli; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"
