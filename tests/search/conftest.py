"""A small corpus and an index of it; and one with texts that try to be something else, and its page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.search.small_corpus import TEXTS, write_corpus, write_picture

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from puma_hf.search import Searcher

SCRIPT = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
MAX_UPLOAD_MB = 0.25


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


@pytest.fixture(scope="session")
def page_index(puma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven items: four of text, two pictures, and a picture with a text. Read only."""
    from puma_hf.search import IndexConfig, build_index

    folder = tmp_path_factory.mktemp("app-corpus")
    lines: list[dict[str, Any]] = [{"id": f"t{row}", "text": text} for row, text in enumerate(TEXTS[:3])]
    lines += [
        {"id": SCRIPT, "text": SCRIPT},
        {"id": "i0", "image": write_picture(folder / "i0.png", 0).name},
        {"id": "i1", "image": write_picture(folder / "i1.png", 2).name},
        {"id": "b", "text": "a red picture", "image": write_picture(folder / "b.png", 1).name},
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "secret.txt").write_text("not to be seen")
    build_index(IndexConfig(data=folder / "corpus.jsonl", model=str(puma_dir), output=folder / "index"))
    return folder / "index"


@pytest.fixture(scope="session")
def page_searcher(page_index: Path, sentence_transformer: SentenceTransformer) -> Searcher:
    """Its searcher. Read only."""
    from puma_hf.search import Searcher, open_index

    return Searcher(open_index(page_index), sentence_transformer)


@pytest.fixture(scope="module")
def url(page_searcher: Searcher) -> Iterator[str]:
    """Where the page is served."""
    pytest.importorskip("gradio")
    from puma_hf.search import AppConfig, serving

    config = AppConfig(index=page_searcher.index.folder, port=0, top=9, max_upload_mb=MAX_UPLOAD_MB)
    with serving(page_searcher, config) as address:
        yield address
