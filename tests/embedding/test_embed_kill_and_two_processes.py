"""A corpus whose run is killed and started again, and one of two processes, come to what one run comes to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puma_hf.embedding.corpus_store import open_embeddings
from puma_hf.files import LOCK_FILE
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


def test_a_command_that_is_terminated_keeps_what_it_has_of_a_shard(folder: Path, report: dict[str, Any]) -> None:
    ended = report["terminated"]
    assert ended["status"] == 143
    num_shards = sum(name.startswith("shard-") for name in ended["left"]) // 2
    assert f".unfinished-{num_shards:05d}.safetensors" in ended["left"]
    assert LOCK_FILE not in ended["left"]
    assert ended["num_new_items"] == NUM_ROWS - num_shards * SHARD_SIZE - 3
    whole, terminated = (list(open_embeddings(folder / name).shards()) for name in ("whole", "terminated"))
    for shard, expected in zip(terminated, whole, strict=True):
        assert shard.ids == expected.ids
        # It was in smaller batches, so a last bit may differ, and with it a step of int8.
        assert np.abs(shard.embeddings.astype(int) - expected.embeddings).max() <= 1


def test_two_processes_are_refused_together_where_another_run_is(folder: Path) -> None:
    said = [json.loads((folder / f"{rank}.json").read_text())["refused"] for rank in SHARES]
    assert said[0] == said[1]
    assert "is in use: another run writes there" in said[0]


def test_two_processes_write_the_same_bytes_and_share_the_work(folder: Path, report: dict[str, Any]) -> None:
    assert files(folder / "two") == files(folder / "whole")
    first, second = [json.loads((folder / f"{rank}.json").read_text()) for rank in SHARES]
    assert first["report"] == second["report"]
    assert counts(first["report"]) == counts(report["whole"])
    assert first["report"]["num_new_shards"] == 9
    # The first process also finds the ranges, from all inputs, before its own shards.
    assert first["calls"] == [0, 0, 10, 20, 30, 40]
    assert second["calls"] == [5, 15, 25, 35]
