from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from puma_hf.evaluation.sweep_report import SweepReport, si
from tests.evaluation.sweep_reports import make_model, make_report


def test_knees_and_recommendation() -> None:
    report = make_report(make_model("full", [0.2, 0.7, 0.78, 0.79, 0.8]), make_model("distilled", [0.3, 0.79]))
    assert (report.full.k, report.knee(), report.knee(1)) == (5, 2, None)
    best = report.recommendation
    assert (best.model, best.k) == ("distilled", 2)
    assert report.recommend(keep=0.97) == best
    assert report.recommend("1.15B").k == 1
    assert report.recommend(1.15e9).model == "distilled"
    assert "score 79.0" in best.reason
    assert report.margin == pytest.approx(1.96 * math.sqrt((322 / 404) * (82 / 404) / 404))
    assert best.reason.endswith("With 400 queries a score is known to about 3.9 points either way: choose with more "
                                "queries if that decides.")  # fmt: skip


def test_the_margin_knows_small_tasks_and_is_never_nothing() -> None:
    one, even, uneven = (make_report(task_queries=counts).margin for counts in ((400,), (200, 200), (390, 10)))
    assert one == even
    assert uneven == pytest.approx(1.96 * math.sqrt((33.2 / 43) * (9.8 / 43) / 43), rel=1e-3)  # as of 39 queries
    assert make_report(task_queries=(400, 0)).margin == one
    for quality in (0.0, 1.0):
        report = make_report(make_model("full", [quality]), task_queries=(16,))
        assert report.margin == pytest.approx(1.96 * math.sqrt(0.1 * 0.9 / 20))


def test_the_budget_and_the_share_that_were_asked_for() -> None:
    report = make_report(keep=0.9, max_params=1_250_000_000)
    assert report.recommendation == report.recommend("1250M", 0.9)
    assert (report.recommendation.k, report.recommend().k) == (2, 3)


def test_the_metric_and_the_pool_decide() -> None:
    report = make_report()
    rows = [
        replace(row, quality=row.quality | {"global": {"score": 0.1 * (6 - row.k)}}) for row in report.models[0].rows
    ]
    swept = replace(report, models=(replace(report.models[0], rows=tuple(rows)),), pool="global")
    assert [swept.quality(row) for row in rows] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert swept.recommendation.k == 1
    assert report.quality(replace(report, metric="hit@1").full) == 0.8


def test_json_round_trip() -> None:
    report = make_report(make_model("full", [0.1, 0.5, 0.6]), make_model("wide", [0.2], cosine=None, cka=None))
    values = report.to_dict()
    assert SweepReport.from_dict(json.loads(json.dumps(values))) == report
    assert values["knees"] == {"full": 2, "wide": None}
    assert values["recommendation"]["k"] == 3
    assert values["models"][1]["rows"][0]["cosine"] is None


def test_markdown() -> None:
    text = make_report().to_markdown()
    assert text.startswith("Layer sweep on toys, val split, toys_task0, 400 queries, 2,000 candidates, local pools.")
    assert "FLOPs of a text of 64 tokens and of an image of 256 visual tokens" in text
    lines = text.splitlines()
    assert lines[4] == (
        "| k | parameters | bytes | FLOPs, text | FLOPs, image | of full | score | hit@1 | ndcg@10 | kept | CKA | "
        "cosine |  |"
    )
    assert lines[7] == (
        "| 2 | 1,200,000,000 | 2,400,000,000 | 2 G | 18 G | 60% | 70.0 | 35.0 | 17.5 | 87.5 | 0.200 | 0.100 | knee |"
    )
    assert lines[8].endswith("| 97.5 | 0.300 | 0.150 | **recommended** |")
    assert text.endswith(f"**Recommended: k = 3.** {make_report().recommendation.reason}\n")
    assert all(line.count("|") == 14 for line in lines if line.startswith("|"))


def test_markdown_of_what_is_not_defined() -> None:
    text = make_report(make_model("full", [0.0, 0.0], cka=None, cosine=None)).to_markdown()
    assert "| 0.0 | 0.0 | 0.0 |  |  |  |  |" in text
    assert "no share of it can be kept" in text


def test_files(tmp_path: Path) -> None:
    report = make_report()
    report.save(tmp_path / "new" / "sweep")
    assert {path.name for path in (tmp_path / "new" / "sweep").iterdir()} == {"sweep.json", "sweep.md", "sweep.png"}
    assert json.loads((tmp_path / "new" / "sweep" / "sweep.json").read_text()) == report.to_dict()
    assert (tmp_path / "new" / "sweep" / "sweep.md").read_text() == report.to_markdown()


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sweep.png"
    make_report().plot(path)
    before = path.read_bytes()

    def fail(report: SweepReport, draft: Path) -> None:
        draft.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("puma_hf.evaluation.sweep_plot.draw", fail)
    with pytest.raises(OSError, match="disk full"):
        make_report().plot(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweep.png"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (1_543_714_304, "1.54 G"), (999_700, "1000 k"), (2.5e15, "2.5 P")],
)
def test_units(number: float, text: str) -> None:
    assert si(number) == text
