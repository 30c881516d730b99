"""M-BEIR's official folder layout.

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

import random
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from puma_hf.data.mbeir_format import (
    Candidate,
    ImageFinder,
    MBEIRFormatError,
    Query,
    location,
    parse_candidate,
    parse_query,
    read_jsonl,
)
from puma_hf.data.mbeir_origin import read_origin, verified_content_hash
from puma_hf.data.mbeir_problems import Problems
from puma_hf.data.mbeir_tables import InstructionKey, read_instructions, read_qrels
from puma_hf.data.mbeir_tasks import MBEIR_DATASET_IDS, TASK_MODALITIES, MBEIRTask
from puma_hf.values import shown

UNION_PREFIX = "union_"
_NAMES_TASK = re.compile(r"(\w+)_task(\d+)")
_TASK_OF_MODALITIES = {modalities: task_id for task_id, modalities in TASK_MODALITIES.items()}


class MBEIR:
    """A folder in M-BEIR's layout; tasks are found from file names, so any dataset may be added to it.

    Nothing is read before it is asked for, and nothing is kept but the instructions. What is wrong with a file is
    reported at once, see `Problems`.

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
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is not a folder; pass the root of a dataset in M-BEIR's layout")
        self._origin = read_origin(self.root)
        if image_root is None:
            image_root = self.root if self._origin is None else self._origin.image_root
        self.image_root = Path(image_root).resolve()
        if not self.image_root.is_dir():
            named = "" if self._origin is None else f", which {self._origin.path} names,"
            raise FileNotFoundError(
                f"The images' folder {self.image_root}{named} is not there; put it back, or name the folder "
                "the images are in now: MBEIR(..., image_root=...), in Python alone"
            )
        self._images = ImageFinder(self.image_root)

    @cached_property
    def content_hash(self) -> str | None:
        """SHA-256 of what a nano folder holds, see `puma_hf.data.nano.build_nano`; None for any other folder.

        Raises:
            MBEIRFormatError: If a file was changed after the folder was built.
        """
        return None if self._origin is None else verified_content_hash(self._origin)

    def tasks(self, split: str = "test") -> list[MBEIRTask]:
        """Tasks that have queries in a split.

        Args:
            split: A folder below `query/`.

        Returns:
            The tasks, by task number and then by dataset.

        Raises:
            FileNotFoundError: If the split has no query files.
            MBEIRFormatError: If a file name has an unknown task number.
        """
        found = self.task_files(split)
        if not found:
            raise FileNotFoundError(
                f"{self.root / 'query' / split} holds no mbeir_<dataset>_task<n>_{split}.jsonl; the splits here are "
                f"{sorted(path.name for path in (self.root / 'query').glob('*'))}"
            )
        return found

    def task_files(self, split: str) -> list[MBEIRTask]:
        """As `tasks`, but without an error if there are none."""
        found = []
        for name in self._query_stems(split):
            match = _NAMES_TASK.fullmatch(name)
            if match is None:
                continue
            if int(match[2]) not in TASK_MODALITIES:
                path = self.root / "query" / split / f"mbeir_{name}_{split}.jsonl"
                raise MBEIRFormatError(f"{path}: task {match[2]} is not one of M-BEIR's {sorted(TASK_MODALITIES)}")
            found.append(MBEIRTask(int(match[2]), match[1]))
        return sorted(found)

    def mixed_paths(self, split: str) -> list[Path]:
        """Query files whose names do not tell the task: M-BEIR's own of "train", one a dataset, or a union.

        Args:
            split: A folder below `query/`.

        Returns:
            The files by name. A dataset that also has files of its tasks is left out, for these hold the same.
        """
        if split.startswith(UNION_PREFIX):
            return [self._union_path(split)]
        known = {task.dataset for task in self.task_files(split)}
        names = [name for name in self._query_stems(split) if not _NAMES_TASK.fullmatch(name) and name not in known]
        return [self.root / "query" / split / f"mbeir_{name}_{split}.jsonl" for name in names]

    def _query_stems(self, split: str) -> list[str]:
        """What stands between `mbeir_` and the split in the names of the query files."""
        pattern = re.compile(rf"mbeir_(\w+)_{re.escape(split)}\.jsonl")
        files = sorted((self.root / "query" / split).glob("mbeir_*.jsonl"))
        return [match[1] for file in files if (match := pattern.fullmatch(file.name))]

    def queries(self, task: MBEIRTask, split: str = "test") -> list[Query]:
        """Queries of one task.

        Args:
            task: The task.
            split: "train", "val" or "test".

        Returns:
            The queries in the file's order.

        Raises:
            MBEIRFormatError: If a line is wrong, a qid comes twice or the file is empty.
            FileNotFoundError: If the file or an image is missing.
        """
        path = self.query_path(split, task)
        queries: dict[str, Query] = {}
        with Problems(path) as problems:
            for query in self._read_queries(path, problems):
                problems.attempt(_add_query, queries, query, task, location(path, query.line))
        return list(queries.values())

    def union_queries(self, split: str = "union_train") -> list[Query]:
        """Queries of all tasks from one file.

        A qid may come many times, as M-BEIR repeats its smaller datasets.

        Args:
            split: "union_train" or "union_val".

        Returns:
            The queries in the file's order.

        Raises:
            MBEIRFormatError: If a line is wrong or the file is empty.
            FileNotFoundError: If the file or an image is missing.
        """
        return self.mixed_queries(self._union_path(split))

    def mixed_queries(self, path: Path) -> list[Query]:
        """Queries of a file of `mixed_paths`, in its order; errors as of `union_queries`."""
        with Problems(path) as problems:
            return list(self._read_queries(path, problems))

    def local_pool(self, task: MBEIRTask, split: str = "test") -> dict[str, Candidate]:
        """Candidates of one task alone.

        Args:
            task: The task.
            split: Split whose own pool is preferred where there is one (MSCOCO's val and test pools differ).

        Returns:
            The candidates by did, in the file's order.

        Raises:
            MBEIRFormatError: If a line is wrong, a did comes twice or the file is empty.
            FileNotFoundError: If the file or an image is missing.
        """
        return self._read_pool(self.local_pool_path(task, split))

    def global_pool(self, split: str = "test") -> dict[str, Candidate]:
        """Candidates of all tasks.

        Args:
            split: "train", "val" or "test"; "union_train" and "union_val" have the pools of "train" and
                "val". Without a file of its own "val" has that of "test": M-BEIR's local pools serve both.

        Returns:
            The candidates by did, in the file's order.

        Raises:
            MBEIRFormatError: If a line is wrong, a did comes twice or the file is empty.
            FileNotFoundError: If the file or an image is missing.
        """
        return self._read_pool(self.global_pool_path(split))

    def qrels(
        self, task: MBEIRTask, split: str, queries: Iterable[Query], pool: Container[str]
    ) -> dict[str, dict[str, int]]:
        """Relevance of the candidates of a pool to the queries of a task.

        Args:
            task: The task.
            split: "train", "val" or "test".
            queries: The task's queries.
            pool: Dids of the pool that is searched.

        Returns:
            For each judged qid, the positive relevances by did.  A candidate of another dataset than its
            query's (OVEN and InfoSeek share Wikipedia) that is absent from the pool is left out.

        Raises:
            MBEIRFormatError: If a line is malformed or has an unknown qid or did.
            FileNotFoundError: If the file is missing.
        """
        path = self.root / "qrels" / split / f"mbeir_{task.name}_{split}_qrels.txt"
        return read_qrels(path, {query.qid for query in queries}, pool)

    def instruction(self, query: Query, candidate_modality: str, seed: int | None = None, *, row: int = 0) -> str:
        """The instruction that tells the model what this query looks for.

        Args:
            query: The query.
            candidate_modality: Modality it looks for: "text", "image" or "image,text".
            seed: None for the first wording (evaluation); a number for one of the wordings, always the same
                for the same seed, qid and row (training).
            row: Tells repetitions of one query apart.

        Returns:
            The instruction, word for word.

        Raises:
            MBEIRFormatError: If the table has no row for this dataset and these modalities.
        """
        wordings = self.wordings(query, candidate_modality)
        return wordings[0] if seed is None else seeded_random(seed, "instruction", query.qid, row).choice(wordings)

    def wordings(self, query: Query, candidate_modality: str) -> tuple[str, ...]:
        """All wordings of a query's instruction.

        Args:
            query: The query.
            candidate_modality: Modality it looks for: "text", "image" or "image,text".

        Returns:
            The wordings in the table's order, at least one.

        Raises:
            MBEIRFormatError: If the table has no row for this dataset and these modalities.
        """
        prompts, _ = self._instructions
        key = (query.dataset_id, query.modality, candidate_modality)
        if key not in prompts:
            raise MBEIRFormatError(
                f"{self.instruction_path}: no instruction for (dataset_id, query modality, candidate "
                f"modality) = {key}, needed by query {shown(query.qid)}; add the row"
            )
        return prompts[key]

    def task_of(self, query: Query, candidate_modality: str) -> MBEIRTask:
        """The task of a query from a union file, where the file name does not say it.

        Args:
            query: The query.
            candidate_modality: Modality of its positive.

        Returns:
            The task; a dataset that is not one of M-BEIR's ten has its name from the table of instructions.

        Raises:
            MBEIRFormatError: If M-BEIR has no task between these modalities.
        """
        task_id = _TASK_OF_MODALITIES.get((query.modality, candidate_modality))
        if task_id is None:
            raise MBEIRFormatError(
                f"query {shown(query.qid)}: M-BEIR has no task from {query.modality!r} to {candidate_modality!r}"
            )
        names = {number: name for name, number in MBEIR_DATASET_IDS.items()}
        number = query.dataset_id
        return MBEIRTask(task_id, names.get(number) or self._instructions[1].get(number) or f"dataset{number}")

    def query_path(self, split: str, task: MBEIRTask) -> Path:
        """File of the queries of a task."""
        return self.root / "query" / split / f"mbeir_{task.name}_{split}.jsonl"

    def local_pool_path(self, task: MBEIRTask, split: str) -> Path:
        """File of the candidates of a task, see `local_pool`."""
        folder = self.root / "cand_pool" / "local"
        own = folder / f"mbeir_{task.name}_{split}_cand_pool.jsonl"
        return own if own.is_file() else folder / f"mbeir_{task.name}_cand_pool.jsonl"

    def global_pool_path(self, split: str) -> Path:
        """File of the candidates of all tasks, see `global_pool`."""
        folder = self.root / "cand_pool" / "global"
        path = folder / f"mbeir_union_{split.removeprefix(UNION_PREFIX)}_cand_pool.jsonl"
        is_shared = path.name == "mbeir_union_val_cand_pool.jsonl" and not path.is_file()
        return folder / "mbeir_union_test_cand_pool.jsonl" if is_shared else path

    def _union_path(self, split: str) -> Path:
        folder, part = self.root / "query" / split, split.removeprefix(UNION_PREFIX)
        repeated = folder / f"mbeir_union_up_{part}.jsonl"  # "up": smaller datasets repeated
        return repeated if repeated.is_file() else folder / f"mbeir_union_{part}.jsonl"

    @property
    def instruction_path(self) -> Path:
        """The table of instructions."""
        return self.root / "instructions" / "query_instructions.tsv"

    @cached_property
    def _instructions(self) -> tuple[dict[InstructionKey, tuple[str, ...]], dict[int, str]]:
        return read_instructions(self.instruction_path)

    def _read_queries(self, path: Path, problems: Problems) -> Iterator[Query]:
        empty = True
        for line, record in read_jsonl(path, problems):
            empty = False
            query = problems.attempt(parse_query, record, line, location(path, line), self._images)
            if query is not None:
                yield query
        if empty and not problems:
            raise MBEIRFormatError(f"{path}, line 1: the query file is empty; download it again or remove it")

    def _read_pool(self, path: Path) -> dict[str, Candidate]:
        pool: dict[str, Candidate] = {}
        with Problems(path) as problems:
            for line, record in read_jsonl(path, problems):
                where = location(path, line)
                candidate = problems.attempt(parse_candidate, record, where, self._images)
                if candidate is not None and pool.setdefault(candidate.did, candidate) is not candidate:
                    message = f"{where}: did {shown(candidate.did)} was already given; keep one line"
                    problems.add(MBEIRFormatError(message, "duplicated id"))
        if not pool:
            raise MBEIRFormatError(f"{path}, line 1: the candidate pool is empty; download it again")
        return pool


def _add_query(queries: dict[str, Query], query: Query, task: MBEIRTask, where: str) -> None:
    if query.qid in queries:
        message = f"{where}: qid {shown(query.qid)} is also on line {queries[query.qid].line}"
        raise MBEIRFormatError(message, "duplicated id")
    if query.modality != task.query_modality:
        raise MBEIRFormatError(
            f"{where}: query_modality is {query.modality!r} but task {task.task_id} has {task.query_modality!r} "
            "queries; move the line to the file of its own task",
            "query of another task",
        )
    queries[query.qid] = query


def select_tasks(available: Sequence[MBEIRTask], names: Iterable[str] | None) -> list[MBEIRTask]:
    """The tasks with these names.

    Args:
        available: Tasks to choose from.
        names: Names such as "webqa_task1"; None for all.

    Returns:
        The chosen tasks in the order of `available`.

    Raises:
        ValueError: If a name is not available, or `names` is empty.
    """
    if names is None:
        return list(available)
    wanted = {names} if isinstance(names, str) else set(names)
    known = [task.name for task in available]
    if not wanted or not wanted <= set(known):
        raise ValueError(f"tasks is {sorted(wanted)}, must be some of {known}; choose from these or leave it out")
    return [task for task in available if task.name in wanted]


def seeded_random(seed: int, *key: object) -> random.Random:
    """A generator that depends on the seed and the key alone: the same in every process and on every machine."""
    return random.Random(":".join(map(str, (seed, *key))))  # a string seed is hashed with SHA-512
