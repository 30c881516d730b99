"""A small, fixed part of a dataset in M-BEIR's layout, to measure on while a model trains."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from puma_hf.data.mbeir_format import Candidate, MBEIRFormatError, Query
from puma_hf.data.mbeir_origin import NANO_FILE, file_hash, read_origin, text_hash, write_origin
from puma_hf.data.mbeir_reader import MBEIR, seeded_random, select_tasks
from puma_hf.data.mbeir_tasks import MBEIRTask
from puma_hf.data.mbeir_writer import MBEIRWriter, candidate_record, query_record
from puma_hf.data.whole_folder import make_folder
from puma_hf.values import shown

Item = TypeVar("Item")

_VERSION = 1  # of how queries and candidates are chosen; part of the settings, so of the hash


def build_nano(
    data: MBEIR,
    output: str | Path,
    *,
    split: str = "test",
    tasks: Iterable[str] | None = None,
    num_queries: int = 200,
    num_candidates: int = 2000,
    seed: int = 0,
) -> MBEIR:
    """A folder in M-BEIR's layout with some of the queries and candidates of each task.

    Of each task's queries with a relevant candidate in its local pool, `num_queries` are drawn. Its local pool then
    holds every candidate that is relevant to one of them, their hard negatives (the first of each query, then the
    second of each ...), and others drawn with the seed, in the source's order. The global pool is that of all local
    pools. The same data, settings and seed give the same folder on every machine.

    Images are not copied: `nano.json` in the folder names the one they are in. It also has `content_hash`, the
    SHA-256 of all ids, texts, image bytes, judgements, instructions and settings; where the data lies does not
    change it. Report it with a figure.

    A folder that was built with the same settings from the same place is opened as it is; it is not built anew when
    the data changes. A part of a part may be taken as well.

    Args:
        data: The dataset.
        output: The folder, which is written whole or not at all.
        split: The split to take queries from.
        tasks: Names such as "webqa_task1"; None for all of the split.
        num_queries: Queries of each task, or all if there are fewer; 0 for all.
        num_candidates: Candidates of each local pool, or all if there are fewer; 0 for all. Relevant ones are
            never left out, so there may be more.
        seed: Seed of what is drawn.

    Returns:
        The dataset that was built; its `content_hash` is a string.

    Raises:
        ValueError: If an argument is out of range, or `output` was built with other settings.
        FileExistsError: If `output` holds anything else.
        MBEIRFormatError: If a file of the data is not what the format says, or a task has no judged query.
        FileNotFoundError: If a file or an image is missing.
        OSError: If the folder cannot be written.

    Example:

    ```python
    >>> import tempfile
    >>> from puma_hf.data import MBEIR
    >>> from puma_hf.data.nano import build_nano

    >>> with tempfile.TemporaryDirectory() as parent:
    ...     nano = build_nano(MBEIR("demo/emoji"), f"{parent}/nano", tasks=["emoji_task1"], num_candidates=50)
    ...     len(nano.queries(nano.tasks()[0])), len(nano.global_pool())
    (167, 167)
    ```
    """
    for name, value in (("num_queries", num_queries), ("num_candidates", num_candidates)):
        if value < 0:
            raise ValueError(f"{name} is {value}, must be 0 or more; 0 takes all of them")
    chosen = select_tasks(data.tasks(split), tasks)
    folder = Path(output)
    settings = {
        "version": _VERSION,
        "split": split,
        "tasks": [task.name for task in chosen],
        "num_queries": num_queries,
        "num_candidates": num_candidates,
        "seed": seed,
    }
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    make_folder(folder, lambda partial: _write(data, partial, settings, chosen))
    _check_settings(folder, settings, data.image_root)
    return MBEIR(folder)


def _check_settings(folder: Path, settings: Mapping[str, Any], image_root: Path) -> None:
    """Refuse a folder that is no nano, or another one."""
    origin = read_origin(folder) if folder.is_dir() else None
    if origin is None or origin.path.name != NANO_FILE:
        raise FileExistsError(f"{folder} is there and is no nano folder. Choose another place for it.")
    remedy = "Name another folder, remove this one, or use its settings."
    for name, value in settings.items():
        if origin.settings.get(name) != value:
            raise ValueError(f"{folder} was built with {name}={origin.settings.get(name)!r}, not {value!r}. {remedy}")
    if origin.image_root != image_root:
        raise ValueError(f"{folder} was built with the images in {origin.image_root}, not {image_root}. {remedy}")


@dataclass(frozen=True)
class _Part:
    """What is taken of one task."""

    task: MBEIRTask
    queries: list[Query]
    pool: list[Candidate]
    qrels: list[str]


def _write(data: MBEIR, folder: Path, settings: Mapping[str, Any], tasks: Sequence[MBEIRTask]) -> None:
    parts = [_choose(data, task, settings) for task in tasks]
    everything: dict[str, Candidate] = {}
    for part in parts:
        for candidate in part.pool:
            if everything.setdefault(candidate.did, candidate) != candidate:
                raise MBEIRFormatError(
                    f"{data.root}: did {shown(candidate.did)} of {part.task.name} is something else in another task's "
                    "pool; a did must mean the same in every pool",
                    "contradiction",
                )
    writer = MBEIRWriter(folder, settings["split"])
    contents: list[object] = [settings]
    fingerprint = _Fingerprints()
    for part in parts:
        queries = [query_record(query, data.image_root, everything) for query in part.queries]
        writer.queries(part.task, queries)
        writer.local_pool(part.task, (candidate_record(candidate, data.image_root) for candidate in part.pool))
        writer.qrels(part.task, part.qrels)
        wordings = {data.wordings(query, part.task.candidate_modality): None for query in part.queries}
        contents += [part.task.name, list(wordings), part.qrels]
        for query, record in zip(part.queries, queries, strict=True):
            contents.append([*fingerprint.of(query.qid, query), record["pos_cand_list"], record["neg_cand_list"]])
        contents += [fingerprint.of(candidate.did, candidate) for candidate in part.pool]
    writer.global_pool(candidate_record(candidate, data.image_root) for candidate in everything.values())
    writer.copy_instructions(data.instruction_path)
    write_origin(folder / NANO_FILE, str(data.image_root), settings, content_hash=text_hash(contents))


def _choose(data: MBEIR, task: MBEIRTask, settings: Mapping[str, Any]) -> _Part:
    split, seed = settings["split"], settings["seed"]
    queries, pool = data.queries(task, split), data.local_pool(task, split)
    relevant = data.qrels(task, split, queries, pool)
    judged = [query for query in queries if relevant.get(query.qid)]
    if not judged:
        raise MBEIRFormatError(
            f"{data.root}: no query of {task.name} ({split}) has a relevant candidate in its local pool; look at its "
            "qrels, or name the other tasks (tasks=[...], --tasks)",
            "no positive",
        )
    taken = _sample(judged, settings["num_queries"] or len(judged), seeded_random(seed, "nano queries", task.name))
    # Relevant candidates, then hard negatives, those of all queries in turn.
    wanted = dict.fromkeys(did for query in taken for did in relevant[query.qid])
    limit = settings["num_candidates"] or len(pool)
    for did in chain.from_iterable(zip_longest(*(query.negatives for query in taken))):
        if len(wanted) >= limit:
            break
        if did in pool:
            wanted[did] = None
    others = [did for did in pool if did not in wanted]
    generator = seeded_random(seed, "nano candidates", task.name)
    wanted |= dict.fromkeys(_sample(others, max(limit - len(wanted), 0), generator))
    # Judgements of other datasets' candidates are kept: they may be in the global pool.
    everywhere = data.qrels(task, split, queries, _Everything())
    lines = [
        f"{query.qid} 0 {did} {relevance} {task.task_id}"
        for query in taken
        for did, relevance in everywhere[query.qid].items()
    ]
    return _Part(task, taken, [candidate for did, candidate in pool.items() if did in wanted], lines)


def _sample(items: Sequence[Item], count: int, generator: random.Random) -> list[Item]:
    """Some of the items, in their own order."""
    return [items[index] for index in sorted(generator.sample(range(len(items)), min(count, len(items))))]


class _Everything:
    """A pool that holds every did."""

    def __contains__(self, did: object) -> bool:
        return True


class _Fingerprints:
    """Contents of records for the hash; each image is read once."""

    def __init__(self) -> None:
        self._images: dict[str, str] = {}

    def of(self, record_id: str, record: Query | Candidate) -> list[object]:
        if record.image is not None and record.image not in self._images:
            self._images[record.image] = file_hash(Path(record.image))
        image = None if record.image is None else self._images[record.image]
        return [record_id, record.modality, record.text, image]
