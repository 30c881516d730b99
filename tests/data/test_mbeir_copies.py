from __future__ import annotations

import os
from pathlib import Path

import pytest

from puma_hf.data.mbeir_copies import copy_names, find_copy, has_parquet, task_of_name
from puma_hf.data.mbeir_problems import MBEIRFormatError
from puma_hf.data.mbeir_tasks import MBEIRTask

TASK = MBEIRTask(7, "cirr")
CORPUS, QUERY, QRELS = "corpus/corpus-00000-of-00001", "query/test-00000-of-00001", "qrels/test-00000-of-00001"


def make(folder: Path, *names: str, card: str | None = None) -> Path:
    for name in names:
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def found(folder: Path, split: str = "test") -> tuple[list[str], list[str], list[str]]:
    copy = find_copy(folder, TASK, split)
    corpus, queries, qrels = (
        [path.relative_to(folder).as_posix().removesuffix(".parquet") for path in paths]
        for paths in (copy.corpus, copy.queries, copy.qrels)
    )
    return corpus, queries, qrels


def test_names() -> None:
    assert task_of_name("mbeir_cirr_task7") == TASK
    assert task_of_name("InfoSeekIT2ITRetrieval") == MBEIRTask(8, "infoseek")
    assert task_of_name("cirr") is None
    assert copy_names(TASK) == ["mbeir_cirr_task7"]
    assert copy_names(MBEIRTask(8, "infoseek")) == ["InfoSeekIT2ITRetrieval", "mbeir_infoseek_task8"]
    with pytest.raises(MBEIRFormatError, match=r"mbeir_cirr_task5: task 5 is not one of M-BEIR's \[0, 1"):
        task_of_name("mbeir_cirr_task5")


@pytest.mark.parametrize(
    ("corpus", "query", "qrels"),
    [
        (CORPUS, QUERY, QRELS),
        ("corpus/test-00000-of-00001", "queries/test-00000-of-00001", "data/test-00000-of-00001"),
        ("corpus/corpus/0000", "query/test/0000", "default/test/0000"),  # the Hub's own conversion
        ("corpus", "query", "qrels"),
        ("data/corpus-00000-of-00001-0a1b", "data/query-00000-of-00001-0a1b", "data/qrels-00000-of-00001-0a1b"),
    ],
)
def test_layouts_without_a_card(tmp_path: Path, corpus: str, query: str, qrels: str) -> None:
    folder = make(tmp_path, corpus, query, qrels)
    assert found(folder) == ([corpus], [query], [qrels])


def test_files_are_in_order_and_hidden_ones_are_left_out(tmp_path: Path) -> None:
    shards = [f"corpus/corpus-{number:05}-of-00012" for number in range(12)]
    make(tmp_path, *reversed(shards), QUERY, QRELS, ".cache/corpus/corpus-00000-of-00001")
    assert found(tmp_path)[0] == shards


def test_the_card_says_what_is_what(tmp_path: Path) -> None:
    card = """---
configs:
- config_name: default
  data_files:
  - {split: test, path: [a/0*, a/1*]}
- config_name: corpus
  data_files: b/*.parquet
- config_name: query
  data_files:
  - {split: test, path: c/x.parquet}
  - {split: train, path: c/y.parquet}
---
"""
    make(tmp_path, "a/00", "a/10", "b/all", "c/x", "c/y", card=card)
    assert found(tmp_path) == (["b/all"], ["c/x"], ["a/00", "a/10"])


def test_qrels_before_default_and_query_before_queries(tmp_path: Path) -> None:
    make(tmp_path, CORPUS, QUERY, "queries/test", QRELS, "default/test")
    assert found(tmp_path) == ([CORPUS], [QUERY], [QRELS])


def test_splits(tmp_path: Path) -> None:
    make(tmp_path, CORPUS, QUERY, QRELS, "query/val-00000-of-00001", "qrels/val-00000-of-00001")
    assert found(tmp_path, "val") == ([CORPUS], ["query/val-00000-of-00001"], ["qrels/val-00000-of-00001"])
    with pytest.raises(FileNotFoundError, match=r"query has no split 'train', only \['test', 'val'\]\. Ask for one"):
        found(tmp_path, "train")


def test_the_only_split_is_not_another_one(tmp_path: Path) -> None:
    make(tmp_path, CORPUS, QUERY, QRELS)
    with pytest.raises(FileNotFoundError, match=r"query has no split 'val', only \['test'\]"):
        found(tmp_path, "val")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((QUERY, QRELS), "no Parquet files of corpus, but of qrels, query. If it was downloaded"),
        ((CORPUS, QRELS), "no Parquet files of query or queries, but of corpus, qrels"),
        ((CORPUS, QUERY), "no Parquet files of qrels or default or data, but of corpus, query"),
        ((), "no Parquet files of corpus, but of nothing"),
        (
            ("corpus/c-00000-of-00003", "corpus/c-00002-of-00003", QUERY, QRELS),
            r"1 of the 3 files corpus/\*-of-00003\.parquet are missing, the first is number 1\. .* interrupted",
        ),
    ],
)
def test_an_interrupted_download(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        found(make(tmp_path, *names))


@pytest.mark.parametrize("card", ["---\nconfigs: [\n---\n", "---\nconfigs: [3]\n---\n", "---\n3\n---\n"])
def test_a_broken_card(tmp_path: Path, card: str) -> None:
    with pytest.raises(MBEIRFormatError, match=r"README\.md: its head is no dataset card .* or remove it"):
        found(make(tmp_path, CORPUS, QUERY, QRELS, card=card))


@pytest.mark.parametrize("card", ["", "# A copy\n", "---\nlicense: mit\n---\n"])
def test_a_card_that_says_nothing(tmp_path: Path, card: str) -> None:
    assert found(make(tmp_path, CORPUS, QUERY, QRELS, card=card)) == ([CORPUS], [QUERY], [QRELS])


def test_the_fingerprint_tells_files_apart(tmp_path: Path) -> None:
    folder = make(tmp_path, CORPUS, QUERY, QRELS)
    first = find_copy(folder, TASK).fingerprint
    assert find_copy(folder, TASK).fingerprint == first
    os.utime(folder / f"{QRELS}.parquet", ns=(1, 1))
    assert find_copy(folder, TASK).fingerprint != first
    assert find_copy(folder, MBEIRTask(8, "cirr")).fingerprint != first


def test_has_parquet(tmp_path: Path) -> None:
    assert not has_parquet(make(tmp_path, ".hidden/a"))
    assert has_parquet(make(tmp_path, "a/b/c"))
