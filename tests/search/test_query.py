"""Ask an index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf import prune
from puma_hf.configs import DistillConfig, IndexConfig, MergeConfig, SearchConfig
from puma_hf.search.build import build_index
from puma_hf.search.index import open_index
from puma_hf.search.query import Query, Searcher, search
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
