from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.mbeir_builder import build_mbeir
from tests.data.photos import make_photos


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return build_mbeir(tmp_path / "mbeir")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")
