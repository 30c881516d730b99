"""A corpus whose run is killed and started again, and one of two processes, come to what one run comes to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from puma_hf.embedding.store import open_embeddings
from tests.forks import SHARES, run_worker

NUM_ROWS, SHARD_SIZE, BROKEN = 43, 5, 17

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, puma_dir: Path) -> Path:
    """Nine shards; one input is broken."""
    folder = tmp_path_factory.mktemp("embeddings")
    rows: list[dict[str, Any]] = [{"text": f"apple {row} " * (row % 4 + 1)} for row in range(NUM_ROWS)]
    rows[BROKEN] = {"image": "gone.png"}
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_worker("tests.embedding.embed_worker", puma_dir, folder / "data.jsonl", folder)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return values


def files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def counts(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what differs from run to run."""
    return {name: value for name, value in report.items() if not name.startswith(("num_new", "seconds", "output"))}


def test_killed_and_uninterrupted_runs_write_the_same_bytes(folder: Path, report: dict[str, Any]) -> None:
    whole = files(folder / "whole")
    assert len(whole) == 9 * 2 + 3
    assert {"manifest.json", "errors.jsonl", "ranges.safetensors", "shard-00008.ids.parquet"} <= set(whole)
    assert files(folder / "killed") == whole
    assert counts(report["finished"]) == counts(report["whole"])
    assert report["whole"]["num_new_shards"] == 9
    # The last run was killed when all shards were there, and only the manifest was not.
    assert report["finished"]["num_new_shards"] == 0
    assert [row for shard in open_embeddings(folder / "killed").shards() for row in shard.rows] == [
        row for row in range(NUM_ROWS) if row != BROKEN
    ]


def test_two_processes_write_the_same_bytes_and_share_the_work(folder: Path, report: dict[str, Any]) -> None:
    assert files(folder / "two") == files(folder / "whole")
    first, second = [json.loads((folder / f"{rank}.json").read_text()) for rank in SHARES]
    assert first["report"] == second["report"]
    assert counts(first["report"]) == counts(report["whole"])
    assert first["report"]["num_new_shards"] == 9
    # The first process also finds the ranges, from all inputs, before its own shards.
    assert first["calls"] == [0, 0, 10, 20, 30, 40]
    assert second["calls"] == [5, 15, 25, 35]
