"""What the demo runs, and what the scripts import; `make demo` itself takes minutes."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

import phrases
import run
from puma_hf.cli import app
from puma_hf.trainer import stages

ROOT = Path(__file__).parents[1]
DATA = ROOT / "demo" / "emoji"


def test_the_stages_follow_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(run, "app", lambda arguments, standalone_mode: called.append(arguments))
    run.build_models(run.DEMO / "output", run.BACKBONE, seed=3)
    trained = [words for words in called if words[0] in ("distill", "train")]
    assert [words[1:3] for words in trained] == [
        ["--config", str(ROOT / "configs" / "demo_distill.yaml")],
        ["--config", str(ROOT / "configs" / "demo_train.yaml")],
        ["--config", str(ROOT / "configs" / "demo_train.yaml")],
        ["--config", str(ROOT / "configs" / "demo_distill.yaml")],
    ]
    assert all(words[words.index("--seed") + 1] == "3" for words in trained)
    # InfoNCE alone trains as many steps as both stages together.
    assert trained[2][-4:] == ["--loss", "infonce", "--max-steps", "210"]
    assert trained[3][-4:] == ["--depths", "2,3,4,6", "--batch-size", "32"]
    # What the commands are given, they understand.
    models = []
    monkeypatch.setattr(stages, "distill", lambda config: models.append(config.model) or Path("out"))
    monkeypatch.setattr(stages, "train", lambda config: models.append(config.model) or Path("out"))
    for words in trained:
        app(words, standalone_mode=False)
    assert [Path(model).name for model in models] == ["pruned", "distilled", "pruned", "pruned-deeper"]


def test_the_teacher_is_asked_for_nothing_that_only_val_and_test_have() -> None:
    unseen = phrases.held_out(DATA)
    assert {"brain", "rocket, man, dark skin tone"} <= unseen
    assert unseen.isdisjoint({"pizza", "exploding head"})


@pytest.mark.parametrize("folder", ["benchmarks", "demo", "examples"])
def test_what_the_scripts_import_is_there(folder: str) -> None:
    """Most of them take minutes, so no test runs them."""
    for path in sorted((ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("puma_hf"):
                module = import_module(node.module or "")
                submodules = {found.name for found in iter_modules(getattr(module, "__path__", []))}
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert set(missing) <= submodules, f"{path.name}: {node.module} has no {missing}"
