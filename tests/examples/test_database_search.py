"""The examples of databases: their answers are those of our own exact search, before and after the corpus changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from puma_hf.search.config import Target
from puma_hf.search.index import manifest_hash, open_index
from puma_hf.search.query import Query, Searcher

# By the library that it needs: the example, the flag of its folder if there is one, and its word for a table.
DATABASES = {"lancedb": ("lancedb_search", "", "table"), "qdrant_client": ("qdrant_search", "--path", "collection")}

Run = Callable[..., list[tuple[float, str]]]


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest) -> str:
    """The library of each database in turn."""
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.fixture
def run(database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Ask the database: score and id of each answer."""

    def ask(index: Path, *words: str) -> list[tuple[float, str]]:
        example, flag, _ = DATABASES[database]
        folder = str(tmp_path / "database")
        placed = [*words, flag, folder] if flag else [folder, *words]
        import_module(f"examples.{example}").main([str(index), *placed])
        lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
        return [(float(line[0]), line[2]) for line in lines]

    return ask


def expected(
    index: Path, model: SentenceTransformer, query: Query, target: Target = "any", top_k: int = 10
) -> list[tuple[float, str]]:
    answers = Searcher(open_index(index), model).search(query, target=target, top_k=top_k).answers
    return [(pytest.approx(answer.score, abs=2e-4), answer.id) for answer in answers]


def test_answers_are_ours(
    run: Run, make_index: Callable[[], Path], corpus: Path, sentence_transformer: SentenceTransformer
) -> None:
    index = make_index()
    apple, picture = Query(text="a red apple"), corpus.parent / "i1.png"
    assert run(index, "a red apple") == expected(index, sentence_transformer, apple)
    assert run(index, "a red apple", "--for", "image", "--top", "2") == expected(
        index, sentence_transformer, apple, "image", 2
    )
    assert run(index, "--image", str(picture), "--for", "text") == expected(
        index, sentence_transformer, Query(image=picture), "text"
    )


def test_after_a_change_nothing_is_there_twice(
    run: Run, make_index: Callable[[], Path], corpus: Path, sentence_transformer: SentenceTransformer
) -> None:
    assert len(run(make_index(), "on")) == 8
    lines = corpus.read_text().splitlines(keepends=True)
    changed = json.dumps({"id": "t4", "text": "a table on an apple"}) + "\n"
    new = json.dumps({"id": "new", "text": "apple on a red table"}) + "\n"
    corpus.write_text("".join([new, *lines[1:6], changed]))
    index = make_index()
    found = run(index, "on")
    assert found == expected(index, sentence_transformer, Query(text="on"))
    assert sorted(name for _, name in found) == ["b", "i0", "new", "t1", "t2", "t3", "t4"]
    assert run(index, "on") == found


def test_an_id_that_repeats(run: Run, make_index: Callable[[], Path], corpus: Path) -> None:
    corpus.write_text("".join(json.dumps({"id": "a", "text": text}) + "\n" for text in ("a", "on")))
    with pytest.raises(SystemExit, match=r"Ids repeat in .*index. Give every item one of its own"):
        run(make_index(), "on")


def test_vectors_of_another_model(run: Run, database: str, make_index: Callable[[], Path]) -> None:
    index = make_index()
    run(index, "on")
    manifest, described = index / "manifest.json", json.loads((index / "index.json").read_text())
    manifest.write_text(manifest.read_text().replace(open_index(index).fingerprint, "0" * 64))
    (index / "index.json").write_text(json.dumps({**described, "manifest_hash": manifest_hash(index)}))
    with pytest.raises(SystemExit, match=rf"The {DATABASES[database][2]} 'items' .*is of another model than"):
        run(index, "on")
