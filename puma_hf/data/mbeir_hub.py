"""Open M-BEIR wherever it is: a folder in its layout, a nano folder, Parquet copies on disk or on the Hub.

The Hub has each task as a dataset of its own, `mteb/mbeir_<dataset>_task<n>` and `MRBench/mbeir_<dataset>_task<n>`,
with the configurations `corpus`, `query` or `queries`, and `qrels` or `default`. Images keep the bytes they have.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from huggingface_hub import constants, snapshot_download

from puma_hf.data.images import image_header
from puma_hf.data.instructions import MBEIR_INSTRUCTIONS
from puma_hf.data.mbeir import (
    IMAGE,
    IMPORT_FILE,
    MBEIR,
    MBEIR_DATASET_IDS,
    TEXT,
    Layout,
    MBEIRTask,
    file_hash,
    is_mbeir,
    read_instructions,
    read_jsonl,
    select_tasks,
    task_named,
)
from puma_hf.data.mbeir_write import (
    link,
    make_folder,
    text_hash,
    write_instructions,
    write_lines,
    write_origin,
    write_records,
)
from puma_hf.data.records import Problems, read_lines, wrong
from puma_hf.files import write_whole
from puma_hf.settings import shown

logger = logging.getLogger(__name__)

_AGAIN = "If it was downloaded, the download was interrupted: run it again."
# The names of each configuration, the first that is there is taken.
_CONFIGS = {"corpus": ("corpus",), "queries": ("query", "queries"), "qrels": ("qrels", "default", "data")}
# The one copy whose name does not say what it is.
_OTHER_NAMES = {"InfoSeekIT2ITRetrieval": MBEIRTask(8, "infoseek")}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
_SHARD = re.compile(r".+-(\d{5})-of-(\d{5})(?:-\w+)?")
_TABLE = "query_instructions.tsv"
_SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif"}
# What some conversions put before an id: the name of the table, and the split.
_ID_PREFIX = re.compile(r"^(?:query|queries|corpus|doc)-(?:(?:train|val|validation|dev|test|corpus)-)?")
_OURS = {"_id": "id", "qid": "id", "did": "id", "txt": "text", "query_txt": "text", "query_modality": "modality"}
_OURS |= {"query_id": "query-id", "corpus_id": "corpus-id", "relevance": "score"}
_COLUMNS = {*_OURS, *_OURS.values(), "image"}


def open_mbeir(
    source: str | Path | MBEIR,
    *,
    split: str = "test",
    tasks: Iterable[str] | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
) -> MBEIR:
    """M-BEIR, or a dataset in its layout, from wherever it is.

    A source is one of

    - a folder in M-BEIR's layout, or one that `build_nano` made;
    - a folder of Parquet copies: `mbeir_<dataset>_task<n>`, or one with such folders in it;
    - a dataset of the Hub that is such a copy, as "mteb/mbeir_cirr_task7";
    - an organisation of the Hub that has copies of all 16 tasks: "mteb" or "MRBench".

    Copies are imported once, into the cache: images as files with the bytes they have, queries, pools and
    judgements in M-BEIR's layout. An import that was interrupted is gone on with, task by task; images that are
    there are not written again. They have the first wording of each instruction (or a `query_instructions.tsv` beside
    them), no hard negatives, and the global pool of the tasks that are asked for alone.

    Args:
        source: The source.
        split: The split that is wanted of copies.
        tasks: The tasks that are wanted of copies, such as "cirr_task7"; None for all. A folder in M-BEIR's layout
            is opened whole.
        cache_dir: Where imports go; by default `puma_hf/mbeir` in the cache of Hugging Face (`HF_HOME`).
        revision: Commit, branch or tag of a dataset of the Hub.

    Raises:
        FileNotFoundError: If there is no such source, or it cannot be downloaded, or a part of it is missing.
        ValueError: If a task is not among those of the source, or `revision` is given for a folder.

    Example:

    ```python
    >>> from puma_hf.data import open_mbeir

    >>> len(open_mbeir("demo/emoji").tasks())
    8
    ```
    """
    if isinstance(source, MBEIR):
        return source
    folder = Path(source)
    if folder.is_dir() and revision is not None:
        what = f"revision is {revision!r}, but {folder} is a folder; a revision is for the Hub alone"
        raise ValueError(f"{what}: leave it out (in evaluate --data-revision)")
    if folder.is_dir() and is_mbeir(folder):
        return MBEIR(folder)
    copies = _folder_copies(folder, tasks) if folder.is_dir() else _hub_copies(str(source), tasks, revision)
    cache = Path(constants.HF_HOME, "puma_hf", "mbeir") if cache_dir is None else Path(cache_dir)
    places = [
        folder / _TABLE,
        *(copy / name for copy in copies.values() for name in (_TABLE, f"instructions/{_TABLE}")),
    ]
    table = next((place for place in places if place.is_file()), None)
    return MBEIR(_import([find_copy(copies[task], task, split) for task in copies], cache, split, table))


def _task_of(name: str) -> MBEIRTask | None:
    """The task that a folder or a dataset of the Hub is named after, or None."""
    return _OTHER_NAMES.get(name) or (task_named(name[6:], name) if name.startswith("mbeir_") else None)


def _folder_copies(folder: Path, tasks: Iterable[str] | None) -> dict[MBEIRTask, Path]:
    """The copies that a folder is or holds, by task."""
    found = {task: path for path in sorted(folder.iterdir()) if path.is_dir() and (task := _task_of(path.name))}
    if not found and next(folder.rglob("*.parquet"), None):
        # A snapshot in the Hub's cache has the name further up, as datasets--<organisation>--<name>.
        names = (part.rpartition("--")[2] for part in reversed(folder.resolve().parts))
        named = [task for name in names if (task := _task_of(name))]
        found = {task: folder for task in named[:1]}
    if not found:
        raise FileNotFoundError(
            f"{folder} is not M-BEIR: it has no query/ and cand_pool/, and neither it nor a folder in it is a Parquet "
            "copy named mbeir_<dataset>_task<n>. Name another; pairs of your own become one by puma-hf pairs --mbeir."
        )
    return {task: found[task] for task in select_tasks(sorted(found), tasks)}


def _hub_copies(name: str, tasks: Iterable[str] | None, revision: str | None) -> dict[MBEIRTask, Path]:
    """Snapshots of the Hub's datasets, by task; what is in the cache is not downloaded again."""
    organisation, _, repository = name.partition("/")
    known = {task: f"mbeir_{task.name}" for row in MBEIR_INSTRUCTIONS if (task := _task_of(row))}
    if organisation == "mteb":
        known |= {task: other for other, task in _OTHER_NAMES.items()}
    if repository:
        known = {task: repository for task in [_task_of(repository)] if task}
    if not known or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(
            f"{name!r} is no folder here, and no organisation or copy of a task on the Hub, which would be named "
            "<organisation>/mbeir_<dataset>_task<n>. Check the path, or download the dataset and name its folder."
        )
    folders = {}
    for task in select_tasks(sorted(known), tasks):
        full = f"{organisation}/{known[task]}"
        try:
            wanted = ["*.parquet", "README.md"]
            found = snapshot_download(full, repo_type="dataset", revision=revision, allow_patterns=wanted)
        except Exception as error:  # the Hub's client raises errors of many types
            raise FileNotFoundError(
                f"{name!r} is no folder here, and the Hub's dataset {full} could not be downloaded "
                f"({str(error).strip().partition(chr(10))[0]}). Check the name. If this machine is offline, run "
                f"`hf download {full} --repo-type dataset` on one that is not, and bring the cache or the files here."
            ) from error
        folders[task] = Path(found)
    return folders


# --- which files are what


class ParquetCopy(NamedTuple):
    """The Parquet copy of one task: its folder, and the files of its candidates, queries and judgements, in order."""

    folder: Path
    task: MBEIRTask
    corpus: list[Path]
    queries: list[Path]
    qrels: list[Path]

    @property
    def fingerprint(self) -> str:
        """A hash of the files' names, sizes and times, to tell whether they have been imported before."""
        files = [(file, file.stat()) for file in (*self.corpus, *self.queries, *self.qrels)]
        states = [[file.name, file.parent.name, state.st_size, state.st_mtime_ns] for file, state in files]
        return text_hash([self.task.name, *states])


def find_copy(folder: Path, task: MBEIRTask, split: str = "test") -> ParquetCopy:
    """The files of a copy: its configurations come from the `README.md`, as `datasets` has them, or are folders.

    Raises:
        FileNotFoundError: If a configuration, the split or a part of a file is missing.
    """
    return ParquetCopy(folder, task, *(_files(folder, role, split) for role in _CONFIGS))


def _files(folder: Path, role: str, split: str) -> list[Path]:
    known = datasets.get_dataset_config_names(str(folder))
    found: Mapping[Any, Any] = {}
    for name in reversed(_CONFIGS[role]):
        options = {"name": name} if name in known and len(known) > 1 else {"data_dir": name}
        if "name" in options or next((folder / name).rglob("*.parquet"), None):
            found = datasets.load_dataset_builder(str(folder), **options).config.data_files or {}
    if not found:
        raise FileNotFoundError(f"{folder} has no Parquet files of {' or '.join(_CONFIGS[role])}. {_AGAIN}")
    splits = {str(name): [Path(file) for file in files] for name, files in found.items()}
    # A pool has a split of any name, but queries of another split are other queries.
    chosen = next(iter(splits)) if role == "corpus" and len(splits) == 1 else split
    if chosen not in splits:
        raise FileNotFoundError(f"{folder}: {role} has no split {split!r}, only {sorted(splits)}. Ask for one of them.")
    # A shard that is missing would be a smaller pool, and better figures.
    shards = [match for file in splits[chosen] if (match := _SHARD.fullmatch(file.stem))]
    if shards and len(shards) != int(shards[0][2]):
        what = f"{len(shards)} of the {int(shards[0][2])} files of its {role} are there"
        raise FileNotFoundError(f"{folder}: {what}. {_AGAIN}")
    return splits[chosen]


# --- the import


def _import(copies: Sequence[ParquetCopy], cache: Path, split: str, table: Path | None) -> Path:
    """Import what is not in the cache yet; returns the folder of these tasks together."""
    numbers = dict(MBEIR_DATASET_IDS)
    if table is not None:
        numbers |= {name: number for number, name in read_instructions(table)[1].items()}
    rows = [] if table is not None else [_instruction_row(copy) for copy in copies]
    parts: list[Path] = []
    for copy in copies:
        part = cache / "tasks" / f"{copy.task.name}-{split}-{copy.fingerprint[:16]}"
        options: Any = {"image_root": cache, "split": split, "dataset_id": numbers.get(copy.task.dataset)}
        make_folder(part, partial(import_copy, copy, **options))
        parts.append(part)
    key = text_hash([split, [part.name for part in parts], file_hash(table) if table else rows])
    name = copies[0].task.name if len(copies) == 1 else f"{len(copies)}_tasks"
    folder = cache / "datasets" / f"{name}-{split}-{key[:16]}"

    def write(draft: Path) -> None:
        layout = Layout(draft)
        write_instructions(layout.instruction_path, rows or [[""] * 5])
        if table is not None:
            shutil.copyfile(table, layout.instruction_path)
        write_records(layout.union_pool_path(split), _joined(copies, parts))
        for part in parts:
            for path in (path for path in part.rglob("*") if path.is_file()):
                link(path, draft / path.relative_to(part))
        write_origin(draft / IMPORT_FILE, "../..", {"split": split, "copies": [part.name for part in parts]})

    make_folder(folder, write)
    return folder


def _instruction_row(copy: ParquetCopy) -> list[str]:
    task = copy.task
    wording = MBEIR_INSTRUCTIONS.get(f"mbeir_{task.name}")
    if wording is None:
        what = f"{task.name} is none of M-BEIR's tasks, so its instruction is not known"
        raise FileNotFoundError(f"{copy.folder}: {what}. Put a {_TABLE} beside it, in M-BEIR's format.")
    number = MBEIR_DATASET_IDS[task.dataset]
    return [task.query_modality, task.candidate_modality, task.dataset, str(number), wording]


def _joined(copies: Sequence[ParquetCopy], parts: Sequence[Path]) -> Iterator[Mapping[str, Any]]:
    """The candidates of several tasks, each once."""
    contents: dict[str, int] = {}  # hashes: pools of millions need not be held
    for copy, part in zip(copies, parts, strict=True):
        for line in read_jsonl(Layout(part).pool_path(copy.task.name), Problems(part)):
            did, content = line.columns["did"], hash(json.dumps(line.columns))
            if did not in contents:
                yield line.columns
            if contents.setdefault(did, content) != content:
                what = f"did {did!r} was already given for something else, here or for another task"
                raise wrong(copy.folder, f"{what}; a did must mean the same in every pool", "contradiction")


def import_copy(copy: ParquetCopy, folder: Path, image_root: Path, split: str, dataset_id: int | None) -> None:
    """Write the queries, the pool and the judgements of a copy; rows are read a few at a time.

    The positives of a query are those that the judgements name; the copies have no hard negatives. What is wrong with
    a record is told by `MBEIR`, which reads what is written here.
    Images go below `image_root`, each under a hash of its bytes; one that is there already is not written again. The
    dataset's number is put before ids that have none; None if it is not known.
    """
    task, layout = copy.task, Layout(folder)

    def records(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
        for where, row in _rows(files, problems, "id"):
            cell, text = row.get("image"), row.get("text") or None
            if isinstance(cell, Mapping) and not any(value is not None for value in cell.values()):
                cell = None  # some writers have a struct of nothing for a row without an image
            image = None if cell is None else problems.attempt(_store_image, cell, image_root, where)
            # Without a label, that of what is there; some copies have "text,image".
            label = row.get("modality") or ",".join([IMAGE] * (cell is not None) + [TEXT] * (text is not None))
            label = ",".join(sorted(part.strip() for part in str(label).split(",")))
            yield {"did": _full_id(row["id"], dataset_id), "txt": text, "img_path": image, "modality": label}

    with Problems(copy.folder) as problems:
        judged: dict[str, dict[str, int]] = defaultdict(dict)
        for where, row in _rows(copy.qrels, problems, "query-id", "corpus-id", "score"):
            problems.attempt(_judge, judged, row, where, dataset_id)
        scores = ((qid, did, score) for qid, dids in judged.items() for did, score in dids.items())
        write_lines(layout.qrels_path(split, task), (f"{qid} 0 {did} {n} {task.task_id}" for qid, did, n in scores))
        queries = (
            {
                **{f"query_{name}": record[name] for name in ("txt", "img_path", "modality")},
                "qid": record["did"],
                "pos_cand_list": [did for did, score in judged.get(record["did"], {}).items() if score > 0],
                "neg_cand_list": [],
            }
            for record in records(copy.queries)
        )
        write_records(layout.query_path(split, task), queries)
        write_records(layout.pool_path(task.name), records(copy.corpus))


def _rows(files: Sequence[Path], problems: Problems, *needed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of Parquet files by our names of their columns."""
    for path in files:
        for line in read_lines(path, _COLUMNS):
            if line.error is not None:
                problems.add(line.error)
                continue
            row = {_OURS.get(name, name): value for name, value in line.columns.items()}
            if missing := [name for name in needed if name not in row]:
                names = [missing[0], *(name for name, ours in _OURS.items() if ours == missing[0])]
                what = f"no column {' or '.join(names)}, only {shown(list(line.columns))}"
                raise wrong(path, f"{what}; rename the one that holds it", "missing field")
            yield line.where, row


def _judge(judged: dict[str, dict[str, int]], row: Mapping[str, Any], where: str, dataset_id: int | None) -> None:
    qid, did = (_full_id(row[name], dataset_id) for name in ("query-id", "corpus-id"))
    score = row["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or score != int(score) or score < 0:
        raise wrong(where, f"score is {shown(score)}, must be a whole number of 0 or more")
    if judged[qid].setdefault(did, int(score)) != score:
        raise wrong(where, f"{shown(qid)} and {shown(did)} were judged {judged[qid][did]} before, now {score}")


def _full_id(value: Any, dataset_id: int | None) -> str:
    record_id = _ID_PREFIX.sub("", str(value).strip())
    return record_id if ":" in record_id or dataset_id is None else f"{dataset_id}:{record_id}"


def _store_image(cell: Any, root: Path, where: str) -> str:
    """Write an image under a hash of its bytes, so that none is there twice; returns its path below the root."""
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if not isinstance(data, bytes) or not data:
        raise wrong(where, "the image holds no bytes; a copy must have its images inside", "image missing")
    kind = image_header(data, f"{where}: the image")[1]
    digest = hashlib.sha256(data).hexdigest()
    name = f"images/{digest[:2]}/{digest[2:]}{_SUFFIXES.get(kind, f'.{kind.lower()}')}"
    path = root / name
    if not path.is_file() or path.stat().st_size != len(data):
        write_whole(path, data, sync=False)
    return name
