from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from puma_hf.evaluation.results import PUBLISHED, PUBLISHED_NOTE, MBEIRResults, MBEIRTaskResult
from puma_hf.hub.card_table import NOT_MEASURED, card_table, is_mbeir, made_from


def row(name: str, score: float, pool: str = "local", skipped: int = 0) -> MBEIRTaskResult:
    dataset, _, task = name.rpartition("_task")
    return MBEIRTaskResult(dataset, int(task), pool, 1000, 50, skipped, score, {"hit@5": score})


def table(results: MBEIRResults) -> list[list[str]]:
    lines = [line for line in card_table(results).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_of_mbeir_all_sixteen_rows_are_shown_beside_the_published_ones() -> None:
    results = MBEIRResults(
        "test", [row("mscoco_task3", 0.5), row("nights_task4", 0.25), row("nights_task4", 0.1, "global")]
    )
    head, _, *rows, mean = table(results)
    assert head[4:] == ["local pool", "global pool", "LamRA-Ret 7B", "LamRA < 4B", "PUMA"]
    assert [f"{line[1]}" for line in rows] == [name.rpartition("_task")[0] for name in PUBLISHED]
    assert len(rows) == 16
    assert rows[7] == ["image → text", "mscoco", "hit@5", "50", "50.0 (of 1000)", NOT_MEASURED, "90.6", "88.9", "90.1"]
    assert rows[9][4:6] == ["25.0 (of 1000)", "10.0 (of 1000)"]
    assert rows[2][2:6] == ["hit@10", "", NOT_MEASURED, NOT_MEASURED]
    # The published means are of other rows than these.
    assert mean[4:] == ["**37.5**", "**10.0**", "", "", ""]
    assert PUBLISHED_NOTE in card_table(results)


def test_the_published_means_stand_beside_a_mean_of_all_rows() -> None:
    results = MBEIRResults("test", [row(name, 0.5) for name in reversed(PUBLISHED)])
    assert table(results)[-1] == ["", "**mean**", "", "", "**50.0**", "56.6", "51.8", "54.4"]
    assert f"| {NOT_MEASURED}" not in card_table(results)
    results.rows.append(row("mscoco_task0", 0.1, "global"))  # a mean of one row, beside means of sixteen
    assert table(results)[-1] == ["", "**mean**", "", "", "**50.0**", "**10.0**", "", "", ""]


def test_a_corrected_figure_never_enters_a_card() -> None:
    plain = MBEIRResults("test", [row("mscoco_task0", 0.5)])
    corrected = replace(plain.rows[0], corrected={"score": 0.75, "hit@5": 0.75})
    made = {"popularity_penalty": 0.2}
    assert card_table(MBEIRResults("test", [corrected], made_from=made)) == card_table(plain)


@pytest.mark.parametrize(
    ("split", "made", "name"),
    [("val", {}, "mscoco_task0"), ("test", {"content_hash": "a"}, "mscoco_task0"), ("test", {}, "emoji_task0")],
)
def test_other_benchmarks_have_nothing_beside_them(split: str, made: dict[str, Any], name: str) -> None:
    results = MBEIRResults(split, [row(name, 0.5, skipped=3)], made_from=made)
    assert not is_mbeir(results)
    assert len(table(results)) == 4
    text = card_table(results)
    assert "LamRA" not in text
    assert f"Split: {split}." in text
    assert f"relevant to them: 3 of {name} (local)." in text
    assert "global" not in text


def test_how_it_was_made() -> None:
    made = {"data": "emoji", "truncate_dim": 64, "torch": None, "model": "puma", "other": 1}
    assert made_from(MBEIRResults("test", [], made_from=made)) == "data emoji, first dimensions 64"
    made = {"encode_kwargs": {"max_length": 32}, "embedding_dtype": "float16"}
    told = "encode with {'max_length': 32}, embeddings in float16"
    assert made_from(MBEIRResults("test", [], made_from=made)) == told
    assert made_from(MBEIRResults("test", [], made_from=made | {"encode_kwargs": {}})) == "embeddings in float16"
