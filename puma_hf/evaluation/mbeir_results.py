"""M-BEIR's table as an object: rows, means, JSON and Markdown."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from puma_hf.data.mbeir_tasks import MBEIRTask

_SHOWN = ("hit", "ndcg", "wrong")


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
    """

    dataset: str
    task_id: int
    pool: str
    pool_size: int
    num_queries: int
    num_skipped: int
    score: float
    metrics: dict[str, float]

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
    """

    split: str
    rows: list[MBEIRTaskResult]
    rankings: dict[str, dict[str, dict[str, list[str]]]] = field(default_factory=dict, repr=False)

    def mean(self, pool: str) -> dict[str, float]:
        """Plain mean over the rows of one pool, as M-BEIR averages: each task counts the same.

        Args:
            pool: "local" or "global".

        Returns:
            The mean of the score, under "score", and of each metric.

        Raises:
            ValueError: If the pool was not evaluated.
        """
        rows = [row for row in self.rows if row.pool == pool]
        if not rows:
            raise ValueError(f"pool is {pool!r}, evaluated were {self.pools}; evaluate with pool='both' to have both")
        means = {name: sum(row.metrics[name] for row in rows) / len(rows) for name in rows[0].metrics}
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
            The keys split, mean, rows and, if asked for, rankings.
        """
        values: dict[str, Any] = {
            "split": self.split,
            "mean": {pool: self.mean(pool) for pool in self.pools},
            "rows": [asdict(row) for row in self.rows],
        }
        return {**values, "rankings": self.rankings} if include_rankings else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MBEIRResults:
        """The results that `to_dict` wrote; the mean is computed anew.

        Args:
            values: What `to_dict` returned, or JSON gave back.

        Returns:
            The results.
        """
        rows = [MBEIRTaskResult(**row) for row in values["rows"]]
        return cls(values["split"], rows, values.get("rankings", {}))

    def to_json(self, path: str | Path, *, include_rankings: bool = False) -> None:
        """Write the results; the file is replaced as a whole or not at all.

        Args:
            path: The file; its folder is made if need be.
            include_rankings: Whether to write the rankings, too.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self.to_dict(include_rankings=include_rankings), indent=2, allow_nan=False) + "\n"
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            draft = Path(folder, path.name)
            draft.write_text(content, encoding="utf-8")
            os.replace(draft, path)

    def to_markdown(self) -> str:
        """The table in percent, one row a task and pool, and a mean for each pool; JSON has the rest.

        Returns:
            A Markdown table that ends in a newline.
        """
        names = [name for name in (self.rows[0].metrics if self.rows else ()) if name.startswith(_SHOWN)]
        lines = [
            _markdown_row(["task", "dataset", "pool", "candidates", "queries", "k", "hit@k", *names]),
            _markdown_row(["---"] * 3 + ["---:"] * (4 + len(names))),
        ]
        for pool in self.pools:
            rows = [row for row in self.rows if row.pool == pool]
            for row in rows:
                task = row.task
                sizes = [f"{row.pool_size}", f"{row.num_queries}", f"{task.reported_k}"]
                values = _percent([row.score, *(row.metrics[name] for name in names)])
                lines.append(_markdown_row([task.arrow, row.dataset, pool, *sizes, *values]))
            queries = sum(row.num_queries for row in rows)
            mean = self.mean(pool)
            values = [f"**{value}**" for value in _percent(mean[name] for name in ("score", *names))]
            lines.append(_markdown_row(["", "**mean**", pool, "", f"{queries}", "", *values]))
        return "\n".join(lines) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(values: Iterable[float]) -> list[str]:
    return [f"{100 * value:.1f}" for value in values]
