"""The files of M-BEIR's Parquet copies: which of them are the corpus, the queries and the qrels of a task.

The Hub has each task as a dataset of its own, `mteb/mbeir_<dataset>_task<n>` and `MRBench/mbeir_<dataset>_task<n>`,
with the configurations `corpus`, `query` or `queries`, and `qrels` or `default`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from puma_hf.data.mbeir_origin import text_hash
from puma_hf.data.mbeir_problems import MBEIRFormatError
from puma_hf.data.mbeir_tasks import TASK_MODALITIES, MBEIRTask

# The names of each configuration, the first that is there is taken.
_CONFIGS = {"corpus": ("corpus",), "queries": ("query", "queries"), "qrels": ("qrels", "default", "data")}
_SPLITS = {"train", "val", "validation", "dev", "test"}
# The one copy whose name does not say what it is.
_OTHER_NAMES = {"InfoSeekIT2ITRetrieval": MBEIRTask(8, "infoseek")}
_TASK = re.compile(r"mbeir_(\w+)_task(\d+)")
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?:-\w+)?")


@dataclass(frozen=True)
class ParquetCopy:
    """The Parquet copy of one task.

    Args:
        folder: Its folder.
        task: The task.
        corpus: Files of the candidates, in order.
        queries: Files of the queries.
        qrels: Files of the judgements.
    """

    folder: Path
    task: MBEIRTask
    corpus: tuple[Path, ...]
    queries: tuple[Path, ...]
    qrels: tuple[Path, ...]

    @property
    def fingerprint(self) -> str:
        """A hash of the files' names, sizes and times, to tell whether they have been imported before."""
        parts: list[object] = [self.task.name]
        for file in (*self.corpus, *self.queries, *self.qrels):
            state = file.stat()
            parts.append([file.relative_to(self.folder).as_posix(), state.st_size, state.st_mtime_ns])
        return text_hash(parts)


def task_of_name(name: str) -> MBEIRTask | None:
    """The task that a folder or a dataset of the Hub is named after.

    Args:
        name: A name such as "mbeir_cirr_task7".

    Returns:
        The task, or None if the name is no task's.

    Raises:
        MBEIRFormatError: If the number is none of M-BEIR's.

    Example:

    ```python
    >>> from puma_hf.data.mbeir_copies import task_of_name

    >>> task_of_name("mbeir_cirr_task7").name
    'cirr_task7'
    ```
    """
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    match = _TASK.fullmatch(name)
    if match is None:
        return None
    if int(match[2]) not in TASK_MODALITIES:
        raise MBEIRFormatError(f"{name}: task {match[2]} is not one of M-BEIR's {sorted(TASK_MODALITIES)}")
    return MBEIRTask(int(match[2]), match[1])


def copy_names(task: MBEIRTask) -> list[str]:
    """Names that the copy of a task may have on the Hub, the usual one last."""
    return [*(name for name, other in _OTHER_NAMES.items() if other == task), f"mbeir_{task.name}"]


def has_parquet(folder: Path) -> bool:
    """Whether there is a Parquet file below a folder."""
    return next(_parquet_files(folder), None) is not None


def find_copy(folder: Path, task: MBEIRTask, split: str = "test") -> ParquetCopy:
    """The files of a copy.

    The configurations come from the `README.md`, as `datasets` has them, or else from the folders' names.

    Args:
        folder: The folder of one task.
        task: The task.
        split: The split of the queries.

    Returns:
        The copy.

    Raises:
        FileNotFoundError: If a configuration, the split or a part of a file is missing.
        MBEIRFormatError: If the `README.md` cannot be read.
    """
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    configs = _readme_configs(folder / "README.md")
    for path in sorted(_parquet_files(folder)):
        config, part = _config_of(path.relative_to(folder), configs)
        found[config][part].append(path)
    files = {role: _role_files(folder, role, found, split) for role in _CONFIGS}
    return ParquetCopy(folder, task, files["corpus"], files["queries"], files["qrels"])


def _parquet_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.parquet"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _readme_configs(readme: Path) -> list[tuple[str, str | None, str]]:
    """(configuration, split or None, pattern of paths) of a dataset card."""
    if not readme.is_file():
        return []
    head = re.match(r"---\s*\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else {}
        configs: Sequence[Mapping[str, Any]] = (values or {}).get("configs") or []
        return [entry for config in configs for entry in _patterns(config["config_name"], config.get("data_files"))]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise MBEIRFormatError(
            f"{readme}: its head is no dataset card ({type(error).__name__}); download it again, or remove it"
        ) from error


def _patterns(config: str, data_files: Any, split: str | None = None) -> Iterator[tuple[str, str | None, str]]:
    if isinstance(data_files, str):
        yield config, split, data_files
    elif isinstance(data_files, list):
        for item in data_files:
            yield from _patterns(config, item, split)
    elif isinstance(data_files, dict):
        yield from _patterns(config, data_files["path"], str(data_files["split"]))


def _config_of(path: Path, configs: Sequence[tuple[str, str | None, str]]) -> tuple[str, str]:
    """Configuration and split of a file."""
    shard = _SHARD.fullmatch(path.stem)
    # The Hub's own conversion to Parquet has <config>/<split>/0000.parquet.
    split = shard["split"] if shard else path.parent.name if path.stem.isdecimal() else path.stem
    for config, named, pattern in configs:
        if fnmatchcase(path.as_posix(), pattern.removeprefix("./")):
            return config, named or split
    known = {name for names in _CONFIGS.values() for name in names}
    places = (*path.parts[:-1], re.split(r"[-_.]", path.stem)[0])
    # "data" last: a copy of one configuration has all its files there.
    return min((name for name in places if name in known), key="data".__eq__, default=path.parts[0]), split


def _role_files(folder: Path, role: str, found: Mapping[str, Mapping[str, list[Path]]], split: str) -> tuple[Path, ...]:
    names = _CONFIGS[role]
    config = next((name for name in names if name in found), None)
    again = "If it was downloaded, the download was interrupted: run it again."
    if config is None:
        there = ", ".join(sorted(found)) or "nothing"
        raise FileNotFoundError(f"{folder} has no Parquet files of {' or '.join(names)}, but of {there}. {again}")
    splits = found[config]
    chosen = split if split in splits else next(iter(splits))
    # A pool has a split of any name, but queries of another split are other queries.
    if split not in splits and (len(splits) > 1 or (role != "corpus" and chosen in _SPLITS)):
        raise FileNotFoundError(
            f"{folder}: {config} has no split {split!r}, only {sorted(splits)}. Ask for one of them."
        )
    files = splits[chosen]
    _check_shards(folder, files, again)
    return tuple(files)


def _check_shards(folder: Path, files: Sequence[Path], again: str) -> None:
    shards = [match for file in files if (match := _SHARD.fullmatch(file.stem))]
    for total in {match["total"] for match in shards}:
        numbers = {int(match["number"]) for match in shards if match["total"] == total}
        missing = sorted(set(range(int(total))) - numbers)
        if missing:
            raise FileNotFoundError(
                f"{folder}: {len(missing)} of the {int(total)} files {files[0].parent.name}/*-of-{total}.parquet are "
                f"missing, the first is number {missing[0]}. {again}"
            )
