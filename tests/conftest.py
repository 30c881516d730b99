"""The environment of the tests: offline, one thread, caches in a temporary directory of their own.

The variables are set while this file is imported, before any test imports torch or transformers: these
libraries read them once, at their own import.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

_CACHES = tempfile.TemporaryDirectory(prefix="puma-hf-tests-", ignore_cleanup_errors=True)
_HF_HOME = Path(_CACHES.name) / "huggingface"

# Each of these would win over HF_HOME and lead back to the user's own files.
for _name in (
    "HF_ASSETS_CACHE",
    "HF_DATASETS_CACHE",
    "HF_EVALUATE_CACHE",
    "HF_HUB_CACHE",
    "HF_METRICS_CACHE",
    "HF_XET_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "SENTENCE_TRANSFORMERS_HOME",
    "TRANSFORMERS_CACHE",
):
    os.environ.pop(_name, None)

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=str(_HF_HOME),
    HF_MODULES_CACHE=str(_HF_HOME / "modules"),
    TOKENIZERS_PARALLELISM="false",
    # torch takes its number of threads from here, so torch itself need not be imported yet. With two threads
    # beside another job tiny models run ten times slower than with one.
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)


def pytest_unconfigure() -> None:
    _CACHES.cleanup()


@pytest.fixture
def docs_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where examples run: paths such as demo/... hold, but what they write stays out of the repository."""
    for name in ("demo", "configs"):
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "output")
            )
    monkeypatch.chdir(tmp_path)
    return tmp_path
