"""M-BEIR's table as an object: rows, means, JSON and Markdown."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from puma_hf.data.mbeir import MBEIRTask
from puma_hf.evaluation.published import PUBLISHED, PUBLISHED_MODELS, PUBLISHED_NOTE, published_mean

# What Markdown shows of the metrics, up to the @ or by the whole name; JSON has them all.
_SHOWN = {"hit", "ndcg", "wrong_modality@1"}
# What a result was made from, in the order and the words that Markdown shows it in.
_MADE_FROM = {
    "model": "model",
    "model_fingerprint": "fingerprint",
    "truncate_dim": "first dimensions",
    "data": "data",
    "content_hash": "content hash",
    "split": "split",
    "instructions": "instructions",
    "puma_hf": "puma-hf",
}
_SHOWN_DIGITS = 12
_STALE_SECONDS = 3600.0  # a draft that old is that of a process that died


@dataclass(frozen=True)
class MBEIRTaskResult:
    """One row of the table.

    Args:
        dataset: Name of the dataset.
        task_id: M-BEIR's task number.
        pool: "local" or "global".
        pool_size: Number of candidates.
        num_queries: Number of queries the metrics are means of.
        num_skipped: Number of queries left out because nothing in the pool is relevant to them.
        score: The number papers report for this row: hit@10 on the two fashion datasets, else hit@5.
        metrics: Values between 0 and 1 by name.
        corrected: The score, under "score", and the metrics of the popularity-corrected ranking; empty if it was not
            asked for.
    """

    dataset: str
    task_id: int
    pool: str
    pool_size: int
    num_queries: int
    num_skipped: int
    score: float
    metrics: dict[str, float]
    corrected: dict[str, float] = field(default_factory=dict)

    @property
    def task(self) -> MBEIRTask:
        """The task of this row."""
        return MBEIRTask(self.task_id, self.dataset)


@dataclass(frozen=True)
class MBEIRResults:
    """The table and what it was made from.

    Args:
        split: The split that was evaluated.
        rows: One a task and pool.
        rankings: For each pool and task name, the dids of the best candidates of each qid, best first.
        made_from: Names of the model and the data, the model's fingerprint, how instructions were chosen, and the
            like: plain values without paths of this machine. Empty if it is not known.
    """

    split: str
    rows: list[MBEIRTaskResult]
    rankings: dict[str, dict[str, dict[str, list[str]]]] = field(default_factory=dict, repr=False)
    made_from: dict[str, Any] = field(default_factory=dict)

    def mean(self, pool: str) -> dict[str, float]:
        """Plain mean over the rows of one pool, as M-BEIR averages: each task counts the same.

        Args:
            pool: "local" or "global".

        Returns:
            The mean of the score, under "score", of each metric, and of the corrected score, if all rows have one,
            under "corrected_score".

        Raises:
            ValueError: If the pool was not evaluated.
        """
        rows = [row for row in self.rows if row.pool == pool]
        if not rows:
            raise ValueError(f"pool is {pool!r}, evaluated were {self.pools}; evaluate with pool='both' to have both")
        means = {name: sum(row.metrics[name] for row in rows) / len(rows) for name in rows[0].metrics}
        if all(row.corrected for row in rows):
            means["corrected_score"] = sum(row.corrected["score"] for row in rows) / len(rows)
        return {"score": sum(row.score for row in rows) / len(rows), **means}

    @property
    def pools(self) -> list[str]:
        """The pools that were evaluated, in order."""
        return list(dict.fromkeys(row.pool for row in self.rows))

    def to_dict(self, *, include_rankings: bool = False) -> dict[str, Any]:
        """The results as plain values that JSON can hold.

        Args:
            include_rankings: Whether to add the rankings.

        Returns:
            The keys split, made_from, mean, rows and, if asked for, rankings.
        """
        values: dict[str, Any] = {
            "split": self.split,
            "made_from": self.made_from,
            "mean": {pool: self.mean(pool) for pool in self.pools},
            "rows": [asdict(row) for row in self.rows],
        }
        return {**values, "rankings": self.rankings} if include_rankings else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MBEIRResults:
        """The results that `to_dict` wrote, or an older version without `made_from`; the mean is computed anew.

        Args:
            values: What `to_dict` returned, or JSON gave back.

        Returns:
            The results.
        """
        rows = [MBEIRTaskResult(**row) for row in values["rows"]]
        return cls(values["split"], rows, values.get("rankings", {}), values.get("made_from", {}))

    def to_json(self, path: str | Path, *, include_rankings: bool = False) -> None:
        """Write the results; the file is replaced as a whole or not at all.

        Args:
            path: The file; its folder is made if need be.
            include_rankings: Whether to write the rankings, too.
        """
        content = json.dumps(self.to_dict(include_rankings=include_rankings), indent=2, allow_nan=False) + "\n"
        with written_whole(path) as file:
            file.write(content)

    def to_markdown(self) -> str:
        """The table in percent, one row a task and pool, and a mean for each pool; JSON has the rest.

        M-BEIR's own rows, on the local pools of the test split, have the published figures of other models beside
        them, and so have the means if all sixteen are there. Popularity-corrected figures stand beside the plain ones,
        never in their place.

        Returns:
            A Markdown table, and under it what it was made from; it ends in a newline.
        """
        names = [
            name for name in (self.rows[0].metrics if self.rows else ()) if {name, name.partition("@")[0]} & _SHOWN
        ]
        published = self._published()
        models = PUBLISHED_MODELS if published else ()
        ours = ["hit@k", "corrected"] if any(row.corrected for row in self.rows) else ["hit@k"]
        lines = [
            _markdown_row(["task", "dataset", "pool", "candidates", "queries", "k", *ours, *models, *names]),
            _markdown_row(["---"] * 3 + ["---:"] * (3 + len(ours) + len(models) + len(names))),
        ]
        for pool in self.pools:
            rows = [row for row in self.rows if row.pool == pool]
            for row in rows:
                task = row.task
                sizes = [f"{row.pool_size}", f"{row.num_queries}", f"{task.reported_k}"]
                scores = _percent([row.score, row.corrected.get("score")][: len(ours)])
                beside = _beside(published.get(task.name, ()) if pool == "local" else (), models)
                values = _percent(row.metrics[name] for name in names)
                lines.append(_markdown_row([task.arrow, row.dataset, pool, *sizes, *scores, *beside, *values]))
            queries = sum(row.num_queries for row in rows)
            mean = self.mean(pool)
            scores = [value and f"**{value}**" for value in _percent([mean["score"], mean.get("corrected_score")])]
            is_theirs = len(published) == len(PUBLISHED) == len(rows)
            beside = _beside(published_mean(pool) if is_theirs else (), models)
            values = [f"**{value}**" for value in _percent(mean[name] for name in names)]
            cells = ["", "**mean**", pool, "", f"{queries}", "", *scores[: len(ours)], *beside, *values]
            lines.append(_markdown_row(cells))
        return "\n\n".join(["\n".join(lines), *self._remarks(bool(published))]) + "\n"

    def _published(self) -> dict[str, tuple[float, ...]]:
        """Published figures by task, of the tasks that were evaluated as they were for the papers."""
        if self.split != "test" or "content_hash" in self.made_from:  # a subset is another benchmark
            return {}
        names = [row.task.name for row in self.rows if row.pool == "local"]
        return {name: PUBLISHED[name] for name in names if name in PUBLISHED}

    def _remarks(self, published: bool) -> list[str]:
        remarks = [PUBLISHED_NOTE] if published else []
        if penalty := self.made_from.get("popularity_penalty"):
            remarks.append(
                f"corrected: hit@k of the similarity less {penalty:g} times the candidate's mean similarity to all "
                f"{self.split} queries of the task. It is transductive (no query can be answered alone) and no part of "
                "M-BEIR's protocol; compare it with plain figures only beside your own. Whether PUMA's 54.4 has it is "
                "not known: the authors' code got it late."
            )
        if skipped := [row for row in self.rows if row.num_skipped]:
            where = ", ".join(f"{row.num_skipped} of {row.task.name} ({row.pool})" for row in skipped)
            remarks.append(f"Left out, as nothing in the pool is relevant to them: {where}.")
        made_from = {"split": self.split, **self.made_from}
        words = [
            f"{word} {str(value)[:_SHOWN_DIGITS] if word in ('fingerprint', 'content hash') else value}"
            for name, word in _MADE_FROM.items()
            if (value := made_from.get(name)) is not None
        ]
        if self.made_from:
            remarks.append(f"Made from: {', '.join(words)}.")
        return remarks


@contextmanager
def written_whole(path: str | Path) -> Iterator[TextIO]:
    """A file to write text into, which takes the place of `path` when the block ends without error.

    Args:
        path: The file; its folder is made if need be.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another run may be writing the same file: with one draft for both, they would mix.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _beside(figures: Sequence[float | None], models: Sequence[str]) -> list[str]:
    """Published figures of one row, with empty cells for those that are not known."""
    return ["" if figure is None else f"{figure:.1f}" for figure in figures or [None] * len(models)]


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(values: Iterable[float | None]) -> list[str]:
    return ["" if value is None else f"{100 * value:.1f}" for value in values]
