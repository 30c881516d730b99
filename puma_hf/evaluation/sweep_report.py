"""What a layer sweep found: a row for each model and depth, the k to take, and both as JSON, Markdown and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from puma_hf.configs import parse_parameters
from puma_hf.evaluation.results import markdown_table
from puma_hf.files import write_json, write_whole

_EPSILON = 1e-9  # below this, two qualities are one
_Option = TypeVar("_Option", bound=tuple[Any, ...])


@dataclass(frozen=True)
class SweepRow:
    """A model cut to `k` layers.

    `cka` and `cosine` are to the full model's embeddings, None where they are not defined. `quality` holds, for each
    pool, the mean over its tasks of each metric and of the "score"; `scores` the score of each task. `seconds_image`,
    the time of one image's forward pass, was measured if pixel limits were asked for, `seconds_text`, that of a text
    from its words to its embedding, where there are pairs. `name` is the model's, where a curve joins several.
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
    seconds_image: float | None = None
    seconds_text: float | None = None
    name: str | None = None

    @property
    def ms_text(self) -> float:
        """Milliseconds of a text; NaN if they were not measured."""
        return 1000 * (math.nan if self.seconds_text is None else self.seconds_text)


@dataclass(frozen=True)
class DepthPair:
    """Queries of an elastic model at `query_k` layers against candidates at `candidate_k`; `quality` as in a row."""

    query_k: int
    candidate_k: int
    quality: dict[str, dict[str, float]]


@dataclass(frozen=True)
class SweptModel:
    """A curve: a row for each k = 1 .. L, for each k that can keep the last layer, too, or for each that was trained.

    With pixel limits there is one of each limit, `max_pixels`; its image that was counted fills it. An elastic model,
    which was trained at several depths, has `pairs` of these at the largest.
    """

    name: str
    rows: tuple[SweepRow, ...]
    max_pixels: int | None = None
    image_tokens: int | None = None
    pairs: tuple[DepthPair, ...] = ()


@dataclass(frozen=True)
class Recommendation:
    """A choice of k, how it was made, the model to cut, and the pixel limit, if limits were measured."""

    k: int
    reason: str
    model: str
    max_pixels: int | None = None


@dataclass(frozen=True)
class PairRecommendation:
    """A choice of layers for queries and for candidates, how it was made, and the elastic model of both."""

    query_k: int
    candidate_k: int
    reason: str
    model: str


@dataclass(frozen=True)
class SweepReport:
    """What every depth of one or more models is worth, and what it costs.

    The full model comes first, then those it is compared with, each at every pixel limit, the largest first; with
    `keep_last` each comes twice, the second time with its last layer kept. The `metric` in the `pool` decides, within
    the budget of `max_params` parameters, for a pair within `max_query_ms` milliseconds a text query. `num_queries` are
    those to which something in the pool is relevant. `data_hash` is there if the data were drawn from larger ones.
    Operations were counted for a text of `text_tokens` and for an image of `image_tokens`.
    """

    models: tuple[SweptModel, ...]
    data: str
    data_hash: str | None
    split: str
    tasks: tuple[str, ...]
    num_queries: int
    num_candidates: int
    pool: str
    metric: str
    text_tokens: int
    image_tokens: int
    keep: float = 0.97
    max_params: int | None = None
    max_query_ms: float | None = None

    @property
    def full(self) -> SweepRow:
        """The full model, which the others are measured against."""
        return self.models[0].rows[-1]

    @property
    def recommendation(self) -> Recommendation:
        """The recommendation for the budget and the share that the sweep was asked for."""
        return self.recommend(self.max_params, self.keep)

    @property
    def recommended_pair(self) -> PairRecommendation | None:
        """The pair for the latency and the share that the sweep was asked for; None without an elastic model."""
        return self.recommend_pair(self.max_query_ms, self.keep)

    def quality(self, row: SweepRow | DepthPair) -> float:
        """The quality that decides."""
        return row.quality[self.pool][self.metric]

    def recommend(self, max_params: str | float | None = None, keep: float = 0.97) -> Recommendation:
        """The smallest k, of any of the models, that keeps enough of the full model's quality.

        With pixel limits it is the k and the limit that take the fewest operations of an image.

        Args:
            max_params: Budget of parameters, such as "4B", "800M" or a number; None for none.
            keep: Share of the full model's quality to keep, above 0 and at most 1.

        Returns:
            The choice, and in plain words how it was decided. If nothing within the budget keeps enough, it is the best
            there, or the smallest of all, and the reason says so.
        """
        budget = math.inf if max_params is None else parse_parameters(max_params)
        within = "" if max_params is None else f" within the budget of {budget:,} parameters"
        # The smallest first, or the quickest, and of equals the better.
        every = [(row, model) for model in self.models for row in model.rows]
        every.sort(key=lambda one: (*self._cost(one[0]), -self.quality(one[0])))
        least = "takes the fewest operations of an image of those that keep"
        least = least if self.has_limits else "is the smallest that keeps"
        if fitting := [one for one in every if one[0].parameters <= budget]:
            (row, model), why = self._choose(fitting, keep, least, within)
        else:
            row, model = min(every, key=lambda one: one[0].parameters)
            why = f"Nothing is{within}: this is the smallest."
        size = f"{row.parameters:,} parameters, {row.parameters / self.full.parameters:.1%} of its"
        like, name = self._told_cost(row, model) if self.has_limits else "", row.name or model.name
        reason = f"k = {row.k} of {name}: {self._told_quality(row)}; {size}. {like}{why} {self._chance}"
        return Recommendation(row.k, reason, name, model.max_pixels)

    def recommend_pair(self, max_query_ms: float | None = None, keep: float = 0.97) -> PairRecommendation | None:
        """The pair of depths with the quickest query that keeps enough of the full model's quality.

        Of those the one with the cheapest candidates, then the better. What is quickest is told by the operations, so
        that a second run chooses alike; what is within `max_query_ms` by the time that was measured.

        Args:
            max_query_ms: Milliseconds that a text query may take, where the sweep was run; None for no limit.
            keep: Share of the full model's quality to keep, above 0 and at most 1.

        Returns:
            The choice, and in plain words how it was decided, as in `recommend`; None without an elastic model.
        """
        every = []
        for model in self.models:
            rows = {row.k: row for row in model.rows}
            every += [(pair, rows[pair.query_k], rows[pair.candidate_k], model.name) for pair in model.pairs]
        if not every:
            return None
        every.sort(key=lambda one: (one[1].flops_text, one[2].flops_image, -self.quality(one[0])))
        within = "" if max_query_ms is None else f" within {max_query_ms:g} ms a text query"
        if fitting := [one for one in every if max_query_ms is None or one[1].ms_text <= max_query_ms]:
            chosen, why = self._choose(fitting, keep, "has the quickest query of those that keep", within)
        else:
            chosen = max((one for one in every if one[1] is every[0][1]), key=lambda one: self.quality(one[0]))
            why = f"Nothing is{within}: this is the best of the quickest."
        pair, query, candidate, name = chosen
        cost = f"{query.ms_text:.1f} ms a text query, {candidate.flops_image / 1e9:,.2f} GFLOPs a candidate image"
        told = f"Queries at {pair.query_k} and candidates at {pair.candidate_k} layers of {name}"
        reason = f"{told}: {self._told_quality(pair)}; {cost}. {why} {self._chance}"
        return PairRecommendation(pair.query_k, pair.candidate_k, reason, name)

    def _choose(self, fitting: Sequence[_Option], keep: float, least: str, within: str) -> tuple[_Option, str]:
        """Of options that begin with a row or a pair, the first that keeps enough, else the best; and why."""
        full, share = self.quality(self.full), f"{keep:.4g} of the full model's quality"
        enough = [one for one in fitting if self.quality(one[0]) >= keep * full - _EPSILON]
        if full > 0 and enough:
            return enough[0], f"It {least} {share}{within}."
        best = max(fitting, key=lambda one: self.quality(one[0]))
        return best, f"Nothing keeps {share}{within}: this is the best there is."

    def _told_quality(self, row: SweepRow | DepthPair) -> str:
        full = self.quality(self.full)
        return f"{self.metric} {100 * self.quality(row):.1f}, of the full model {100 * full:.1f}"

    @property
    def _chance(self) -> str:
        # Half of a 95 % interval, 1.96 sqrt(p (1 - p) / n), is never more than this.
        points = 100 / math.sqrt(self.num_queries)
        return f"With {self.num_queries:,} queries, differences of up to {points:.1f} points may be chance."

    @property
    def has_limits(self) -> bool:
        """Whether every k was measured at pixel limits."""
        return self.models[0].max_pixels is not None

    @property
    def frontier(self) -> list[SweepRow]:
        """The rows that no other beats at as few operations of an image, or fewer; the cheapest first."""
        every = [row for model in self.models for row in model.rows]
        found: list[SweepRow] = []
        for row in sorted(every, key=lambda row: (row.flops_image, -self.quality(row))):
            if not found or self.quality(row) > self.quality(found[-1]) + _EPSILON:
                found.append(row)
        return found

    def _cost(self, row: SweepRow) -> tuple[int, ...]:
        return (row.flops_image, row.parameters, row.k) if self.has_limits else (row.parameters, row.k)

    def _told_cost(self, row: SweepRow, model: SweptModel) -> str:
        """What the operations of an image are like, in layers at the largest limit."""
        full = self.models[0]
        near = min(full.rows, key=lambda one: abs(one.flops_image - row.flops_image))
        share = f"{row.flops_image / self.full.flops_image:.0%} of the full model's operations"
        costs = f"An image at {model.image_tokens} visual tokens takes {share}"
        if row in full.rows:
            return f"{costs}. "
        if row.flops_image < full.rows[0].flops_image:
            return f"{costs}, fewer than any k of {full.name}. "
        return f"{costs}, about as many as k = {near.k} of {full.name}. "

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold, and the recommendation."""
        pair = self.recommended_pair
        found = {"recommendation": asdict(self.recommendation), "recommended_pair": pair and asdict(pair)}
        return asdict(self) | found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SweepReport:
        """The report that `to_dict` wrote; the recommendation is found anew."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}  # of older files, too
        models = []
        for one in values["models"]:
            rows, pairs = one["rows"], one.get("pairs", ())
            made = {"rows": tuple(SweepRow(**row) for row in rows), "pairs": tuple(DepthPair(**pair) for pair in pairs)}
            models.append(SweptModel(**one | made))
        return cls(**known | {"models": tuple(models), "tasks": tuple(values["tasks"])})

    def to_markdown(self) -> str:
        """The tables, one a model, and the recommendation; quality in percent."""
        tasks = f"{len(self.tasks)} tasks" if len(self.tasks) > 1 else self.tasks[0]
        parts = [
            f"Layer sweep on {self.data}, {self.split} split, {tasks}, {self.num_queries:,} queries, "
            f'{self.num_candidates:,} candidates, {self.pool} pools. Quality in percent; "kept" is the share of the '
            f"full model's {self.metric}. Operations of a text of {self.text_tokens} tokens and of an image of "
            f"{self.image_tokens} visual tokens. CKA and cosine are to the full model's embeddings."
        ]
        best, full, frontier = self.recommendation, self.quality(self.full), self.frontier
        if self.has_limits:
            parts.append(self._by_limit())
        known = self.full.quality[self.pool]
        shown = dict.fromkeys(name for name in (self.metric, "hit@1", "ndcg@10") if name in known)
        for model in self.models:
            lines: list[dict[str, object]] = []
            for row in model.rows:
                line: dict[str, object] = {"k": row.k} | ({} if row.name is None else {"model": row.name})
                line |= {"parameters": row.parameters, "bytes": row.bytes}
                for kind, flops in (("text", row.flops_text), ("image", row.flops_image)):
                    line[f"GFLOPs, {kind}"] = f"{flops / 1e9:,.2f}"
                line["of full"] = f"{row.flops_image / self.full.flops_image:.0%}"
                if row.seconds_image is not None:
                    line["ms, image"] = f"{1000 * row.seconds_image:,.1f}"
                line |= {name: 100 * row.quality[self.pool][name] for name in shown}
                line["kept"] = 100 * self.quality(row) / full if full else None
                for name, value in (("CKA", row.cka), ("cosine", row.cosine)):
                    line[name] = None if value is None else f"{value:.3f}"
                marks = ["**recommended**"] if (best.model, best.k) == (row.name or model.name, row.k) else []
                marks += ["frontier"] if self.has_limits and row in frontier else []
                line[""] = ", ".join(marks) or None
                lines.append(line)
            parts += [f"**{model.name}**", markdown_table(lines)]
            parts += [self._by_pair(model)] if model.pairs else []
        parts.append(f"**Recommended: k = {best.k}.** {best.reason}")
        if (pair := self.recommended_pair) is not None:
            told = f"queries at k = {pair.query_k}, candidates at k = {pair.candidate_k}"
            parts.append(f"**Recommended pair: {told}.** {pair.reason}")
        return "\n\n".join(parts) + "\n"

    def _by_pair(self, model: SweptModel) -> str:
        """One table of an elastic model: a row for each k of queries, a column for each k of candidates."""
        best, lines = self.recommended_pair, []
        found = {(pair.query_k, pair.candidate_k): 100 * self.quality(pair) for pair in model.pairs}
        for query in model.rows:
            line: dict[str, object] = {"k of queries": query.k, "ms, text": query.ms_text}
            for row in model.rows:
                value, this = found.get((query.k, row.k)), (model.name, query.k, row.k)
                is_best = best is not None and this == (best.model, best.query_k, best.candidate_k)
                column = f"candidates at k = {row.k} ({row.flops_image / 1e9:,.2f} GFLOPs)"
                line[column] = f"**{value:.1f}**" if is_best else value
            lines.append(line)
        told = f"queries at one depth, candidates at another: {self.metric}, %"
        told = f"{told}; milliseconds of a text of {self.text_tokens} tokens on this machine, operations of an image"
        return f"**{model.name}, {told}**\n\n{markdown_table(lines)}"

    def _by_limit(self) -> str:
        """One table of k by model and limit: quality, operations and time."""
        lines: list[dict[str, object]] = []
        for k in sorted({row.k for model in self.models for row in model.rows}):
            line: dict[str, object] = {"k": k}
            for model in self.models:
                for row in (row for row in model.rows if row.k == k):
                    seconds = "" if row.seconds_image is None else f", {1000 * row.seconds_image:,.1f} ms"
                    line[model.name] = f"{100 * self.quality(row):.1f} ({row.flops_image / 1e9:,.2f} GFLOPs{seconds})"
            lines.append({"k": k, **{model.name: line.get(model.name) for model in self.models}})
        told = f"{self.metric}, %, and what an image takes that fills the limit"
        return f"**k by visual tokens: {told}**\n\n{markdown_table(lines)}"

    def plot(self, path: str | Path) -> None:
        """Draw quality against FLOPs, and CKA and cosine by k, into a PNG, SVG or PDF file; needs matplotlib."""
        # A figure of its own draws with Agg and leaves pyplot, and so a user's windows, alone.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
        best = self.recommendation
        for number, model in enumerate(self.models):
            # Curves come close to each other: the numbers of every second one are below it.
            ks, colour, offset = [row.k for row in model.rows], f"C{number}", (3, -11 if number % 2 else 4)
            xs, ys = [row.flops_image / 1e9 for row in model.rows], [100 * self.quality(row) for row in model.rows]
            left.plot(xs, ys, "o-", color=colour, label=model.name)
            for row, *point in zip(model.rows, xs, ys, strict=True):
                k = row.k
                left.annotate(k, point, xytext=offset, textcoords="offset points", color=colour, fontsize=8)
                if (row.name or model.name, k) == (best.model, best.k):
                    left.plot(*point, "ko", markersize=15, fillstyle="none", label=f"recommended: k = {k}")
            for name, style in (("cka", "o-"), ("cosine", "s--")):
                # Where one is not defined, the line has a gap.
                values = [math.nan if (value := getattr(row, name)) is None else value for row in model.rows]
                right.plot(ks, values, style, color=colour)
        for name, style in (("CKA", "o-"), ("cosine", "s--")):
            right.plot([], [], style, color="gray", label=f"{name}, right")
        if self.has_limits:
            points = [(row.flops_image / 1e9, 100 * self.quality(row)) for row in self.frontier]
            left.plot(*zip(*points, strict=True), color="gray", linewidth=6, alpha=0.3, label="frontier", zorder=0)
        for share, style in ((1.0, "--"), (self.keep, ":")):
            label = f"{share:.4g} x the full model's quality"
            left.axhline(100 * share * self.quality(self.full), color="gray", linestyle=style, label=label)
        tokens = "that fills the limit" if self.has_limits else f"({self.image_tokens} visual tokens)"
        left.set(xlabel=f"GFLOPs of one image {tokens}", ylabel=f"{self.metric}, %")
        left.set_ylim(bottom=0)
        right.set(xlabel="k, decoder layers kept", ylabel="closeness to the full model's embeddings")
        right.xaxis.get_major_locator().set_params(integer=True)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        figure.suptitle(f"Layer sweep on {self.data} ({self.split} split, {self.pool} pools)")
        file = BytesIO()
        figure.savefig(file, format=Path(path).suffix.lstrip(".").lower(), dpi=150)
        write_whole(Path(path), file.getvalue())

    def save(self, folder: str | Path) -> None:
        """Write sweep.json, sweep.md and sweep.png, for which matplotlib is needed; each whole or not at all."""
        write_json(Path(folder, "sweep.json"), self.to_dict())
        write_whole(Path(folder, "sweep.md"), self.to_markdown().encode())
        self.plot(Path(folder, "sweep.png"))
