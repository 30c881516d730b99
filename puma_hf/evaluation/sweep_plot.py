"""The picture of a layer sweep: quality against FLOPs, and how close each depth is to the full model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puma_hf.evaluation.sweep_report import SweepReport, SweepRow

# Okabe and Ito's colours, which colour-blind people tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _MUTED, _GRID = "#1f2328", "#6b7280", "#e5e7eb"
_UNITS = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
_FEW = 12  # points of a line that can each bear a label
_SMALL = 9


def load_matplotlib() -> Any:
    """matplotlib's `Figure`.

    Raises:
        ImportError: If matplotlib is not installed; the message says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "The picture of a sweep needs matplotlib, which is not installed. Run `pip install 'puma-hf[plot]'`, or "
            "leave out the output."
        ) from error
    return Figure


def draw(report: SweepReport, path: Path) -> None:
    """Write the picture of a report; its suffix says in which format.

    Args:
        report: The report.
        path: The file.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    # A figure of its own draws with Agg and leaves pyplot, and so a user's windows, alone.
    figure = load_matplotlib()(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    for axes in (left, right):
        _clean(axes)
    _draw_quality(left, report)
    _draw_closeness(right, report)
    size = f"{report.num_queries:,} queries, {report.num_candidates:,} candidates"
    title = f"Layer sweep on {report.data} ({report.split} split, {size})\n{fill(_recommended(report), 130)}"
    figure.suptitle(title, x=0.008, ha="left", fontsize=11, color=_INK, linespacing=1.5)
    # The file names no version and no date: the same figures make the same picture.
    figure.savefig(path, dpi=150, metadata={"Software": None} if path.suffix.lower() == ".png" else None)


def _draw_quality(axes: Any, report: SweepReport) -> None:
    unit, size = next((unit, size) for unit, size in _UNITS if report.full.flops_image >= size)
    best, full = report.recommendation, 100 * report.quality(report.full)
    highest = max(100 * report.quality(row) for model in report.models for row in model.rows)
    for number, model in enumerate(report.models):
        colour, knee = _COLOURS[number % len(_COLOURS)], report.knee(number)
        xs = [row.flops_image / size for row in model.rows]
        ys = [100 * report.quality(row) for row in model.rows]
        label = f"{model.name} (knee at k = {knee})" if knee else model.name
        axes.plot(xs, ys, color=colour, marker="o", markersize=4.5, linewidth=1.8, label=label, zorder=3)
        chosen = best.k if best.model == model.name else None
        _number_points(axes, xs, ys, colour, {knee, chosen}, first=number == 0)
        if knee:
            _ring(axes, xs[knee - 1], ys[knee - 1], "D", 11, colour)
        if chosen:
            _ring(axes, xs[chosen - 1], ys[chosen - 1], "o", 17, _INK)
    axes.margins(x=0.07)
    axes.set_ylim(0, 1.1 * max(highest, full, 1.0))
    if _comparable(report):
        _shade_budget(axes, report, size)
    _level(axes, full, "--", f"full model, {full:.1f}", "bottom")
    _level(axes, report.keep * full, ":", f"{100 * report.keep:.3g} % of it", "top")
    axes.set_xlabel(f"{unit}FLOPs of one image ({report.image_tokens} visual tokens)")
    axes.set_ylabel(f"{report.metric}, {report.pool} pools, %")
    _add_text_axis(axes, report, size)
    axes.plot([], [], "D", color="none", markeredgecolor=_MUTED, markersize=8, label="knee")
    axes.plot([], [], "o", color="none", markeredgecolor=_INK, markersize=11, label=f"recommended: k = {best.k}")
    axes.legend(frameon=False, fontsize=_SMALL, loc="best")


def _draw_closeness(axes: Any, report: SweepReport) -> None:
    for number, model in enumerate(report.models):
        colour = _COLOURS[number % len(_COLOURS)]
        _line(axes, model.rows, [row.cka for row in model.rows], colour, "-", "o")
        _line(axes, model.rows, [row.cosine for row in model.rows], colour, "--", "s")
    axes.plot([], [], color=_MUTED, marker="o", markersize=4, label="linear CKA")
    axes.plot([], [], color=_MUTED, marker="s", markersize=4, linestyle="--", label="mean cosine")
    axes.set_xlim(left=0.5)
    axes.set_ylim(top=1.03)
    axes.set_xlabel("k, decoder layers kept")
    axes.set_ylabel("closeness to the full model's embeddings")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=_SMALL, loc="lower right")


def _line(
    axes: Any, rows: Sequence[SweepRow], values: Sequence[float | None], colour: str, style: str, marker: str
) -> None:
    points = [(row.k, value) for row, value in zip(rows, values, strict=True) if value is not None]
    if points:
        ks, shown = zip(*points, strict=True)
        axes.plot(ks, shown, color=colour, linestyle=style, marker=marker, markersize=4, linewidth=1.6)


def _number_points(
    axes: Any, xs: Sequence[float], ys: Sequence[float], colour: str, marked: set[int | None], *, first: bool
) -> None:
    """Write k beside the points: all of a few, some of many, always those that are marked."""
    every = -(-len(xs) // _FEW)
    shown = [k for k in range(1, len(xs) + 1) if k in marked or (k % every == 0 and not {k - 1, k + 1} & marked)]
    if every == 1:
        shown = list(range(1, len(xs) + 1))
    for k in shown:
        away = 13 if k in marked else 6
        # The first line has its numbers on the right, and below where there is room; the others above on the left.
        below = first and ys[k - 1] > 0.08 * max(ys)
        axes.annotate(
            f"k = {k}" if first and k == every == 1 else f"{k}", (xs[k - 1], ys[k - 1]),
            xytext=(away - 2 if first else 2 - away, -away - 5 if below else away - 3), textcoords="offset points",
            ha="left" if first else "right", fontsize=_SMALL, color=colour,
        )  # fmt: skip


def _ring(axes: Any, x: float, y: float, marker: str, size: float, colour: str) -> None:
    axes.plot(x, y, marker, markersize=size, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.7)


def _recommended(report: SweepReport) -> str:
    best, full = report.recommendation, report.full
    row = next(model for model in report.models if model.name == best.model).rows[best.k - 1]
    kept = "" if best.kept is None else f" keeps {_percent(best.kept)} of the {report.metric},"
    return (
        f"Recommended: k = {best.k} of {best.model}{kept} with {_percent(row.parameters / full.parameters)} of the "
        f"parameters, {_percent(row.flops_image / full.flops_image)} (image) and "
        f"{_percent(row.flops_text / full.flops_text)} (text) of the FLOPs"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _shade_budget(axes: Any, report: SweepReport, size: float) -> None:
    """Grey what the budget leaves out: all beyond the middle between the last depth that fits and the next."""
    rows = report.models[0].rows
    over = [row.k for row in rows if report.max_params is not None and row.parameters > report.max_params]
    if not over or over[0] == 1 or report.max_params is None:
        return
    edge = (rows[over[0] - 2].flops_image + rows[over[0] - 1].flops_image) / 2 / size
    right = axes.get_xlim()[1]
    label = f"over the budget of {report.max_params:,} parameters"
    axes.axvspan(edge, right, color=_GRID, alpha=0.5, linewidth=0, zorder=0, label=label)
    axes.set_xlim(right=right)


def _level(axes: Any, height: float, style: str, text: str, side: str) -> None:
    axes.axhline(height, color=_MUTED, linewidth=1, linestyle=style, zorder=1)
    axes.annotate(
        text, (0.008, height), xycoords=("axes fraction", "data"), xytext=(0, 3 if side == "bottom" else -3),
        textcoords="offset points", va=side, fontsize=_SMALL, color=_MUTED,
    )  # fmt: skip


def _add_text_axis(axes: Any, report: SweepReport, size: float) -> None:
    """FLOPs of a text on top: both costs grow by the same amount a layer, so one scale is the other, moved."""
    rows = report.models[0].rows
    images = rows[-1].flops_image - rows[0].flops_image
    if not images or not _comparable(report):
        return
    unit, text_size = next((unit, text_size) for unit, text_size in _UNITS if report.full.flops_text >= text_size)
    slope = (rows[-1].flops_text - rows[0].flops_text) / images
    first_image, first_text = rows[0].flops_image, rows[0].flops_text
    top = axes.secondary_xaxis(
        "top",
        functions=(
            lambda x: (first_text + slope * (x * size - first_image)) / text_size,
            lambda x: (first_image + (x * text_size - first_text) / slope) / size,
        ),
    )
    top.set_xlabel(f"{unit}FLOPs of one text ({report.text_tokens} tokens)", color=_INK)
    top.tick_params(colors=_MUTED, labelsize=_SMALL)
    top.spines["top"].set_visible(False)


def _comparable(report: SweepReport) -> bool:
    """Whether k layers cost the same in every model."""
    full, *others = report.models
    return all(
        (ours.flops_image, ours.flops_text) == (theirs.flops_image, theirs.flops_text)
        for other in others
        for ours, theirs in zip(full.rows, other.rows, strict=False)
    )


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=_SMALL)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_INK)
