from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from click.testing import CliRunner, Result
from safetensors import SafetensorError

from puma_hf import cli
from puma_hf.configs import DistillConfig, MergeConfig, TrainConfig
from puma_hf.trainer import stages
from tests.data.mbeir_builder import build_mbeir

CONFIGS: dict[str, Any] = {name: kind for name, kind, _ in cli._COMMANDS}
QUICK = ["--batch-size", "4", "--max-steps", "2", "--logging-steps", "1", "--lora-r", "2"]


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, words)), catch_exceptions=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_mbeir(tmp_path_factory.mktemp("data") / "mbeir")


@pytest.fixture
def restored_logging() -> Iterator[None]:
    loggers = [logging.root, *map(logging.getLogger, ("httpx", "sentence_transformers", "datasets"))]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def test_the_whole_way(qwen_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("prune", qwen_dir, "pruned", "--num-kept-layers", 2, "--max-pixels", 4096)
    assert result.exit_code == 0
    invoke("distill", "pruned", "lora", "--data", data, "--teacher", qwen_dir, *QUICK)
    result = invoke("merge", "lora", "distilled")
    assert "merged; embeddings differ by at most " in result.output
    invoke("train", "distilled", "mac-lora", "--data", data, "--num-negatives", 1, *QUICK)
    result = invoke("merge", "mac-lora", "mac", "--base", "distilled")
    assert result.exit_code == 0
    result = invoke("evaluate", "mac", "--data", data, "--output", "results")
    assert result.exit_code == 0
    results = json.loads(Path("results", "results.json").read_text())
    assert results["split"] == "test"
    assert set(results["mean"]) == {"local", "global"}
    assert len(results["rows"]) == 16
    assert Path("results/runs/local/toys_task0.trec").read_text().count("11:1000 Q0 ") == 6
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


def test_a_file_and_flags_that_win(seen: list[Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: pruned\noutput: out\ndata: mbeir\nbf16: true\nseed: 3\nmatryoshka_dims: [8]\n")
    result = invoke("train", "--config", recipe)
    assert result.output == "saved the adapter to out; merge it with: puma-hf merge out MERGED\n"
    from_file = TrainConfig(model="pruned", output="out", data="mbeir", bf16=True, seed=3, matryoshka_dims=(8,))
    dims = ["--matryoshka-dims", 4, "--matryoshka-dims", 2]
    invoke("train", "other", "--config", recipe, "--no-bf16", "--seed", 0, *dims)
    won = TrainConfig(model="other", output="out", data="mbeir", matryoshka_dims=(4, 2))
    invoke("distill", "model", "out", "--data", "mbeir", "--no-train-ret-token", "--resume")
    distilled = DistillConfig(model="model", output="out", data="mbeir", train_ret_token=False, resume=True)
    invoke("merge", "adapter", "merged", "--base", "base")
    assert seen == [from_file, won, distilled, MergeConfig(adapter="adapter", output="merged", base="base")]


@pytest.mark.parametrize("command", CONFIGS)
def test_every_field_is_an_option(command: str) -> None:
    help_text = " ".join(invoke(command, "--help").output.replace("-\n", "-").split())
    names = {parameter.name for parameter in cli.app.commands[command].params}
    for entry in fields(CONFIGS[command]):
        flag = entry.metadata.get("flag", True)
        assert (entry.name in names) == bool(flag)
        if flag:
            assert f"--{flag if isinstance(flag, str) else entry.name.replace('_', '-')} " in help_text


@pytest.mark.parametrize("command", ["embed", "evaluate", "index"])
def test_the_depth_has_one_line_of_help(command: str) -> None:
    help_text = " ".join(invoke(command, "--help").output.split())
    assert "--num-kept-layers INTEGER Decoder layers that are run, of a model that was trained at several" in help_text


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
        f"distill {puma_dir} out --data {data}": "Pass teacher=<path of that folder> (--teacher).",
        f"train {puma_dir} out --data {data} --batch-size 0": "batch_size=0 must be at least 1",
        f"train {puma_dir} out --output other": "output is given twice, 'out' and --output 'other'.",
        "merge": "adapter is missing (Directory that training saved). Give it as --adapter, or as 'adapter' in a",
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
def test_errors_of_files_are_one_line_and_mistakes_in_the_library_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(cli, "app", Mock(side_effect=error))
    assert run_main([], monkeypatch, capsys) == (1, f"error: {error}\n")
    monkeypatch.setattr(cli, "app", Mock(side_effect=KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        cli.main()


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
    assert all((os.environ.get(name) == "1") == (rank == "1") for name in cli.BARS)
