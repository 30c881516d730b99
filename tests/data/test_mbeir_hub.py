from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from puma_hf.data import MBEIR, MBEIRFormatError, MBEIRTask, build_nano, mbeir_hub, open_mbeir
from tests.data import mbeir_builder as builder
from tests.data.parquet_builder import Layout, Row, write_copy

Change = Callable[[list[Row], list[Row], list[Row]], None]


@pytest.fixture
def copies(root: Path, tmp_path: Path) -> Path:
    """Copies of two tasks, with their instructions beside them."""
    folder = tmp_path / "copies"
    write_copy(root, folder, 1)
    write_copy(root, folder, 7, "mteb")
    shutil.copy(builder.instructions_path(root), folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def official(root: Path, tmp_path: Path) -> Path:
    """A copy that is named after one of M-BEIR's own tasks."""
    folder = write_copy(root, tmp_path / "hub", 7)
    return folder.rename(folder.with_name("mbeir_cirr_task7"))


class FakeHub:
    """Stands in for `snapshot_download`: repositories are folders."""

    def __init__(self, **repositories: Path) -> None:
        self.repositories = {name.replace("__", "/"): folder for name, folder in repositories.items()}
        self.calls: list[str] = []

    def __call__(self, name: str, **_: Any) -> str:
        self.calls.append(name)
        return str(self.repositories[name])


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> FakeHub:
    monkeypatch.setattr(mbeir_hub, "snapshot_download", hub)
    return hub


def test_an_mbeir_and_folders_in_its_layout_are_opened_as_they_are(root: Path, tmp_path: Path, cache: Path) -> None:
    data = MBEIR(root)
    assert open_mbeir(data) is data
    assert open_mbeir(str(root), cache_dir=cache).root == root
    nano = build_nano(data, tmp_path / "nano", num_queries=2)
    assert open_mbeir(nano.root).content_hash == nano.content_hash
    shutil.rmtree(root / "cand_pool")
    assert open_mbeir(root).root == root  # its own reader says what is missing
    assert not cache.exists()


def test_copies_in_a_folder(root: Path, copies: Path, cache: Path) -> None:
    data, original = open_mbeir(copies, cache_dir=cache), MBEIR(root)
    assert data.tasks() == [MBEIRTask(1, "toys"), MBEIRTask(7, "toys")]
    assert (data.content_hash, data.image_root) == (None, cache.resolve())
    together = {}
    for task in data.tasks():
        queries, pool = original.queries(task), original.local_pool(task)
        assert [query.id for query in data.queries(task)] == [query.id for query in queries]
        assert data.qrels(task, "test", queries, pool) == original.qrels(task, "test", queries, pool)
        assert data.wordings(queries[0], task.candidate_modality) == original.wordings(
            queries[0], task.candidate_modality
        )
        together |= data.local_pool(task)
    assert data.global_pool() == together


def test_a_killed_import_goes_on(copies: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second of two tasks, after an image: nothing of that is read, and the first is not done again."""
    whole = open_mbeir(copies, cache_dir=cache.with_name("whole"))
    put, done = mbeir_hub.save_image, list[Path]()

    def killed(*args: Any) -> Path:
        done.append(put(*args))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mbeir_hub, "save_image", killed)
        patch.setattr(mbeir_hub.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            open_mbeir(copies, cache_dir=cache)
    assert len(list((cache / "tasks").glob("toys_task*"))) == 1
    assert not (cache / "datasets").exists()
    os.utime(done[0], ns=(1, 1))
    data = open_mbeir(copies, cache_dir=cache)
    assert done[0].stat().st_mtime_ns == 1
    files = [path.relative_to(whole.root) for path in sorted(whole.root.rglob("*")) if path.is_file()]
    assert [path.relative_to(data.root) for path in sorted(data.root.rglob("*")) if path.is_file()] == files
    assert all((data.root / file).read_bytes() == (whole.root / file).read_bytes() for file in files)


def test_an_organisation_of_the_hub(official: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two tasks of the same directions, so that one copy serves as both.
    hub = use_hub(monkeypatch, FakeHub(mteb__mbeir_cirr_task7=official, mteb__mbeir_fashioniq_task7=official))
    data = open_mbeir("mteb", tasks=["fashioniq_task7", "cirr_task7"], cache_dir=cache)
    assert [task.name for task in data.tasks()] == ["cirr_task7", "fashioniq_task7"]
    assert hub.calls == ["mteb/mbeir_cirr_task7", "mteb/mbeir_fashioniq_task7"]
    assert len(data.global_pool()) == builder.NUM_CANDIDATES  # the same candidates, once
    with pytest.raises(ValueError, match=r"tasks is \['toys_task1'\], must be some of"):
        open_mbeir("mybench", tasks=["toys_task1"], cache_dir=cache)


@pytest.mark.parametrize(
    ("organisation", "name"), [("mteb", "InfoSeekIT2ITRetrieval"), ("MRBench", "mbeir_infoseek_task8")]
)
def test_the_one_copy_with_another_name(
    organisation: str, name: str, root: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_copy(root, tmp_path, 8)
    hub = use_hub(monkeypatch, FakeHub(**{f"{organisation}__{name}": folder}))
    assert open_mbeir(organisation, tasks=["infoseek_task8"], cache_dir=cache).tasks()[0].name == "infoseek_task8"
    assert open_mbeir(f"{organisation}/{name}", cache_dir=cache).tasks()[0].name == "infoseek_task8"
    assert set(hub.calls) == {f"{organisation}/{name}"}


# --- files and rows of a copy


def imported(
    root: Path, tmp_path: Path, number: int, layout: Layout = "mrbench", change: Change | None = None
) -> MBEIR:
    folder = write_copy(root, tmp_path, number, layout, change)
    shutil.copy(builder.instructions_path(root), folder)
    return open_mbeir(folder, cache_dir=tmp_path / "to")


def task(number: int) -> MBEIRTask:
    return MBEIRTask(number, builder.DATASET)


def test_splits_and_files_that_are_missing(root: Path, tmp_path: Path) -> None:
    folder = write_copy(root, tmp_path, 1)
    with pytest.raises(FileNotFoundError, match=r"of the split 'val' there are no files, only .*\. Ask"):
        mbeir_hub.copy_files(folder, "queries", "val")
    (folder / "corpus" / "corpus-00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"of the corpus .* there are 1 of 2 files\. .* download it again"):
        mbeir_hub.copy_files(folder, "corpus", "test")


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_images_keep_their_bytes_and_are_named_after_them(root: Path, tmp_path: Path, kind: str) -> None:
    buffer = BytesIO()
    Image.new("RGB", (3, 2), "red").save(buffer, kind)

    def same_image(corpus: list[Row], queries: list[Row], _: list[Row]) -> None:
        for row in (*corpus, *queries):
            row["image"] = {"bytes": buffer.getvalue(), "path": "wrong.txt"}

    data = imported(root, tmp_path, 4, change=same_image)
    (path,) = {Path(candidate.image or "") for candidate in data.local_pool(task(4)).values()}
    assert path.read_bytes() == buffer.getvalue()
    assert path.suffix == {"JPEG": ".jpg", "TIFF": ".tif"}[kind]
    assert len([file for file in (tmp_path / "to" / "images").rglob("*") if file.is_file()]) == 1


def test_prefixes_of_ids(root: Path, tmp_path: Path) -> None:
    def respell(*tables: list[Row]) -> None:
        for row in (row for rows in tables for row in rows):
            for name in {"id", "query-id", "corpus-id"} & set(row):
                row[name] = f"{'corpus' if name == 'corpus-id' else 'query-test'}-{row[name]}"

    data = imported(root, tmp_path, 1, change=respell)
    assert [query.id for query in data.queries(task(1))] == [builder.qid(1, n) for n in range(builder.NUM_QUERIES)]
    assert list(data.local_pool(task(1))) == [builder.did(1, n) for n in range(builder.NUM_CANDIDATES)]


def set_row(table: int, row: int, **values: Any) -> Change:
    return lambda *tables: tables[table][row].update(values)


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (1, set_row(0, 1, id="11:100"), "1 dids come twice, as '11:100'"),
        (
            4,
            set_row(0, 1, image={"bytes": b"no image", "path": None}),
            r"row 2: the image inside \(8 bytes\) cannot",
        ),
        (1, set_row(2, 1, score=-1), "line 2: expected 'qid 0 did relevance task_id' .*, got .* -1 1"),
        (1, lambda *t: t[2].append({**t[2][0], "score": 3}), "'11:1100' and '11:100' were judged 1 before, now 3"),
    ],
)
def test_wrong_rows(root: Path, tmp_path: Path, number: int, change: Change, message: str) -> None:
    def read() -> None:
        data = imported(root, tmp_path, number, change=change)
        pool, queries = data.local_pool(task(number)), data.queries(task(number))
        data.qrels(task(number), "test", queries, pool)

    with pytest.raises(MBEIRFormatError, match=message):
        read()
