"""Training rows from a folder in M-BEIR's layout.

Source: M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136; TIGER-Lab/M-BEIR on the Hub).
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import datasets

from puma_hf.data.mbeir_format import Candidate, MBEIRFormatError, Query, location
from puma_hf.data.mbeir_problems import Problems
from puma_hf.data.mbeir_reader import MBEIR, seeded_random, select_tasks
from puma_hf.data.mbeir_tasks import MBEIRTask
from puma_hf.values import shown

__all__ = ["MBEIR", "load_mbeir"]

logger = logging.getLogger(__name__)


def load_mbeir(
    root: str | Path | MBEIR,
    split: str = "train",
    *,
    tasks: Iterable[str] | None = None,
    num_negatives: int = 0,
    missing_negatives: Literal["error", "drop"] = "error",
    seed: int = 0,
    with_ids: bool = False,
) -> datasets.Dataset:
    """Training rows of M-BEIR, one a query, for `SentenceTransformerTrainer` and its relatives.

    Every cell is a struct `{"text": str | None, "image": absolute path | None}`, the anchor's also has
    "instruction"; images are read when a batch is collated.  The candidates come from the global pool of the
    split.  Each choice depends only on the seed and the row, never on the order of calls:

    - the instruction: one of its wordings;
    - the positive: one of `pos_cand_list`;
    - the negatives: drawn from `neg_cand_list`, less the positives, without repetition; a query with fewer
      than `num_negatives` repeats its own in turn, which counts them twice in a softmax; one with none at all
      is an error or is dropped, see `missing_negatives`.

    Args:
        root: Folder in M-BEIR's layout, or an `MBEIR` of it.
        split: "train" (the files of each task or dataset), "union_train" (M-BEIR's mixture, smaller datasets
            repeated), or any other split.
        tasks: Names such as "webqa_task1"; None for all.
        num_negatives: Number of columns `negative_1`, `negative_2`, ...
        missing_negatives: What to do with a query without hard negatives if `num_negatives` > 0.
        seed: Seed of the choices above.
        with_ids: Whether to add the columns `qid`, `did` (the chosen positive) and `positives` (all of them),
            which a batch sampler can use to keep false negatives apart.  Remove them before training: a
            trainer embeds every column.

    Returns:
        A dataset with the columns anchor, positive, negative_1 .. negative_n.

    Raises:
        ValueError: If an argument is out of range.
        MBEIRFormatError: If a file is not what the format says; the message names file and line.
        FileNotFoundError: If a file or an image is missing.

    Example:
        >>> rows = load_mbeir("demo/emoji", num_negatives=1)
        >>> rows.column_names
        ['anchor', 'positive', 'negative_1']
    """
    if num_negatives < 0:
        raise ValueError(f"num_negatives is {num_negatives}, must be 0 or more; 0 trains on in-batch negatives alone")
    if missing_negatives not in ("error", "drop"):
        raise ValueError(f"missing_negatives is {missing_negatives!r}, must be 'error' or 'drop'")
    data = root if isinstance(root, MBEIR) else MBEIR(root)
    pool = data.global_pool(split)
    columns: dict[str, list[Any]] = {name: [] for name in training_features(num_negatives, with_ids)}
    dropped = 0
    for query, row, path in _select_queries(data, split, tasks, pool, seed):
        positive = pool[_choose_positive(query, row, seed)]
        negatives = _choose_negatives(query, num_negatives, row, seed)
        if negatives is None and missing_negatives == "drop":
            dropped += 1
            continue
        if negatives is None:
            raise MBEIRFormatError(
                f"{location(path, query.line)}: query {shown(query.qid)} has no negatives but num_negatives is "
                f"{num_negatives}; pass num_negatives=0 or missing_negatives='drop'"
            )
        instruction = data.instruction(query, positive.modality, seed, row=row)
        columns["anchor"].append({**_cell(query), "instruction": instruction})
        columns["positive"].append(_cell(positive))
        for number, did in enumerate(negatives, start=1):
            columns[f"negative_{number}"].append(_cell(pool[did]))
        if with_ids:
            columns["qid"].append(query.qid)
            columns["did"].append(positive.did)
            columns["positives"].append(list(query.positives))
    if dropped:
        logger.warning("Dropped %d queries of %s without negatives", dropped, split)
    return datasets.Dataset.from_dict(columns, features=training_features(num_negatives, with_ids))


def _select_queries(
    data: MBEIR, split: str, names: Iterable[str] | None, pool: Mapping[str, Candidate], seed: int
) -> Iterator[tuple[Query, int, Path]]:
    """Each query of the wanted tasks with its row number and its file; candidates are checked."""
    mixed = mixed_queries(data, split, pool, seed)
    tasks = data.task_files(split) if mixed else data.tasks(split)
    wanted = select_tasks(sorted({*tasks, *(task for *_, task in mixed)}), names)
    for task in tasks:
        if task in wanted:
            path = data.query_path(split, task)
            queries = data.queries(task, split)
            _check_candidates(queries, pool, path)
            for row, query in enumerate(queries):
                yield query, row, path
    for query, row, path, task in mixed:
        if task in wanted:
            yield query, row, path


def mixed_queries(
    data: MBEIR, split: str, pool: Mapping[str, Candidate], seed: int
) -> list[tuple[Query, int, Path, MBEIRTask]]:
    """The queries of files that do not tell their task, which then the positive tells.

    Args:
        data: The dataset.
        split: The split.
        pool: The split's global pool.
        seed: Seed of the choice of a positive.

    Returns:
        Each query with its row number, its file and its task.

    Raises:
        MBEIRFormatError: If a query has no positive, or a candidate is not in the pool.
    """
    rows = []
    for path in data.mixed_paths(split):
        queries = data.mixed_queries(path)
        _check_candidates(queries, pool, path)
        for row, query in enumerate(queries):
            task = data.task_of(query, pool[_choose_positive(query, row, seed)].modality)
            rows.append((query, row, path, task))
    return rows


def _check_candidates(queries: Iterable[Query], pool: Container[str], path: Path) -> None:
    with Problems(path) as problems:
        for query in queries:
            problems.attempt(_check_candidates_of, query, pool, location(path, query.line))


def _check_candidates_of(query: Query, pool: Container[str], where: str) -> None:
    if not query.positives:
        raise MBEIRFormatError(
            f"{where}: pos_cand_list of query {shown(query.qid)} is empty; a training row needs a positive",
            "no positive",
        )
    for name, dids in (("pos_cand_list", query.positives), ("neg_cand_list", query.negatives)):
        unknown = [did for did in dids if did not in pool]
        if unknown:
            raise MBEIRFormatError(
                f"{where}: {name} has dids that are not in the global pool of the split: {shown(unknown[:3])}",
                "did that is in no pool",
            )


def _choose_positive(query: Query, row: int, seed: int) -> str:
    return seeded_random(seed, "positive", query.qid, row).choice(query.positives)


def _choose_negatives(query: Query, count: int, row: int, seed: int) -> list[str] | None:
    """`count` dids, or None if the query has none to choose from."""
    if count == 0:
        return []
    usable = [did for did in query.negatives if did not in query.positives]
    if not usable:
        return None
    seeded_random(seed, "negatives", query.qid, row).shuffle(usable)
    return [usable[index % len(usable)] for index in range(count)]


def _cell(record: Query | Candidate) -> dict[str, str | None]:
    return {"text": record.text, "image": record.image}


def training_features(num_negatives: int, with_ids: bool) -> datasets.Features:
    """The columns of training rows.

    Args:
        num_negatives: Number of columns `negative_1`, `negative_2`, ...
        with_ids: Whether there are `qid`, `did` and `positives`.
    """
    string = datasets.Value("string")
    features: dict[str, Any] = {"anchor": {"text": string, "image": string, "instruction": string}}
    for name in ("positive", *(f"negative_{number}" for number in range(1, num_negatives + 1))):
        features[name] = {"text": string, "image": string}
    if with_ids:
        features |= {"qid": string, "did": string, "positives": datasets.List(string)}
    return datasets.Features(features)
