"""The result of a layer sweep: one row a model and depth, as JSON, Markdown and a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from puma_hf.configs import parse_parameters
from puma_hf.evaluation.sweep_choice import Depth, Recommendation, knee, recommend
from puma_hf.files import write_whole

_SHOWN = ("hit@1", "ndcg@10")


@dataclass(frozen=True)
class SweepRow:
    """A model cut to k layers.

    Args:
        k: Layers kept.
        parameters: Its parameters.
        bytes: Their bytes in the data type it was measured in.
        flops_text: Operations of one text.
        flops_image: Operations of one image.
        cka: Linear CKA to the full model over all queries and candidates; None where it is not defined.
        cosine: Mean cosine to the full model's embeddings; None if they have another size.
        quality: For each pool, the mean over its tasks of each metric, and of the "score".
        scores: For each pool, the score of each task.
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
    """All depths of a model.

    Args:
        name: What the report calls it.
        rows: One for each k = 1 .. L; of the first k - 1 layers with the last, one for each k that can be.
    """

    name: str
    rows: tuple[SweepRow, ...]


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
        """The k at which quality against FLOPs bends most, see `sweep_choice.knee`.

        Args:
            model: Number of the model in `models`.

        Returns:
            The k, or None if the curve has no knee.
        """
        rows = self.models[model].rows
        found = knee([row.flops_image for row in rows], [self.quality(row) for row in rows])
        return None if found is None else rows[found].k

    def recommend(self, max_params: str | float | None = None, keep: float = 0.97) -> Recommendation:
        """The smallest k, of any of the models, that keeps enough of the full model's quality.

        Args:
            max_params: Budget of parameters, such as "4B", "800M" or a number; None for none.
            keep: Share of the full model's quality to keep.

        Returns:
            The choice, and in plain words how it was decided. If nothing within the budget keeps enough, it is the best
            there, and the reason says so.

        Raises:
            ValueError: If nothing fits into the budget, or an argument is out of range.
        """
        depths = [
            Depth(model.name, row.k, row.parameters, self.quality(row)) for model in self.models for row in model.rows
        ]
        full = depths[len(self.models[0].rows) - 1]
        budget = None if max_params is None else parse_parameters(max_params)
        chosen = recommend(depths, full, max_params=budget, keep=keep, metric=self.metric)
        return replace(
            chosen,
            reason=f"{chosen.reason} With {self.num_queries:,} queries a {self.metric} is known to about "
            f"{100 * self.margin:.1f} points either way: choose with more queries if that decides.",
        )

    @property
    def margin(self) -> float:
        """About half of the 95 % interval of the full model's quality, if other queries had been drawn.

        A query counts as 0 or 1, which vary most. Tasks weigh the same, so a small one adds much; and two hits and two
        misses are added (Agresti and Coull, 1998), for no figure is sure because all queries were alike. Differences
        between depths, which answer the same queries, vary less.
        """
        counts = [count for count in self.task_queries if count]
        number = len(counts) ** 2 / sum(1 / count for count in counts) + 4  # as many queries, were all in one task
        mean = (self.quality(self.full) * (number - 4) + 2) / number
        return 1.96 * math.sqrt(mean * (1 - mean) / number)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values that JSON can hold, the same for the same figures.

        Returns:
            The fields, and under "knees" and "recommendation" what follows from them.
        """
        knees = {model.name: self.knee(number) for number, model in enumerate(self.models)}
        values = asdict(self) | {"knees": knees, "recommendation": asdict(self.recommendation)}
        return dict(json.loads(json.dumps(values, allow_nan=False)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SweepReport:
        """The report that `to_dict` wrote; knees and recommendation are found anew.

        Args:
            values: What `to_dict` returned, or JSON gave back.

        Returns:
            The report.
        """
        fields = {name: value for name, value in values.items() if name not in ("knees", "recommendation")}
        lists = {name: tuple(fields[name]) for name in ("tasks", "task_queries")}
        models = [
            SweptModel(model["name"], tuple(SweepRow(**row) for row in model["rows"])) for model in fields.pop("models")
        ]
        return cls(models=tuple(models), **fields | lists)

    def to_markdown(self) -> str:
        """The tables, one a model, and the recommendation.

        Returns:
            Markdown that ends in a newline; quality in percent.
        """
        name = self.metric
        tasks = f"{len(self.tasks)} tasks" if len(self.tasks) > 1 else self.tasks[0]
        parts = [
            f"Layer sweep on {self.data}, {self.split} split, {tasks}, {self.num_queries:,} queries, "
            f'{self.num_candidates:,} candidates, {self.pool} pools. Quality in percent; "kept" is the share of the '
            f"full model's {name}. FLOPs of a text of {self.text_tokens} tokens and of an image of {self.image_tokens} "
            "visual tokens. CKA and cosine are to the full model's embeddings.\n"
        ]
        for number, model in enumerate(self.models):
            parts.append(f"**{model.name}**\n\n{self._table(model, self.knee(number))}")
        parts.append(f"**Recommended: k = {self.recommendation.k}.** {self.recommendation.reason}\n")
        return "\n".join(parts)

    def _table(self, model: SweptModel, knee_at: int | None) -> str:
        shown = [name for name in (self.metric, *_SHOWN) if name in self.full.quality[self.pool]]
        names = list(dict.fromkeys(shown))
        head = ["k", "parameters", "bytes", "FLOPs, text", "FLOPs, image", "of full", *names, "kept", "CKA", "cosine"]
        lines = [_line([*head, ""]), _line([*(["---:"] * len(head)), "---"])]
        best = self.recommendation
        for row in model.rows:
            cells = [str(row.k), f"{row.parameters:,}", f"{row.bytes:,}"]
            cells += [si(row.flops_text), si(row.flops_image), f"{row.flops_image / self.full.flops_image:.0%}"]
            cells += [f"{100 * row.quality[self.pool][name]:.1f}" for name in names]
            kept = self.quality(row) / self.quality(self.full) if self.quality(self.full) else None
            cells += ["" if kept is None else f"{100 * kept:.1f}", *map(_optional, (row.cka, row.cosine))]
            marks = {"knee": row.k == knee_at, "**recommended**": (best.model, best.k) == (model.name, row.k)}
            lines.append(_line([*cells, ", ".join(mark for mark, holds in marks.items() if holds)]))
        return "\n".join(lines) + "\n"

    def plot(self, path: str | Path) -> None:
        """Draw quality against FLOPs, and CKA and cosine by k.

        Args:
            path: PNG, SVG or PDF file; replaced as a whole or not at all.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from puma_hf.evaluation.sweep_plot import draw

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.stem}.tmp{path.suffix}")  # the suffix says in which format
        try:
            draw(self, draft)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def save(self, folder: str | Path) -> None:
        """Write sweep.json, sweep.md and sweep.png; each is replaced as a whole or not at all.

        Args:
            folder: The folder; it is made if need be.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        folder = Path(folder)
        content = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        for name, text in {"sweep.json": content, "sweep.md": self.to_markdown()}.items():
            write_whole(folder / name, text.encode())
        self.plot(folder / "sweep.png")


def si(number: float) -> str:
    """A number with three digits and a unit, such as "1.54 G".

    Example:
        >>> si(1_543_714_304), si(870), si(93_000_000)
        ('1.54 G', '870', '93 M')
    """
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}"
    return f"{number:.3g}"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
