"""A corpus whose run is killed and started again, and one of two processes, come to what one run comes to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puma_hf.embedding.store import open_embeddings
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


def rows_of(output: Path) -> dict[str, np.ndarray]:
    return {name: row for ids, rows in open_embeddings(output) for name, row in zip(ids, rows, strict=True)}


@pytest.mark.parametrize("output", ["killed", "terminated", "two"])
def test_every_run_comes_to_the_rows_of_one_that_nothing_interrupts(folder: Path, output: str) -> None:
    whole, found = rows_of(folder / "whole"), rows_of(folder / output)
    assert found.keys() == whole.keys() == {str(row) for row in range(NUM_ROWS) if row != BROKEN}
    # In other batches a last bit may differ, and with it a step of int8.
    assert max(np.abs(found[name].astype(int) - row).max() for name, row in whole.items()) <= 1
    left = {path.name for path in (folder / output).iterdir() if not path.name.startswith("shard-")}
    assert left == {"manifest.json", "errors.jsonl"}
    assert (folder / output / "errors.jsonl").read_bytes() == (folder / "whole" / "errors.jsonl").read_bytes()


def test_an_uninterrupted_run_writes_shards_in_the_order_of_the_corpus(folder: Path) -> None:
    ids = [ids for ids, _ in open_embeddings(folder / "whole")]
    assert [name for part in ids for name in part] == [str(row) for row in range(NUM_ROWS) if row != BROKEN]
    assert [len(part) for part in ids] == [SHARD_SIZE] * 8 + [2]


def test_a_killed_run_goes_on(report: dict[str, Any]) -> None:
    # The last run was killed when all shards were there, and only the manifest was not.
    assert report["finished"]["num_new_items"] == 0
    for name in ("num_items", "num_rows", "num_errors"):
        assert report["finished"][name] == report["whole"][name]


def test_a_command_that_is_terminated_keeps_what_it_has(report: dict[str, Any]) -> None:
    ended = report["terminated"]
    assert ended["status"] == 143
    assert LOCK_FILE not in ended["left"]
    assert ended["kept"] >= 4
    assert ended["num_new_items"] == NUM_ROWS - 1 - ended["kept"]


def test_two_processes_are_refused_together_where_another_run_is(folder: Path) -> None:
    said = [json.loads((folder / f"{rank}.json").read_text())["refused"] for rank in SHARES]
    assert said[0] == said[1]
    assert "is in use: another run writes there" in said[0]


def test_two_processes_share_the_work(folder: Path, report: dict[str, Any]) -> None:
    first, second = [json.loads((folder / f"{rank}.json").read_text()) for rank in SHARES]
    assert first["report"] == second["report"]
    assert first["report"]["num_rows"] == first["report"]["num_new_items"] == NUM_ROWS - 1
    assert min(len(first["ids"]), len(second["ids"])) > NUM_ROWS / 4
    assert sorted(first["ids"] + second["ids"], key=int) == [str(row) for row in range(NUM_ROWS) if row != BROKEN]
