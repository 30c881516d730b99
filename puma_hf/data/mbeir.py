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
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from puma_hf.data.images import Images
from puma_hf.data.records import Line, Problems, Record, cut_off, file_state, json_lines, location, on_disk, wrong
from puma_hf.data.tasks import MBEIR_DATASET_IDS, MODALITIES, TASK_OF_MODALITIES, MBEIRTask, task_named
from puma_hf.settings import shown

logger = logging.getLogger(__name__)

NANO_FILE, IMPORT_FILE = "nano.json", "import.json"  # what a folder made from another dataset says of itself
_RECORD_ID = re.compile(r"(\d+):\S+")
_LFS_POINTER = b"version https://git-lfs.github.com/"
_UNION = "union_"
_POOL = datasets.Features({name: datasets.Value("string") for name in ("did", "text", "image")})


# --- records


@dataclass(frozen=True, slots=True)
class Candidate(Record):
    """One candidate of a pool; its id is a did, `<dataset_id>:<number>`."""

    @property
    def did(self) -> str:
        """Its id."""
        return self.id


@dataclass(frozen=True, slots=True)
class Query(Record):
    """One query; its id is a qid, `<dataset_id>:<number>`.

    Args:
        positives: Ids of the relevant candidates, in the file's order.
        negatives: Ids of its hard negatives, in the file's order.
        line: Line of the file it was read from, for error messages.
    """

    positives: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    line: int = field(default=0, compare=False, repr=False)

    @property
    def qid(self) -> str:
        """Its id."""
        return self.id

    @property
    def dataset_id(self) -> int:
        """Number of the dataset, the part of the qid before the colon."""
        return int(self.id.partition(":")[0])


def parse_candidate(line: Line, images: Images, *, may_be_missing: bool = False) -> Candidate:
    """A line of a pool, checked, its image as an absolute path.

    An MBEIRFormatError if a field is missing or wrong, a FileNotFoundError if the image is missing and may not be.
    """
    return Candidate(*_content(line, images, may_be_missing, "", "did"))


def parse_query(line: Line, images: Images) -> Query:
    """A line of a query file likewise; whether its candidates exist is checked by who has the pool."""
    content = _content(line, images, False, "query_", "qid", "pos_cand_list", "neg_cand_list")
    lists = []
    for name in ("pos_cand_list", "neg_cand_list"):
        value = line.columns[name] or []  # both null and an empty list mean that there are none
        if not isinstance(value, list) or not all(isinstance(did, str) for did in value):
            raise wrong(line.where, f"a list of candidates must be one of dids, got {shown(value)}")
        lists.append(tuple(dict.fromkeys(value)))
    positives, negatives = lists
    return Query(*content, positives, negatives, _number(line))


def _number(line: Line) -> int:
    return int(line.where.rpartition(" ")[2])


def _content(
    line: Line, images: Images, may_be_missing: bool, prefix: str, key: str, *others: str
) -> tuple[str, str | None, str | None]:
    """Id, text and absolute image path of a query (prefix "query_") or a candidate (no prefix)."""
    text_name, path_name, label_name = (f"{prefix}{name}" for name in ("txt", "img_path", "modality"))
    for name in (key, text_name, path_name, label_name, *others):
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

    They lie in a file that all processes of a machine map; in memory are 12 bytes a candidate, to find a did. One
    that is looked up takes some 20 microseconds; `values` reads a thousand rows at a time.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        self._table = rows.with_format("arrow")[:]
        self._columns = [self._table[name] for name in _POOL]

    @cached_property
    def _index(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Hashes of the dids in ascending order, and the row of each."""
        # A dict of the dids would take some 100 bytes each, in every process.
        # Two dids may have one hash, so a row is always compared with the did itself.
        hashes = np.fromiter((hash(did) for did in self), np.int64, len(self))
        order = np.argsort(hashes, kind="stable").astype(np.int32)
        return hashes[order], order

    def row(self, did: object) -> int | None:
        """The place of a candidate in the file's order, or None if it is not in the pool."""
        hashes, order = self._index
        first, last = (int(np.searchsorted(hashes, hash(did), side)) for side in ("left", "right"))
        rows = (int(row) for row in order[first:last])
        return next((row for row in rows if self._columns[0][row].as_py() == did), None)

    def __contains__(self, did: object) -> bool:
        return self.row(did) is not None

    def __getitem__(self, did: str) -> Candidate:
        if (row := self.row(did)) is None:
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


def check_is_file(path: Path) -> None:
    """Refuse a file that is not there, or of which a clone without Git LFS left a pointer."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; M-BEIR's layout needs it (TIGER-Lab/M-BEIR on the Hub)")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise FileNotFoundError(f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` there")


def read_jsonl(path: Path, problems: Problems) -> Iterator[Line]:
    """The lines of a JSON Lines file that must not be empty; broken ones are counted and left out."""
    check_is_file(path)
    line = None
    for line in json_lines(path, problems):
        yield line
    if line is None and not problems:
        raise wrong(location(path, 1), "the file is empty; download it again or remove it", "empty file")


def read_instructions(path: Path) -> tuple[dict[tuple[int, str, str], tuple[str, ...]], dict[int, str]]:
    """M-BEIR's prompts by (dataset_id, query modality, candidate modality), and the name of each dataset id."""
    check_is_file(path)
    prompts: dict[tuple[int, str, str], tuple[str, ...]] = {}
    names: dict[int, str] = {}
    # Read as lines of text, and not as a .tsv: rows have as many cells as wordings, and quotation marks at will.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[1:], start=2):
        if not line.strip():
            continue
        cells = [cell.strip().strip('"').strip() for cell in line.split("\t")]
        wordings = tuple(cell for cell in cells[4:] if cell)
        key = (int(cells[3]), cells[0], cells[1]) if wordings and cells[3].isdecimal() else None
        if key is None or key in prompts:
            columns = "query modality, candidate modality, dataset name, a dataset id and at least one prompt"
            raise wrong(location(path, number), f"expected {columns}, one row of each kind, got {shown(line)}")
        prompts[key], names[key[0]] = wordings, cells[2].lower()
    return prompts, names


def read_qrels(path: Path, qids: Container[str], dids: Container[str] | None) -> dict[str, dict[str, int]]:
    """Relevance judgements, lines of `qid 0 did relevance task_id`: for each qid the dids with a positive relevance.

    OVEN and InfoSeek judge each other's candidates, which a local pool does not hold: a did of another
    dataset than its query's that is absent from the pool is left out, and the log says how many were.  Any other
    unknown did is an error. Without a pool all are kept.
    """
    check_is_file(path)
    qrels: dict[str, dict[str, int]] = {}
    foreign: dict[str, None] = {}

    def judge(line: bytes, where: str) -> None:
        # As trec_eval does, fields are whatever stands between blanks.
        cells = line.decode(errors="replace").split()
        is_right = len(cells) == 5 and cells[3].isdecimal()
        if not is_right or not (_RECORD_ID.fullmatch(cells[0]) and _RECORD_ID.fullmatch(cells[2])):
            what = f"expected 'qid 0 did relevance task_id' as 9:12 0 9:7 1 6, got {shown(line)}"
            raise wrong(where, what, "malformed line") if line.endswith(b"\n") else cut_off(where, what)
        qid, did, relevance = cells[0], cells[2], int(cells[3])
        if qid not in qids:
            raise wrong(where, f"qid {shown(qid)} is not in the query file of this task", "unknown qid")
        is_here = dids is None or did in dids
        if not is_here and did.partition(":")[0] == qid.partition(":")[0]:
            raise wrong(where, f"did {shown(did)} is not in the candidate pool", "did that is in no pool")
        if not is_here:
            foreign[did] = None
        elif (before := qrels.setdefault(qid, {}).setdefault(did, relevance)) != relevance:
            raise wrong(where, f"{shown(qid)} and {shown(did)} were judged {before} before, now {relevance}")

    with Problems(path) as problems, path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                problems.attempt(judge, line, location(path, number))
    if foreign:
        what = "left out %d judged candidates of other datasets that this pool does not hold, such as %s"
        logger.info(f"%s: {what}", path.name, len(foreign), ", ".join(list(foreign)[:3]))
    return {qid: {d: r for d, r in judged.items() if r > 0} for qid, judged in qrels.items()}


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_origin(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The file in which a nano or imported folder says what it holds, and what it says; None of a plain folder."""
    path = next((folder / name for name in (NANO_FILE, IMPORT_FILE) if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        says = json.loads(path.read_bytes())
        values = {name: says[name] for name in ("content_hash", "files", "settings")}
        # A relative image root counts from the folder, so that both can move together.
        return path, {**values, "image_root": (folder.resolve() / says["image_root"]).resolve()}
    except (ValueError, TypeError, KeyError) as error:
        raise wrong(path, f"it does not say what the folder holds ({error!r}); remove it and build it anew") from error


class Layout:
    """Where the files of a folder in M-BEIR's layout are."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.instruction_path = self.root / "instructions" / "query_instructions.tsv"

    def query_path(self, split: str, task: MBEIRTask) -> Path:
        """File of the queries of a task."""
        return self.root / "query" / split / f"mbeir_{task.name}_{split}.jsonl"

    def qrels_path(self, split: str, task: MBEIRTask) -> Path:
        """File of the judgements of a task."""
        return self.root / "qrels" / split / f"mbeir_{task.name}_{split}_qrels.txt"

    def pool_path(self, name: str) -> Path:
        """File of the candidates of a task, by its name."""
        return self.root / "cand_pool" / "local" / f"mbeir_{name}_cand_pool.jsonl"

    def union_pool_path(self, split: str) -> Path:
        """File of the candidates of all tasks."""
        return self.root / "cand_pool" / "global" / f"mbeir_union_{split}_cand_pool.jsonl"


class MBEIR(Layout):
    """A folder in M-BEIR's layout; tasks are found from file names, so any dataset may be added to it.

    Nothing is read before it is asked for. What is wrong with a file is reported at once, see `Problems`: as an
    MBEIRFormatError, or as a FileNotFoundError if only files are missing. Pools and training rows that were read are
    kept in the cache of `datasets`, until their file changes.

    Args:
        root: The folder.
        image_root: Folder that every `img_path` is relative to, if not the one that a nano or imported folder
            names, or else `root`; images outside of it are refused.

    Raises:
        FileNotFoundError: If `root` is not a folder, or the images' folder is gone.
        MBEIRFormatError: If a nano or imported folder's own description of itself cannot be read.

    Example:
        >>> data = MBEIR("demo/emoji")
        >>> [task.arrow for task in data.tasks("test")]
        ['t -> i', 't -> t', 't -> it', 'i -> t', 'i -> i', 'it -> t', 'it -> i', 'it -> it']
    """

    def __init__(self, root: str | Path, *, image_root: str | Path | None = None) -> None:
        super().__init__(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is not a folder; pass the root of a dataset in M-BEIR's layout")
        self._origin = read_origin(self.root)
        named = self.root if self._origin is None else self._origin[1]["image_root"]
        self.image_root = Path(named if image_root is None else image_root).resolve()
        if not self.image_root.is_dir():
            by = "" if self._origin is None else f", which {self._origin[0]} names,"
            raise FileNotFoundError(f"The images' folder {self.image_root}{by} is not there; use MBEIR(image_root=...)")
        self._images = Images(self.image_root)

    @cached_property
    def content_hash(self) -> str | None:
        """SHA-256 of what a nano folder holds, see `build_nano`; None for any other folder."""
        path, says = self._origin or (self.root, {"content_hash": None, "files": {}})
        for name, expected in says["files"].items():
            file = path.parent / name
            if not file.is_file() or file_hash(file) != expected:
                raise wrong(file, f"it was changed or removed after {path}; remove the folder and build it anew")
        return None if says["content_hash"] is None else str(says["content_hash"])

    def tasks(self, split: str = "test") -> list[MBEIRTask]:
        """The tasks that have queries in a split, by task number and then by dataset; there must be one."""
        if found := self.task_files(split):
            return found
        there = sorted(path.name for path in (self.root / "query").glob("*"))
        here = f"{self.root / 'query' / split}; the splits here are {there}"
        raise FileNotFoundError(f"There is no mbeir_<dataset>_task<n>_{split}.jsonl in {here}")

    def task_files(self, split: str) -> list[MBEIRTask]:
        """As `tasks`, but without an error if there are none."""
        return sorted(task for name in self._query_files(split) if (task := task_named(name)))

    def mixed_paths(self, split: str) -> list[Path]:
        """Query files whose names do not tell the task: M-BEIR's own of "train", one a dataset, or a union.

        A dataset that also has files of its tasks is left out, for these hold the same.
        """
        if split.startswith(_UNION):
            folder, part = self.root / "query" / split, split.removeprefix(_UNION)
            repeated = folder / f"mbeir_union_up_{part}.jsonl"  # "up": smaller datasets repeated
            return [repeated if repeated.is_file() else folder / f"mbeir_union_{part}.jsonl"]
        known = {task.dataset for task in self.task_files(split)}
        files = self._query_files(split).items()
        return [path for name, path in files if task_named(name) is None and name not in known]

    def _query_files(self, split: str) -> dict[str, Path]:
        """The query files, by what stands between `mbeir_` and the split in their names."""
        files = sorted((self.root / "query" / split).glob(f"mbeir_*_{split}.jsonl"))
        return {file.stem.removeprefix("mbeir_").removesuffix(f"_{split}"): file for file in files}

    def queries(self, task: MBEIRTask, split: str = "test") -> list[Query]:
        """The queries of one task, in the file's order; a qid may come once."""
        return self._whole(self.query_path(split, task), task)

    def union_queries(self, split: str = "union_train") -> list[Query]:
        """The queries of all tasks from one file, in which a qid may come many times."""
        return self._whole(self.mixed_paths(split)[0])

    def _whole(self, path: Path, task: MBEIRTask | None = None) -> list[Query]:
        with Problems(path) as problems:
            return list(self.read_queries(path, problems, task))

    def read_queries(self, path: Path, problems: Problems, task: MBEIRTask | None = None) -> Iterator[Query]:
        """The good queries of a file as a stream.

        In that of one task a qid may come once; in a union many times, as M-BEIR repeats its smaller datasets.
        """
        lines: dict[str, int] = {}
        for line in read_jsonl(path, problems):
            query = problems.attempt(parse_query, line, self._images)
            if query is None:
                continue
            if task is not None and lines.setdefault(query.id, query.line) != query.line:
                problems.add(wrong(line.where, f"qid {query.id!r} is also on line {lines[query.id]}", "duplicated id"))
            elif task is not None and query.modality != task.query_modality:
                what = f"query_modality is {query.modality!r} but task {task.task_id} has {task.query_modality!r}"
                problems.add(wrong(line.where, f"{what} queries; move the line to the file of its own task"))
            else:
                yield query

    def local_pool(self, task: MBEIRTask, split: str = "test") -> Pool:
        """The candidates of one task alone, of its split where that has its own (MSCOCO's val and test differ)."""
        return self._read_pool(self.local_pool_path(task, split))

    def local_pool_path(self, task: MBEIRTask, split: str) -> Path:
        """File of the candidates of a task, see `local_pool`."""
        own = self.pool_path(f"{task.name}_{split}")
        return own if own.is_file() else self.pool_path(task.name)

    def global_pool(self, split: str = "test") -> Pool:
        """The candidates of all tasks; "union_train" has those of "train".

        Without a file of its own "val" has that of "test": M-BEIR's local pools serve both.
        """
        return self._read_pool(self.global_pool_path(split))

    def global_pool_path(self, split: str) -> Path:
        """File of the candidates of all tasks, see `global_pool`."""
        path = self.union_pool_path(split.removeprefix(_UNION))
        return path if path.is_file() or not split.endswith("val") else self.union_pool_path("test")

    def _read_pool(self, path: Path) -> Pool:
        check_is_file(path)
        return Pool(on_disk(partial(self._pool_rows, path), _POOL, ["pool 1", file_state(path), str(self.image_root)]))

    def _pool_rows(self, path: Path) -> Iterator[dict[str, Any]]:
        hashes, lines = array("q"), array("q")  # 16 bytes a did, where a set of texts would take 100
        with Problems(path) as problems:
            for line in read_jsonl(path, problems):
                candidate = problems.attempt(parse_candidate, line, self._images)
                if candidate is not None:
                    hashes.append(hash(candidate.id))
                    lines.append(_number(line))
                    yield {"did": candidate.id, "text": candidate.text, "image": candidate.image}
            # Duplicates are neighbours in the order of hashes. Of 5.6 M different dids two have the same 64 bits once
            # in a million pools.
            values = np.frombuffer(hashes, np.int64)
            order = np.argsort(values, kind="stable")
            for row in sorted(order[1:][np.diff(values[order]) == 0].tolist()):
                problems.add(wrong(location(path, lines[row]), "its did was already given", "duplicated id"))

    def qrels(
        self, task: MBEIRTask, split: str, queries: Iterable[Query], pool: Container[str] | None
    ) -> dict[str, dict[str, int]]:
        """Relevance of the candidates of a pool to the queries of a task, see `read_qrels`."""
        return read_qrels(self.qrels_path(split, task), {query.id for query in queries}, pool)

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
        key = (query.dataset_id, query.modality, candidate_modality)
        if key not in self._instructions[0]:
            what = f"no instruction for (dataset_id, query modality, candidate modality) = {key}; add the row"
            raise wrong(self.instruction_path, what)
        return self._instructions[0][key]

    def task_of(self, query: Query, candidate_modality: str) -> MBEIRTask:
        """The task of a query from a file whose name does not say it, by the modality of its positive.

        A dataset that is not one of M-BEIR's ten has its name from the table of instructions.
        """
        task_id = TASK_OF_MODALITIES.get((query.modality, candidate_modality))
        if task_id is None:
            raise wrong(f"query {query.id}", f"M-BEIR has no task from {query.modality!r} to {candidate_modality!r}")
        # M-BEIR's own ten are known by their numbers, any other by the table.
        names = {**self._instructions[1], **{number: name for name, number in MBEIR_DATASET_IDS.items()}}
        return MBEIRTask(task_id, names.get(query.dataset_id) or f"dataset{query.dataset_id}")

    @cached_property
    def _instructions(self) -> tuple[dict[tuple[int, str, str], tuple[str, ...]], dict[int, str]]:
        return read_instructions(self.instruction_path)


def seeded_random(seed: int, *key: object) -> random.Random:
    """A generator that depends on the seed and the key alone: the same in every process and on every machine."""
    return random.Random(":".join(map(str, (seed, *key))))  # a string seed is hashed with SHA-512
