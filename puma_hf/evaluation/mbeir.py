"""M-BEIR's table: every task against its own pool, the pool of all tasks, or both.

Source: M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from puma_hf.data.mbeir_format import Candidate, MBEIRFormatError, Query
from puma_hf.data.mbeir_reader import MBEIR, select_tasks
from puma_hf.data.mbeir_tasks import MBEIRTask
from puma_hf.evaluation.retrieval import exact_search, retrieval_metrics, wrong_modality_at_1

logger = logging.getLogger(__name__)

_NDCG_K = 10
_SHOWN = ("hit", "ndcg", "wrong")
_POOLS: dict[str, tuple[str, ...]] = {"local": ("local",), "global": ("global",), "both": ("local", "global")}


class Encoder(Protocol):
    """What is asked of a model: `encode(inputs, prompt=..., batch_size=..., show_progress_bar=...)`."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Embed inputs as rows: a tensor or array `(len(inputs), embedding_dim)`."""


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


def evaluate_mbeir(
    model: Encoder,
    root: str | Path | MBEIR,
    *,
    split: str = "test",
    tasks: Iterable[str] | None = None,
    pool: Literal["local", "global", "both"] = "local",
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 32,
    block_size: int = 4096,
    instruction_seed: int | None = None,
    show_progress_bar: bool = True,
    search_device: str | torch.device = "cpu",
    encode_kwargs: Mapping[str, Any] | None = None,
) -> MBEIRResults:
    """Measure a model on M-BEIR or any dataset in its layout.

    Each distinct candidate is encoded once, without instruction, however many pools it is in.  Queries are
    encoded with their task's instruction as `prompt`.  Inputs of one modality go together: text,
    `{"image": path}` or `{"image": path, "text": ...}`.

    Args:
        model: A `SentenceTransformer` or anything with its `encode`.
        root: Folder in M-BEIR's layout, or an `MBEIR` of it.
        split: Split to evaluate.
        tasks: Names such as "webqa_task1"; None for all of the split.
        pool: "local" for each task's own pool, "global" for the pool of all tasks, or "both".
        ks: The k of hit@k and recall@k.
        batch_size: Batch size of `encode`.
        block_size: Rows compared at a time, see `exact_search`.
        instruction_seed: None for the first wording of each instruction, a number to draw one a query.
        show_progress_bar: Whether `encode` shows its progress.
        search_device: Device of the search.
        encode_kwargs: Further arguments of `encode`.

    Returns:
        One row a task and pool, and the rankings.

    Raises:
        ValueError: If an argument is out of range, or an embedding is not finite.
        MBEIRFormatError: If a file is not what the format says; the message names file and line.
        FileNotFoundError: If a file or an image is missing.

    Example:
        >>> results = evaluate_mbeir(model, "demo/emoji", pool="both")  # doctest: +SKIP
        >>> print(results.to_markdown())  # doctest: +SKIP
    """
    if pool not in _POOLS:
        raise ValueError(f"pool is {pool!r}, must be one of {list(_POOLS)}")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {list(ks)}, must be numbers of 1 or more, such as (1, 5, 10)")
    data = root if isinstance(root, MBEIR) else MBEIR(root)
    chosen = select_tasks(data.tasks(split), tasks)
    searches = _read_searches(data, chosen, split, _POOLS[pool])  # reads and checks every file before encoding
    candidates = _distinct_candidates(searches)
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar, **(encode_kwargs or {})}
    logger.info("Encoding %d candidates", len(candidates))
    # The empty prompt, unlike None, keeps a SentenceTransformer's default prompt away.
    pool_embeddings = _encode(model, list(candidates.values()), [""] * len(candidates), options)
    row_of = {did: row for row, did in enumerate(candidates)}
    query_embeddings: dict[MBEIRTask, Tensor] = {}
    results = MBEIRResults(split, [], {name: {} for name in _POOLS[pool]})
    top_k = max(*ks, _NDCG_K, *(task.reported_k for task in chosen))
    for search in searches:
        task = search.task
        if task not in query_embeddings:
            modality = task.candidate_modality
            prompts = [data.instruction(query, modality, instruction_seed) for query in search.queries]
            query_embeddings[task] = _encode(model, search.queries, prompts, options)
        dids = list(search.pool)
        rows = [row_of[did] for did in dids]
        whole = rows == list(range(len(candidates)))  # no copy of the largest pool
        found = exact_search(
            query_embeddings[task].to(search_device),
            pool_embeddings if whole else pool_embeddings[rows],
            top_k,
            block_size=block_size,
        )
        ranked = [[dids[index] for index in ranking] for ranking in found.indices.tolist()]
        rankings = {query.qid: ranking for query, ranking in zip(search.queries, ranked, strict=True)}
        results.rankings[search.pool_name][task.name] = rankings
        results.rows.append(_task_result(search, rankings, ks))
    return results


@dataclass(frozen=True)
class _Search:
    """One task against one pool; relevance only has queries to which something in the pool is relevant."""

    task: MBEIRTask
    pool_name: str
    pool: dict[str, Candidate]
    queries: list[Query]
    relevance: dict[str, dict[str, int]]


def _read_searches(data: MBEIR, tasks: Sequence[MBEIRTask], split: str, pool_names: Sequence[str]) -> list[_Search]:
    queries = {task: data.queries(task, split) for task in tasks}
    searches = []
    for pool_name in pool_names:
        global_pool = data.global_pool(split) if pool_name == "global" else None
        for task in tasks:
            pool = data.local_pool(task, split) if global_pool is None else global_pool
            qrels = data.qrels(task, split, queries[task], pool)
            relevance = {qid: judged for qid, judged in qrels.items() if judged}
            if not relevance:
                raise MBEIRFormatError(
                    f"{data.root}: no query of {task.name} ({split}) has a relevant candidate in its "
                    f"{pool_name} pool; look at its qrels, or leave the task out with tasks=[...]"
                )
            searches.append(_Search(task, pool_name, pool, queries[task], relevance))
    return searches


def _distinct_candidates(searches: Sequence[_Search]) -> dict[str, Candidate]:
    """Every candidate once; the largest pool comes first, so that it is a prefix of the result."""
    distinct: dict[str, Candidate] = {}
    for search in sorted(searches, key=lambda search: -len(search.pool)):
        for did, candidate in search.pool.items():
            if distinct.setdefault(did, candidate) != candidate:
                raise MBEIRFormatError(
                    f"did {did!r} of the {search.pool_name} pool of {search.task.name} differs from that in "
                    f"another pool: {candidate} and {distinct[did]}; a did must mean the same in every pool"
                )
    return distinct


def _encode(
    model: Encoder, records: Sequence[Query | Candidate], prompts: Sequence[str], options: Mapping[str, Any]
) -> Tensor:
    """Embeddings `(len(records), embedding_dim)`, float32, in the order of the records."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, (record, prompt) in enumerate(zip(records, prompts, strict=True)):
        groups[prompt, record.modality].append(row)
    embeddings = torch.empty(0, 0)
    for (prompt, modality), rows in groups.items():
        inputs = [records[row].model_input for row in rows]
        encoded = torch.as_tensor(model.encode(inputs, prompt=prompt, **options)).float().cpu()
        if not embeddings.numel() and encoded.ndim == 2:
            embeddings = torch.empty(len(records), encoded.shape[1])
        if encoded.shape != (len(rows), embeddings.shape[1]):
            raise ValueError(
                f"encode returned {tuple(encoded.shape)} for {len(rows)} inputs of modality {modality!r}, "
                f"expected ({len(rows)}, embedding_dim) with the same embedding_dim for every modality"
            )
        embeddings[rows] = encoded
    return embeddings


def _task_result(search: _Search, rankings: Mapping[str, list[str]], ks: Sequence[int]) -> MBEIRTaskResult:
    task, judged = search.task, list(search.relevance.values())
    ranked = [rankings[qid] for qid in search.relevance]
    metrics = retrieval_metrics(ranked, judged, sorted({*ks, task.reported_k}), ndcg_k=_NDCG_K)
    score = metrics[f"hit@{task.reported_k}"]
    if task.reported_k not in ks:  # every row must have the same metrics
        del metrics[f"hit@{task.reported_k}"], metrics[f"recall@{task.reported_k}"]
    modalities = {did: candidate.modality for did, candidate in search.pool.items()}
    metrics["wrong_modality@1"] = wrong_modality_at_1(ranked, judged, modalities)
    return MBEIRTaskResult(
        dataset=task.dataset,
        task_id=task.task_id,
        pool=search.pool_name,
        pool_size=len(search.pool),
        num_queries=len(search.relevance),
        num_skipped=len(search.queries) - len(search.relevance),
        score=score,
        metrics=metrics,
    )


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(values: Iterable[float]) -> list[str]:
    return [f"{100 * value:.1f}" for value in values]
