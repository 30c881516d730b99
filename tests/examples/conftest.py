"""What the examples of databases are tried on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from puma_hf.search import IndexConfig, build_index
from tests.search.small_corpus import write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def make_index(puma_dir: Path, corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make the index of the corpus as it is now."""

    def make() -> Path:
        build_index(IndexConfig(data=corpus, model=str(puma_dir), output=tmp_path / "index", shard_size=3))
        return tmp_path / "index"

    return make
