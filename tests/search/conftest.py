"""A small corpus, and an index of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.search.small_corpus import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of eight items. Read only."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def index_dir(corpus: Path, puma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its index, in shards of three. Read only."""
    from puma_hf.search import IndexConfig, build_index

    output = tmp_path_factory.mktemp("index") / "index"
    build_index(IndexConfig(data=corpus, model=str(puma_dir), output=output, shard_size=3))
    return output
