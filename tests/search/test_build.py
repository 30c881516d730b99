"""Make an index of each kind of corpus, again, and after a stop."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pytest
from filelock import FileLock
from PIL import Image
from pyarrow import parquet

from puma_hf.embedding.config import EmbedConfig
from puma_hf.embedding.run import embed_corpus
from puma_hf.locks import LOCK_FILE, DirectoryInUseError
from puma_hf.search import build
from puma_hf.search.ann import write_ann
from puma_hf.search.build import IndexReport, build_index
from puma_hf.search.config import IndexConfig
from puma_hf.search.index import DESCRIPTION, open_index
from puma_hf.search.items import Item
from tests.data.mbeir_builder import build_mbeir
from tests.search.small_corpus import write_corpus, write_picture

Make = Callable[..., IndexReport]


@pytest.fixture
def make(puma_dir: Path, tmp_path: Path) -> Make:
    def run(data: Path, **values: Any) -> IndexReport:
        return build_index(IndexConfig(**{"data": data, "model": str(puma_dir), "output": tmp_path / "out", **values}))

    return run


def state(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def items(folder: Path) -> list[Item]:
    index = open_index(folder)
    return index.items(range(len(index)))


def test_a_folder_of_pictures_one_of_them_broken(make: Make, tmp_path: Path) -> None:
    data = tmp_path / "photos"
    for number, name in enumerate(("a.png", "sub/a.png", "z.png")):  # two of one name
        write_picture(data / name, number)
    (data / "m.png").write_bytes(b"no picture")
    report = make(data, shard_size=2)
    assert report.counts == {"image": 3}
    assert report.embedded.num_errors == 1
    assert "indexed  3 of image; ask with: puma-hf search" in str(report)
    assert "broken   1 input, see" in str(report)
    expected = [Item(name, None, str(data.resolve() / name)) for name in ("a.png", "z.png", "sub/a.png")]
    assert items(tmp_path / "out") == expected


def test_a_broken_picture_can_stop_it(make: Make, tmp_path: Path) -> None:
    write_picture(tmp_path / "photos" / "a.png", 0)
    (tmp_path / "photos" / "m.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"Input 'm.png' \(row 1\) cannot be embedded"):
        make(tmp_path / "photos", on_error="raise")


def test_another_run_in_the_directory_is_refused_and_who_searches_is_not(
    make: Make, tmp_path: Path, index_dir: Path, corpus: Path
) -> None:
    shutil.copytree(index_dir, tmp_path / "out")
    before = state(tmp_path / "out")
    with FileLock(tmp_path / "out" / LOCK_FILE):
        with pytest.raises(DirectoryInUseError, match=r"'.*out' is in use"):
            make(corpus, shard_size=5)
        assert len(open_index(tmp_path / "out")) == len(open_index(index_dir))
        (tmp_path / "out" / LOCK_FILE).unlink()
    assert state(tmp_path / "out") == before


def test_a_text_of_a_hundred_thousand_characters(make: Make, tmp_path: Path) -> None:
    text = "apple " * 17_000
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert make(tmp_path / "t.jsonl").counts == {"text": 1}
    assert items(tmp_path / "out") == [Item("0", text)]


def test_a_pool_of_mbeir(make: Make, tmp_path: Path) -> None:
    report = make(build_mbeir(tmp_path / "mbeir"))
    found = items(tmp_path / "out")
    assert sum(report.counts.values()) == len(found) > 0
    assert set(report.counts) == {item.modality for item in found}


def test_pictures_inside_of_a_parquet_file(make: Make, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 24), "red").save(buffer, "PNG")
    rows = [{"text": "a", "image": None}, {"text": None, "image": {"bytes": buffer.getvalue(), "path": "x.png"}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows[::-1]), tmp_path / "t.parquet")
    make(tmp_path / "t.parquet")
    shutil.move(tmp_path / "out", tmp_path / "moved")  # its pictures go with it
    picture, text = items(tmp_path / "moved")
    assert text == Item("1", "a")
    assert picture.image is not None
    assert Path(picture.image).parent == tmp_path / "moved" / "images"
    assert Path(picture.image).suffix == ".png"
    assert Path(picture.image).read_bytes() == buffer.getvalue()


def test_again_nothing_is_written(make: Make, corpus: Path, index_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(index_dir, tmp_path / "out")
    before = {name: time for name, time in state(tmp_path / "out").items() if name != DESCRIPTION}
    report = make(corpus, shard_size=3)
    assert report.embedded.num_new_items == 0
    assert report.counts == open_index(index_dir).counts
    assert {name: time for name, time in state(tmp_path / "out").items() if name != DESCRIPTION} == before
    assert (tmp_path / "out" / DESCRIPTION).read_bytes() == (index_dir / DESCRIPTION).read_bytes()


def test_a_corpus_that_grew_and_shrank(make: Make, tmp_path: Path) -> None:
    data = write_corpus(tmp_path)
    lines = data.read_text().splitlines(keepends=True)
    make(data, shard_size=3)
    data.write_text("".join([*lines, json.dumps({"id": "new", "text": "a"}) + "\n"]))
    assert make(data, shard_size=3).embedded.num_new_shards == 1
    assert [item.id for item in items(tmp_path / "out")][-2:] == ["i1", "new"]
    data.write_text("".join(lines[:3]))
    assert make(data, shard_size=3).embedded.num_new_items == 0
    assert [item.id for item in items(tmp_path / "out")] == ["t0", "i0", "t1"]
    assert sorted(path.name for path in (tmp_path / "out").glob("items-*")) == ["items-00000.parquet"]


def test_the_index_remembers_its_model(make: Make, corpus: Path, puma_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model is missing: '.*out' is no index yet.*as in --model DIRECTORY"):
        make(corpus, model="")
    make(corpus)
    before = state(tmp_path / "out")
    assert make(corpus, model="").embedded.num_new_items == 0
    changed = {name for name, time in state(tmp_path / "out").items() if time != before.get(name)}
    assert changed <= {DESCRIPTION}
    assert open_index(tmp_path / "out").model == str(puma_dir.resolve())


def test_an_index_of_another_corpus_and_ids_that_repeat_are_told(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, rows in (("one", ("a", "b")), ("two", ("a", "a"))):
        lines = [json.dumps({"id": id, "text": f"text {number}"}) for number, id in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    make(tmp_path / "one.jsonl")
    make(tmp_path / "one.jsonl")
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    assert make(tmp_path / "two.jsonl").counts == {"text": 2}
    other, repeated = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert f"out was of {tmp_path.resolve() / 'one.jsonl'}, and becomes one of " in other
    assert repeated.startswith("1 ids are of several items (first: 'a').")


def test_embeddings_that_are_there_become_an_index(make: Make, corpus: Path, puma_dir: Path, tmp_path: Path) -> None:
    embed_corpus(EmbedConfig(data=corpus, model=str(puma_dir), output=tmp_path / "out"))
    assert make(corpus).embedded.num_new_items == 0
    assert len(open_index(tmp_path / "out")) == 8


def test_stopped_after_the_embeddings(
    make: Make, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_items", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(corpus)
    with pytest.raises(ValueError, match="the run has not finished"):
        open_index(tmp_path / "out")
    assert make(corpus).embedded.num_new_items == 0
    assert len(open_index(tmp_path / "out")) == 8


def test_a_corpus_that_changes_meanwhile(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_corpus(tmp_path)
    lines = data.read_text().splitlines(keepends=True)
    for changed in (lines[1:], [*lines, lines[0]]):
        data.write_text("".join(lines))

        def embed_then_change(config: IndexConfig, text: str = "".join(changed)) -> Any:
            report = embed_corpus(config)
            data.write_text(text)
            return report

        monkeypatch.setattr(build, "embed_corpus", embed_then_change)
        with pytest.raises(ValueError, match=r"changed while it was read. Run the same command again"):
            make(data)


def test_another_run_that_ends_meanwhile(
    make: Make, puma_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_corpus(tmp_path)
    lines = data.read_text().splitlines(keepends=True)

    def write_ann_late(*values: Any) -> Any:
        data.write_text("".join(lines[::-1]))
        # Of the newer corpus, and killed before it writes items.
        embed_corpus(IndexConfig(data=data, model=str(puma_dir), output=tmp_path / "out"))
        return write_ann(*values)

    monkeypatch.setattr(build, "write_ann", write_ann_late)
    with pytest.raises(ValueError, match=r"are newer than its index.json"):
        make(data)
    monkeypatch.undo()
    make(data)
    assert [item.id for item in items(tmp_path / "out")] == [json.loads(line)["id"] for line in lines[::-1]]


def test_what_is_no_corpus(make: Make, index_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a directory of embeddings, which hold nothing to show. Name the corpus"):
        make(index_dir)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        make(tmp_path / "empty")


def test_somebody_elses_file_is_kept(make: Make, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / DESCRIPTION).write_text("{}")
    with pytest.raises(ValueError, match="describes no index"):
        make(corpus)
    assert (tmp_path / "out" / DESCRIPTION).read_text() == "{}"


def test_another_model(make: Make, corpus: Path, index_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(index_dir, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"are of another model or setting: fingerprint is .* weights_dtype is 'float32' there"
    ):
        make(corpus, shard_size=3, dtype="bfloat16")


def test_another_precision(make: Make, corpus: Path, index_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(index_dir, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"precision is 'float32' there, 'int8' here. Choose another directory, or delete this one"
    ):
        make(corpus, shard_size=3, precision="int8")
    assert len(open_index(tmp_path / "out")) == 8


def test_hundreds_of_small_pictures_and_a_broken_one(make: Make, tmp_path: Path) -> None:
    data = tmp_path / "photos"
    for number in range(300):
        (data / str(number % 3)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(data / str(number % 3) / f"{number // 3}.png")
    (data / "1" / "50.png").write_bytes(b"\x89PNG\r\n\x1a\n, and then something else")
    report = make(data, shard_size=128)
    assert (report.counts, report.embedded.num_errors) == ({"image": 299}, 1)
    (broken,) = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert broken["id"] == "1/50.png"
    ids = [item.id for item in items(tmp_path / "out")]
    assert len(set(ids)) == 299
    assert {"0/50.png", "2/50.png"} < set(ids)  # two of one name
