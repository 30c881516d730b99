"""Open M-BEIR wherever it is: a folder in its layout, a nano folder, Parquet copies on disk or on the Hub.

The Hub has each task as a dataset of its own, `mteb/mbeir_<dataset>_task<n>` and `MRBench/mbeir_<dataset>_task<n>`,
with the configurations `corpus`, `query` or `queries`, and `qrels` or `default`. Images keep the bytes they have.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants, snapshot_download

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
from puma_hf.modeling.inputs_puma import open_image
from puma_hf.settings import cut, shown

logger = logging.getLogger(__name__)

IMAGE_FOLDER = "images"  # below the image root
_AGAIN = "If it was downloaded, the download was interrupted: run it again."
# The names of each configuration, the first that is there is taken.
_CONFIGS = {"corpus": ("corpus",), "queries": ("query", "queries"), "qrels": ("qrels", "default", "data")}
_SPLITS = {"train", "val", "validation", "dev", "test"}
# The one copy whose name does not say what it is.
_OTHER_NAMES = {"InfoSeekIT2ITRetrieval": MBEIRTask(8, "infoseek")}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
_SHARD = re.compile(r".+-(\d{5})-of-(\d{5})(?:-\w+)?")
_TABLE = "query_instructions.tsv"
_SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif"}
# What some conversions put before an id: the name of the table, and the split.
_ID_PREFIX = re.compile(r"^(?:query|queries|corpus|doc)-(?:(?:train|val|validation|dev|test|corpus)-)?")
_NAMES = {
    "id": ("id", "_id", "qid", "did"),
    "text": ("text", "txt", "query_txt"),
    "image": ("image",),
    "modality": ("modality", "query_modality"),
    "query-id": ("query-id", "query_id"),
    "corpus-id": ("corpus-id", "corpus_id"),
    "score": ("score", "relevance"),
}


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
    if folder.is_dir():
        if revision is not None:
            what = f"revision is {revision!r}, but {folder} is a folder; a revision is for the Hub alone"
            raise ValueError(f"{what}: leave it out (in evaluate --data-revision)")
        if is_mbeir(folder):
            return MBEIR(folder)
        copies = _folder_copies(folder, tasks, split)
    else:
        copies = _hub_copies(source, tasks, split, revision)
    cache = Path(constants.HF_HOME, "puma_hf", "mbeir") if cache_dir is None else Path(cache_dir)
    return MBEIR(_import(copies, cache, split, _table(folder, copies)))


def _task_of(name: str) -> MBEIRTask | None:
    """The task that a folder or a dataset of the Hub is named after, or None."""
    return _OTHER_NAMES.get(name) or (task_named(name[6:], name) if name.startswith("mbeir_") else None)


def _folder_copies(folder: Path, tasks: Iterable[str] | None, split: str) -> list[ParquetCopy]:
    # A snapshot in the Hub's cache has the name further up, as datasets--<organisation>--<name>.
    names = (part.rpartition("--")[2] for part in reversed(folder.resolve().parts))
    own = next((task for name in names if (task := _task_of(name))), None)
    children = {task: path for path in sorted(folder.iterdir()) if path.is_dir() and (task := _task_of(path.name))}
    found = children or ({own: folder} if own is not None and next(_parquet_files(folder), None) else {})
    if not found:
        raise FileNotFoundError(
            f"{folder} is not M-BEIR: it has no query/ and cand_pool/, and neither it nor a folder in it is a Parquet "
            "copy named mbeir_<dataset>_task<n>. Name another; pairs of your own become one by puma-hf pairs --mbeir."
        )
    return [find_copy(found[task], task, split) for task in select_tasks(sorted(found), tasks)]


def _hub_copies(source: str | Path, tasks: Iterable[str] | None, split: str, revision: str | None) -> list[ParquetCopy]:
    name = str(source)
    if Path(source).exists() or not _HUB_NAME.fullmatch(name):
        what = "is neither a folder nor the name of a dataset or organisation of the Hub"
        raise FileNotFoundError(f"{name!r} {what}. Check the path.")
    organisation, _, repository = name.partition("/")
    if not repository:
        rows = sorted(task for row in MBEIR_INSTRUCTIONS if (task := _task_of(row)))
        try:
            chosen = select_tasks(rows, tasks)
        except ValueError as error:
            raise ValueError(f"{name!r} is no folder here, and for an organisation of the Hub {error}") from error
        others = {task: other for other, task in _OTHER_NAMES.items() if organisation == "mteb"}
        wanted = {task: f"{name}/{others.get(task, f'mbeir_{task.name}')}" for task in chosen}
    else:
        if (task := _task_of(repository)) is None:
            raise FileNotFoundError(
                f"{name!r} is no folder here, and no copy of a task on the Hub, which would be named "
                "<organisation>/mbeir_<dataset>_task<n>. Check the path, or download the dataset and name its folder."
            )
        wanted = {task: name for task in select_tasks([task], tasks)}
    return [find_copy(_download(name, found, revision), task, split) for task, found in wanted.items()]


def _download(source: str, repository: str, revision: str | None) -> Path:
    """The snapshot of a dataset of the Hub; what is in the cache is not downloaded again."""
    wanted = ["*.parquet", "README.md"]
    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=wanted))
    except Exception as error:  # the Hub's client raises errors of many types
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"{source!r} is no folder here, and the Hub's dataset {repository} could not be downloaded ({cause}). "
            f"Check the name. If this machine is offline, run `hf download {repository} --repo-type dataset` on one "
            "that is not, and bring the cache or the files here."
        ) from error


def _table(folder: Path, copies: Sequence[ParquetCopy]) -> Path | None:
    """A table of instructions beside the copies."""
    places = [*([folder] if folder.is_dir() else []), *(copy.folder for copy in copies)]
    tables = (place / name for place in places for name in (_TABLE, f"instructions/{_TABLE}"))
    return next((table for table in tables if table.is_file()), None)


# --- which files are what


@dataclass(frozen=True)
class ParquetCopy:
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
    for name in _CONFIGS[role]:
        options = {"name": name} if name in known and len(known) > 1 else {"data_dir": name}
        if "name" in options or next(_parquet_files(folder / name), None):
            found = datasets.load_dataset_builder(str(folder), **options).config.data_files
            break
    else:
        raise FileNotFoundError(f"{folder} has no Parquet files of {' or '.join(_CONFIGS[role])}. {_AGAIN}")
    splits = {str(name): [Path(file) for file in files] for name, files in (found or {}).items()}
    chosen = split if split in splits else next(iter(splits))
    # A pool has a split of any name, but queries of another split are other queries.
    if split not in splits and (len(splits) > 1 or (role != "corpus" and chosen in _SPLITS)):
        raise FileNotFoundError(f"{folder}: {role} has no split {split!r}, only {sorted(splits)}. Ask for one of them.")
    shards = [match for file in splits[chosen] if (match := _SHARD.fullmatch(file.stem))]
    missing = {int(match[2]) for match in shards} - {len(shards)} if shards else set()
    if missing:
        what = f"{len(shards)} of the {min(missing)} files of its {role} are there"
        raise FileNotFoundError(f"{folder}: {what}. {_AGAIN}")
    return splits[chosen]


def _parquet_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.parquet") if "/." not in path.relative_to(folder).as_posix())


# --- the import


def _import(copies: Sequence[ParquetCopy], cache: Path, split: str, table: Path | None) -> Path:
    """Import what is not in the cache yet; returns the folder of these tasks together."""
    numbers = dict(MBEIR_DATASET_IDS)
    if table is not None:
        numbers |= {name: number for number, name in read_instructions(table)[1].items()}
    rows = [] if table is not None else [_instruction_row(copy) for copy in copies]
    imported: list[Path] = []
    for copy in copies:
        part = cache / "tasks" / f"{copy.task.name}-{split}-{copy.fingerprint[:16]}"
        if not part.exists():
            logger.info("Importing %s from %s", copy.task.name, copy.folder)
        number = numbers.get(copy.task.dataset)
        make_folder(part, partial(import_copy, copy, image_root=cache, split=split, dataset_id=number))
        imported.append(part)
    key = text_hash([split, [part.name for part in imported], file_hash(table) if table else rows])
    name = copies[0].task.name if len(copies) == 1 else f"{len(copies)}_tasks"
    folder = cache / "datasets" / f"{name}-{split}-{key[:16]}"

    def write(draft: Path) -> None:
        layout = Layout(draft)
        if table is None:
            write_instructions(layout.instruction_path, rows)
        else:
            layout.instruction_path.parent.mkdir()
            shutil.copyfile(table, layout.instruction_path)
        write_records(layout.union_pool_path(split), _joined(copies, imported))
        for part in imported:
            for path in (path for path in part.rglob("*") if path.is_file()):
                link(path, draft / path.relative_to(part))
        write_origin(draft / IMPORT_FILE, "../..", {"split": split, "copies": [part.name for part in imported]})

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


def _joined(copies: Sequence[ParquetCopy], parts: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The candidates of several tasks, each once."""
    contents: dict[str, int] = {}  # hashes: pools of millions need not be held
    for copy, part in zip(copies, parts, strict=True):
        with Problems(part) as problems:
            for _, record in read_jsonl(Layout(part).pool_path(copy.task.name), problems):
                content = hash(json.dumps(record))
                if record["did"] not in contents:
                    yield record
                if contents.setdefault(record["did"], content) != content:
                    what = f"did {record['did']!r} was already given for something else, here or for another task"
                    raise wrong(copy.folder, f"{what}; a did must mean the same in every pool", "contradiction")


def import_copy(copy: ParquetCopy, folder: Path, image_root: Path, split: str, dataset_id: int | None) -> None:
    """Write the queries, the pool and the judgements of a copy; rows are read a few at a time.

    The positives of a query are those that the judgements name; the copies have no hard negatives. What is wrong with
    a record is told by `MBEIR`, which reads what is written here.
    Images go below `image_root`, each under a hash of its bytes; one that is there already is not written again. The
    dataset's number is put before ids that have none; None if it is not known.
    """
    task, layout = copy.task, Layout(folder)
    with Problems(copy.folder) as problems:
        judged: dict[str, dict[str, int]] = defaultdict(dict)
        for where, row in _rows(copy.qrels, problems, ("query-id", "corpus-id", "score")):
            problems.attempt(_judge, judged, row, where, dataset_id)
        scores = ((qid, did, score) for qid, dids in judged.items() for did, score in dids.items())
        write_lines(layout.qrels_path(split, task), (f"{qid} 0 {did} {n} {task.task_id}" for qid, did, n in scores))
        read = partial(_records, image_root=image_root, problems=problems, dataset_id=dataset_id)
        queries = (_as_query(record, judged.get(record["did"], {})) for record in read(copy.queries))
        write_records(layout.query_path(split, task), queries)
        write_records(layout.pool_path(task.name), read(copy.corpus))


def _records(
    files: Sequence[Path], image_root: Path, problems: Problems, dataset_id: int | None
) -> Iterator[dict[str, Any]]:
    """The rows of a corpus, or of queries, as candidates."""
    for where, row in _rows(files, problems, ("id",), ("text", "image", "modality")):
        cell, text = row.get("image"), row.get("text") or None
        if isinstance(cell, dict) and not any(value is not None for value in cell.values()):
            cell = None  # some writers have a struct of nothing for a row without an image
        image = None if cell is None else problems.attempt(_store_image, cell, image_root, where)
        present = ",".join(name for name, value in ((IMAGE, cell), (TEXT, text)) if value is not None)
        label = row.get("modality")
        label = present if label is None else ",".join(sorted(part.strip() for part in str(label).split(",")))
        yield {"did": _full_id(row["id"], dataset_id), "txt": text, "img_path": image, "modality": label}


def _rows(
    files: Sequence[Path], problems: Problems, needed: Sequence[str], others: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    only = [column for name in (*needed, *others) for column in _NAMES[name]]
    for path in files:
        for line in read_lines(path, only):
            if line.error is not None:
                problems.add(line.error, "broken row")
                continue
            found = {name: [one for one in _NAMES[name] if one in line.columns] for name in (*needed, *others)}
            if missing := next((name for name in needed if not found[name]), None):
                what = f"no column {' or '.join(_NAMES[missing])}, only {cut(', '.join(line.columns))}"
                raise wrong(path, f"{what}; rename the one that holds it", "missing field")
            yield line.where, {name: line.columns[columns[0]] for name, columns in found.items() if columns}


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


def _as_query(record: Mapping[str, Any], judged: Mapping[str, int]) -> dict[str, Any]:
    return {
        "qid": record["did"],
        "query_txt": record["txt"],
        "query_img_path": record["img_path"],
        "query_modality": record["modality"],
        "pos_cand_list": [did for did, score in judged.items() if score > 0],
        "neg_cand_list": [],
    }


def _store_image(cell: Any, root: Path, where: str) -> str:
    """Write an image under a hash of its bytes, so that none is there twice; returns its path below the root."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes) or not data:
        raise wrong(where, "the image holds no bytes; a copy must have its images inside", "missing image")
    try:
        with warnings.catch_warnings(action="ignore"), open_image(io.BytesIO(data)) as image:
            kind = image.format or ""  # the header alone is read
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
        raise wrong(where, f"the image cannot be read ({error})", "broken image") from error
    digest = hashlib.sha256(data).hexdigest()
    name = f"{IMAGE_FOLDER}/{digest[:2]}/{digest[2:]}{_SUFFIXES.get(kind, f'.{kind.lower()}')}"
    path = root / name
    if not path.is_file() or path.stat().st_size != len(data):
        write_whole(path, data, sync=False)
    return name
