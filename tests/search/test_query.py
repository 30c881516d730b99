"""Ask an index."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf import prune
from puma_hf.checkpoint import open_sentence_transformer
from puma_hf.configs import DistillConfig, IndexConfig, MergeConfig, SearchConfig
from puma_hf.search.build import build_index
from puma_hf.search.index import open_index
from puma_hf.search.query import Query, Searcher, open_searcher, search
from puma_hf.trainer.stages import distill, merge


@pytest.fixture(scope="module")
def searcher(index_dir: Path, sentence_transformer: SentenceTransformer) -> Searcher:
    return Searcher(open_index(index_dir), sentence_transformer)


def inputs(corpus: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in corpus.read_text().splitlines()]
    return [
        {
            name: str(corpus.parent / line[name]) if name == "image" else line[name]
            for name in ("image", "text")
            if name in line
        }
        for line in lines
    ]


@pytest.mark.parametrize(("target", "rows"), [("any", range(8)), ("text", [0, 2, 3, 5, 6]), ("image", [1, 4, 7])])
@pytest.mark.parametrize("query", [{"text": "a table"}, {"image": "b.png"}, {"text": "red", "image": "i0.png"}])
def test_answers_are_those_of_all_cosines(
    searcher: Searcher, corpus: Path, target: Any, rows: Any, query: dict[str, str]
) -> None:
    if "image" in query:
        query = {**query, "image": str(corpus.parent / query["image"])}
    everything = searcher.model.encode([query, *inputs(corpus)])
    cosines = everything[1:] @ everything[0]
    order = sorted(rows, key=lambda row: -cosines[row])
    found = searcher.search(Query(**query), target=target, top_k=4)
    ids = [json.loads(line)["id"] for line in corpus.read_text().splitlines()]
    assert [answer.id for answer in found.answers] == [ids[row] for row in order[:4]]
    np.testing.assert_allclose([answer.score for answer in found.answers], cosines[order[:4]], atol=1e-5)
    assert [answer.rank for answer in found.answers] == list(range(1, len(found.answers) + 1))
    assert found.num_candidates == len(rows)


def test_an_item_finds_itself(searcher: Searcher, corpus: Path) -> None:
    with Image.open(corpus.parent / "i1.png") as picture:
        best = searcher.search(Query(image=picture), top_k=1).answers[0]
    assert (best.id, best.modality, best.text) == ("i1", "image", None)
    assert best.image == str((corpus.parent / "i1.png").resolve())
    assert best.score == pytest.approx(1, abs=1e-5)


# --- bad queries


@pytest.mark.parametrize("values", [{}, {"text": "\t"}])
def test_a_query_that_is_none(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"nothing to look for\. Give words, a picture, or both"):
        Query(**values)


def test_what_cannot_be_embedded(searcher: Searcher, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a.png' cannot be read as an image"):
        searcher.search(Query(image=tmp_path / "a.png"))
    with pytest.raises(FileNotFoundError, match=r"no image file at .* Check the path"):
        searcher.search(Query(image=str(tmp_path / "gone.png")))
    with pytest.raises(ValueError, match="surrogates not allowed"):
        searcher.search(Query(text="\ud83d"))


# --- from a configuration


def test_one_question(index_dir: Path, searcher: Searcher, tmp_path: Path) -> None:
    page = tmp_path / "new" / "answers.html"
    found = search(SearchConfig(index=index_dir, query="a <b>table</b>", target="image", top=2, html=page))
    assert found == searcher.search(Query(text="a <b>table</b>"), target="image", top_k=2)
    assert "a &lt;b&gt;table&lt;/b&gt;" in page.read_text()
    assert page.read_text().count("<img src=") == 2


def test_vectors_of_another_model_are_refused(index_dir: Path, puma_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(puma_dir, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights[min(weights)] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"was made by another model than 'other', and vectors of two models cannot"):
        search(SearchConfig(index=index_dir, query="a", model=str(other)))


# --- a smaller model for the query


@pytest.fixture(scope="module")
def full_index(qwen_dir: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index that the uncut model has made, in bfloat16; then it goes."""
    folder = tmp_path_factory.mktemp("full")
    prune(qwen_dir, folder / "full", num_kept_layers=4)
    options: dict[str, Any] = {"dtype": "bfloat16", "truncate_dim": 16, "max_pixels": 784}
    build_index(IndexConfig(data=corpus, model=str(folder / "full"), output=folder / "index", **options))
    shutil.rmtree(folder / "full")
    return folder / "index"


def distilled(model: Path, teacher: Path, corpus: Path, output: Path, **changes: Any) -> str:
    settings: dict[str, Any] = {"batch_size": 4, "max_steps": 1, "lora_r": 2, "metric": "cosine", **changes}
    distill(DistillConfig(model=model, teacher=teacher, data=corpus, output=output / "adapter", **settings))
    merge(MergeConfig(adapter=output / "adapter", output=output / "small"))
    return str(output / "small")


@pytest.mark.parametrize("mode", ["frozen", "cached"])
def test_a_student_asks_the_index_of_its_teacher(
    full_index: Path, puma_dir: Path, qwen_dir: Path, corpus: Path, tmp_path: Path, mode: str
) -> None:
    teacher = Path(shutil.copytree(qwen_dir, tmp_path / "moved"))
    small = distilled(puma_dir, teacher, corpus, tmp_path, teacher_mode=mode)
    asked = {"index": full_index, "query": "a table", "image": str(corpus.parent / "b.png")}
    found = search(SearchConfig(query_model=small, **asked)).answers
    model = SentenceTransformer(small, trust_remote_code=True, device="cpu", model_kwargs={"dtype": "bfloat16"})
    reading: Any = {"truncate_dim": 16, "processing_kwargs": {"image": {"max_pixels": 784}}}
    query = model.encode([{"image": asked["image"], "text": "a table"}], **reading, normalize_embeddings=True)[0]
    rows = {row["id"]: np.array(row["vector"]) for row in open_index(full_index).table.to_arrow().to_pylist()}
    expected = [float(query @ rows[answer.id]) for answer in found]
    np.testing.assert_allclose([answer.score for answer in found], expected, atol=1e-5)
    assert len(found) == 8
    # Whatever is made of it afterwards is no student: another cut, or a training.
    prune(small, tmp_path / "cut", num_kept_layers=1)
    further = distilled(Path(small), teacher, corpus, tmp_path / "further", metric="relational")
    for other in (str(tmp_path / "cut"), further):
        with pytest.raises(ValueError, match="was not distilled towards"):
            search(SearchConfig(query_model=other, **asked))


def test_who_is_no_student_is_refused(
    full_index: Path, index_dir: Path, puma_dir: Path, sentence_transformer: SentenceTransformer, tmp_path: Path
) -> None:
    remedy = r"query_model 'tiny-puma' was not distilled towards .*full', which made .*\. Distil it towards that model"
    with pytest.raises(ValueError, match=remedy):
        Searcher(open_index(full_index), "never opened", query_model=sentence_transformer)
    with pytest.raises(FileNotFoundError, match=r"for the index .* is gone\. Pass model \(--model, --query-model\)"):
        search(SearchConfig(index=full_index, query="a", query_model=str(tmp_path / "gone")))
    index = open_index(full_index)
    del index.description["space"]  # as it was before
    with pytest.raises(ValueError, match=r"leave query_model out; run puma-hf index again on an older index"):
        Searcher(index, "never opened", query_model=sentence_transformer)
    # The model that made an index is as good as ever.
    assert search(SearchConfig(index=index_dir, query="a", query_model=str(puma_dir)))


# --- another depth for the query


def index_of(model: Path, corpus: Path, output: Path, **values: Any) -> Path:
    build_index(IndexConfig(data=corpus, model=str(model), output=output, **values))
    return output


@pytest.fixture(scope="module")
def elastic_index(elastic_dir: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index that the model of all 4 layers has made. Read only."""
    return index_of(elastic_dir, corpus, tmp_path_factory.mktemp("elastic") / "index")


def with_config(model: Path, output: Path, **values: Any) -> Path:
    """A copy of a model that says other things of itself."""
    shutil.copytree(model, output)
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, **values}))
    return output


def with_other_weights(model: Path, output: Path, layer: int = 0) -> Path:
    """A copy of a model whose weights differ in one layer."""
    from safetensors.torch import load_file, save_file

    weights = load_file(shutil.copytree(model, output) / "model.safetensors")
    next(weight for name, weight in weights.items() if f"layers.{layer}." in name).add_(0.1)
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    return output


def test_a_query_after_fewer_layers(
    elastic_index: Path,
    elastic_dir: Path,
    corpus: Path,
    sentence_transformer: SentenceTransformer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    picture = str(corpus.parent / "b.png")
    query = sentence_transformer.encode([{"image": picture, "text": "a table"}])[0]  # of a copy cut to 2 layers
    rows = {row["id"]: np.array(row["vector"]) for row in open_index(elastic_index).table.to_arrow().to_pylist()}
    cosines = {name: pytest.approx(float(query @ row), abs=1e-5) for name, row in rows.items()}
    asked: dict[str, Any] = {"index": elastic_index, "query": "a table", "image": picture}
    prune(elastic_dir, tmp_path / "cut", num_kept_layers=2)
    found = [
        search(SearchConfig(**asked, num_kept_layers=2)),
        search(SearchConfig(**asked, query_model=str(tmp_path / "cut"))),
        search(SearchConfig(**asked, query_model=str(elastic_dir), num_kept_layers=2)),
        Searcher(open_index(elastic_index), open_sentence_transformer(str(elastic_dir), 2)).search(
            Query(text="a table", image=picture)
        ),
    ]
    told = f"queries are embedded after 2 layers, the index {str(elastic_index)!r} after 4; without a teacher nothing"
    assert sum(told in message for message in caplog.messages) == len(found)
    for answers in found:
        assert {answer.id: answer.score for answer in answers.answers} == cosines
    whole = search(SearchConfig(**asked))
    assert whole == search(SearchConfig(**asked, num_kept_layers=4)) != found[0]
    assert sum("queries are embedded" in message for message in caplog.messages) == len(found)


def test_an_index_remembers_its_depth(elastic_dir: Path, corpus: Path, tmp_path: Path) -> None:
    output = index_of(elastic_dir, corpus, tmp_path / "index", num_kept_layers=2)
    again = build_index(IndexConfig(data=corpus, output=output))
    assert (again.num_new, again.num_kept) == (0, 8)
    asked: dict[str, Any] = {"index": output, "query": "a table"}
    assert search(SearchConfig(**asked)) == search(SearchConfig(**asked, num_kept_layers=2))
    assert search(SearchConfig(**asked)) != search(SearchConfig(**asked, num_kept_layers=4))
    with pytest.raises(ValueError, match=r"num_kept_layers is 2 there and 4 here\. Go on with --num-kept-layers 2, as"):
        index_of(elastic_dir, corpus, output)


def test_depths_that_cannot_be_compared(elastic_index: Path, elastic_dir: Path, corpus: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"index": elastic_index, "query": "a table"}
    remedy = r"Search after 4 layers, or after one of the trained_depths of '.*tiny-elastic'"
    with pytest.raises(ValueError, match=rf"embedded after 4 layers; 'tiny-elastic' was .* after 3, or .*{remedy}"):
        search(SearchConfig(**asked, num_kept_layers=3))
    other = str(with_other_weights(elastic_dir, tmp_path / "other"))
    with pytest.raises(ValueError, match=rf"'other' was not trained to be compared with that after 2, or .*{remedy}"):
        search(SearchConfig(**asked, model=other, num_kept_layers=2))
    with pytest.raises(ValueError, match=r"query_model 'other' was not distilled .* no other trained depth of that"):
        search(SearchConfig(**asked, query_model=other, num_kept_layers=2))
    # One that shares the first exit alone is another checkpoint at those above.
    other = str(with_other_weights(elastic_dir, tmp_path / "above", layer=1))
    with pytest.raises(ValueError, match="'above' was not trained to be compared with that after 2, or"):
        search(SearchConfig(**asked, model=other, num_kept_layers=2))
    assert search(SearchConfig(**asked, model=other, num_kept_layers=1))
    whole = open_sentence_transformer(str(elastic_dir))
    with pytest.raises(ValueError, match="num_kept_layers=2 is for a model that is opened here; this one is open"):
        Searcher(open_index(elastic_index), whole, num_kept_layers=2)
    # Of a depth that was not trained, which its index can be searched at, as ever.
    third = index_of(elastic_dir, corpus, tmp_path / "third", num_kept_layers=3)
    assert search(SearchConfig(index=third, query="a table"))
    with pytest.raises(ValueError, match="was embedded after 3 layers"):
        search(SearchConfig(index=third, query="a table", num_kept_layers=2))
    index = open_index(elastic_index)
    for name in ("num_kept_layers", "exits", "teacher"):  # as it was before
        del index.description[name]
    assert open_searcher(index).search("a table") == search(SearchConfig(**asked))
    with pytest.raises(ValueError, match=r"weights in float32; run puma-hf index again on an older index\."):
        open_searcher(index, num_kept_layers=2)


def test_students_of_one_teacher(elastic_dir: Path, puma_dir: Path, corpus: Path, tmp_path: Path) -> None:
    deep = with_config(elastic_dir, tmp_path / "deep", teacher_fingerprint="a" * 64)
    asked: dict[str, Any] = {"index": index_of(deep, corpus, tmp_path / "index"), "query": "a table"}
    small = with_other_weights(
        with_config(puma_dir, tmp_path / "same", teacher_fingerprint="a" * 64), tmp_path / "small"
    )
    vectors = {row["id"]: row["vector"] for row in open_index(asked["index"]).table.to_arrow().to_pylist()}
    query = open_sentence_transformer(str(small)).encode(["a table"])[0]
    for answer in search(SearchConfig(**asked, query_model=str(small))).answers:
        assert answer.score == pytest.approx(float(query @ np.array(vectors[answer.id])), abs=1e-5)
    for other in ("b" * 64, None):
        stranger = with_config(small, tmp_path / f"of-{other}", teacher_fingerprint=other)
        with pytest.raises(ValueError, match="was not distilled towards"):
            search(SearchConfig(**asked, query_model=str(stranger)))
    # It is no copy of the model that made the index.
    with pytest.raises(ValueError, match="embedded after 4 layers"):
        search(SearchConfig(**asked, model=str(small), num_kept_layers=2))
