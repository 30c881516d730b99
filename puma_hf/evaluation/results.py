"""M-BEIR's table: rows, means, JSON and Markdown; rankings for trec_eval; and what papers have published.

Sources of the published figures: PUMA (ACM MM 2025, arXiv 2507.08064) and LamRA (arXiv 2412.01720): hit@k, which they
call Recall@k, in percent, each task against its own pool, test split. The means of others are those of U-MARVEL (arXiv
2507.14902) and ELVA's table 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from puma_hf.data.tasks import MBEIRTask
from puma_hf.files import write_json, write_whole

PUBLISHED_MODELS = ("LamRA-Ret 7B", "LamRA < 4B", "PUMA")

# One row of figures a task, in the order of PUBLISHED_MODELS.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "visualnews_task0": (41.6, 30.8, 35.7),
    "mscoco_task0": (81.5, 78.8, 79.5),
    "fashion200k_task0": (28.7, 25.1, 25.8),
    "webqa_task1": (86.0, 82.5, 86.2),
    "edis_task2": (62.6, 54.3, 58.2),
    "webqa_task2": (81.2, 77.8, 78.4),
    "visualnews_task3": (39.6, 31.2, 35.2),
    "mscoco_task3": (90.6, 88.9, 90.1),
    "fashion200k_task3": (30.4, 27.1, 29.0),
    "nights_task4": (32.1, 28.7, 31.4),
    "oven_task6": (54.1, 51.1, 52.7),
    "infoseek_task6": (52.1, 44.2, 48.3),
    "fashioniq_task7": (33.2, 28.9, 30.6),
    "cirr_task7": (53.1, 47.7, 49.9),
    "oven_task8": (76.2, 72.3, 74.0),
    "infoseek_task8": (63.3, 60.8, 65.2),
}

# Means of the sixteen rows, as printed: the papers average before they round. None: not known.
_PUBLISHED_MEANS: dict[str, tuple[float | None, ...]] = {"local": (56.6, 51.8, 54.4), "global": (54.9, None, None)}
# A re-ranker reads query and candidate together, so it is no embedder: what it adds is a bound.
PUBLISHED_NOTE = (
    "LamRA-Ret 7B, LamRA < 4B, PUMA: hit@k as published (PUMA, ACM MM 2025, arXiv 2507.08064; LamRA, arXiv 2412.01720) "
    "for the local pools of the test split; not measured here. Published means of all sixteen rows, local / global: "
    "LamRA-Ret 7B 56.6 / 54.9, LamRA < 4B 51.8 / ?, PUMA 54.4 / ?, CLIP_SF 50.6 / 48.9, PUMA + ELVA's stage 56.3 / ?, "
    "ELVA-7B 58.7 / ?, U-MARVEL 4B (Qwen3-VL) 58.8 / 56.2, U-MARVEL 7B (Qwen2-VL) 63.2 / 60.7, LamRA 7B with re-ranker "
    "63.7 / 61.4, U-MARVEL 7B with re-ranker 64.8 / 61.8 (U-MARVEL, arXiv 2507.14902; ELVA; ?: not known)."
)
# What Markdown shows of the metrics, up to the @ or by the whole name; JSON has them all.
_SHOWN_METRICS = {"hit", "ndcg", "wrong_modality@1", "overlap"}
# What a result was made from, in the order that Markdown shows it in; of a hash it shows the first digits.
_MADE_FROM = (
    *("model", "model_fingerprint", "num_kept_layers", "candidates_model", "candidates_fingerprint"),
    *("candidates_num_kept_layers", "truncate_dim", "max_pixels", "data", "content_hash", "split", "instructions"),
    "puma_hf",
)
_DIGITS = {"model_fingerprint": 12, "candidates_fingerprint": 12, "content_hash": 12}
_LABELS = ("task", "dataset", "pool", "candidates", "queries", "k")
_Figures = tuple[float | None, ...]

Ranking = dict[str, list[tuple[str, float]]]
"""For each qid, dids and scores, best first."""


@dataclass(frozen=True)
class MBEIRTaskResult:
    """One row of the table.

    Args:
        dataset: Name of the dataset.
        task_id: M-BEIR's task number.
        pool: "local" or "global"; it has `pool_size` candidates.
        num_queries: Queries that the metrics are means of; `num_skipped` have nothing relevant in the pool.
        score: The number papers report for this row: hit@10 on the two fashion datasets, else hit@5.
        metrics: Values between 0 and 1 by name.
        corrected: The "score" and the metrics of the popularity-corrected ranking; empty if it was not asked for.
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

    @property
    def values(self) -> dict[str, float]:
        """The "score", the metrics, and the "corrected_score" if it was asked for."""
        corrected = {"corrected_score": self.corrected["score"]} if self.corrected else {}
        return {"score": self.score, **self.metrics, **corrected}


@dataclass(frozen=True)
class MBEIRResults:
    """The table and what it was made from.

    Args:
        split: The split that was evaluated.
        rows: One a task and pool.
        rankings: For each pool and task name, the dids of the best candidates of each qid, best first.
        made_from: Model, data, the model's fingerprint, how instructions were chosen, and the like: plain values
            without paths of this machine. Empty if it is not known.
    """

    split: str
    rows: list[MBEIRTaskResult]
    rankings: dict[str, dict[str, dict[str, list[str]]]] = field(default_factory=dict, repr=False)
    made_from: dict[str, Any] = field(default_factory=dict)

    @property
    def pools(self) -> list[str]:
        """The pools that were evaluated, in order."""
        return list(dict.fromkeys(row.pool for row in self.rows))

    @property
    def is_whole(self) -> bool:
        """Whether published figures can stand beside: a subset, another split or two models are another benchmark."""
        return self.split == "test" and not {"content_hash", "candidates_model"} & self.made_from.keys()

    def mean(self, pool: str) -> dict[str, float]:
        """Plain mean over the rows of one pool, as M-BEIR averages: each task counts the same.

        Returns:
            The mean "score", of each metric, and, if all rows have one, of the corrected score as "corrected_score".
        """
        rows = [row for row in self.rows if row.pool == pool]
        if not rows:
            raise ValueError(f"pool is {pool!r}, evaluated were {self.pools}; evaluate with pool='both' to have both")
        # Of the corrected score only if all rows have one.
        names = [name for name in rows[0].values if all(name in row.values for row in rows)]
        return {name: sum(row.values[name] for row in rows) / len(rows) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The keys split, made_from, mean and rows: plain values that JSON can hold. Run files have the rankings."""
        means, rows = {pool: self.mean(pool) for pool in self.pools}, [asdict(row) for row in self.rows]
        return {"split": self.split, "made_from": self.made_from, "mean": means, "rows": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MBEIRResults:
        """The results that `to_dict` wrote; the mean is computed anew."""
        rows = [MBEIRTaskResult(**row) for row in values["rows"]]
        return cls(values["split"], rows, made_from=values.get("made_from", {}))

    def to_json(self, path: str | Path) -> None:
        """Write the results, whole or not at all; the folder is made if need be."""
        write_json(Path(path), self.to_dict())

    def to_markdown(self) -> str:
        """The table in percent, one row a task and pool, and a mean for each pool; JSON has the rest.

        M-BEIR's own rows, on the local pools of the test split, have the published figures of other models beside
        them, and so have the means if all sixteen are there. Popularity-corrected figures stand beside the plain ones,
        never in their place. Under the table stands what it was made from.
        """
        there = {row.task.name for row in self.rows if row.pool == "local"}
        published = {name: figures for name, figures in PUBLISHED.items() if self.is_whole and name in there}
        names = [name for name in self.rows[0].metrics if {name, name.partition("@")[0]} & _SHOWN_METRICS]
        has_corrected = any(row.corrected for row in self.rows)
        lines = []
        for pool in self.pools:
            rows = [row for row in self.rows if row.pool == pool]
            table: list[tuple[Sequence[object], Mapping[str, float], _Figures | None]] = []
            for row in rows:
                labels = row.task.arrow, row.dataset, pool, row.pool_size, row.num_queries, row.task.reported_k
                table.append((labels, row.values, published.get(row.task.name) if pool == "local" else None))
            # Of fewer or other rows, the published mean would be of another benchmark.
            is_theirs = len(published) == len(PUBLISHED) == len(rows)
            total = "", "**mean**", pool, None, sum(row.num_queries for row in rows), None
            table.append((total, self.mean(pool), _PUBLISHED_MEANS[pool] if is_theirs else None))
            for cells, values, theirs in table:
                percent = {name: 100 * value for name, value in values.items()}
                line: dict[str, object] = dict(zip(_LABELS, cells, strict=True)) | {"hit@k": percent["score"]}
                if has_corrected:
                    line["corrected"] = percent.get("corrected_score")
                if published:
                    line |= zip(PUBLISHED_MODELS, theirs or [None] * len(PUBLISHED_MODELS), strict=True)
                lines.append(line | {name: percent[name] for name in names})
        return "\n\n".join([markdown_table(lines, num_left=3), *self._remarks(bool(published))]) + "\n"

    def _remarks(self, published: bool) -> list[str]:
        remarks = [PUBLISHED_NOTE] if published else []
        if candidates := self.made_from.get("candidates_model"):
            depths = [self.made_from.get(f"{one}num_kept_layers") for one in ("", "candidates_")]
            own, theirs = ("" if depth is None else f" ({depth} layers)" for depth in depths)
            candidates += theirs
            remarks.append(
                f"The queries alone are embedded by this model{own}, and all candidates by {candidates}. "
                f"overlap@10: the share of the ten candidates which {candidates} finds with queries of its own that "
                "these find, too."
            )
        if penalty := self.made_from.get("popularity_penalty"):
            remarks.append(
                f"corrected: hit@k of the similarity less {penalty:g} times the candidate's mean similarity to all "
                f"{self.split} queries of the task. It is transductive (no query can be answered alone) and no part of "
                "M-BEIR's protocol; compare it with plain figures only beside your own."
            )
        if skipped := [f"{row.num_skipped} of {row.task.name} ({row.pool})" for row in self.rows if row.num_skipped]:
            remarks.append(f"Left out, as nothing in the pool is relevant to them: {', '.join(skipped)}.")
        known = {"split": self.split, **self.made_from}
        shown = {name: str(known[name])[: _DIGITS.get(name)] for name in _MADE_FROM if known.get(name) is not None}
        words = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in shown.items())
        return [*remarks, f"Made from: {words}."] if self.made_from else remarks


def markdown_table(lines: Sequence[Mapping[str, object]], num_left: int = 0) -> str:
    """Lines with the same columns as Markdown, the first `num_left` columns to the left, without a line end.

    Fractions have one digit, and whole numbers separators; None is an empty cell.
    """
    cells = [[*lines[0]], ["---"] * num_left + ["---:"] * (len(lines[0]) - num_left)]
    for line in lines:
        values = ["" if value is None else f"{value:,}" if isinstance(value, int) else value for value in line.values()]
        cells.append([f"{value:.1f}" if isinstance(value, float) else str(value) for value in values])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


# --- trec_eval's files: runs have lines `qid Q0 did rank score tag`, qrels `qid 0 did relevance`

_SMALLEST_STEP = 2.0**-30  # near 0, float32 has numbers so close that nine digits would not tell them apart


def falling_scores(scores: Sequence[float]) -> list[float]:
    """The scores of a ranking as float32 numbers, each below the one before it.

    trec_eval goes by the score alone, in float32, and orders ties by id, last one first. Scores that fall keep the
    order that the search gave; one is changed only if it would tie.

    Example:
        >>> falling_scores([0.5, 0.5, 0.25])
        [0.5, 0.4999999403953552, 0.25]
    """
    fallen: list[float] = []
    for value in np.asarray(scores, dtype=np.float32):
        if fallen and value >= fallen[-1]:
            last = np.float32(fallen[-1])
            value = last - np.maximum(np.spacing(np.abs(last)), np.float32(_SMALLEST_STEP))
        fallen.append(float(value))
    return fallen


def write_run(path: str | Path, rankings: Mapping[str, Sequence[tuple[str, float]]], *, tag: str = "puma-hf") -> None:
    """Write rankings for trec_eval, whole or not at all: for each qid its dids and their scores, best first.

    Example:
        >>> write_run("runs/webqa.trec", {"2:1": [("2:7", 0.9), ("2:5", 0.9)]})
        >>> print(open("runs/webqa.trec").read(), end="")
        2:1 Q0 2:7 1 0.899999976 puma-hf
        2:1 Q0 2:5 2 0.899999917 puma-hf
    """
    lines = []
    for qid, ranking in rankings.items():
        scores = falling_scores([score for _, score in ranking])
        for rank, ((did, _), score) in enumerate(zip(ranking, scores, strict=True), start=1):
            lines.append(f"{qid} Q0 {did} {rank} {score:.9g} {tag}\n")
    write_whole(Path(path), "".join(lines).encode())


def write_qrels(path: str | Path, relevance: Mapping[str, Mapping[str, int]]) -> None:
    """Write the relevance of each qid's dids for trec_eval, whole or not at all."""
    lines = [f"{qid} 0 {did} {gain}\n" for qid, judged in relevance.items() for did, gain in judged.items()]
    write_whole(Path(path), "".join(lines).encode())
