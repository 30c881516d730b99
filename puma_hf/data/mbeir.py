"""A folder in M-BEIR's layout: its files, its records, its pools.

    query/<split>/mbeir_<dataset>_task<n>_<split>.jsonl
    query/train/mbeir_<dataset>_train.jsonl                    (all tasks of a dataset)
    query/union_train/mbeir_union_up_train.jsonl
    cand_pool/local/mbeir_<dataset>_task<n>_cand_pool.jsonl    (or ..._task<n>_<split>_cand_pool.jsonl: MSCOCO)
    cand_pool/global/mbeir_union_<split>_cand_pool.jsonl
    qrels/<split>/mbeir_<dataset>_task<n>_<split>_qrels.txt
    instructions/query_instructions.tsv
    and images, at the img_path of each record

Source: M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136; TIGER-Lab/M-BEIR on the Hub).
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from puma_hf.data.images import Images
from puma_hf.data.records import Line, Problems, Record, broken_line, file_state, json_lines, location, on_disk, wrong
from puma_hf.data.tasks import MBEIR_DATASET_IDS, MODALITIES, TASK_OF_MODALITIES, MBEIRTask, task_named
from puma_hf.settings import shown

logger = logging.getLogger(__name__)

NANO_FILE = "nano.json"  # how a nano folder was made, and where its images are
_RECORD_ID = re.compile(r"(\d+):\S+")
_UNION = "union_"
_POOL = datasets.Features({name: datasets.Value("string") for name in ("did", "text", "image")})


# --- records


@dataclass(frozen=True, slots=True)
class Candidate(Record):
    """One candidate of a pool; its id is a did, `<dataset_id>:<number>`."""


@dataclass(frozen=True, slots=True)
class Query(Record):
    """One query; its id is a qid, `<dataset_id>:<number>`.

    Args:
        positives: Ids of the relevant candidates, in the file's order.
        negatives: Those of its hard negatives, likewise.
        where: File and line it was read from.
    """

    positives: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    where: str = field(default="", compare=False, repr=False)


def parse_candidate(line: Line, images: Images, *, may_be_missing: bool = False) -> Candidate:
    """A line of a pool, checked, its image as an absolute path; an MBEIRFormatError says what is wrong with it."""
    return Candidate(*_content(line, images, "did", "", may_be_missing=may_be_missing))


def parse_query(line: Line, images: Images) -> Query:
    """A line of a query file likewise; whether its candidates exist is checked by who has the pool."""
    lists: list[tuple[str, ...]] = []
    for name in ("pos_cand_list", "neg_cand_list"):
        value = line.columns.get(name) or []  # null and an empty list both mean that there are none
        if not isinstance(value, list) or not all(isinstance(did, str) for did in value):
            raise wrong(line.where, f"{name} must be a list of dids, got {shown(value)}")
        lists.append(tuple(dict.fromkeys(value)))
    positives, negatives = lists
    return Query(*_content(line, images, "qid", "query_"), positives, negatives, line.where)


def _content(
    line: Line, images: Images, key: str, prefix: str, *, may_be_missing: bool = False
) -> tuple[str, str | None, str | None]:
    """Id, text and absolute image path of a query or a candidate."""
    text_name, path_name, label_name = (f"{prefix}{name}" for name in ("txt", "img_path", "modality"))
    for name in (key, text_name, path_name, label_name):
        if name not in line.columns:
            raise wrong(line.where, f"field {name!r} is missing, only {shown(sorted(line.columns))}", "missing field")
    record_id, label = line.columns[key], line.columns[label_name]
    if not isinstance(record_id, str) or not _RECORD_ID.fullmatch(record_id):
        raise wrong(line.where, f"{key} must look like '<dataset_id>:<number>', got {shown(record_id)}", "wrong id")
    # A blank text counts as none, as null does: there is nothing in it to read.
    text, path = line.text(text_name), line.text(path_name)
    # The label is redundant, and that is its use: a line that lost its text or image would else be another task's.
    present = ",".join(name for name, value in (("image", path), ("text", text)) if value is not None)
    if label != present or present not in MODALITIES:
        what = f"{label_name} is {shown(label)} but the line holds {present or 'neither text nor image'}; mend either"
        raise wrong(line.where, what, "wrong modality label")
    return record_id, text, images.find(path, line.where, may_be_missing=may_be_missing) if path else None


class Pool(Mapping[str, Candidate]):
    """The candidates of a pool by did, in the file's order; made one at a time when they are asked for.

    They lie in a file that all processes of a machine map; in memory are 12 bytes a candidate, to find a did: a dict
    would take some 100 in every process. One that is looked up takes some 20 microseconds; `values` reads a thousand
    rows at a time.
    """

    def __init__(self, rows: datasets.Dataset, path: Path) -> None:
        self._table = rows.with_format("arrow")[:]
        self._columns = [self._table[name] for name in _POOL]
        # Hashes of the dids in ascending order, and the row of each. Two dids may have one hash, so a row is always
        # compared with the did itself.
        hashes = np.fromiter((hash(did) for did in self), np.int64, len(self))
        order = np.argsort(hashes, kind="stable").astype(np.int32)
        self._hashes, self._rows = hashes[order], order
        # A candidate that comes twice would take two places in every answer.
        places = np.flatnonzero(np.diff(self._hashes) == 0)
        dids = [[self._columns[0][row].as_py() for row in order[place : place + 2].tolist()] for place in places]
        if twice := [first for first, second in dids if first == second]:
            raise wrong(path, f"{len(twice)} dids come twice, as {shown(twice[0])}. Remove one of each")

    def _row(self, did: object) -> int | None:
        first, last = (int(np.searchsorted(self._hashes, hash(did), side)) for side in ("left", "right"))
        return next((row for row in self._rows[first:last].tolist() if self._columns[0][row].as_py() == did), None)

    def __contains__(self, did: object) -> bool:
        return self._row(did) is not None

    def __getitem__(self, did: str) -> Candidate:
        if (row := self._row(did)) is None:
            raise KeyError(did)
        return Candidate(*(column[row].as_py() for column in self._columns))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[str]:
        # A thousand rows at a time: one scalar of Arrow after the other is far slower.
        return (did for batch in self._table.to_batches(1000) for did in batch.column(0).to_pylist())

    def values(self) -> Iterator[Candidate]:  # type: ignore[override]
        """All of them; much faster than one by one."""
        for batch in self._table.to_batches(1000):
            yield from map(Candidate, *(column.to_pylist() for column in batch.columns))


# --- files


def is_mbeir(folder: Path) -> bool:
    """Whether a folder is in M-BEIR's layout: it holds a file of queries or a pool under the name of the layout."""
    return any(any(folder.glob(f"{part}/*/mbeir_*.jsonl")) for part in ("query", "cand_pool"))


class MBEIR:
    """A folder in M-BEIR's layout; tasks are found from file names, so any dataset may be added to it.

    Nothing is read before it is asked for. All that is wrong with a file is reported at once, as an MBEIRFormatError,
    or as a FileNotFoundError if only files are missing. Pools that were read are kept in the cache of `datasets`, until
    their file changes.

    Args:
        root: The folder.
        image_root: Folder that every `img_path` is relative to, if not the one that a nano folder names, or else
            `root`; images outside of it are refused.

    Raises:
        FileNotFoundError: If `root` is not a folder, or the images' folder is gone.

    Example:
        >>> data = MBEIR("demo/emoji")
        >>> [task.arrow for task in data.tasks("test")]
        ['t -> i', 't -> t', 't -> it', 'i -> t', 'i -> i', 'it -> t', 'it -> i', 'it -> it']
    """

    def __init__(self, root: str | Path, *, image_root: str | Path | None = None) -> None:
        self.root = Path(root)
        self.instruction_path = self.root / "instructions" / "query_instructions.tsv"
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is not a folder; pass the root of a dataset in M-BEIR's layout")
        nano = self.root / NANO_FILE
        self._nano: dict[str, Any] = json.loads(nano.read_bytes()) if nano.is_file() else {}
        self.nano_settings: dict[str, Any] = self._nano.get("settings", {})
        self.image_root = Path(self._nano.get("image_root", self.root) if image_root is None else image_root).resolve()
        if not self.image_root.is_dir():
            by = f", which {nano} names," if self._nano else ""
            raise FileNotFoundError(f"The images' folder {self.image_root}{by} is not there; use MBEIR(image_root=...)")
        self._images = Images(self.image_root)

    @cached_property
    def content_hash(self) -> str | None:
        """SHA-256 of all that a figure on a nano folder depends on, see `build_nano`; None for any other folder."""
        for name, digest in self._nano.get("files", {}).items():
            file = self.root / name
            if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                raise wrong(file, f"it was changed or removed after {NANO_FILE}; remove the folder and build it anew")
        return self._nano.get("content_hash")

    def query_path(self, split: str, task: MBEIRTask) -> Path:
        """File of the queries of a task."""
        return self.root / "query" / split / f"mbeir_{task.name}_{split}.jsonl"

    def qrels_path(self, split: str, task: MBEIRTask) -> Path:
        """File of its judgements."""
        return self.root / "qrels" / split / f"mbeir_{task.name}_{split}_qrels.txt"

    def pool_path(self, task: MBEIRTask | None, split: str) -> Path:
        """File of the candidates of a task, or of all: one of the split alone comes first."""
        pools = self.root / "cand_pool"
        if task is not None:
            own = pools / "local" / f"mbeir_{task.name}_{split}_cand_pool.jsonl"
            return own if own.is_file() else pools / "local" / f"mbeir_{task.name}_cand_pool.jsonl"
        own = pools / "global" / f"mbeir_union_{split.removeprefix(_UNION)}_cand_pool.jsonl"
        # M-BEIR's pools of "test" serve "val", too.
        is_missing = split.endswith("val") and not own.is_file()
        return pools / "global" / "mbeir_union_test_cand_pool.jsonl" if is_missing else own

    def tasks(self, split: str = "test") -> list[MBEIRTask]:
        """The tasks that have queries in a split, by task number and then by dataset; there must be one."""
        if found := [task for task in self.query_files(split).values() if task is not None]:
            return found
        there = sorted(path.name for path in (self.root / "query").glob("*"))
        here = f"{self.root / 'query' / split}; the splits here are {there}"
        raise FileNotFoundError(f"There is no mbeir_<dataset>_task<n>_{split}.jsonl in {here}")

    def query_files(self, split: str) -> dict[Path, MBEIRTask | None]:
        """The query files of a split with their tasks, in the order of the tasks; last those of several tasks.

        M-BEIR's own "train" has a file a dataset (left out where a dataset has files of its tasks, which hold the
        same), and "union_train" one for all.
        """
        folder = self.root / "query" / split
        if split.startswith(_UNION):
            part = split.removeprefix(_UNION)
            repeated = folder / f"mbeir_union_up_{part}.jsonl"  # "up": smaller datasets repeated
            return {repeated if repeated.is_file() else folder / f"mbeir_union_{part}.jsonl": None}
        files = sorted(folder.glob(f"mbeir_*_{split}.jsonl"))
        names = {file: file.stem.removeprefix("mbeir_").removesuffix(f"_{split}") for file in files}
        found = {file: task for file, name in names.items() if (task := task_named(name))}
        of_tasks = dict(sorted(found.items(), key=lambda pair: pair[1]))
        known = {task.dataset for task in found.values()}
        return {**of_tasks, **{file: None for file in files if file not in found and names[file] not in known}}

    def queries(self, task: MBEIRTask, split: str = "test") -> list[Query]:
        """The queries of one task, in the file's order; a qid may come once."""
        path = self.query_path(split, task)
        with Problems(path) as problems:
            return list(self.read_queries(path, problems, task))

    def read_queries(self, path: Path, problems: Problems, task: MBEIRTask | None = None) -> Iterator[Query]:
        """The good queries of a file as a stream; in that of a task a qid may come once, in a union many times."""
        places: dict[str, str] = {}
        for line in json_lines(path):
            query = problems.attempt(parse_query, line, self._images)
            if query is None:
                continue
            if task is not None and places.setdefault(query.id, query.where) != query.where:
                problems.add(wrong(line.where, f"qid {query.id!r} is also at {places[query.id]}", "duplicated id"))
            elif task is not None and query.modality != task.query_modality:
                what = f"query_modality is {query.modality!r} but task {task.task_id} has {task.query_modality!r}"
                problems.add(wrong(line.where, f"{what} queries; move the line to the file of its own task"))
            else:
                yield query

    def local_pool(self, task: MBEIRTask, split: str = "test") -> Pool:
        """The candidates of one task alone, of its split where that has its own (MSCOCO's val and test differ)."""
        return self._read_pool(self.pool_path(task, split))

    def global_pool(self, split: str = "test") -> Pool:
        """The candidates of all tasks; "union_train" has those of "train", and "val" most often those of "test"."""
        return self._read_pool(self.pool_path(None, split))

    def _read_pool(self, path: Path) -> Pool:
        def rows() -> Iterator[dict[str, Any]]:
            with Problems(path) as problems:
                for line in json_lines(path):
                    if (one := problems.attempt(parse_candidate, line, self._images)) is not None:
                        yield {"did": one.id, "text": one.text, "image": one.image}

        return Pool(on_disk(rows, _POOL, ["pool 1", file_state(path), str(self.image_root)]), path)

    def qrels(
        self, task: MBEIRTask, split: str, queries: Iterable[Query], pool: Container[str] | None
    ) -> dict[str, dict[str, int]]:
        """Relevance of the candidates of a pool to the queries of a task: dids with a relevance above 0, by qid.

        OVEN and InfoSeek judge each other's candidates, which a local pool does not hold: these are left out, and the
        log says how many. Any other unknown did is an error. Without a pool all are kept.
        """
        path, qids = self.qrels_path(split, task), {query.id for query in queries}
        qrels: dict[str, dict[str, int]] = {}
        foreign: set[str] = set()

        def judge(line: bytes, where: str) -> None:
            # As trec_eval does, fields are whatever stands between blanks.
            cells = line.decode(errors="replace").split()
            is_right = len(cells) == 5 and cells[3].isdecimal()
            if not is_right or not (_RECORD_ID.fullmatch(cells[0]) and _RECORD_ID.fullmatch(cells[2])):
                what = f"expected 'qid 0 did relevance task_id' as 9:12 0 9:7 1 6, got {shown(line)}"
                raise broken_line(where, line, what)
            qid, did, relevance = cells[0], cells[2], int(cells[3])
            if qid not in qids:
                raise wrong(where, f"qid {qid!r} is not in the query file of this task", "unknown qid")
            is_here = pool is None or did in pool
            if not is_here and did.partition(":")[0] == qid.partition(":")[0]:
                raise wrong(where, f"did {did!r} is not in the candidate pool", "did that is in no pool")
            if not is_here:
                foreign.add(did)
            elif (before := qrels.setdefault(qid, {}).setdefault(did, relevance)) != relevance:
                raise wrong(where, f"{qid!r} and {did!r} were judged {before} before, now {relevance}")

        with Problems(path) as problems, path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    problems.attempt(judge, line, location(path, number))
        if foreign:
            what = "%s: left out %d judged candidates of other datasets that this pool does not hold"
            logger.info(what, path.name, len(foreign))
        return {qid: {d: r for d, r in judged.items() if r > 0} for qid, judged in qrels.items()}

    def instruction(self, query: Query, candidate_modality: str, seed: int | None = None, *, row: int = 0) -> str:
        """The instruction that tells the model what this query looks for, word for word.

        Args:
            query: The query.
            candidate_modality: Modality it looks for: "text", "image" or "image,text".
            seed: None for the first wording (evaluation); a number for one of the wordings, always the same
                for the same seed, qid and row (training).
            row: Tells repetitions of one query apart.
        """
        # Drawn by qid and row, and not from one stream: tasks can be left out without changing the others.
        wordings = self.wordings(query, candidate_modality)
        return wordings[0] if seed is None else seeded_random(seed, "instruction", query.id, row).choice(wordings)

    def wordings(self, query: Query, candidate_modality: str) -> tuple[str, ...]:
        """All wordings of a query's instruction, in the table's order."""
        key = (query.id.partition(":")[0], query.modality, candidate_modality)
        if key not in self._instructions[0]:
            what = f"no instruction for (dataset_id, query modality, candidate modality) = {key}; add the row"
            raise wrong(self.instruction_path, what)
        return self._instructions[0][key]

    def task_of(self, query: Query, candidate_modality: str) -> MBEIRTask:
        """The task of a query from a file whose name does not say it, by the modality of its positive."""
        task_id = TASK_OF_MODALITIES.get((query.modality, candidate_modality))
        if task_id is None:
            raise wrong(f"query {query.id}", f"M-BEIR has no task from {query.modality!r} to {candidate_modality!r}")
        number = query.id.partition(":")[0]
        return MBEIRTask(task_id, self._instructions[1].get(number, f"dataset{number}"))

    @cached_property
    def _instructions(self) -> tuple[dict[tuple[str, str, str], tuple[str, ...]], dict[str, str]]:
        """M-BEIR's prompts by (dataset id, query modality, candidate modality), and the name of each dataset id."""
        path = self.instruction_path
        prompts: dict[tuple[str, str, str], tuple[str, ...]] = {}
        names: dict[str, str] = {}
        # Read as lines of text, and not as a .tsv: rows have as many cells as wordings, and quotation marks at will.
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[1:], start=2):
            if not line.strip():
                continue
            cells = [cell.strip().strip('"').strip() for cell in line.split("\t")]
            wordings = tuple(cell for cell in cells[4:] if cell)
            key = (cells[3], cells[0], cells[1]) if wordings and cells[3].isdecimal() else None
            if key is None or key in prompts:
                columns = "query modality, candidate modality, dataset name, a dataset id and at least one prompt"
                raise wrong(location(path, number), f"expected {columns}, one row of each kind, got {shown(line)}")
            prompts[key], names[key[0]] = wordings, cells[2].lower()
        # M-BEIR's own ten are known by their numbers, any other by the table.
        return prompts, names | {str(number): name for name, number in MBEIR_DATASET_IDS.items()}


def seeded_random(seed: int, *key: object) -> random.Random:
    """A generator that depends on the seed and the key alone: the same in every process and on every machine."""
    return random.Random(":".join(map(str, (seed, *key))))  # a string seed is hashed with SHA-512
