from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from safetensors import SafetensorError

from puma_hf import cli, configs
from puma_hf.configs import DistillConfig, MergeConfig, TrainConfig
from puma_hf.data.records import MBEIRFormatError, Problems
from puma_hf.evaluation.results import read_run
from puma_hf.settings import field_help
from puma_hf.trainer import stages
from tests.data.mbeir_builder import build_mbeir

CONFIGS: dict[str, Any] = {
    kind.__name__.removesuffix("Config").lower(): kind
    for kind in vars(configs).values()
    if isinstance(kind, type)
    and kind.__name__.endswith("Config")
    and kind.__name__ not in ("CheckedConfig", "StageConfig")
}
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
    assert set(cli.app.commands) == {*CONFIGS, "prune", "estimate"}
    return {str(parameter.name): parameter.default for parameter in cli.app.commands[command].params}


def test_the_whole_way(
    invoke: Invoke, qwen_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("prune", qwen_dir, "pruned", "--num-kept-layers", 2, "--max-pixels", 4096)
    assert result.exit_code == 0
    assert "images   at most 16 visual tokens, 4,096 pixels (source: 65,536)\n" in result.output
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
    result = invoke("evaluate", "mac", "--data", data, "--output", "results")
    assert result.exit_code == 0
    results = json.loads(Path("results", "results.json").read_text())
    assert results["split"] == "test"
    assert set(results["mean"]) == {"local", "global"}
    assert len(results["rows"]) == 16
    assert len(read_run("results/runs/local/toys_task0.trec")["11:1000"]) == 6
    assert "| **mean** |" in result.output


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that the commands would run."""
    found: list[Any] = []

    def record(config: Any) -> Any:
        found.append(config)
        return 0.0 if isinstance(config, MergeConfig) else Path("out")

    for name in ("train", "distill", "merge"):
        monkeypatch.setattr(stages, name, record)
    return found


def test_options_arrive(invoke: Invoke, seen: list[Any]) -> None:
    shared = ["--num-train-epochs", 2, "--learning-rate", 0.5, "--bf16", "--dataloader-num-workers", 3]
    shared += ["--save-steps", 7, "--seed", 5, "--overwrite", "--report-to", "wandb", "--report-to", "tensorboard"]
    train = ["--loss", "infonce", "--schedule", "linear", "--matryoshka-dims", 32, "--matryoshka-dims", 16]
    result = invoke("train", "model", "out", "--data", "mbeir", *train, *shared)
    assert result.output == "saved the adapter to out; merge it with: puma-hf merge out MERGED\n"
    expected = TrainConfig(
        model="model",
        output="out",
        data="mbeir",
        loss="infonce",
        schedule="linear",
        matryoshka_dims=(32, 16),
        num_train_epochs=2.0,
        learning_rate=0.5,
        bf16=True,
        dataloader_num_workers=3,
        save_steps=7,
        seed=5,
        overwrite=True,
        report_to=("wandb", "tensorboard"),
    )
    invoke("distill", "model", "out", "--data", "mbeir", "--metric", "cosine", "--no-train-ret-token", "--resume")
    distilled = DistillConfig(
        model="model", output="out", data="mbeir", metric="cosine", train_ret_token=False, resume=True
    )
    invoke("merge", "adapter", "merged", "--base", "base")
    assert seen == [expected, distilled, MergeConfig(adapter="adapter", output="merged", base="base")]


def test_a_file_and_flags_that_win(invoke: Invoke, seen: list[Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: pruned\noutput: out\ndata: mbeir\nbf16: true\nseed: 3\nmatryoshka_dims: [8]\n")
    invoke("train", "--config", recipe)
    from_file = TrainConfig(model="pruned", output="out", data="mbeir", bf16=True, seed=3, matryoshka_dims=(8,))
    invoke("train", "other", "--config", recipe, "--no-bf16", "--seed", 0, "--matryoshka-dims", 4)
    won = TrainConfig(model="other", output="out", data="mbeir", matryoshka_dims=(4,))
    assert seen == [from_file, won]


# --- defaults


@pytest.mark.parametrize("command", CONFIGS)
def test_every_field_is_an_option_with_its_help_and_default(invoke: Invoke, command: str) -> None:
    help_text = " ".join(invoke(command, "--help").output.replace("-\n", "-").split())
    names = set(options_of(command))
    for entry in fields(CONFIGS[command]):
        if flag := entry.metadata.get("flag", True):
            assert entry.name in names
            assert f"--{flag if isinstance(flag, str) else entry.name.replace('_', '-')} " in help_text
            assert field_help(CONFIGS[command])[entry.name].split()[0] in help_text
        else:
            assert entry.name not in names
    assert ("Default: 0.0002." in help_text) == (command == "distill")
    assert ("mac|mac-split|infonce" in help_text) == (command == "train")
    assert ("--overwrite / --no-overwrite" in help_text) == (command in ("distill", "train", "merge", "export"))


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
        f"prune {qwen_dir} out --num-kept-layers 9": "num_kept_layers=9 must be an integer from 1 to 4",
        f"prune {qwen_dir} out --keep-layers 0,9": "keep_layers='0,9' must be rising numbers from 0 to 3",
        f"prune {qwen_dir} out --num-kept-layers 2 --reading gme": "reading='gme' is not known here",
        f"prune {qwen_dir} out --num-kept-layers 2 --max-pixels all": "max_pixels='all' must be a whole number, or",
        "prune nothing out --num-kept-layers 2": "nothing",
        f"distill {puma_dir} out --data {data}": "Pass teacher=<path of that folder> (--teacher).",
        f"distill {puma_dir} out --data nowhere --teacher {qwen_dir}": "'nowhere' is neither a file nor a folder",
        f"train {puma_dir} out --data {data} --temperature 0 --loss infonce": "temperature=0.0 must be above 0",
        f"train {puma_dir} out --data {data} --batch-size 0": "batch_size=0 must be at least 1",
        f"train {puma_dir} out --data {data} --loss mack": "must be one of 'mac', 'mac-split', 'infonce'. Did you",
        f"train {puma_dir} out": "data is missing (Folder",
        f"train {puma_dir} out --config nowhere.yaml": "There is no file 'nowhere.yaml'.",
        f"train {puma_dir} out --output other": "output is given twice, as 'out' and as --output 'other'.",
        "merge": "adapter is missing (Directory that training saved). Give it as the key 'adapter' of --config, or",
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
def test_a_report_of_several_offenders_keeps_its_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        with Problems(Path("pool.jsonl")) as problems:
            for line in (3, 8):
                problems.add(MBEIRFormatError(f"pool.jsonl, line {line}: no did\n there", "missing field"))

    monkeypatch.setattr(cli, "app", fail)
    assert run_main([], monkeypatch, capsys) == (
        1,
        "error: pool.jsonl: 2 problems (missing field: 2):\n"
        "- pool.jsonl, line 3: no did there\n- pool.jsonl, line 8: no did there\n",
    )


@pytest.mark.usefixtures("restored_logging")
def test_a_terminal_that_lacks_a_character_gets_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(cli, "app", lambda: click.echo("モ é"))
    cli.main()
    screen.seek(0)
    assert screen.read() == "\\u30e2 é\n"


@pytest.mark.usefixtures("restored_logging")
def test_an_error_while_training_has_a_line_of_its_own(
    puma_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(puma_dir), str(tmp_path / "out"), "--data", str(data), *QUICK, "--learning-rate", "1e30"]
    code, errors = run_main([*words, "--max-steps", "4"], monkeypatch, capsys)
    assert code == 1
    assert "it/s" in errors or "s/it" in errors  # a bar was open
    *_, last = errors.rstrip("\n").split("\n")
    assert last.startswith("error: ")
    assert "not finite" in last or "nan" in last
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while deserializing header: header too small"),
    ],
)
def test_errors_of_files_are_one_line_too(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert run_main([], monkeypatch, capsys) == (1, f"error: {error}\n")


@pytest.mark.usefixtures("restored_logging")
def test_mistakes_in_the_library_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(KeyError, match="a bug"):
        cli.main()


def test_ctrl_c_has_the_exit_status_that_shells_know(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "merge", stopped)
    assert invoke("merge", "lora", "merged").exit_code == 130


def test_fresh_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "puma_hf.cli", "merge", str(tmp_path), str(tmp_path / "out")]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr == (
        f"error: {str(tmp_path)!r} has no adapter_config.json. Point to a directory that training saved.\n"
    )


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize(("rank", "level"), [("0", logging.INFO), ("1", logging.ERROR)])
def test_only_the_first_process_speaks(rank: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(cli, "app", lambda: None)
    for name in cli.BARS:
        monkeypatch.delenv(name, raising=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cli.main()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
    assert not told  # peft asks for it, and nobody who merges can mend that
    assert logging.root.level == level
    # Which modules it tried before one fitted the processor is no news.
    assert all((os.environ.get(name) == "1") == (rank == "1") for name in cli.BARS)
