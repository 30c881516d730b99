"""Parquet copies of a tiny M-BEIR, written with `datasets` in the layouts that the Hub has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import datasets

from puma_hf.data.tasks import MBEIRTask
from tests.data import mbeir_builder as builder

Layout = Literal["mrbench", "mteb"]
Row = dict[str, Any]

STRING = datasets.Value("string")


def read_tables(root: Path, task: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Corpus, queries and qrels of a task of the builder's dataset, as rows."""
    corpus = [
        {"id": r["did"], "modality": r["modality"], "text": r["txt"], "image": _image(root, r["img_path"])}
        for r in builder.read_records(builder.local_pool_path(root, task))
    ]
    names = {"id": "qid", "modality": "query_modality", "text": "query_txt"}
    queries = [
        {**{ours: r[name] for ours, name in names.items()}, "image": _image(root, r["query_img_path"])}
        for r in builder.read_records(builder.query_path(root, task, "test"))
    ]
    lines = builder.qrels_path(root, task, "test").read_text(encoding="utf-8").splitlines()
    judged = [line.split() for line in lines]
    return corpus, queries, [{"query-id": q, "corpus-id": did, "score": int(score)} for q, _, did, score, _ in judged]


def write_copy(
    root: Path,
    parent: Path,
    task: int,
    layout: Layout = "mrbench",
    change: Callable[[list[Row], list[Row], list[Row]], None] | None = None,
) -> Path:
    """The copy of a task.

    - mrbench: query, corpus (split "corpus") and qrels; images as datasets.Image; two files of the corpus; "_id".
    - mteb: queries, corpus and default (in data/), all with the split "test"; images as structs of bytes; "id"; no
      modality, and texts that are "" instead of null.
    """
    folder = parent / f"mbeir_{MBEIRTask(task, builder.DATASET).name}"
    corpus, queries, qrels = read_tables(root, task)
    if change is not None:
        change(corpus, queries, qrels)
    if layout == "mrbench":
        for rows in (corpus, queries):
            for row in rows:
                row["_id"] = row.pop("id")
                row["modality"] = ",".join(reversed(row["modality"].split(",")))  # "text,image"
        half = len(corpus) // 2
        content = {"_id": STRING, "modality": STRING, "text": STRING, "image": datasets.Image()}
        write_table(folder / "corpus" / "corpus-00000-of-00002.parquet", corpus[:half], content)
        write_table(folder / "corpus" / "corpus-00001-of-00002.parquet", corpus[half:], content)
        write_table(folder / "query" / "test-00000-of-00001.parquet", queries, content)
        write_table(folder / "qrels" / "test-00000-of-00001.parquet", qrels, _qrels(datasets.Value("int32")))
    else:
        for rows in (corpus, queries):
            for row in rows:
                row["text"] = row["text"] or ""
                del row["modality"]
        content = {"id": STRING, "text": STRING, "image": {"bytes": datasets.Value("binary"), "path": STRING}}
        for name, rows in (("corpus", corpus), ("queries", queries)):
            write_table(folder / name / "test-00000-of-00001.parquet", rows, content)
        write_table(folder / "data" / "test-00000-of-00001.parquet", qrels, _qrels(datasets.Value("float64")))
    return folder


def write_table(path: Path, rows: list[Row], features: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(str(path))


def _qrels(score: Any) -> dict[str, Any]:
    return {"query-id": STRING, "corpus-id": STRING, "score": score}


def _image(root: Path, img_path: str | None) -> Row | None:
    return None if img_path is None else {"bytes": (root / img_path).read_bytes(), "path": None}
