"""An evaluation that is killed and started again, and one of two processes, come to what one run comes to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.data.mbeir_builder import build_mbeir
from tests.evaluation.evaluation_worker import NUM_KILLS
from tests.forks import SHARES, run_worker

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluations")
    (folder / "tmp").mkdir()
    run_worker("tests.evaluation.evaluation_worker", build_mbeir(folder / "mbeir"), folder)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return values


def files(output: Path) -> dict[str, bytes]:
    """What an evaluation writes, but for the embeddings."""
    paths = [path for path in output.rglob("*") if path.is_file() and path.parts[len(output.parts)] != "embeddings"]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in paths}


def test_killed_and_uninterrupted_runs_write_the_same_bytes(folder: Path, report: dict[str, Any]) -> None:
    whole = files(folder / "whole")
    assert {"results.json", "results.md", "runs/local/toys_task0.trec", "qrels/global/toys_task8.txt"} <= set(whole)
    assert len(whole) == 2 + 2 * 2 * 8  # a run and qrels for each task and pool
    assert files(folder / "killed") == whole
    # Killed in a call and in a write; what was finished was kept.
    assert len(report["points"]) == NUM_KILLS
    assert {point.partition(" ")[0] for point in report["points"]} == {"call", "write"}
    assert 0 < report["calls_left"] < report["calls"] - NUM_KILLS


def test_two_processes_write_the_same_bytes_and_share_the_work(folder: Path, report: dict[str, Any]) -> None:
    assert files(folder / "two") == files(folder / "whole")
    halves = [json.loads((folder / f"{rank}.json").read_text()) for rank in SHARES]
    for half in halves:
        assert half["results"] == report["results"]
    assert min(half["calls"] for half in halves) >= report["calls"] / 4
    assert max(half["calls"] for half in halves) < report["calls"]


def test_two_processes_need_no_output(folder: Path, report: dict[str, Any]) -> None:
    first, second = [json.loads((folder / f"temporary-{rank}.json").read_text()) for rank in SHARES]
    assert first == second
    assert [row["dataset"] for row in first["rows"]] == ["toys"]
    assert list((folder / "tmp").glob("puma-hf-*")) == []
