from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import puma_hf

NAMES = [name for name in puma_hf.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_resolves(name: str) -> None:
    module = import_module(puma_hf._PUBLIC_NAMES[name])
    assert getattr(puma_hf, name) is getattr(module, name)


def test_the_lists_agree() -> None:
    assert set(puma_hf._PUBLIC_NAMES) == set(NAMES)
    assert dir(puma_hf) == puma_hf.__all__


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, puma_hf; print(puma_hf.__version__, *sys.modules)"
    root = Path(puma_hf.__file__ or "").parents[1]
    process = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    version, *modules = process.stdout.split()
    assert version == puma_hf.__version__
    assert {"torch", "transformers", "sentence_transformers", "datasets", "PIL"} & set(modules) == set()
    assert {name for name in modules if name.startswith("puma_hf")} == {"puma_hf"}
