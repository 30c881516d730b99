from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from puma_hf.evaluation.sweep_report import DepthPair, SweepReport, SweepRow, SweptModel


def make_model(name: str, qualities: Sequence[float], **changes: Any) -> SweptModel:
    """Each layer costs 100 million parameters, 1 GFLOP a text, and 4 GFLOPs an image; the rest 1, 0 and 10."""
    rows = []
    for k, quality in enumerate(qualities, start=1):
        values: dict[str, Any] = {
            "k": k,
            "parameters": 10**9 + k * 10**8,
            "bytes": 2 * (10**9 + k * 10**8),
            "flops_text": k * 10**9,
            "flops_image": 10**10 + 4 * k * 10**9,
            "cka": k / 10,
            "cosine": k / 20,
            "quality": {"local": {"score": quality, "hit@1": quality / 2, "ndcg@10": quality / 4}},
            "scores": {"local": {"toys_task0": quality}},
        }
        rows.append(SweepRow(**(values | changes)))
    return SweptModel(name, tuple(rows))


def make_report(*models: SweptModel, **changes: Any) -> SweepReport:
    values: dict[str, Any] = {
        "data": "toys",
        "data_hash": None,
        "split": "val",
        "tasks": ("toys_task0",),
        "num_queries": 400,
        "num_candidates": 2000,
        "pool": "local",
        "metric": "score",
        "text_tokens": 64,
        "image_tokens": 256,
    }
    return SweepReport(models=models or (make_model("full", [0.2, 0.7, 0.78, 0.79, 0.8]),), **(values | changes))


QUALITIES = [0.2, 0.7, 0.78, 0.79, 0.8]  # of models of 1.1 to 1.5 billion parameters
FULL = make_model("full", QUALITIES)


def test_the_smallest_that_keeps_enough() -> None:
    report = make_report()
    assert (report.recommend().k, report.recommend().model) == (3, "full")
    assert "**Recommended: k = 3.** k = 3 of full: score 78.0, of the full model 80.0; " in report.to_markdown()
    # A share exactly kept is kept.
    assert [report.recommend(keep=keep).k for keep in (0.8, 0.975, 1)] == [2, 3, 5]
    asked = replace(report, keep=0.9, max_params=1_250_000_000)
    assert asked.recommendation == report.recommend("1250M", 0.9) == report.recommend(1.25e9, 0.9)


def test_budgets() -> None:
    """Where nothing keeps enough, the best within the budget; where nothing is within it, the smallest."""
    assert [make_report().recommend(budget).k for budget in ("1.4B", "1.29B", "1k")] == [3, 2, 1]


def test_a_compared_model_wins_if_it_is_smaller_or_better() -> None:
    report = make_report(FULL, make_model("distilled", [0.3, 0.79]))
    assert report.full.k == 5
    assert (report.recommendation.model, report.recommendation.k) == ("distilled", 2)
    same_size = make_report(FULL, make_model("distilled", [0.3, 0.5, 0.79])).recommendation
    assert (same_size.model, same_size.k) == ("distilled", 3)


def test_a_full_model_that_finds_nothing() -> None:
    assert make_report(make_model("full", [0.0, 0.1, 0.0])).recommendation.k == 2


def at_limits() -> SweepReport:
    """Two limits; at the smaller one an image costs half as much, and the quality is up to 0.02 less."""
    large = replace(FULL, name="large", max_pixels=235_200, image_tokens=300)
    cheap = [
        replace(row, flops_image=row.flops_image // 2) for row in make_model("", [0.3, 0.6, 0.75, 0.78, 0.78]).rows
    ]
    small = SweptModel("small", tuple(replace(row, seconds_image=0.25) for row in cheap), 50_000, 64)
    return make_report(large, small)


def test_pixel_limits_are_the_second_lever() -> None:
    report = at_limits()
    # Of 0.776 and more: k = 3 at the larger limit costs 22 GFLOPs an image, k = 4 at the smaller 13.
    assert (report.recommendation.k, report.recommendation.max_pixels) == (4, 50_000)
    assert (
        "64 visual tokens takes 43% of the full model's operations, fewer than any k of large"
        in report.recommendation.reason
    )
    assert (report.recommend(keep=1).k, report.recommend(keep=1).max_pixels) == (5, 235_200)
    like = report.recommend("1.1B", keep=0.1)  # k = 1 at the smaller limit: 7 GFLOPs
    assert (like.k, like.max_pixels) == (1, 50_000)
    costs = [(row.k, row.flops_image // 10**9) for row in report.frontier]
    assert costs == [(1, 7), (2, 9), (3, 11), (4, 13), (4, 26), (5, 30)]
    table = report.to_markdown()
    assert "| 4 | 79.0 (26.00 GFLOPs) | 78.0 (13.00 GFLOPs, 250.0 ms) |" in table
    assert "| **recommended**, frontier |" in table
    assert SweepReport.from_dict(report.to_dict()) == report


def test_a_point_of_several_directories_is_recommended_by_its_own_name() -> None:
    points = make_model("distilled for one depth", [0.5, 0.79, 0.79])
    rows = [replace(row, name=name) for row, name in zip(points.rows[1:], ("two", "three"), strict=True)]
    report = make_report(FULL, replace(points, rows=tuple(rows)))
    assert (report.recommendation.model, report.recommendation.k) == ("two", 2)
    assert report.recommendation.reason.startswith("k = 2 of two: score 79.0")
    table = report.to_markdown()
    assert "| 2 | two | 1,200,000,000 |" in table
    assert table.count("| **recommended** |") == 1


def with_pairs() -> SweepReport:
    """Trained at 1, 3 and 4 layers; a text query takes as many milliseconds as layers, and 10 more."""
    rows = [row for row in make_model("", [0.5, 0.0, 0.7, 0.78]).rows if row.k != 2]
    rows = [replace(row, seconds_text=(10 + row.k) / 1000) for row in rows]
    qualities = {(1, 1): 0.5, (1, 3): 0.65, (1, 4): 0.64, (3, 3): 0.7, (3, 4): 0.77, (4, 4): 0.78}
    pairs = [DepthPair(q, c, {"local": {"score": value}}) for (q, c), value in qualities.items()]
    return make_report(FULL, SweptModel("any, elastic", tuple(rows), pairs=tuple(pairs)))


@pytest.mark.parametrize(
    ("max_query_ms", "keep", "pair", "why"),
    [
        (None, 0.97, (4, 4), "It has the quickest query of those that keep 0.97 of the full model's quality."),
        (None, 0.96, (3, 4), "of those that keep 0.96"),  # 0.768 of 0.8
        (None, 0.8, (1, 3), "of those that keep 0.8"),  # 0.64 or more: of both the cheaper candidates
        (None, 0.6, (1, 1), "of those that keep 0.6"),
        (11, 0.8, (1, 3), "of those that keep 0.8 of the full model's quality within 11 ms a text query."),
        (13.5, 0.97, (3, 4), "Nothing keeps 0.97 of the full model's quality within 13.5 ms a text query: this is the"),
        (10.5, 0.1, (1, 3), "Nothing is within 10.5 ms a text query: this is the best of the quickest."),
        (None, 1, (4, 4), "Nothing keeps 1 of the full model's quality: this is the best there is."),
    ],
)
def test_the_recommended_pair(max_query_ms: float | None, keep: float, pair: tuple[int, int], why: str) -> None:
    report = replace(with_pairs(), max_query_ms=max_query_ms, keep=keep)
    found = report.recommended_pair
    assert found is not None
    assert found == report.recommend_pair(max_query_ms, keep)
    assert (found.query_k, found.candidate_k, found.model) == (*pair, "any, elastic")
    assert why in found.reason


def test_of_equal_pairs_the_better() -> None:
    report = with_pairs()
    better = [replace(pair, quality={"local": {"score": 0.79}}) for pair in report.models[1].pairs]
    report = replace(report, models=(*report.models, replace(report.models[1], name="better", pairs=tuple(better))))
    found = report.recommend_pair(keep=0.6)
    assert found is not None
    assert (found.query_k, found.candidate_k, found.model) == (1, 1, "better")


def test_pairs_are_told_and_kept() -> None:
    assert make_report().recommended_pair is None
    report = replace(with_pairs(), keep=0.96)
    # Nobody has trained it at two layers: of the trained depths the smallest within the budget, and of all models.
    assert (report.recommend("1.35B", 0.6).model, report.recommend("1.35B", 0.6).k) == ("any, elastic", 1)
    table = report.to_markdown()
    assert (
        "| k of queries | ms, text | candidates at k = 1 (14.00 GFLOPs) | candidates at k = 3 (22.00 GFLOPs) |" in table
    )
    assert "| 1 | 11.0 | 50.0 | 65.0 | 64.0 |\n| 3 | 13.0 |  | 70.0 | **77.0** |\n| 4 | 14.0 |  |  | 78.0 |" in table
    told = (
        "**Recommended pair: queries at k = 3, candidates at k = 4.** Queries at 3 and candidates at 4 layers of any,"
    )
    assert (
        f"{told} elastic: score 77.0, of the full model 80.0; 13.0 ms a text query, 26.00 GFLOPs a candidate" in table
    )
    values = report.to_dict()
    assert values["recommended_pair"]["query_k"] == 3
    assert SweepReport.from_dict(values) == report
    # As files were before there were pairs.
    values = make_report().to_dict()
    del values["max_query_ms"], values["recommended_pair"]
    for model in values["models"]:
        del model["pairs"]
        for row in model["rows"]:
            del row["seconds_text"], row["name"]
    assert SweepReport.from_dict(values) == make_report()


@pytest.mark.parametrize("qualities", [[0.5], [0.0] * 3, [0.01 * k for k in range(1, 29)]])
def test_any_curve_is_drawn(qualities: list[float], tmp_path: Path) -> None:
    swept = make_model("full", qualities, cka=None)
    # With DeepStack, the models that keep their last layer begin at k = 4.
    report = make_report(swept, replace(swept, name="last", rows=swept.rows[3:] or swept.rows))
    report.plot(tmp_path / "one.png")
    at_limits().plot(tmp_path / "two.png")
    with_pairs().plot(tmp_path / "three.png")
    assert (tmp_path / "one.png").stat().st_size > 0
