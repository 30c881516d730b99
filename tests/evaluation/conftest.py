from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.mbeir_builder import build_mbeir


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return build_mbeir(tmp_path / "mbeir")
