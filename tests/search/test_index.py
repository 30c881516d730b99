"""Make an index of each kind of corpus, again, and after a stop; open it."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pytest
from filelock import FileLock
from PIL import Image
from pyarrow import parquet
from sentence_transformers import SentenceTransformer

from puma_hf.configs import IndexConfig
from puma_hf.files import LOCK_FILE, DirectoryInUseError
from puma_hf.search.build import IndexReport, build_index
from puma_hf.search.index import Index, open_index
from puma_hf.search.query import Query, Searcher, open_searcher
from tests.data.mbeir_builder import build_mbeir
from tests.forks import in_two_processes, run_worker
from tests.search.small_corpus import write_corpus, write_picture

Make = Callable[..., IndexReport]


@pytest.fixture
def make(puma_dir: Path, tmp_path: Path) -> Make:
    def run(data: Path, **values: Any) -> IndexReport:
        given = {"data": data, "model": str(puma_dir), "output": tmp_path / "out", "shard_size": 3, **values}
        return build_index(IndexConfig(**given))

    return run


@pytest.fixture
def copy(index_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(index_dir, tmp_path / "out"))


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of an index by their ids."""
    return {row["id"]: row for row in open_index(folder).table.to_arrow().to_pylist()}


def vectors(folder: Path, ids: list[str]) -> np.ndarray[Any, Any]:
    found = rows(folder)
    return np.array([found[name]["vector"] for name in ids])


# --- what is made


def test_what_it_holds(
    index_dir: Path, corpus: Path, puma_dir: Path, sentence_transformer: SentenceTransformer
) -> None:
    index = open_index(index_dir)
    assert index.counts == {"image": 2, "image,text": 1, "text": 5}
    assert [index.num_candidates(target) for target in ("any", "image", "text")] == [len(index), 3, 5] == [8, 3, 5]
    assert (index.model, index.description["data"]) == (str(puma_dir.resolve()), str(corpus.resolve()))
    row = rows(index_dir)["b"]
    assert (row["text"], row["image"], row["modality"]) == (
        "a red picture",
        str((corpus.parent / "b.png").resolve()),
        "image,text",
    )
    expected = sentence_transformer.encode([{"text": "a table"}, {"image": str(corpus.parent / "i1.png")}])
    np.testing.assert_allclose(vectors(index_dir, ["t1", "i1"]), expected, atol=1e-5)


def test_pictures_and_a_broken_one(make: Make, tmp_path: Path) -> None:
    data = tmp_path / "photos"
    for number in range(30):
        write_picture(data / str(number % 3) / f"{number // 3}.png", number)
    (data / "1" / "5.png").write_bytes(b"\x89PNG\r\n\x1a\n, and then something else")
    report = make(data, shard_size=12)
    assert (report.counts, report.num_new, report.num_errors) == ({"image": 29}, 29, 1)
    assert "indexed  29 of image; ask with: puma-hf search" in str(report)
    assert "broken   1 inputs, see" in str(report)
    (broken,) = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert broken["id"] == "1/5.png"
    assert {"0/5.png", "2/5.png"} < set(rows(tmp_path / "out"))  # two of one name


def test_broken_rows_of_a_table(make: Make, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"id": "a", "text": "red"}\n{"id": "b", "text": " "}\n{"id": "\\ud800", "text": "x"}\n'
    )
    report = make(tmp_path / "t.jsonl")
    assert (report.counts, report.num_errors) == ({"text": 1}, 2)
    with pytest.raises(ValueError, match="line 2"):
        make(tmp_path / "t.jsonl", on_error="raise")


def test_a_pool_of_mbeir(make: Make, tmp_path: Path) -> None:
    report = make(build_mbeir(tmp_path / "mbeir"))
    assert set(report.counts) == {"image", "image,text", "text"}
    assert sum(report.counts.values()) == len(rows(tmp_path / "out")) == report.num_new


def test_pictures_inside_of_a_parquet_file_go_with_a_copied_folder(
    make: Make, tmp_path: Path, sentence_transformer: SentenceTransformer
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 24), "red").save(buffer, "PNG")
    held = [{"text": "a", "image": None}, {"text": None, "image": {"bytes": buffer.getvalue(), "path": "x.png"}}]
    parquet.write_table(pyarrow.Table.from_pylist(held[::-1]), tmp_path / "t.parquet")
    make(tmp_path / "t.parquet")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    found = Searcher(open_index(tmp_path / "moved"), sentence_transformer).search("red", target="image").answers[0]
    picture = Path(found.image or "")
    assert (picture.parent, picture.suffix) == (tmp_path / "moved" / "images", ".png")
    assert picture.read_bytes() == buffer.getvalue()


@pytest.mark.parametrize(
    ("values", "is_older"),
    [({}, False), ({"max_pixels": 1024}, False), ({"decode": "exact"}, False), ({"decode": "exact"}, True)],
)
def test_a_photo_finds_itself_however_the_index_read_it(
    make: Make, tmp_path: Path, values: Any, is_older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.effect_noise((1200, 900), 30 * number + 30).save(tmp_path / "photos" / f"{number}.jpg")
    if is_older:  # as by a version that decoded every pixel, and said nothing of it
        monkeypatch.setattr("puma_hf.embedding.run.image_settings", lambda *_: {})
    make(tmp_path / "photos", **values)
    best = open_searcher(tmp_path / "out").search(Query(image=tmp_path / "photos" / "1.jpg"), top_k=1).answers[0]
    assert (best.id, best.score) == ("1.jpg", pytest.approx(1, abs=1e-5))


@pytest.mark.parametrize("values", [{"precision": "float16"}, {"truncate_dim": 8}])
def test_small_vectors(make: Make, corpus: Path, tmp_path: Path, values: dict[str, Any], puma_dir: Path) -> None:
    make(corpus, **values)
    kind = open_index(tmp_path / "out").table.schema.field("vector").type
    assert str(kind.value_type) == ("halffloat" if "precision" in values else "float")
    searcher = open_searcher(tmp_path / "out")
    row = searcher.embed("a table")[0]
    assert row.shape == (kind.list_size,)
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-5)
    best = searcher.search("a table", top_k=1).answers[0]
    assert (best.id, best.score) == ("t1", pytest.approx(1, abs=1e-3))


def test_two_processes_share_the_work(puma_dir: Path, corpus: Path, index_dir: Path, tmp_path: Path) -> None:
    run_worker("tests.search.test_index", puma_dir, corpus, tmp_path / "shared")
    ids = sorted(rows(index_dir))
    assert sorted(rows(tmp_path / "shared")) == ids
    np.testing.assert_allclose(vectors(tmp_path / "shared", ids), vectors(index_dir, ids), atol=1e-5)


# --- made again


def test_items_added_changed_moved_and_removed(make: Make, tmp_path: Path) -> None:
    data = write_corpus(tmp_path)
    lines = data.read_text().splitlines(keepends=True)
    make(data)
    before = rows(tmp_path / "out")
    new = json.dumps({"id": "new", "text": "an apple on a table"}) + "\n"
    renamed = lines[3].replace('"t2"', '"other"')
    data.write_text("".join([new, *lines[:2], renamed, *lines[4:]]))
    report = make(data)
    assert (report.num_new, report.num_kept, report.counts) == (1, 7, {"image": 2, "image,text": 1, "text": 5})
    after = rows(tmp_path / "out")
    assert sorted(after) == ["b", "i0", "i1", "new", "other", "t0", "t3", "t4"]
    assert after["other"]["vector"] == before["t2"]["vector"]
    assert all(after[name] == before[name] for name in after if name in before)
    make(data, output=tmp_path / "fresh")
    np.testing.assert_allclose(
        vectors(tmp_path / "out", sorted(after)), vectors(tmp_path / "fresh", sorted(after)), atol=1e-5
    )


def test_lines_without_ids_keep_their_embeddings_when_one_before_them_goes(make: Make, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a red apple\na table\non\n")
    make(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_text("a table\non\n")
    assert make(tmp_path / "t.txt").num_new == 0
    assert {name: row["text"] for name, row in rows(tmp_path / "out").items()} == {"0": "a table", "1": "on"}


def test_pictures_added_changed_removed_and_mended(make: Make, tmp_path: Path) -> None:
    data = tmp_path / "photos"
    pictures = [write_picture(data / f"{name}.png", number) for number, name in enumerate("bcdefg")]
    (data / "h.png").write_bytes(b"no picture")
    assert make(data).num_errors == 1
    write_picture(data / "a.png", 9)
    write_picture(data / "h.png", 7)
    pictures[0].unlink()
    os.utime(pictures[3], ns=(1, 1))
    report = make(data)
    assert (report.num_new, report.num_errors) == (3, 0)
    assert sorted(rows(tmp_path / "out")) == [f"{name}.png" for name in "acdefgh"]
    assert not (tmp_path / "out" / "errors.jsonl").exists()


def test_again_nothing_is_embedded_and_the_model_is_remembered(make: Make, corpus: Path, copy: Path) -> None:
    before = open_index(copy)
    assert make(corpus, model="").num_new == 0
    after = open_index(copy)
    assert (after.table.version, after.description) == (before.table.version, before.description)
    with pytest.raises(ValueError, match=r"model is missing: '.*new' is no index yet.*as in --model DIRECTORY"):
        make(corpus, model="", output=copy.parent / "new")


@pytest.mark.parametrize("kind", ["hnsw", "int8", "binary"])
def test_approximate_search_is_added_kept_up_to_date_and_removed(
    make: Make, tmp_path: Path, kind: str, sentence_transformer: SentenceTransformer
) -> None:
    data = write_corpus(tmp_path)
    make(data)
    assert make(data, ann=kind).num_new == 0
    data.write_text(data.read_text() + '{"id": "new", "text": "apple"}\n')
    make(data)
    index = open_index(tmp_path / "out")
    assert index.ann == kind
    (statistics,) = index.table.list_indices()
    assert (statistics.num_indexed_rows, statistics.num_unindexed_rows) == (9, 0)
    exact, approximate = (
        Searcher(index, sentence_transformer, backend=backend)  # type: ignore[arg-type]
        for backend in ("exact", "ann")
    )
    for target in ("any", "image", "text"):
        found, expected = (one.search("a red apple", target=target, top_k=3) for one in (approximate, exact))
        assert [answer.id for answer in found.answers] == [answer.id for answer in expected.answers]
        assert found.answers[0].score == pytest.approx(expected.answers[0].score, abs=1e-5)
    make(data, ann="none")
    assert open_index(tmp_path / "out").ann == "none"


# --- stopped, and in use


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_that_are_killed(puma_dir: Path, tmp_path: Path) -> None:
    data = write_corpus(tmp_path)
    run_worker("tests.search.index_worker", puma_dir, data, tmp_path)
    said = json.loads((tmp_path / "said.json").read_text())
    assert "is no index" in said[0]
    assert all("is not finished. Wait for the run that makes it" in text for text in said[1:3])
    assert said[3:] == [8, 8]  # the earlier version, whole, until the later one is
    build_index(IndexConfig(data=data, model=str(puma_dir), output=tmp_path / "whole"))
    ids = sorted(rows(tmp_path / "whole"))
    assert sorted(rows(tmp_path / "killed")) == ids
    assert len(ids) == 11
    np.testing.assert_allclose(vectors(tmp_path / "killed", ids), vectors(tmp_path / "whole", ids), atol=1e-5)


def test_another_run_is_refused_and_who_searches_is_not(make: Make, corpus: Path, copy: Path) -> None:
    with FileLock(copy / LOCK_FILE):
        with pytest.raises(DirectoryInUseError, match=r"'.*out' is in use"):
            make(corpus)
        assert len(open_index(copy)) == 8


def test_who_has_an_index_open_goes_on_with_it(
    make: Make, tmp_path: Path, sentence_transformer: SentenceTransformer
) -> None:
    data = write_corpus(tmp_path)
    make(data)
    searcher = Searcher(open_index(tmp_path / "out"), sentence_transformer)
    before = searcher.search("a table")
    data.write_text("".join(data.read_text().splitlines(keepends=True)[4:]))
    make(data)
    assert searcher.search("a table") == before
    assert len(Searcher(open_index(tmp_path / "out"), sentence_transformer).search("a table").answers) == 4


# --- what is refused


@pytest.mark.parametrize("version", [3, None])
def test_another_format(make: Make, corpus: Path, copy: Path, version: int | None) -> None:
    table = open_index(copy).table
    table.checkout_latest()
    about = {} if version is None else {"puma_hf": json.dumps({"format_version": version})}
    table.update_field_metadata({"path": "vector", "metadata": about, "replace": True})
    with pytest.raises(ValueError, match=rf"table 'items' of format {version}, must be 2 of puma-hf index. Choose"):
        make(corpus)


@pytest.mark.parametrize("name", ["index.json", "manifest.json"])
def test_what_an_older_version_made_names_the_command(make: Make, corpus: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"data": "photos", "model": "org/puma"}')
    message = rf"older puma-hf index: it has {name}.* Make it anew: puma-hf index photos --model org/puma --output NEW"
    for action in (lambda: open_index(tmp_path / "out"), lambda: make(corpus)):
        with pytest.raises(ValueError, match=message):
            action()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "bfloat16"}, r"fingerprint is .* weights_dtype is 'float32' there and 'bfloat16' here"),
        (
            {"precision": "float16"},
            "precision is 'float32' there and 'float16' here. Choose another directory, or delete",
        ),
        ({"truncate_dim": 8}, "truncate_dim is None there and 8 here"),
        ({"prompt": "Find it."}, "prompt is None there and 'Find it.' here"),
        ({"max_pixels": 1024}, r"max_pixels is None there and 1024 here. Go on without --max-pixels, as"),
        ({"decode": "exact"}, r"decode is 'fast' there and 'exact' here. Go on with --decode fast, as"),
    ],
)
def test_vectors_that_cannot_be_compared(make: Make, corpus: Path, copy: Path, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(corpus, **values)
    assert len(open_index(copy)) == 8


def test_a_target_that_there_is_not_and_an_empty_index(make: Make, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a\nb\n")
    make(tmp_path / "t.txt", output=tmp_path / "texts")
    with pytest.raises(ValueError, match=r"has no image to find, only 2 of text. Look for 'any' \(--for any\)"):
        open_index(tmp_path / "texts").num_candidates("image")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no picture")
    assert "indexed  no items" in str(make(tmp_path / "photos", ann="hnsw"))
    with pytest.raises(ValueError, match="is empty: nothing of its corpus could be embedded"):
        open_index(tmp_path / "out").num_candidates()


def test_damaged_files(copy: Path, sentence_transformer: SentenceTransformer) -> None:
    searcher = Searcher(Index(copy, open_index(copy).table), sentence_transformer)
    for file in (copy / "items.lance" / "data").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"The index '.*out' cannot be read \(.*delete it and run puma-hf index again"):
        searcher.search("a table")


if __name__ == "__main__":  # by `run_worker`
    model, data, output = sys.argv[1:]
    in_two_processes(lambda rank: build_index(IndexConfig(data=data, model=model, output=output, shard_size=3)))
