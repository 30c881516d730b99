"""Open M-BEIR wherever it is: a folder in its layout, a nano folder, Parquet copies on disk or on the Hub.

The Hub has each task as a dataset of its own, `mteb/mbeir_<dataset>_task<n>` and `MRBench/mbeir_<dataset>_task<n>`,
with the configurations `corpus`, `query` or `queries`, and `qrels`, or `default` in `data/`. Images keep their bytes.
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from puma_hf.data.images import save_image
from puma_hf.data.mbeir import MBEIR, is_mbeir
from puma_hf.data.mbeir_write import link, text_hash, write_instructions, write_lines, write_records
from puma_hf.data.records import Line, Problems, read_lines, wrong
from puma_hf.data.tasks import (
    MBEIR_DATASET_IDS,
    MBEIR_INSTRUCTIONS,
    TASK_MODALITIES,
    MBEIRTask,
    select_tasks,
    task_named,
)
from puma_hf.files import new_directory

# The folders of each part of a copy; the first that is there is taken.
_FOLDERS = {"corpus": ["corpus"], "queries": ["query", "queries"], "qrels": ["qrels", "data"]}
# The one copy whose name does not say what it is.
_OTHER_NAMES = {"InfoSeekIT2ITRetrieval": MBEIRTask(8, "infoseek")}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
_TOTAL = re.compile(r"-of-(\d{5})")
_TABLE = "query_instructions.tsv"
# What mteb puts before an id: the name of the table, and the split.
_ID_PREFIX = re.compile(r"^(?:query|corpus)-(?:(?:train|val|test)-)?")
_COLUMNS = {"id", "_id", "text", "image", "modality", "query-id", "corpus-id", "score"}


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

    Copies are imported once, into the cache, in M-BEIR's layout; an import that was interrupted goes on, task by task.
    They have the first wording of each instruction (or a `query_instructions.tsv` beside them), no hard negatives, and
    the global pool of the tasks that are asked for alone.

    Args:
        source: The source.
        split: The split that is wanted of copies.
        tasks: The tasks that are wanted of copies, such as "cirr_task7"; None for all.
        cache_dir: Where imports go; by default `puma_hf/mbeir` in the cache of Hugging Face (`HF_HOME`).
        revision: Commit, branch or tag of a dataset of the Hub.

    Raises:
        FileNotFoundError: If there is no such source, or it cannot be downloaded, or a part of it is missing.
        ValueError: If a task is not among those of the source.

    Example:
        >>> len(open_mbeir("demo/emoji").tasks())
        8
    """
    if isinstance(source, MBEIR):
        return source
    folder = Path(source)
    if is_mbeir(folder):
        return MBEIR(folder)
    # Found and chosen before anything is downloaded or written.
    copies = _folder_copies(folder, tasks) if folder.is_dir() else _hub_copies(str(source), tasks, revision)
    cache = Path(constants.HF_HOME, "puma_hf", "mbeir") if cache_dir is None else Path(cache_dir)
    places = [place / name for place in (folder, *copies.values()) for name in (_TABLE, f"instructions/{_TABLE}")]
    cache.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(cache / ".lock"):  # one process of a machine imports, the others wait and find it done
        return MBEIR(_import(copies, cache, split, next(filter(Path.is_file, places), None)), image_root=cache)


def _task_of(name: str) -> MBEIRTask | None:
    """The task that a folder or a dataset of the Hub is named after, or None."""
    return _OTHER_NAMES.get(name) or (task_named(name[6:]) if name.startswith("mbeir_") else None)


def _folder_copies(folder: Path, tasks: Iterable[str] | None) -> dict[MBEIRTask, Path]:
    """The copies that a folder is or holds, by task."""
    found = {task: path for path in sorted(folder.iterdir()) if path.is_dir() and (task := _task_of(path.name))}
    if not found and (own := _task_of(folder.resolve().name)):
        found = {own: folder}
    if not found:
        what = "has no query/ and cand_pool/, and neither it nor a folder in it is a copy named mbeir_<dataset>_task<n>"
        raise FileNotFoundError(f"{folder} is not M-BEIR: it {what}. Pairs become one by puma-hf pairs --mbeir.")
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
        what = "no organisation or copy of a task on the Hub, such as <organisation>/mbeir_<dataset>_task<n>"
        raise FileNotFoundError(f"{name!r} is no folder here, and {what}. Check the path.")
    folders = {}
    for task in select_tasks(sorted(known), tasks):
        full, wanted = f"{organisation}/{known[task]}", ["*.parquet", "README.md"]
        try:
            found = snapshot_download(full, repo_type="dataset", revision=revision, allow_patterns=wanted)
        except OSError as error:  # which does not name what a mistyped path was taken for
            what = f"{name!r} is no folder here, and {full} could not be downloaded. Check the name. {error}"
            raise FileNotFoundError(what) from error
        folders[task] = Path(found)
    return folders


def copy_files(folder: Path, role: str, split: str) -> list[Path]:
    """The Parquet files of a copy's "corpus", "queries" or "qrels", in order; a FileNotFoundError if one is missing."""
    files = next(filter(None, (sorted((folder / name).rglob("*.parquet")) for name in _FOLDERS[role])), [])
    found = [file for file in files if file.stem.partition("-")[0] == split]
    if role == "corpus" and not found:
        found = files  # a pool has a split of any name, but queries of another split are other queries
    # A file that is missing would be a smaller pool, and better figures.
    total = _TOTAL.search(found[0].stem) if found else None
    if not found or (total and len(found) != int(total[1])):
        parts = f"{len(found)} of {int(total[1])} files" if total else f"no files, only {[file.name for file in files]}"
        what = f"of the {role} of the split {split!r} there are {parts}"
        raise FileNotFoundError(f"{folder}: {what}. Ask for another split, or download it again.")
    return found


# --- the import


def _import(copies: Mapping[MBEIRTask, Path], cache: Path, split: str, table: Path | None) -> Path:
    """Import what is not in the cache yet; returns the folder of these tasks together."""
    parts: dict[MBEIRTask, Path] = {}
    rows = []
    for task, folder in copies.items():
        wording = MBEIR_INSTRUCTIONS.get(f"mbeir_{task.name}")
        if table is None and wording is None:
            raise FileNotFoundError(f"{folder}: the instruction of {task.name} is not known. Put a {_TABLE} beside it.")
        directions, number = TASK_MODALITIES[task.task_id], MBEIR_DATASET_IDS.get(task.dataset)
        rows.append([*directions, task.dataset, str(number), str(wording)])
        files = {role: copy_files(folder, role, split) for role in _FOLDERS}
        # Size and time stand for the bytes: to hash them would cost a read of all images.
        states = [(file, file.stat()) for role in files.values() for file in role]
        known_by = [[file.name, file.parent.name, state.st_size, state.st_mtime_ns] for file, state in states]
        parts[task] = cache / "tasks" / f"{task.name}-{split}-{text_hash(['2', task.name, *known_by])[:16]}"
        if not parts[task].is_dir():
            with new_directory(parts[task], overwrite=False) as draft:
                import_copy(files, task, split, cache, draft)
    key = text_hash([split, [part.name for part in parts.values()], table.read_text("utf-8") if table else rows])
    name = next(iter(copies)).name if len(copies) == 1 else f"{len(copies)}_tasks"
    together = cache / "datasets" / f"{name}-{split}-{key[:16]}"
    if not together.is_dir():
        with new_directory(together, overwrite=False) as draft:
            layout = MBEIR(draft)
            write_instructions(layout.instruction_path, rows)
            if table is not None:
                shutil.copyfile(table, layout.instruction_path)
            pools = (MBEIR(part).pool_path(task, split) for task, part in parts.items())
            write_lines(layout.pool_path(None, split), _joined(pools))
            for part in parts.values():
                for path in filter(Path.is_file, part.rglob("*")):
                    link(path, draft / path.relative_to(part))
    return together


def _joined(pools: Iterable[Path]) -> Iterator[str]:
    """The lines of several pools: a candidate of two tasks is in both local pools, and once in the global."""
    seen: set[int] = set()  # hashes: pools of millions need not be held
    for pool in pools:
        with pool.open(encoding="utf-8") as lines:
            for line in lines:
                if hash(line) not in seen:
                    seen.add(hash(line))
                    yield line.rstrip("\n")


def import_copy(files: Mapping[str, Sequence[Path]], task: MBEIRTask, split: str, images: Path, folder: Path) -> None:
    """Write the queries, the pool and the judgements of a copy into a folder; rows are read a few at a time.

    The positives of a query are those that the judgements name; the copies have no hard negatives. What is wrong with
    a record is told by `MBEIR`, which reads what is written here. Images go below `images`, each under a hash of its
    bytes.
    """
    layout, positives = MBEIR(folder), defaultdict[str, list[str]](list)

    def rows(role: str) -> Iterator[Line]:
        return (line for file in files[role] for line in read_lines(file, _COLUMNS))

    def judgements() -> Iterator[str]:
        for line in rows("qrels"):
            qid, did, score = _plain_id(line, "query-id"), _plain_id(line, "corpus-id"), line.columns["score"]
            if score > 0:
                positives[qid].append(did)
            yield f"{qid} 0 {did} {score:g} {task.task_id}"

    def store(cell: Any, where: str) -> str:
        content = cell.get("bytes") if isinstance(cell, Mapping) else cell
        if not isinstance(content, bytes):
            raise wrong(where, "the image holds no bytes; a copy must have its images inside", "image missing")
        return save_image(content, images / "images", where).relative_to(images).as_posix()

    def records(role: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for line in rows(role):
            row, cell, text = line.columns, line.columns.get("image"), line.columns.get("text") or None
            if isinstance(cell, Mapping) and not any(value is not None for value in cell.values()):
                cell = None  # some writers have a struct of nothing for a row without an image
            image = None if cell is None else problems.attempt(store, cell, line.where)
            # Without a label, that of what is there; some copies have "text,image".
            label = row.get("modality") or ",".join(["image"] * (cell is not None) + ["text"] * (text is not None))
            label = ",".join(sorted(part.strip() for part in str(label).split(",")))
            yield _plain_id(line, "_id" if "_id" in row else "id"), {"txt": text, "img_path": image, "modality": label}

    def query(qid: str, record: Mapping[str, Any]) -> dict[str, Any]:
        named = {f"query_{name}": value for name, value in record.items()}
        return {"qid": qid, **named, "pos_cand_list": positives.get(qid, []), "neg_cand_list": []}

    with Problems(files["corpus"][0].parents[1]) as problems:
        write_lines(layout.qrels_path(split, task), judgements())
        write_records(layout.query_path(split, task), starmap(query, records("queries")))
        write_records(layout.pool_path(task, split), ({"did": did, **record} for did, record in records("corpus")))


def _plain_id(line: Line, name: str) -> str:
    return _ID_PREFIX.sub("", str(line.columns[name]).strip())
