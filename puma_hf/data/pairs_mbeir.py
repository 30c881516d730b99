"""Pairs of one's own as a folder in M-BEIR's layout, so that whatever works on M-BEIR works on them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from puma_hf.data.mbeir_reader import MBEIR
from puma_hf.data.mbeir_tasks import TASK_MODALITIES, MBEIRTask
from puma_hf.data.pair_ids import PairIds
from puma_hf.data.pair_rows import Cell, Pair, PairOptions, read_pairs
from puma_hf.files import new_directory

logger = logging.getLogger(__name__)

FIRST_FREE_ID = 100  # below are M-BEIR's own datasets and those that may join them
MAX_WORDINGS = 50
_SPLITS = ("train", "val", "test")
_TASK_OF = {modalities: number for number, modalities in TASK_MODALITIES.items()}
_IN_WORDS = {"text": "text", "image": "image", "image,text": "image with text"}


@dataclass
class _Query:
    """An anchor that looks for one modality, with all its right answers."""

    anchor: Cell
    task: MBEIRTask
    positives: dict[str, None] = field(default_factory=dict)  # content ids
    negatives: dict[str, None] = field(default_factory=dict)


def write_mbeir(
    rows: datasets.Dataset,
    output: str | Path,
    *,
    dataset: str = "pairs",
    dataset_id: int = FIRST_FREE_ID,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> MBEIR:
    """Write pairs as a folder in M-BEIR's layout, for `puma-hf evaluate --data` and `puma-hf train --data`.

    An anchor is one query for each modality it looks for, with all its positives as right answers; equal candidates
    are one (see `PairIds`). Pools hold the candidates of all splits. Queries that share an anchor or a positive,
    directly or through others, come into one split: no anchor and no positive of val or test is trained on, but a
    positive may be a negative or the image of a captioned candidate elsewhere. Instructions are those
    of the rows, as the wordings of their task; a task without any has a plain sentence.

    Images are hard links where the file system allows, else copies: the folder holds all it needs, but do not edit
    an image in place.

    Args:
        rows: As `load_pairs` makes them.
        output: New folder.
        dataset: Its name in file names: letters, digits and underscores.
        dataset_id: Its number, the first part of each id; 100 or more.
        val_fraction: Share of the queries for val.
        test_fraction: Share of the queries for test; 1 makes a set for evaluation alone.
        seed: Seed of the splits.

    Returns:
        The folder, opened.

    Raises:
        FileExistsError: If the output is not empty.
        ValueError: If an argument is out of range, a row cannot be used, M-BEIR has no task between two modalities,
            or a split stays empty.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from puma_hf.data.pairs import load_pairs
    >>> from puma_hf.data.pairs_mbeir import write_mbeir

    >>> rows = load_pairs(Dataset.from_dict({"question": ["1 + 1?", "2 + 2?"], "answer": ["two", "four"]}))
    >>> write_mbeir(rows, "sums", val_fraction=0, test_fraction=0.5).tasks("test")
    [MBEIRTask(task_id=1, dataset='pairs')]
    ```
    """
    _check(output, dataset, dataset_id, val_fraction, test_fraction)
    reading = read_pairs(rows, PairOptions(special_tokens="split"))
    if reading.offenders.counts:
        raise ValueError(reading.refusal())
    pairs = reading.pairs
    ids = PairIds(pairs)
    queries, candidates = _collect(pairs, ids, dataset)
    splits = _split(list(queries.values()), ids, {"test": test_fraction, "val": val_fraction}, seed)
    with new_directory(output, overwrite=False) as folder:
        images = _Images(folder, f"mbeir_images/{dataset}_images", ids)
        dids = {content: f"{dataset_id}:{number}" for number, content in enumerate(candidates, start=1)}
        _write_pools(folder, queries.values(), candidates, dids, images)
        _write_queries(folder, splits, dids, dataset_id, images)
        _write_instructions(folder, _wordings(pairs, dataset), dataset_id)
    counts = ", ".join(f"{len(splits[name])} {name}" for name in _SPLITS)
    logger.info("%s: %d candidates; queries: %s", output, len(candidates), counts)
    return MBEIR(output)


def _check(output: str | Path, dataset: str, dataset_id: int, val_fraction: float, test_fraction: float) -> None:
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output {str(output)!r} is not empty. Choose a new folder.")
    if not re.fullmatch(r"[A-Za-z0-9_]+", dataset):
        raise ValueError(f"dataset={dataset!r} must be letters, digits and underscores: it stands in file names.")
    if dataset_id < FIRST_FREE_ID:
        raise ValueError(f"dataset_id={dataset_id} must be {FIRST_FREE_ID} or more: smaller ones are M-BEIR's own.")
    if not (0 <= val_fraction <= 1 and 0 <= test_fraction <= 1 and val_fraction + test_fraction <= 1):
        raise ValueError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction} must be 0 to 1, and 1 at most together; "
            "what they leave is for training. Lower one."
        )


def _task(pair: Pair, dataset: str) -> MBEIRTask:
    modalities = (pair.anchor.modality, pair.positive.modality)
    if modalities not in _TASK_OF:
        raise ValueError(
            f"{pair.where}: M-BEIR has no task from {modalities[0]!r} to {modalities[1]!r}. Leave such pairs out, or "
            "swap the sides (anchor, positive)."
        )
    return MBEIRTask(_TASK_OF[modalities], dataset)


def _collect(pairs: Iterable[Pair], ids: PairIds, dataset: str) -> tuple[dict[Any, _Query], dict[str, Cell]]:
    queries: dict[Any, _Query] = {}
    candidates: dict[str, Cell] = {}
    for pair in pairs:
        task = _task(pair, dataset)
        query = queries.setdefault((task, ids.of(pair.anchor)), _Query(pair.anchor, task))
        query.positives[ids.of(pair.positive)] = None
        query.negatives |= dict.fromkeys(ids.of(cell) for cell in pair.negatives)
        for cell in (pair.positive, *pair.negatives):
            candidates.setdefault(ids.of(cell), cell)
    for query in queries.values():
        for content in query.positives:
            query.negatives.pop(content, None)
    return queries, candidates


def _split(queries: list[_Query], ids: PairIds, fractions: Mapping[str, float], seed: int) -> dict[str, list[_Query]]:
    """The queries of each split, in their own order; those that share anything stay together."""
    groups = _groups(queries, ids)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    splits: dict[str, list[int]] = {name: [] for name in _SPLITS}
    rooms = {name: round(fraction * len(queries)) for name, fraction in fractions.items()}
    for group in order:
        name = next((name for name, room in rooms.items() if len(group) <= room), "train")
        if name != "train":
            rooms[name] -= len(group)
        elif math.isclose(sum(fractions.values()), 1):  # there is no training
            name = max(rooms, key=lambda name: rooms[name])
            rooms[name] -= len(group)
        splits[name] += group
    for name, fraction in fractions.items():
        if fraction and not splits[name]:
            raise ValueError(
                f"{name}_fraction={fraction} of {len(queries)} queries in {len(groups)} groups that share no anchor "
                "and no positive leaves the split empty. Raise it, or set it to 0."
            )
    return {name: [queries[number] for number in sorted(numbers)] for name, numbers in splits.items()}


def _groups(queries: list[_Query], ids: PairIds) -> dict[int, list[int]]:
    parents = list(range(len(queries)))

    def find(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    owners: dict[str, int] = {}
    for number, query in enumerate(queries):
        for content in (ids.of(query.anchor), *query.positives):
            parents[find(number)] = find(owners.setdefault(content, number))
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(queries)):
        groups[find(number)].append(number)
    return groups


class _Images:
    """Puts images into the folder."""

    def __init__(self, root: Path, name: str, ids: PairIds) -> None:
        self._root, self._name, self._ids = root, name, ids
        self._placed: dict[str, str] = {}

    def place(self, path: str | None) -> str | None:
        """The `img_path` of an image."""
        if path is None:
            return None
        if path not in self._placed:
            digest = hashlib.blake2b(self._ids.image(path).encode("utf-8", "surrogateescape"), digest_size=12)
            name = f"{self._name}/{digest.hexdigest()[:2]}/{digest.hexdigest()}{Path(path).suffix.lower()}"
            target = self._root / name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                source = os.path.realpath(path)
                try:
                    os.link(source, target)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(source, target)
            self._placed[path] = name
        return self._placed[path]


def _write_pools(
    folder: Path, queries: Iterable[_Query], candidates: Mapping[str, Cell], dids: Mapping[str, str], images: _Images
) -> None:
    of_task: dict[MBEIRTask, dict[str, None]] = defaultdict(dict)
    for query in queries:
        of_task[query.task] |= query.positives | query.negatives
    records = {
        content: {
            "did": dids[content],
            "txt": cell.text,
            "img_path": images.place(cell.image),
            "modality": cell.modality,
            "src_content": None,
        }
        for content, cell in candidates.items()
    }
    for task, contents in of_task.items():
        pool = [records[content] for content in records if content in contents]
        _write_jsonl(folder / "cand_pool" / "local" / f"mbeir_{task.name}_cand_pool.jsonl", pool)
    for split in ("train", "test"):  # val has that of test
        path = folder / "cand_pool" / "global" / f"mbeir_union_{split}_cand_pool.jsonl"
        _write_jsonl(path, records.values())


def _write_queries(
    folder: Path, splits: Mapping[str, list[_Query]], dids: Mapping[str, str], dataset_id: int, images: _Images
) -> None:
    number = len(dids)
    for split, queries in splits.items():
        of_task: dict[MBEIRTask, list[dict[str, Any]]] = defaultdict(list)
        for query in queries:
            number += 1
            of_task[query.task].append(
                {
                    "qid": f"{dataset_id}:{number}",
                    "query_txt": query.anchor.text,
                    "query_img_path": images.place(query.anchor.image),
                    "query_modality": query.anchor.modality,
                    "query_src_content": None,
                    "pos_cand_list": [dids[content] for content in query.positives],
                    "neg_cand_list": [dids[content] for content in query.negatives],
                }
            )
        for task, records in of_task.items():
            _write_jsonl(folder / "query" / split / f"mbeir_{task.name}_{split}.jsonl", records)
            judged = ((record["qid"], did) for record in records for did in record["pos_cand_list"])
            lines = [f"{qid} 0 {did} 1 {task.task_id}\n" for qid, did in judged]
            _write(folder / "qrels" / split / f"mbeir_{task.name}_{split}_qrels.txt", "".join(lines))


def _wordings(pairs: Iterable[Pair], dataset: str) -> dict[MBEIRTask, list[str]]:
    """The instructions of each task, in their order; a plain sentence where there is none."""
    found: dict[MBEIRTask, dict[str, None]] = defaultdict(dict)
    for pair in pairs:
        wordings = found[_task(pair, dataset)]
        if pair.instruction is not None:
            # Tabs and quotation marks at the ends have a meaning in the table.
            wordings[" ".join(pair.instruction.split()).strip('"')] = None
            if len(wordings) > MAX_WORDINGS:
                raise ValueError(
                    f"{pair.where}: more than {MAX_WORDINGS} different instructions for one task; M-BEIR has a few "
                    "wordings for all its queries. Put what differs from row to row into the anchor's text."
                )
    return {
        task: list(wordings)
        or [f"Find the {_IN_WORDS[task.candidate_modality]} that matches the given {_IN_WORDS[task.query_modality]}."]
        for task, wordings in found.items()
    }


def _write_instructions(folder: Path, wordings: Mapping[MBEIRTask, list[str]], dataset_id: int) -> None:
    width = max(map(len, wordings.values()))
    header = ["query_modality", "cand_modality", "dataset_name", "dataset_id"]
    lines = [[*header, *(f"prompt_{number}" for number in range(1, width + 1))]]
    for task in sorted(wordings):
        line = [task.query_modality, task.candidate_modality, task.dataset, str(dataset_id), *wordings[task]]
        lines.append(line)
    text = "".join("\t".join(line) + "\n" for line in lines)
    _write(folder / "instructions" / "query_instructions.tsv", text)


def _write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    _write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
