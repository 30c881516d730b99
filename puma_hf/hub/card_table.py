"""The tables of a card: one row a task, one column a pool, and M-BEIR's sixteen rows beside the published figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from puma_hf.data.mbeir import MBEIRTask
from puma_hf.evaluation.results import (
    PUBLISHED,
    PUBLISHED_MODELS,
    PUBLISHED_NOTE,
    MBEIRResults,
    MBEIRTaskResult,
    published_mean,
)

NOT_MEASURED = "not measured"
_POOLS = {
    "local": "each task against its own candidates",
    "global": "every task against the candidates of all",
}


def is_mbeir(results: MBEIRResults) -> bool:
    """Whether results are M-BEIR's own: the test split, whole, and at least one of its sixteen rows."""
    is_whole = results.split == "test" and "content_hash" not in results.made_from  # a subset is another benchmark
    return is_whole and any(row.task.name in PUBLISHED for row in results.rows)


def card_table(results: MBEIRResults) -> str:
    """Results as Markdown for a card, in percent; of M-BEIR all sixteen rows, measured or not.

    Args:
        results: What `puma-hf evaluate` wrote.

    Returns:
        A table and, under it, what its words mean.

    Example:

    ```python
    >>> from puma_hf.hub.card_table import card_table
    >>> from puma_hf.evaluation.results import MBEIRResults, MBEIRTaskResult

    >>> row = MBEIRTaskResult("toys", 0, "local", 100, 50, 0, 0.625, {"hit@5": 0.625})
    >>> print(card_table(MBEIRResults("val", [row])).splitlines()[2])
    | text → image | toys | hit@5 | 50 | 62.5 (of 100) |
    ```
    """
    published = PUBLISHED if is_mbeir(results) else {}
    tasks = list(dict.fromkeys(row.task for row in results.rows))
    rows_of = {pool: {row.task.name for row in results.rows if row.pool == pool} for pool in results.pools}
    names = set().union(*rows_of.values())
    tasks += [_task(name) for name in published if name not in names]
    tasks.sort(key=lambda task: list(PUBLISHED).index(task.name) if task.name in PUBLISHED else len(PUBLISHED))
    models = PUBLISHED_MODELS if published else ()
    pools = results.pools
    lines = [
        _line(["task", "dataset", "metric", "queries", *(f"{pool} pool" for pool in pools), *models]),
        _line([*["---"] * 3, *["---:"] * (1 + len(pools) + len(models))]),
    ]
    for task in tasks:
        rows = {row.pool: row for row in results.rows if row.task == task}
        queries = str(next(iter(rows.values())).num_queries) if rows else ""
        direction = f"{_words(task.query_modality)} → {_words(task.candidate_modality)}"
        figures = [f"{figure:.1f}" for figure in published[task.name]] if task.name in published else [""] * len(models)
        cells = [_cell(rows.get(pool)) for pool in pools]
        lines.append(_line([direction, task.dataset, f"hit@{task.reported_k}", queries, *cells, *figures]))
    is_all = all(rows == set(published) for rows in rows_of.values())
    lines.append(_mean(results, is_all=is_all, models=models))
    return "\n\n".join(["\n".join(lines), *_remarks(results, bool(published))])


def _mean(results: MBEIRResults, *, is_all: bool, models: Sequence[str]) -> str:
    """The mean of what was measured in each pool; the published one stands beside it if all are of the same rows."""
    means = [f"**{100 * results.mean(pool)['score']:.1f}**" for pool in results.pools]
    beside = [f"{figure:.1f}" for figure in published_mean("local")] if is_all else [""] * len(models)
    return _line(["", "**mean**", "", "", *means, *(beside if models else [])])


def _remarks(results: MBEIRResults, published: bool) -> list[str]:
    pools = "; ".join(f"{pool} pool: {_POOLS[pool]}" for pool in results.pools if pool in _POOLS)
    remarks = [
        "hit@k: share of queries, in percent, that have a relevant candidate among the first k. In brackets: the "
        f"number of candidates. {pools[:1].upper()}{pools[1:]}. Split: {results.split}."
    ]
    if published:
        remarks.append(PUBLISHED_NOTE)
    if skipped := [row for row in results.rows if row.num_skipped]:
        where = ", ".join(f"{row.num_skipped} of {row.task.name} ({row.pool})" for row in skipped)
        remarks.append(f"Left out, as nothing in the pool is relevant to them: {where}.")
    return remarks


def made_from(results: MBEIRResults) -> str:
    """How an evaluation was made, in a few words: data, instructions, dimensions, data type, versions."""
    words: dict[str, Any] = {
        "data": "data",
        "instructions": "instructions",
        "truncate_dim": "first dimensions",
        "encode_kwargs": "encode with",
        "embedding_dtype": "embeddings in",
        "puma_hf": "puma-hf",
        "transformers": "transformers",
        "torch": "torch",
    }
    found = ((word, results.made_from.get(name)) for name, word in words.items())
    return ", ".join(f"{word} {value}" for word, value in found if value not in (None, {}))


def _cell(row: MBEIRTaskResult | None) -> str:
    return NOT_MEASURED if row is None else f"{100 * row.score:.1f} (of {row.pool_size})"


def _task(name: str) -> MBEIRTask:
    dataset, _, number = name.rpartition("_task")
    return MBEIRTask(int(number), dataset)


def _words(modality: str) -> str:
    return modality.replace(",", " + ")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
