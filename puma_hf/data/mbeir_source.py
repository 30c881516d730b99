"""Open M-BEIR wherever it is: a folder in its layout, a nano folder, Parquet copies on disk or on the Hub."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from puma_hf.data.instructions import MBEIR_INSTRUCTIONS
from puma_hf.data.mbeir_copies import ParquetCopy, copy_names, find_copy, has_parquet, task_of_name
from puma_hf.data.mbeir_format import MBEIRFormatError, is_mbeir, read_jsonl
from puma_hf.data.mbeir_origin import IMPORT_FILE, file_hash, text_hash, write_origin
from puma_hf.data.mbeir_parquet import import_copy
from puma_hf.data.mbeir_reader import MBEIR, select_tasks
from puma_hf.data.mbeir_tables import read_instructions
from puma_hf.data.mbeir_tasks import MBEIR_DATASET_IDS, MBEIRTask
from puma_hf.data.mbeir_writer import MBEIRWriter, json_line
from puma_hf.data.whole_folder import make_folder

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
_TABLE = "query_instructions.tsv"


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

    Returns:
        The dataset.

    Raises:
        FileNotFoundError: If there is no such source, or it cannot be downloaded, or a part of it is missing.
        ValueError: If a task is not among those of the source, or `revision` is given for a folder.
        MBEIRFormatError: If a copy is not what it should be; all wrong rows are counted.
        OSError: If the cache cannot be written.

    Example:

    ```python
    >>> from puma_hf.data.mbeir_source import open_mbeir

    >>> len(open_mbeir("demo/emoji").tasks())
    8
    ```
    """
    if isinstance(source, MBEIR):
        return source
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision is {revision!r}, but {folder} is a folder; a revision is for the Hub alone: leave it out "
                "(in evaluate --data-revision)"
            )
        if is_mbeir(folder):
            return MBEIR(folder)
        copies = _folder_copies(folder, tasks, split)
    else:
        copies = _hub_copies(source, tasks, split, revision)
    cache = Path(constants.HF_HOME, "puma_hf", "mbeir") if cache_dir is None else Path(cache_dir)
    return MBEIR(_import(copies, cache, split, _table(folder, copies)))


def _folder_copies(folder: Path, tasks: Iterable[str] | None, split: str) -> list[ParquetCopy]:
    found: dict[MBEIRTask, Path] = {}
    # A snapshot in the Hub's cache has the name further up.
    own = next((task for part in reversed(folder.resolve().parts) if (task := task_of_name(_plain(part)))), None)
    children = {path: task_of_name(path.name) for path in sorted(folder.iterdir()) if path.is_dir()}
    if any(children.values()):
        found = {task: path for path, task in children.items() if task is not None}
    elif own is not None and has_parquet(folder):
        found = {own: folder}
    if not found:
        raise FileNotFoundError(
            f"{folder} is not M-BEIR: it has no query/ and cand_pool/, and neither it nor a folder in it is a Parquet "
            "copy named mbeir_<dataset>_task<n>. Name the folder that has them; pairs of your own become one by "
            "puma-hf pairs DATA --mbeir FOLDER."
        )
    return [find_copy(found[task], task, split) for task in select_tasks(sorted(found), tasks)]


def _hub_copies(source: str | Path, tasks: Iterable[str] | None, split: str, revision: str | None) -> list[ParquetCopy]:
    name = str(source)
    if Path(source).exists() or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor the name of a dataset or organisation of the Hub. Check the path."
        )
    if "/" not in name:
        rows = sorted(task for row in MBEIR_INSTRUCTIONS if (task := task_of_name(row)))
        try:
            chosen = select_tasks(rows, tasks)
        except ValueError as error:
            raise ValueError(f"{name!r} is no folder here, and for an organisation of the Hub {error}") from error
        wanted = {task: f"{name}/{_copy_name(name, task)}" for task in chosen}
    else:
        task = task_of_name(name.partition("/")[2])
        if task is None:
            raise FileNotFoundError(
                f"{name!r} is no folder here, and no copy of a task on the Hub, which would be named "
                "<organisation>/mbeir_<dataset>_task<n>. Check the path, or download the dataset and name its folder."
            )
        wanted = {task: name for task in select_tasks([task], tasks)}
    return [find_copy(_download(name, repository, revision), task, split) for task, repository in wanted.items()]


def _download(source: str, repository: str, revision: str | None) -> Path:
    """The snapshot of a dataset of the Hub; what is in the cache is not downloaded again."""
    try:
        folder = snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=["*.parquet", "README.md"]
        )
    except Exception as error:  # the Hub's client raises errors of many types
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"{source!r} is no folder here, and the Hub's dataset {repository} could not be downloaded ({cause}). "
            f"Check the name. If this machine is offline, run `hf download {repository} --repo-type dataset` on one "
            "that is not, and bring the cache or the files here. A download that was interrupted goes on when it is "
            "run again."
        ) from error
    return Path(folder)


def _copy_name(organisation: str, task: MBEIRTask) -> str:
    names = copy_names(task)
    return names[0] if organisation == "mteb" else names[-1]


def _plain(part: str) -> str:
    """The name of a dataset from a folder of the Hub's cache, `datasets--<organisation>--<name>`."""
    return part.rpartition("--")[2]


def _table(folder: Path, copies: Sequence[ParquetCopy]) -> Path | None:
    """A table of instructions beside the copies."""
    places = [folder] if folder.is_dir() else []
    places += [copy.folder for copy in copies]
    tables = (place / name for place in places for name in (_TABLE, f"instructions/{_TABLE}"))
    return next((table for table in tables if table.is_file()), None)


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

    def write(unfinished: Path) -> None:
        writer = MBEIRWriter(unfinished, split)
        if table is None:
            writer.instructions(rows)
        else:
            writer.copy_instructions(table)
        _join(copies, imported, writer, split)
        write_origin(unfinished / IMPORT_FILE, "../..", {"split": split, "copies": [part.name for part in imported]})

    make_folder(folder, write)
    return folder


def _instruction_row(copy: ParquetCopy) -> str:
    task = copy.task
    wording = MBEIR_INSTRUCTIONS.get(f"mbeir_{task.name}")
    if wording is None:
        raise FileNotFoundError(
            f"{copy.folder}: {task.name} is none of M-BEIR's tasks, so its instruction is not known. Put a {_TABLE} "
            "beside it, in M-BEIR's format."
        )
    number = MBEIR_DATASET_IDS[task.dataset]
    return f"{task.query_modality}\t{task.candidate_modality}\t{task.dataset}\t{number}\t{wording}"


def _join(copies: Sequence[ParquetCopy], parts: Sequence[Path], writer: MBEIRWriter, split: str) -> None:
    """One folder of several tasks."""
    writer.global_path.parent.mkdir(parents=True)
    lines: dict[str, int] = {}  # hashes: pools of millions need not be held
    with writer.global_path.open("w", encoding="utf-8", errors="surrogatepass", newline="\n") as everything:
        for copy, folder in zip(copies, parts, strict=True):
            part = MBEIRWriter(folder, split)
            for find in (MBEIRWriter.query_path, MBEIRWriter.local_path, MBEIRWriter.qrels_path):
                _link(find(part, copy.task), find(writer, copy.task))
            for _, record in read_jsonl(part.local_path(copy.task)):
                line = json_line(record)
                known = lines.get(record["did"])
                if known is None:
                    lines[record["did"]] = hash(line)
                    everything.write(line + "\n")
                elif known != hash(line):
                    raise MBEIRFormatError(
                        f"{copy.folder}: did {record['did']!r} is something else in another task's corpus; a did must "
                        "mean the same in every pool",
                        "contradiction",
                    )


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # not every file system has links
        shutil.copyfile(source, target)
