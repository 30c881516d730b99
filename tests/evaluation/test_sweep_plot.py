from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from puma_hf.evaluation import sweep_plot
from puma_hf.evaluation.sweep_plot import draw, load_matplotlib
from tests.evaluation.sweep_reports import make_model, make_report

FULL = make_model("full", [0.2, 0.7, 0.78, 0.79, 0.8])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    drawn: list[Any] = []
    figure_class = load_matplotlib()

    def make(**options: Any) -> Any:
        drawn.append(figure_class(**options))
        return drawn[-1]

    monkeypatch.setattr(sweep_plot, "load_matplotlib", lambda: make)
    return drawn


def texts(axes: Any) -> str:
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    return "\n".join([*(text.get_text() for text in axes.texts), *legend, axes.get_xlabel(), axes.get_ylabel()])


def test_what_the_picture_says(figures: list[Any], tmp_path: Path) -> None:
    draw(make_report(FULL, make_model("distilled", [0.3, 0.6, 0.79])), tmp_path / "sweep.png")
    left, right = figures[0].axes
    said = texts(left)
    assert figures[0].get_suptitle().splitlines() == [
        "Layer sweep on toys (val split, 400 queries, 2,000 candidates)",
        "Recommended: k = 3 of distilled keeps 99 % of the score, with 87 % of the parameters, 73 % (image) and 60 % "
        "(text) of the FLOPs",
    ]
    assert "recommended: k = 3" in said
    (ring,) = [line for line in left.lines if line.get_markersize() == 17]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == pytest.approx((22, 79))
    assert "full model, 80.0" in said
    assert "97 % of it" in said
    assert "full (knee at k = 2)" in said
    assert "GFLOPs of one image (256 visual tokens)" in said
    line = next(line for line in left.lines if line.get_label() == "full (knee at k = 2)")
    assert line.get_xdata().tolist() == pytest.approx([14, 18, 22, 26, 30])
    assert line.get_ydata().tolist() == pytest.approx([20, 70, 78, 79, 80])
    assert len([line for line in right.lines if len(line.get_xdata())]) == 4  # CKA and cosine of two models
    assert "linear CKA" in texts(right)
    # The axis on top: 1 GFLOP a text where an image costs 14, 5 where it costs 30.
    to_text = left.child_axes[0]._functions[0]
    assert (to_text(14), to_text(30)) == pytest.approx((1, 5))


def test_no_axis_for_texts_where_models_cost_differently(figures: list[Any], tmp_path: Path) -> None:
    draw(make_report(FULL, make_model("wide", [0.3, 0.6], flops_text=7)), tmp_path / "sweep.png")
    assert figures[0].axes[0].child_axes == []


def test_the_budget_is_shaded(figures: list[Any], tmp_path: Path) -> None:
    draw(make_report(FULL, max_params=1_250_000_000), tmp_path / "sweep.png")
    axes = figures[0].axes[0]
    assert "over the budget of 1,250,000,000 parameters" in texts(axes)
    assert axes.patches[0].get_x() == pytest.approx(20)  # between k = 2 at 18 and k = 3 at 22
    draw(make_report(FULL, max_params=2_000_000_000), tmp_path / "sweep.png")
    assert not figures[1].axes[0].patches  # nothing is over it


@pytest.mark.parametrize(
    "qualities",
    [[0.5], [0.0, 0.0, 0.0], [0.01 * k for k in range(1, 29)]],
)
def test_any_curve_is_drawn(qualities: list[float], figures: list[Any], tmp_path: Path) -> None:
    draw(make_report(make_model("full", qualities, cka=None)), tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size == (1800, 780)
    numbers = [text.get_text() for text in figures[0].axes[0].texts if text.get_text().removeprefix("k = ").isdigit()]
    assert len(numbers) <= 14  # they do not cover each other


def test_the_same_figures_make_the_same_file(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        draw(make_report(), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*pip install 'puma-hf\[plot\]'"):
        draw(make_report(), tmp_path / "sweep.png")
