"""What a directory of ours is, and how a directory or a file is written: whole or not at all, by one run at a time."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from tempfile import mkdtemp, mkstemp
from typing import Any

logger = logging.getLogger(__name__)

# What peft calls the two files of an adapter.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What training puts beside them: the SHA-256 of the weights that it started from, and its settings.
BASE_FILE = "puma_base.json"
DISTILL_RECIPE, TRAIN_RECIPE = "distill.yaml", "train.yaml"
# As the classes of `puma_hf.modeling` call themselves; those are heavy to import, and a test holds the two equal.
PUMA_MODEL_TYPES = ("puma", "puma_qwen2_5_vl", "puma_qwen3_vl", "puma_qwen3_5")
LOCK_FILE = ".puma-hf.lock"

# What a loader reads of a directory: the list of what may be published. Whatever else lies there stays.
LOADED = (
    *("config.json", "*_puma.py", ADAPTER_CONFIG, BASE_FILE, "LICENSE", "NOTICE"),
    *("model.safetensors.index.json", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json"),
    *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)
_PATIENCE = 0.2  # seconds: a run that ends at this moment removes its lock, and the next one makes its own


class DirectoryInUseError(OSError):
    """Another run writes into the directory."""


# ---------------------------------------------------------------------------------------------------- what a folder is


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository on the Hub, organisation/name; nobody is asked for it."""
    from huggingface_hub.errors import HFValidationError  # here, as `puma-hf --help` need not wait for it
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """What the `config.json` of a folder, or another such file, holds; nothing if there is none, or it is damaged."""
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def is_puma_directory(folder: Path) -> bool:
    """Whether a folder holds a PUMA model, judged by its `config.json`."""
    return read_config(folder).get("model_type") in PUMA_MODEL_TYPES


def is_adapter_directory(directory: str | Path) -> bool:
    """Whether a directory is that of a LoRA adapter, and not of a PUMA model.

    Raises:
        FileNotFoundError: If it is neither.
    """
    is_adapter = Path(directory, ADAPTER_CONFIG).is_file()
    if not is_adapter and not is_puma_directory(Path(directory)):
        raise FileNotFoundError(f"{str(directory)!r} is neither a PUMA directory nor an adapter's. Name such a one.")
    return is_adapter


def model_files(folder: Path) -> list[str]:
    """Names of the files of a PUMA directory, or of an adapter's, that a loader reads, its card not among them."""
    index = read_config(folder, "model.safetensors.index.json").get("weight_map")
    # Of shards those that the index names: older ones may lie beside them.
    weights = set(index.values()) if index else {"model.safetensors", ADAPTER_WEIGHTS}
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [name for name in names if name in weights or any(fnmatch(name, pattern) for pattern in LOADED)]


def named_base(adapter: Path) -> str:
    """The base that an adapter names, a folder or a Hub id; "" if it names none.

    A relative path is looked for in the current directory, and then in each that the adapter lies in: the one that it
    was trained in is often among them.
    """
    name = str(read_config(adapter, ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    places = [Path(name), *(parent / name for parent in adapter.resolve().parents)]
    return next((str(place) for place in places if name and is_puma_directory(place)), name)


# ------------------------------------------------------------------------------------------------------------- writing


def write_whole(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file whole or not at all; its folder is made if need be. Of several processes that write it one wins.

    With `sync` it is on the disk when this returns. For thousands of small files, that can be made again, this wait
    is too long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = mkstemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(draft, 0o644)  # mkstemp lets nobody else read it
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON that people can read, whole or not at all."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def new_directory(
    output_dir: str | Path,
    *,
    overwrite: bool,
    forbidden: Path | None = None,
    is_ours: Callable[[Path], bool] = is_puma_directory,
) -> Iterator[Path]:
    """A hidden sibling of `output_dir` to write into, renamed into place when the block ends without error.

    What is there is replaced only with `overwrite`, and only if `is_ours` knows it: else a FileExistsError. A
    ValueError is raised if it is, or holds, the `forbidden` folder, from which the block reads.
    """
    target, name = Path(output_dir).resolve(), f"output_dir {str(output_dir)!r}"
    if forbidden is not None and forbidden.resolve().is_relative_to(target):
        raise ValueError(f"{name} is, or holds, the source itself. Choose another directory.")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{name} is not empty. Choose another, or pass overwrite=True (--overwrite).")
        if not is_ours(target):
            raise FileExistsError(f"{name} holds files, but no PUMA model. Choose another, or empty it yourself.")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    parked = draft.with_name(f".old{draft.name}")
    try:
        draft.chmod(0o755)
        yield draft
        # A directory that has content cannot be replaced in one step: park it, and only then remove it.
        if target.exists():
            os.replace(target, parked)
        os.replace(draft, target)
    except BaseException:
        if parked.exists():
            os.replace(parked, target)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(parked, ignore_errors=True)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep every other run out of a directory as long as the block lasts; who only reads is not kept out.

    The directory is made if need be, and removed at the end if it is empty then. In it lies a hidden file, removed at
    the end; one that a killed run has left locks nothing, as the lock is the operating system's. Inside of the block
    the same thread may lock it again, which does nothing. On a file system without locks a warning is all that happens.

    Raises:
        DirectoryInUseError: At once, if another run has it, in this process or in another.
        OSError: If it is a file, or cannot be made.
    """
    from filelock import FileLock, Timeout  # 50 ms, which --help need not wait for

    directory = Path(folder).resolve()  # a link may have another end later
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    # One object for the path, which counts per thread. Not a lock by a file alone: that outlives a killed process.
    lock = FileLock(directory / LOCK_FILE, timeout=_PATIENCE, is_singleton=True, fallback_to_soft=False)
    is_inside = lock.is_locked
    try:
        lock.acquire()  # makes the directory again if a run that failed has removed it just now
    except Timeout as error:
        raise DirectoryInUseError(f"{str(folder)!r} is in use: another run writes there. Wait for its end.") from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s). See to it yourself that no other run writes there.", folder, error)
    try:
        yield
    finally:
        if not is_inside:  # while it is locked: who waits for it finds out that it is gone, and makes another
            (directory / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):  # of a run that has failed nothing is left; what holds something stays
                directory.rmdir()
