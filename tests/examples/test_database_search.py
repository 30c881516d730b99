"""The example of a database: its answers are those of our own exact search, before and after the corpus changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from puma_hf.configs import Target
from puma_hf.search import IndexConfig, Query, Searcher, build_index, open_index
from tests.search.small_corpus import write_corpus

pytest.importorskip("qdrant_client")

Run = Callable[..., list[tuple[float, str]]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Ask the database: score and id of each answer."""
    from examples.qdrant_search import main

    def ask(index: Path, *words: str) -> list[tuple[float, str]]:
        main([str(index), *words, "--path", str(tmp_path / "database")])
        lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
        return [(float(line[0]), line[2]) for line in lines]

    return ask


def test_answers_are_ours_before_and_after_the_corpus_changed(
    run: Run, puma_dir: Path, tmp_path: Path, sentence_transformer: SentenceTransformer
) -> None:
    corpus, index = write_corpus(tmp_path / "corpus"), tmp_path / "index"
    config = IndexConfig(data=corpus, model=str(puma_dir), output=index, shard_size=3)

    def expected(query: Query, target: Target = "any", top_k: int = 10) -> list[tuple[float, str]]:
        answers = Searcher(open_index(index), sentence_transformer).search(query, target=target, top_k=top_k).answers
        return [(pytest.approx(answer.score, abs=2e-4), answer.id) for answer in answers]

    build_index(config)
    apple, picture = Query(text="a red apple"), corpus.parent / "i1.png"
    assert run(index, "a red apple") == expected(apple)
    assert run(index, "a red apple", "--for", "image", "--top", "2") == expected(apple, "image", 2)
    assert run(index, "--image", str(picture), "--for", "text") == expected(Query(image=picture), "text")

    # Nothing is there twice, or still, after a change.
    lines = corpus.read_text().splitlines(keepends=True)
    changed = json.dumps({"id": "t4", "text": "a table on an apple"}) + "\n"
    new = json.dumps({"id": "new", "text": "apple on a red table"}) + "\n"
    corpus.write_text("".join([new, *lines[1:6], changed]))
    build_index(config)
    found = run(index, "on")
    assert found == expected(Query(text="on"))
    assert sorted(name for _, name in found) == ["b", "i0", "new", "t1", "t2", "t3", "t4"]
