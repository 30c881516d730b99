"""What a layer sweep found: a row for each model and depth, the k to take, and both as JSON, Markdown and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from puma_hf.configs import parse_parameters
from puma_hf.files import write_json, write_whole

_EPSILON = 1e-9  # below this, two qualities are one
_UNITS = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
# Okabe and Ito's colours, which colour-blind people tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _MUTED, _GRID = "#1f2328", "#6b7280", "#e5e7eb"
_FEW = 12  # points of a line that can each bear a label
_SMALL = 9


@dataclass(frozen=True)
class SweepRow:
    """A model cut to `k` layers.

    `cka` and `cosine` are to the full model's embeddings, None where they are not defined. `quality` holds, for each
    pool, the mean over its tasks of each metric and of the "score"; `scores` the score of each task.
    """

    k: int
    parameters: int
    bytes: int
    flops_text: int
    flops_image: int
    cka: float | None
    cosine: float | None
    quality: dict[str, dict[str, float]]
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True)
class SweptModel:
    """A model's rows: one for each k = 1 .. L, or for each k that can keep the last layer, too."""

    name: str
    rows: tuple[SweepRow, ...]


@dataclass(frozen=True)
class Recommendation:
    """A choice of k, how it was made, the model to cut, and its share of the full model's quality if that has any."""

    k: int
    reason: str
    model: str = ""
    kept: float | None = None


def knee(costs: Sequence[float], qualities: Sequence[float]) -> int | None:
    """Where a curve of quality against rising costs bends most: the point farthest above its chord.

    Both axes are scaled to their own ranges first, so that units do not matter.

    Returns:
        The index of the knee, the cheapest of several; None if no point lies above the chord.

    Example:
        >>> knee([1, 2, 3, 4], [0.1, 0.7, 0.8, 0.9])
        1

    Source: the idea of Kneedle, Satopää et al., ICDCS Workshops 2011, without its smoothing.
    """
    span = max(qualities, default=0.0) - min(qualities, default=0.0)
    if len(costs) < 3 or span <= _EPSILON:
        return None
    slope = (qualities[-1] - qualities[0]) / (costs[-1] - costs[0])
    points = zip(costs, qualities, strict=True)
    # Rounded, so that of points equally far above the chord the first wins, whatever the last digits say.
    above = [round((quality - qualities[0] - slope * (cost - costs[0])) / span, 9) for cost, quality in points]
    return above.index(max(above)) if max(above) > _EPSILON else None


@dataclass(frozen=True)
class SweepReport:
    """What every depth of one or more models is worth, and what it costs.

    Args:
        models: The full model first, then those it is compared with; with `keep_last` each comes twice, the second
            time with its last layer kept.
        data: Name of the dataset.
        data_hash: Hash of its content where it was drawn from a larger one; else None.
        split: Its split.
        tasks: Names of the tasks.
        num_queries: Queries of all tasks to which something in the pool is relevant.
        task_queries: How many of them each task has.
        num_candidates: Distinct candidates.
        pool: The pool whose quality decides.
        metric: The metric that decides.
        text_tokens: Tokens of the text whose operations were counted.
        image_tokens: Visual tokens of the image whose operations were counted.
        keep: Share of the full model's quality to keep.
        max_params: Budget of parameters; None for none.
    """

    models: tuple[SweptModel, ...]
    data: str
    data_hash: str | None
    split: str
    tasks: tuple[str, ...]
    num_queries: int
    task_queries: tuple[int, ...]
    num_candidates: int
    pool: str
    metric: str
    text_tokens: int
    image_tokens: int
    keep: float = 0.97
    max_params: int | None = None

    @property
    def full(self) -> SweepRow:
        """The full model, which the others are measured against."""
        return self.models[0].rows[-1]

    @property
    def recommendation(self) -> Recommendation:
        """The recommendation for the budget and the share that the sweep was asked for."""
        return self.recommend(self.max_params, self.keep)

    def quality(self, row: SweepRow) -> float:
        """The quality that decides."""
        return row.quality[self.pool][self.metric]

    def knee(self, model: int = 0) -> int | None:
        """The k at which quality against FLOPs bends most, of the model of this number; None if the curve has none."""
        rows = self.models[model].rows
        found = knee([row.flops_image for row in rows], [self.quality(row) for row in rows])
        return None if found is None else rows[found].k

    @property
    def margin(self) -> float:
        """About half of the 95 % interval of the full model's quality, if other queries had been drawn."""
        # A query counts as 0 or 1, which vary most. Tasks weigh the same, so a small one adds much. Two hits and two
        # misses are added (Agresti and Coull, 1998): no figure is sure because all queries were alike. Differences
        # between depths vary less, as they answer the same queries.
        counts = [count for count in self.task_queries if count]
        number = len(counts) ** 2 / sum(1 / count for count in counts) + 4  # as many queries, were all in one task
        mean = (self.quality(self.full) * (number - 4) + 2) / number
        return 1.96 * math.sqrt(mean * (1 - mean) / number)

    def recommend(self, max_params: str | float | None = None, keep: float = 0.97) -> Recommendation:
        """The smallest k, of any of the models, that keeps enough of the full model's quality.

        Args:
            max_params: Budget of parameters, such as "4B", "800M" or a number; None for none.
            keep: Share of the full model's quality to keep, above 0 and at most 1.

        Returns:
            The choice, and in plain words how it was decided. If nothing within the budget keeps enough, it is the best
            there, or the smallest of all, and the reason says so.
        """
        budget = math.inf if max_params is None else parse_parameters(max_params)
        within = "" if max_params is None else f" within the budget of {budget:,} parameters"
        # The smallest first, and of equals the better: (parameters, k, minus quality, model).
        every = [(row, model.name) for model in self.models for row in model.rows]
        rows = sorted((row.parameters, row.k, -self.quality(row), name) for row, name in every)
        full, fitting = self.quality(self.full), [row for row in rows if row[0] <= budget]
        enough = [row for row in rows if -row[2] >= keep * full - _EPSILON]
        best = min(fitting or rows[:1], key=lambda row: (row[2], row[0]))
        if not fitting:
            why = f"Nothing is{within}: this is the smallest."
        elif full <= 0:
            why = f"The full model's {self.metric} is 0, so no share of it can be kept. "
            why += f"This is the best there is{within}. Look at the data, or at the model, before choosing."
        elif enough and enough[0] in fitting:
            best = enough[0]
            why = f"It is the smallest that keeps at least {_percent(keep)} of the full model{within}."
            before = [row for row in rows if (row[1], row[3]) == (best[1] - 1, best[3])]
            why += "".join(f" k = {k} keeps {_percent(-worse / full)}." for _, k, worse, _ in before)
        else:
            why = f"None{within} keeps {_percent(keep)} of the full model; this is the best there."
            for size, k, _, name in enough[:1]:
                why += f" To keep it takes k = {k} of {name}, of {size:,} parameters."
        size, k, worst, name = best
        kept, worth = None, "."
        if full > 0:
            kept, share = -worst / full, _percent(size / self.full.parameters)
            worth = f": {self.metric} {-100 * worst:.1f}, {_percent(kept)} of the full model's {100 * full:.1f}, with "
            worth += f"{size:,} parameters, {share} of its."
        known = f"With {self.num_queries:,} queries a {self.metric} is known to about {100 * self.margin:.1f} points "
        known += "either way: choose with more queries if that decides."
        return Recommendation(k, f"k = {k} of {name}{worth} {why} {known}", name, kept)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold, and what follows: "knees" and "recommendation"."""
        knees = {model.name: self.knee(number) for number, model in enumerate(self.models)}
        values = asdict(self) | {"knees": knees, "recommendation": asdict(self.recommendation)}
        return dict(json.loads(json.dumps(values, allow_nan=False)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SweepReport:
        """The report that `to_dict` wrote; knees and recommendation are found anew."""
        fields = {name: value for name, value in values.items() if name not in ("knees", "recommendation")}
        models = [SweptModel(one["name"], tuple(SweepRow(**row) for row in one["rows"])) for one in fields["models"]]
        lists = {name: tuple(fields[name]) for name in ("tasks", "task_queries")}
        return cls(**fields | lists | {"models": tuple(models)})

    def to_markdown(self) -> str:
        """The tables, one a model, and the recommendation; quality in percent."""
        tasks = f"{len(self.tasks)} tasks" if len(self.tasks) > 1 else self.tasks[0]
        parts = [
            f"Layer sweep on {self.data}, {self.split} split, {tasks}, {self.num_queries:,} queries, "
            f'{self.num_candidates:,} candidates, {self.pool} pools. Quality in percent; "kept" is the share of the '
            f"full model's {self.metric}. FLOPs of a text of {self.text_tokens} tokens and of an image of "
            f"{self.image_tokens} visual tokens. CKA and cosine are to the full model's embeddings.\n"
        ]
        best = self.recommendation
        for number, model in enumerate(self.models):
            parts.append(f"**{model.name}**\n\n{self._table(model, self.knee(number), best)}")
        parts.append(f"**Recommended: k = {best.k}.** {best.reason}\n")
        return "\n".join(parts)

    def _table(self, model: SweptModel, knee_at: int | None, best: Recommendation) -> str:
        full, known = self.quality(self.full), self.full.quality[self.pool]
        shown = dict.fromkeys(name for name in (self.metric, "hit@1", "ndcg@10") if name in known)
        head = ["k", "parameters", "bytes", "FLOPs, text", "FLOPs, image", "of full", *shown, "kept", "CKA", "cosine"]
        lines = [[*head, ""], [*(["---:"] * len(head)), "---"]]
        for row in model.rows:
            cells = [str(row.k), f"{row.parameters:,}", f"{row.bytes:,}", si(row.flops_text), si(row.flops_image)]
            cells += [f"{row.flops_image / self.full.flops_image:.0%}"]
            cells += [f"{100 * row.quality[self.pool][name]:.1f}" for name in shown]
            cells += [f"{100 * self.quality(row) / full:.1f}" if full else ""]
            cells += ["" if value is None else f"{value:.3f}" for value in (row.cka, row.cosine)]
            marks = {"knee": row.k == knee_at, "**recommended**": (best.model, best.k) == (model.name, row.k)}
            lines.append([*cells, ", ".join(mark for mark, holds in marks.items() if holds)])
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

    def plot(self, path: str | Path) -> None:
        """Draw quality against FLOPs, and CKA and cosine by k, into a PNG, SVG or PDF file; needs matplotlib."""
        write_whole(Path(path), _drawn(self, Path(path).suffix.lstrip(".").lower()))

    def save(self, folder: str | Path) -> None:
        """Write sweep.json, sweep.md and sweep.png, for which matplotlib is needed; each whole or not at all."""
        write_json(Path(folder, "sweep.json"), self.to_dict())
        write_whole(Path(folder, "sweep.md"), self.to_markdown().encode())
        self.plot(Path(folder, "sweep.png"))


def si(number: float) -> str:
    """A number with three digits and a unit, such as "1.54 G".

    Example:
        >>> si(1_543_714_304), si(870), si(93_000_000)
        ('1.54 G', '870', '93 M')
    """
    unit, size = _unit(number)
    # Three digits of 999,700 would be 1e+03.
    return (f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}").rstrip()


def _unit(number: float) -> tuple[str, float]:
    return next(((unit, size) for unit, size in _UNITS if number >= size), _UNITS[-1])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace(".0 %", " %")


# --- The picture ----------------------------------------------------------------------------------------------------


def load_matplotlib() -> Any:
    """matplotlib's `Figure`, or an ImportError that says how to get it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = "Run `pip install 'puma-hf[plot]'`, or leave out the output."
        raise ImportError(f"The picture of a sweep needs matplotlib. {remedy}") from error
    return Figure


def _drawn(report: SweepReport, file_format: str) -> bytes:
    """The picture of a report as the bytes of a file: quality against operations, and closeness by k."""
    # A figure of its own draws with Agg and leaves pyplot, and so a user's windows, alone.
    figure = load_matplotlib()(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    best, full, unit, size = report.recommendation, report.full, *_unit(report.full.flops_image)
    highest = 0.01
    for number, model in enumerate(report.models):
        colour, knee_at, ks = _COLOURS[number % len(_COLOURS)], report.knee(number), [row.k for row in model.rows]
        xs, ys = [row.flops_image / size for row in model.rows], [100 * report.quality(row) for row in model.rows]
        label = f"{model.name} (knee at k = {knee_at})" if knee_at else model.name
        left.plot(xs, ys, "o-", color=colour, markersize=4.5, linewidth=1.8, label=label)
        highest = max(highest, *ys)
        # The first line has its numbers below on the right, the others above on the left.
        place = {"xytext": (6, -14), "ha": "left"} if number == 0 else {"xytext": (-6, 8), "ha": "right"}
        for row, x, y in zip(model.rows, xs, ys, strict=True):
            is_chosen = (model.name, row.k) == (best.model, best.k)
            for holds, mark, width, edge in ((row.k == knee_at, "D", 11, colour), (is_chosen, "o", 17, _INK)):
                if holds:
                    left.plot(x, y, mark, markersize=width, markeredgecolor=edge, markerfacecolor="none")
            if len(ks) <= _FEW or row.k % 4 == 0 or is_chosen:
                left.annotate(row.k, (x, y), textcoords="offset points", color=colour, fontsize=_SMALL, **place)
        for column, style in (("cka", "o-"), ("cosine", "s--")):
            values = [getattr(row, column) for row in model.rows]
            if None not in values:
                right.plot(ks, values, style, color=colour, markersize=4, linewidth=1.6)
    for share, style in ((1.0, "--"), (report.keep, ":")):
        height = 100 * share * report.quality(full)
        label = f"{share:.3g} x full model, {height:.1f}"
        left.axhline(height, color=_MUTED, linewidth=1, linestyle=style, label=label)
    left.plot([], [], "D", color="none", markeredgecolor=_MUTED, label="knee")
    left.plot([], [], "o", color="none", markeredgecolor=_INK, markersize=11, label=f"recommended: k = {best.k}")
    right.plot([], [], "o-", color=_MUTED, label="linear CKA")
    right.plot([], [], "s--", color=_MUTED, label="mean cosine")
    xlabel = f"{unit}FLOPs of one image ({report.image_tokens} visual tokens)"
    left.set(ylim=(0, 1.1 * highest), xlabel=xlabel, ylabel=f"{report.metric}, {report.pool} pools, %")
    right.set(xlabel="k, decoder layers kept", ylabel="closeness to the full model's embeddings")
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=_SMALL)
    figure.suptitle(_title(report), x=0.008, ha="left", fontsize=11, color=_INK, linespacing=1.5, wrap=True)
    file = BytesIO()
    # The file names no version and no date: the same figures make the same picture.
    figure.savefig(file, format=file_format, dpi=150, metadata={"Software": None} if file_format == "png" else None)
    return file.getvalue()


def _title(report: SweepReport) -> str:
    best, full = report.recommendation, report.full
    row = next(row for model in report.models if model.name == best.model for row in model.rows if row.k == best.k)
    kept = "" if best.kept is None else f" keeps {best.kept:.0%} of the {report.metric},"
    return (
        f"Layer sweep on {report.data} ({report.split} split, {report.num_queries:,} queries, "
        f"{report.num_candidates:,} candidates)\nRecommended: k = {best.k} of {best.model}{kept} with "
        f"{row.parameters / full.parameters:.0%} of the parameters, {row.flops_image / full.flops_image:.0%} (image) "
        f"and {row.flops_text / full.flops_text:.0%} (text) of the FLOPs"
    )
