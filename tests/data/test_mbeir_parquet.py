from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from puma_hf.data import mbeir_parquet
from puma_hf.data.mbeir_copies import find_copy
from puma_hf.data.mbeir_parquet import import_copy
from puma_hf.data.mbeir_problems import MBEIRFormatError
from puma_hf.data.mbeir_reader import MBEIR
from puma_hf.data.mbeir_tasks import MBEIRTask
from tests.data import mbeir_builder as builder
from tests.data.parquet_builder import Layout, Row, write_copy, write_table

LAYOUTS: tuple[Layout, ...] = ("mrbench", "mteb")
Change = Callable[[list[Row], list[Row], list[Row]], None]


def task(number: int) -> MBEIRTask:
    return MBEIRTask(number, builder.DATASET)


def imported(folder: Path, number: int, target: Path, dataset_id: int | None = None) -> MBEIR:
    target.mkdir(exist_ok=True)
    import_copy(find_copy(folder, task(number)), target / "data", target, "test", dataset_id)
    return MBEIR(target / "data", image_root=target)


def content(record: Any) -> tuple[str | None, bytes | None, str]:
    return record.text, None if record.image is None else Path(record.image).read_bytes(), record.modality


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("number", list(builder.MODALITIES))
def test_a_copy_reads_equal_to_the_original(root: Path, tmp_path: Path, number: int, layout: Layout) -> None:
    data, original = imported(write_copy(root, tmp_path, number, layout), number, tmp_path / "to"), MBEIR(root)
    queries, expected = data.queries(task(number)), original.queries(task(number))
    assert [query.qid for query in queries] == [query.qid for query in expected]
    assert list(map(content, queries)) == list(map(content, expected))
    judged = [query.positives for query in expected[: builder.UNJUDGED_QUERY]]
    assert [query.positives for query in queries] == [*judged, ()]
    pool, whole = data.local_pool(task(number)), original.local_pool(task(number))
    assert list(pool) == list(whole)
    assert list(map(content, pool.values())) == list(map(content, whole.values()))
    qrels = original.qrels(task(number), "test", expected, whole)
    assert data.qrels(task(number), "test", queries, pool) == qrels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_keep_their_bytes_and_are_named_after_them(root: Path, tmp_path: Path, kind: str) -> None:
    buffer = BytesIO()
    Image.new("RGB", (3, 2), "red").save(buffer, kind)

    def same_image(corpus: list[Row], queries: list[Row], _: list[Row]) -> None:
        for row in (*corpus, *queries):
            row["image"] = {"bytes": buffer.getvalue(), "path": "wrong.txt"}

    data = imported(write_copy(root, tmp_path, 4, change=same_image), 4, tmp_path / "to")
    paths = {candidate.image for candidate in data.local_pool(task(4)).values()}
    (path,) = [Path(path) for path in paths if path is not None]
    assert path.read_bytes() == buffer.getvalue()
    assert path.suffix == {"JPEG": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")
    assert len([file for file in (tmp_path / "to" / "images").rglob("*") if file.is_file()]) == 1


def test_images_that_are_there_are_not_written_again(root: Path, tmp_path: Path) -> None:
    folder = write_copy(root, tmp_path, 4)
    data = imported(folder, 4, tmp_path / "to")
    images = [Path(candidate.image or "") for candidate in data.local_pool(task(4)).values()]
    for image in images:
        os.utime(image, ns=(1, 1))
    images[0].write_bytes(images[0].read_bytes()[:5])  # cut, as a full disk may leave it
    imported(folder, 4, tmp_path / "to")
    assert [image.stat().st_mtime_ns == 1 for image in images] == [False, *[True] * (len(images) - 1)]
    assert images[0].read_bytes() == (root / "images" / "c4_0.png").read_bytes()


def change_ids(change: Callable[[str], str]) -> Change:
    def apply(corpus: list[Row], queries: list[Row], qrels: list[Row]) -> None:
        for rows, names in ((corpus, ["id"]), (queries, ["id"]), (qrels, ["query-id", "corpus-id"])):
            for row in rows:
                row |= {name: change(row[name]) for name in names}

    return apply


@pytest.mark.parametrize(
    "change", [lambda i: i.partition(":")[2], lambda i: f"query-test-{i}", lambda i: f"corpus-{i}"]
)
def test_other_spellings_of_ids(root: Path, tmp_path: Path, change: Callable[[str], str]) -> None:
    folder = write_copy(root, tmp_path, 1, change=change_ids(change))
    data = imported(folder, 1, tmp_path / "to", dataset_id=builder.DATASET_ID)
    assert [query.qid for query in data.queries(task(1))] == [builder.qid(1, n) for n in range(builder.NUM_QUERIES)]
    assert list(data.local_pool(task(1))) == [builder.did(1, n) for n in range(builder.NUM_CANDIDATES)]


def test_judgements_of_another_datasets_candidates_are_kept(root: Path, tmp_path: Path) -> None:
    def add(_: list[Row], __: list[Row], qrels: list[Row]) -> None:
        qrels.append({"query-id": builder.qid(1, 0), "corpus-id": "6:1000", "score": 1})  # as OVEN's

    data = imported(write_copy(root, tmp_path, 1, change=add), 1, tmp_path / "to")
    queries, pool = data.queries(task(1)), data.local_pool(task(1))
    assert set(data.qrels(task(1), "test", queries, pool)[builder.qid(1, 0)]) == {builder.did(1, 0)}
    assert queries[0].positives == (builder.did(1, 0), "6:1000")


def set_row(table: int, row: int, **values: Any) -> Change:
    def apply(*tables: list[Row]) -> None:
        tables[table][row] |= values

    return apply


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (1, set_row(0, 1, id="11:100"), r"corpus-00000-of-00002\.parquet, row 2: id '11:100' was already given"),
        (1, set_row(0, 4, id="11:100"), r"corpus-00001-of-00002\.parquet, row 2: id '11:100' was already given"),
        (1, set_row(1, 1, id="11:1100"), r"test-00000-of-00001\.parquet, row 2: id '11:1100' was already given"),
        (1, set_row(0, 1, id="a b"), "row 2: id is 'a b', must look like '<dataset_id>:<number>'; only M-BEIR's own"),
        (1, set_row(0, 1, id=None), "row 2: id is None, must look like"),
        (1, set_row(0, 1, modality="image"), "row 2: modality is 'image', but the row holds text"),
        (1, set_row(0, 1, modality="audio"), "row 2: modality is 'audio', but the row holds text"),
        (1, set_row(0, 1, text=" "), "row 2: modality is 'text', but the row holds neither text nor image"),
        (4, set_row(0, 1, image=None), "row 2: modality is 'image', but the row holds neither"),
        (4, set_row(0, 1, image={"bytes": b"no image", "path": None}), "row 2: the image cannot be read"),
        (4, set_row(0, 1, image={"bytes": b"", "path": None}), "row 2: the image holds no bytes"),
        (
            4,
            set_row(1, 1, text="also a text", modality="image,text"),
            "row 2: a query of image,text, but this task has queries of image",
        ),
        (1, set_row(2, 1, score=-1), "row 2: score is -1, must be a whole number of 0 or more"),
        (1, set_row(2, 0, **{"query-id": "11"}), "row 1: query-id is '11', must look like"),
        (
            1,
            lambda _, __, qrels: qrels.append({**qrels[0], "score": 3}),
            "'11:1100' and '11:100' were judged 1 before, now 3",
        ),
        (1, lambda corpus, _, __: corpus.clear(), "there are no rows in its corpus; download it again"),
        (1, lambda _, queries, __: queries.clear(), "there are no rows in its queries"),
    ],
)
def test_wrong_rows(root: Path, tmp_path: Path, number: int, change: Change, message: str) -> None:
    folder = write_copy(root, tmp_path, number, change=change)
    with pytest.raises(MBEIRFormatError, match=message):
        imported(folder, number, tmp_path / "to")


def test_an_image_that_is_a_path_alone(root: Path, tmp_path: Path) -> None:
    folder = write_copy(root, tmp_path, 4, "mteb", set_row(0, 1, image={"bytes": None, "path": "a.png"}))
    with pytest.raises(MBEIRFormatError, match=r"row 2: the image holds no bytes; a copy must have its images inside"):
        imported(folder, 4, tmp_path / "to")


def test_a_struct_of_nothing_is_no_image(root: Path, tmp_path: Path) -> None:
    folder = write_copy(root, tmp_path, 1, "mteb", set_row(0, 1, image={"bytes": None, "path": None}))
    assert {candidate.image for candidate in imported(folder, 1, tmp_path / "to").local_pool(task(1)).values()} == {
        None
    }


def test_a_score_between_numbers(root: Path, tmp_path: Path) -> None:
    folder = write_copy(root, tmp_path, 1, "mteb", set_row(2, 0, score=0.5))
    with pytest.raises(MBEIRFormatError, match=r"row 1: score is 0\.5, must be a whole number"):
        imported(folder, 1, tmp_path / "to")


def test_all_wrong_rows_are_counted(root: Path, tmp_path: Path) -> None:
    def spoil(corpus: list[Row], queries: list[Row], qrels: list[Row]) -> None:
        for row in corpus:
            row["modality"] = "text"
        queries[0]["image"] = {"bytes": b"no", "path": None}
        qrels[0]["score"] = -1

    folder = write_copy(root, tmp_path, 4, change=spoil)
    with pytest.raises(MBEIRFormatError) as caught:
        imported(folder, 4, tmp_path / "to")
    assert str(caught.value).startswith(
        f"{folder}: 8 problems (wrong modality label: 6, wrong field: 1, broken image: 1). The first 5:\n- {folder}"
    )


@pytest.mark.parametrize("file", ["corpus/corpus-00001-of-00002", "query/test-00000-of-00001"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_cut_file_is_named(root: Path, tmp_path: Path, file: str, share: float) -> None:
    folder = write_copy(root, tmp_path, 4)
    path = folder / f"{file}.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        MBEIRFormatError, match=rf"{path} is not a whole Parquet file .* Was the download cut off\? Del"
    ):
        imported(folder, 4, tmp_path / "to")


def test_damage_in_the_middle_is_found(root: Path, tmp_path: Path) -> None:
    folder = write_copy(root, tmp_path, 4)
    path = folder / "query" / "test-00000-of-00001.parquet"
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(MBEIRFormatError, match=r"test-00000-of-00001\.parquet is not a whole"):
        imported(folder, 4, tmp_path / "to")


@pytest.mark.parametrize(
    ("file", "column", "message"),
    [
        ("corpus/corpus-00000-of-00002", "_id", "no column id or _id or qid or did, only"),
        ("qrels/test-00000-of-00001", "score", "no column score or relevance, only query-id, corpus-id"),
    ],
)
def test_a_missing_column(root: Path, tmp_path: Path, file: str, column: str, message: str) -> None:
    path = write_copy(root, tmp_path, 1) / f"{file}.parquet"
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"), keep_in_memory=True)
    rows.remove_columns(column).to_parquet(str(path))
    with pytest.raises(MBEIRFormatError, match=rf"{path} has {message}.*rename the one that holds it"):
        imported(path.parents[1], 1, tmp_path / "to")


def test_a_full_disk_is_not_the_files_fault(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        imported(write_copy(root, tmp_path, 4), 4, tmp_path / "to")
    assert not [file for file in (tmp_path / "to" / "images").rglob("*") if file.is_file()]


def test_memory_stays_small(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_copy(root, tmp_path, 4)
    size = 20_000
    image = {"bytes": (root / "images" / "c4_0.png").read_bytes() + os.urandom(size), "path": None}
    rows = [{"_id": f"11:{n}", "modality": "image", "text": None, "image": image} for n in range(1000)]
    features = {name: datasets.Value("string") for name in ("_id", "modality", "text")} | {"image": datasets.Image()}
    for path in (folder / "corpus").iterdir():
        path.unlink()
    path = folder / "corpus" / "corpus-00000-of-00001.parquet"
    write_table(path, rows, features)
    parquet.write_table(parquet.read_table(path), path, row_group_size=50, use_dictionary=False)
    del rows
    held = []

    def put(*args: Any) -> str:
        held.append(pyarrow.total_allocated_bytes())
        return store(*args)

    store = mbeir_parquet._ImageStore.put
    monkeypatch.setattr(mbeir_parquet._ImageStore, "put", put)
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    imported(folder, 4, tmp_path / "to")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * size  # Python's: a batch of 64 rows
    assert max(held) - before < 300 * size  # Arrow's: some row groups
