from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from puma_hf.data.mbeir import MBEIRTask
from puma_hf.evaluation.mbeir_results import MBEIRResults, MBEIRTaskResult, written_whole
from puma_hf.evaluation.published import PUBLISHED, PUBLISHED_NOTE

METRICS = {
    "hit@1": 0.25,
    "recall@1": 0.2,
    "ndcg@10": 0.5,
    "mrr@10": 0.4,
    "wrong_modality@1": 0.1,
    "wrong_modality@5": 0.3,
}


def row(name: str, pool: str = "local", **changes: Any) -> MBEIRTaskResult:
    dataset, _, number = name.rpartition("_task")
    values = {"pool_size": 1000, "num_queries": 10, "num_skipped": 0, "score": 0.625, "metrics": METRICS, **changes}
    return MBEIRTaskResult(dataset, int(number), pool, **values)


def table(results: MBEIRResults) -> list[list[str]]:
    lines = results.to_markdown().split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def results_of(names: list[str], pools: tuple[str, ...] = ("local",), **values: Any) -> MBEIRResults:
    rows = [row(name, pool) for pool in pools for name in names]
    return MBEIRResults(values.pop("split", "test"), rows, **values)


def test_published_figures_stand_beside_ours() -> None:
    results = results_of(["cirr_task7", "toys_task7"], ("local", "global"))
    header, _, cirr, toys, mean, *rest = table(results)
    assert header == [
        *("task", "dataset", "pool", "candidates", "queries", "k", "hit@k", "LamRA-Ret 7B", "LamRA < 4B", "PUMA"),
        *("hit@1", "ndcg@10", "wrong_modality@1"),
    ]
    assert cirr[6:] == ["62.5", "53.1", "47.7", "49.9", "25.0", "50.0", "10.0"]
    # Other datasets, the global pool and a mean of fewer rows have none.
    assert toys[6:] == ["62.5", "", "", "", "25.0", "50.0", "10.0"]
    assert mean[6:] == ["**62.5**", "", "", "", "**25.0**", "**50.0**", "**10.0**"]
    assert [line[7:10] for line in rest] == [[""] * 3] * 3
    assert {len(line) for line in table(results)} == {13}
    assert results.to_markdown().count(PUBLISHED_NOTE) == 1


def test_the_mean_of_all_sixteen_rows_has_the_published_means() -> None:
    whole = results_of(sorted(PUBLISHED))
    assert table(whole)[-1][6:10] == ["**62.5**", "56.6", "51.8", "54.4"]
    both = table(results_of(sorted(PUBLISHED), ("local", "global")))
    assert both[-1][2:10] == ["global", "", "160", "", "**62.5**", "54.9", "", ""]
    assert table(results_of([*sorted(PUBLISHED), "toys_task1"]))[-1][7:10] == [""] * 3  # ours is of other rows then
    assert table(results_of(sorted(PUBLISHED)[1:]))[-1][7:10] == [""] * 3


@pytest.mark.parametrize(
    "results",
    [
        results_of(["toys_task7"]),
        results_of(["cirr_task7"], ("global",)),
        results_of(["cirr_task7"], split="val"),
        results_of(["cirr_task7"], made_from={"content_hash": "ab"}),  # the nano benchmark's pools are smaller
        results_of([]),
    ],
    ids=["other dataset", "global pool", "val", "nano", "nothing"],
)
def test_nothing_published_where_it_would_not_compare(results: MBEIRResults) -> None:
    assert "PUMA" not in results.to_markdown()
    assert "LamRA" not in results.to_markdown()


def test_corrected_figures_stand_beside_the_plain_ones() -> None:
    other = {**METRICS, "score": 0.75}
    rows = [row("cirr_task7", corrected=other), row("toys_task7", corrected={**other, "score": 0.25})]
    results = MBEIRResults("test", rows, made_from={"popularity_penalty": 0.2})
    header, _, cirr, toys, mean = table(results)
    assert header[6:9] == ["hit@k", "corrected", "LamRA-Ret 7B"]
    assert [line[6:9] for line in (cirr, toys, mean)] == [
        ["62.5", "75.0", "53.1"],
        ["62.5", "25.0", ""],
        ["**62.5**", "**50.0**", ""],
    ]
    text = results.to_markdown()
    assert "less 0.2 times the candidate's mean similarity to all test queries" in text
    assert "transductive" in text
    assert results.to_dict()["mean"]["local"]["corrected_score"] == 0.5
    assert MBEIRResults.from_dict(json.loads(json.dumps(results.to_dict()))) == results


def test_remarks() -> None:
    results = MBEIRResults("test", [row("toys_task1", num_skipped=3), row("toys_task7"), row("toys_task1", "global")])
    assert results.to_markdown().endswith(
        "\n\nLeft out, as nothing in the pool is relevant to them: 3 of toys_task1 (local).\n"
    )
    made_from = {
        "model": "org/model",
        "model_fingerprint": "0123456789abcdef",
        "truncate_dim": 64,
        "data": "M-BEIR (nano)",
        "content_hash": "fedcba9876543210",
        "instructions": "drawn with seed 5",
        "puma_hf": "0.1.0",
    }
    assert (
        results_of(["toys_task1"], made_from=made_from)
        .to_markdown()
        .endswith(
            "\n\nMade from: model org/model, fingerprint 0123456789ab, first dimensions 64, data M-BEIR (nano), "
            "content hash fedcba987654, split test, instructions drawn with seed 5, puma-hf 0.1.0.\n"
        )
    )


def test_json_of_an_older_version_is_read() -> None:
    values = results_of(["cirr_task7"], made_from={"model": "m"}).to_dict()
    assert list(values) == ["split", "made_from", "mean", "rows"]
    assert MBEIRResults.from_dict(json.loads(json.dumps(values))).made_from == {"model": "m"}
    del values["made_from"]
    older = MBEIRResults.from_dict(values)
    assert older.made_from == {}
    assert older.rows[0].task == MBEIRTask(7, "cirr")
    assert "Made from" not in older.to_markdown()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with written_whole(path) as file:
        file.write("one\n")
    stale, other = path.with_name(".file.txt.1.tmp"), path.with_name(".file.txt.2.tmp")
    stale.write_text("what a killed run left")
    os.utime(stale, (time.time() - 7200, time.time() - 7200))
    other.write_text("what another run is writing")
    with written_whole(path) as file:
        file.write("two\n")
        assert path.read_text() == "one\n"
    assert not stale.exists()
    assert other.read_text() == "what another run is writing"
    other.unlink()
    with pytest.raises(UnicodeEncodeError), written_whole(path) as file:
        file.write("three\n\ud800")
    assert path.read_bytes() == b"two\n"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]
