"""Write folders in M-BEIR's layout: pairs of one's own, and small parts of a dataset to measure on in training."""

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
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, count, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import datasets
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from puma_hf.configs import PairsConfig
from puma_hf.data.mbeir import MBEIR, NANO_FILE, Candidate, Query, seeded_random
from puma_hf.data.pairs import Pair, PairIds, PairsReport, check_pairs, load_pairs, read_pairs
from puma_hf.data.records import Record, wrong
from puma_hf.data.tasks import TASK_MODALITIES, TASK_OF_MODALITIES, MBEIRTask, select_tasks
from puma_hf.files import new_directory, write_json

logger = logging.getLogger(__name__)

FIRST_FREE_ID = 100  # below are M-BEIR's own datasets and those that may join them
_NANO_VERSION = 1  # of how queries and candidates are chosen; part of the settings, so of the hash

Item = TypeVar("Item")


# --- files


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines to a file of the layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON Lines."""
    write_lines(path, (json.dumps(record, ensure_ascii=False) for record in records))


def write_instructions(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write M-BEIR's table: query modality, candidate modality, dataset name, dataset id, prompts."""
    prompts = (f"prompt_{number}" for number in range(1, max(map(len, rows)) - 3))
    header = ["query_modality", "cand_modality", "dataset_name", "dataset_id", *prompts]
    write_lines(path, ("\t".join(row) for row in (header, *rows)))


def record_line(record: Record, root: Path, pool: Container[str] = ()) -> dict[str, Any]:
    """A candidate as a line of a pool, or a query as one of a query file, without what is not in the global pool."""
    image = None if record.image is None else Path(os.path.relpath(record.image, root)).as_posix()
    values = {"txt": record.text, "img_path": image, "modality": record.modality}
    if not isinstance(record, Query):
        return {"did": record.id, **values}
    lists = {"pos_cand_list": record.positives, "neg_cand_list": record.negatives}
    known = {name: [did for did in dids if did in pool] for name, dids in lists.items()}
    return {"qid": record.id, **{f"query_{name}": value for name, value in values.items()}, **known}


def link(source: str | Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # No second copy of gigabytes of images.
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def text_hash(parts: Iterable[object]) -> str:
    """SHA-256 of a sequence of values, as hexadecimal digits; values with another split are another hash."""
    lines = (json.dumps(part, ensure_ascii=False, separators=(",", ":")) + "\n" for part in parts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# --- a small part of a dataset


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
    holds all that is relevant to one of them, their hard negatives (the first of each query, then the second of each
    ...), and others drawn with the seed, in the source's order. The global pool is that of all local pools. The same
    data, settings and seed give the same folder on every machine.

    Images are not copied: `nano.json` in the folder names the one they are in. It also has `content_hash`, the SHA-256
    of all that a figure depends on, wherever the data lies: report it with the figure, and edit nothing in the folder.
    One that was built with the same settings from the same place is opened as it is, even if the data has changed.

    Args:
        data: The dataset, which may itself be such a part.
        output: The folder, which is written whole or not at all.
        split: The split to take queries from.
        tasks: Names such as "webqa_task1"; None for all of the split.
        num_queries: Queries of each task, or all if there are fewer; 0 for all.
        num_candidates: Candidates of each local pool, likewise; relevant ones are never left out.
        seed: Seed of what is drawn.

    Raises:
        ValueError: If a number is negative, `output` has other settings, or a task has no judged query.
        FileExistsError: If `output` holds anything else.

    Example:
        >>> nano = build_nano(MBEIR("demo/emoji"), "nano", tasks=["emoji_task1"], num_candidates=50)
        >>> len(nano.queries(nano.tasks()[0])), len(nano.global_pool())
        (167, 167)
    """
    chosen, folder = select_tasks(data.tasks(split), tasks), Path(output)
    settings: dict[str, Any] = {"version": _NANO_VERSION, "split": split, "tasks": [task.name for task in chosen]}
    settings |= {"num_queries": num_queries, "num_candidates": num_candidates, "seed": seed}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.parent / f".{folder.name}.lock"):  # one process of a machine writes, the others wait
        if not (folder / NANO_FILE).is_file():
            with new_directory(folder, overwrite=False) as draft:
                _write_nano(data, draft, settings, chosen)
    nano = MBEIR(folder)
    wanted = {**settings, "images": str(data.image_root)}
    there = {**nano.nano_settings, "images": str(nano.image_root)}
    if there != wanted:
        raise ValueError(f"{folder} was built with {there}, not {wanted}. Name another folder, or remove this one.")
    return nano


def _write_nano(data: MBEIR, folder: Path, settings: dict[str, Any], tasks: Sequence[MBEIRTask]) -> None:
    split, root, layout = settings["split"], data.image_root, MBEIR(folder)
    parts = [(task, *_choose(data, task, settings)) for task in tasks]
    everything: dict[str, Candidate] = {}
    for task, _, pool, _ in parts:
        for candidate in pool:
            if everything.setdefault(candidate.id, candidate) != candidate:
                raise wrong(data.root, f"did {candidate.id!r} of {task.name} is something else in another task's pool")

    @cache  # each image is read once
    def hash_of(image: str | None) -> str | None:
        return None if image is None else hashlib.sha256(Path(image).read_bytes()).hexdigest()

    # What a figure depends on, wherever the data lies.
    contents: list[object] = [settings]
    for task, queries, pool, qrels in parts:
        records = [record_line(query, root, everything) for query in queries]
        write_records(layout.query_path(split, task), records)
        write_records(layout.pool_path(task, split), (record_line(candidate, root) for candidate in pool))
        write_lines(layout.qrels_path(split, task), qrels)
        wordings = {data.wordings(query, task.candidate_modality): None for query in queries}
        contents += [task.name, list(wordings), qrels]
        lists = [[record["pos_cand_list"], record["neg_cand_list"]] for record in records]
        for one, others in zip([*queries, *pool], lists + [[]] * len(pool), strict=True):
            contents.append([one.id, one.modality, one.text, hash_of(one.image), *others])
    write_records(layout.pool_path(None, split), (record_line(one, root) for one in everything.values()))
    layout.instruction_path.parent.mkdir()
    shutil.copyfile(data.instruction_path, layout.instruction_path)
    files = {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
    digests = {file.relative_to(folder).as_posix(): hashlib.sha256(text).hexdigest() for file, text in files.items()}
    says = {"image_root": str(root), "settings": settings, "content_hash": text_hash(contents), "files": digests}
    write_json(folder / NANO_FILE, says)


def _choose(
    data: MBEIR, task: MBEIRTask, settings: Mapping[str, Any]
) -> tuple[list[Query], list[Candidate], list[str]]:
    """The queries, candidates and lines of the qrels that are taken of a task."""
    split, seed = settings["split"], settings["seed"]
    queries, pool = data.queries(task, split), data.local_pool(task, split)
    # Judgements of other datasets' candidates are kept: they may be in the global pool.
    judged = data.qrels(task, split, queries, None)
    usable = [query for query in queries if any(did in pool for did in judged.get(query.id, ()))]
    if not usable:
        what = f"no query of {task.name} ({split}) has a relevant candidate in its local pool; look at its qrels"
        raise wrong(data.root, f"{what}, or name the other tasks (tasks=[...], --tasks)")

    def sample(items: Sequence[Item], number: int, name: str) -> list[Item]:
        generator = seeded_random(seed, name, task.name)
        places = generator.sample(range(len(items)), min(number, len(items)))
        return [items[place] for place in sorted(places)]  # in their own order

    taken = sample(usable, settings["num_queries"] or len(usable), "nano queries")
    # Relevant candidates, then hard negatives, those of all queries in turn.
    wanted = dict.fromkeys(did for query in taken for did in judged[query.id] if did in pool)
    limit = settings["num_candidates"] or len(pool)
    # In turn, and not query by query: else the first queries would fill the pool with theirs.
    for did in chain.from_iterable(zip_longest(*(query.negatives for query in taken))):
        if len(wanted) < limit and did in pool:
            wanted[did] = None
    rest = [did for did in pool if did not in wanted]
    wanted |= dict.fromkeys(sample(rest, max(limit - len(wanted), 0), "nano candidates"))
    lines = [f"{q.id} 0 {did} {grade} {task.task_id}" for q in taken for did, grade in judged[q.id].items()]
    return taken, [candidate for candidate in pool.values() if candidate.id in wanted], lines


# --- pairs of one's own


@dataclass
class _Anchor:
    """An anchor that looks for one modality, and by their content ids itself, its right and its wrong answers."""

    record: Record
    content: str
    task: MBEIRTask
    positives: dict[str, None] = field(default_factory=dict)
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
    directly or through others, come into one split: none of val or test is trained on. A task whose rows have no
    instruction has a plain sentence. Images are hard links where the file system allows: do not edit one in place.

    Args:
        rows: As `load_pairs` makes them.
        output: New folder.
        dataset: Its name in file names: letters, digits and underscores.
        dataset_id: Its number, the first part of each id; 100 or more.
        val_fraction: Share of the queries for val.
        test_fraction: Share of the queries for test; 1 makes a set for evaluation alone.
        seed: Seed of the splits.

    Raises:
        FileExistsError: If the output is not empty.
        ValueError: If a row cannot be used, M-BEIR has no task between two modalities, or a split stays empty.

    Example:
        >>> from datasets import Dataset
        >>> rows = load_pairs(Dataset.from_dict({"question": ["1 + 1?", "2 + 2?"], "answer": ["two", "four"]}))
        >>> write_mbeir(rows, "sums", val_fraction=0, test_fraction=0.5).tasks("test")
        [MBEIRTask(task_id=1, dataset='pairs')]
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+", dataset) or dataset_id < FIRST_FREE_ID:
        what = f"dataset={dataset!r} must be letters, digits and underscores, and dataset_id={dataset_id}"
        raise ValueError(f"{what} {FIRST_FREE_ID} or more: smaller ones are M-BEIR's own.")
    if not (0 <= val_fraction <= 1 and 0 <= test_fraction <= 1 and val_fraction + test_fraction <= 1):
        raise ValueError(f"{val_fraction=} and {test_fraction=} must be 0 to 1, and 1 at most together. Lower one.")
    with new_directory(output, overwrite=False) as folder:
        reading = read_pairs(rows, special_tokens="split")
        if reading.offenders:
            raise ValueError(str(reading))
        ids, layout = PairIds(reading.pairs), MBEIR(folder)
        images = folder / "mbeir_images" / f"{dataset}_images"

        def place(record: Record) -> str | None:
            """The image of a record in the folder, under a name by what it holds."""
            if record.image is None:
                return None
            content = ids.images[record.image].encode("utf-8", "surrogateescape")
            name = hashlib.blake2b(content, digest_size=12).hexdigest()
            target = images / name[:2] / f"{name}{Path(record.image).suffix.lower()}"
            if not target.exists():
                link(os.path.realpath(record.image), target)
            return str(target)

        anchors, records, wordings = _collect(reading.pairs, ids, dataset)
        splits = _split(anchors, {"test": test_fraction, "val": val_fraction}, seed)
        dids = {content: f"{dataset_id}:{number}" for number, content in enumerate(records, start=1)}
        lines = {k: record_line(Candidate(dids[k], one.text, place(one)), folder) for k, one in records.items()}
        for task in wordings:
            wanted = {key for anchor in anchors if anchor.task == task for key in anchor.positives | anchor.negatives}
            write_records(layout.pool_path(task, "test"), (line for key, line in lines.items() if key in wanted))
        for split in ("train", "test"):  # val has that of test
            write_records(layout.pool_path(None, split), lines.values())
        numbers, everything = count(len(lines) + 1), set(dids.values())
        for split, chosen in splits.items():
            queries = defaultdict[MBEIRTask, list[Query]](list)
            for anchor in chosen:
                right, bad = (tuple(dids[key] for key in keys) for keys in (anchor.positives, anchor.negatives))
                content = (f"{dataset_id}:{next(numbers)}", anchor.record.text, place(anchor.record))
                queries[anchor.task].append(Query(*content, right, bad))
            for task, found in queries.items():
                write_records(layout.query_path(split, task), (record_line(one, folder, everything) for one in found))
                judged = (f"{query.id} 0 {did} 1 {task.task_id}" for query in found for did in query.positives)
                write_lines(layout.qrels_path(split, task), judged)
        table = [[*TASK_MODALITIES[task.task_id], dataset, str(dataset_id), *found] for task, found in wordings.items()]
        write_instructions(layout.instruction_path, table)
    counts = ", ".join(f"{len(chosen)} {split}" for split, chosen in splits.items())
    logger.info("%s: %d candidates; queries: %s", output, len(lines), counts)
    return MBEIR(output)


def _collect(
    pairs: Iterable[Pair], ids: PairIds, dataset: str
) -> tuple[list[_Anchor], dict[str, Record], dict[MBEIRTask, list[str]]]:
    """The anchors with their answers, the records of all answers by content, and the instructions of each task."""
    anchors: dict[Any, _Anchor] = {}
    records: dict[str, Record] = {}
    wordings: dict[MBEIRTask, dict[str, None]] = defaultdict(dict)
    for pair in pairs:
        modalities = (pair.anchor.modality, pair.positive.modality)
        if modalities not in TASK_OF_MODALITIES:
            raise wrong(pair.where, f"M-BEIR has no task from {modalities[0]} to {modalities[1]}. Swap the sides.")
        task, content = MBEIRTask(TASK_OF_MODALITIES[modalities], dataset), ids.of(pair.anchor)
        # Tabs and quotation marks at the ends have a meaning in the table.
        sentence = " ".join((pair.anchor.instruction or "").split()).strip('"')
        wordings[task] |= {sentence: None} if sentence else {}
        anchor = anchors.setdefault((task, content), _Anchor(pair.anchor, content, task))
        anchor.positives[ids.of(pair.positive)] = None
        anchor.negatives |= dict.fromkeys(map(ids.of, pair.negatives))
        for record in (pair.positive, *pair.negatives):
            records.setdefault(ids.of(record), record)
    for anchor in anchors.values():
        anchor.negatives = {key: None for key in anchor.negatives if key not in anchor.positives}
    for task in wordings:  # a task without any has a plain sentence
        asks, answers = (modality.replace(",", " with ") for modality in TASK_MODALITIES[task.task_id])
        wordings[task] = wordings[task] or {f"Find the {answers} that matches the given {asks}.": None}
    return list(anchors.values()), records, {task: list(wordings[task]) for task in sorted(wordings)}


def _split(anchors: list[_Anchor], fractions: Mapping[str, float], seed: int) -> dict[str, list[_Anchor]]:
    """The anchors of each split, in their own order; those that share anything stay together."""
    # Groups and not pairs are drawn: five captions of an image in two splits would be a leak.
    groups = _groups(anchors)
    random.Random(seed).shuffle(groups)
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    rooms = {name: round(fraction * len(anchors)) for name, fraction in fractions.items()}
    for group in groups:
        name = next((name for name, room in rooms.items() if len(group) <= room), "train")
        if name == "train" and math.isclose(sum(fractions.values()), 1):  # there is no training
            name = max(rooms, key=lambda name: rooms[name])
        if name != "train":
            rooms[name] -= len(group)
        splits[name] += group
    for name, fraction in fractions.items():
        if fraction and not splits[name]:
            of = f"{len(anchors)} queries in {len(groups)} groups that share no anchor and no positive"
            raise ValueError(f"{name}_fraction={fraction} of {of} leaves the split empty. Raise it, or set it to 0.")
    return {name: [anchors[number] for number in sorted(numbers)] for name, numbers in splits.items()}


def _groups(anchors: list[_Anchor]) -> list[list[int]]:
    """Numbers of the anchors that share content, directly or through others: a union-find over what they hold."""
    parents = list(range(len(anchors)))

    def find(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    owners: dict[str, int] = {}
    for number, anchor in enumerate(anchors):
        # Negatives do not tie anchors together: hard ones come from everywhere, and all would be one group.
        for content in (anchor.content, *anchor.positives):
            parents[find(number)] = find(owners.setdefault(content, number))
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(anchors)):
        groups[find(number)].append(number)
    return list(groups.values())


def pairs(config: PairsConfig) -> PairsReport:
    """The dry run of `puma-hf pairs`; with `mbeir` it writes the pairs, too, unless there are rows that stop it."""
    arguments = {**config.pair_arguments(), "special_tokens": config.special_tokens}
    # Read twice, for the report must not depend on what is dropped.
    report = check_pairs(config.data, decode=config.decode, **arguments)
    if config.json is not None:
        write_json(Path(config.json), report.to_dict())
    if config.mbeir is not None and (not report.num_pairs or (report.offenders and config.bad_pairs == "raise")):
        logger.warning("%s was not written, for rows cannot be used; see the report.", config.mbeir)
    elif config.mbeir is not None:
        rows = load_pairs(config.data, on_error=config.bad_pairs, **arguments)
        val, test = config.val_fraction, config.test_fraction
        write_mbeir(rows, config.mbeir, val_fraction=val, test_fraction=test, seed=config.seed)
    return report
