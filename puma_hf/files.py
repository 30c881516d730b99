"""What a directory of ours is, and how a directory or a file is written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp, mkstemp
from typing import Any

# What peft calls the two files of an adapter.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What training puts beside them: the SHA-256 of the weights that it started from, and its settings.
BASE_FILE = "puma_base.json"
DISTILL_RECIPE, TRAIN_RECIPE = "distill.yaml", "train.yaml"
# As the classes of `puma_hf.modeling` call themselves; those are heavy to import, and a test holds the two equal.
PUMA_MODEL_TYPES = ("puma", "puma_qwen2_5_vl", "puma_qwen3_vl")
# huggingface_hub.utils.validate_repo_id has the same rules; to import it would slow `puma-hf --help` down.
_HUB_ID = re.compile(r"\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository on the Hub, organisation/name; nobody is asked for it.

    Example:
        >>> is_hub_id("org/puma-k14"), is_hub_id("../puma-k14"), is_hub_id("/home/me/puma-k14")
        (True, False, False)
    """
    is_forbidden = "--" in name or ".." in name or name.endswith(".git")
    return _HUB_ID.fullmatch(name) is not None and not is_forbidden


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
    folder = Path(directory)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not is_adapter and not is_puma_directory(folder):
        raise FileNotFoundError(
            f"{str(directory)!r} is neither a PUMA directory nor that of a LoRA adapter. Name one that puma-hf prune, "
            "distill, train or merge wrote."
        )
    return is_adapter


def named_base(adapter: Path) -> str:
    """The base that an adapter names, a folder or a Hub id; "" if it names none.

    A relative path is looked for in the current directory, and then in each that the adapter lies in: the one that it
    was trained in is often among them.
    """
    name = str(read_config(adapter, ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    places = [Path(name), *(parent / name for parent in adapter.resolve().parents)]
    return next((str(place) for place in places if name and is_puma_directory(place)), name)


@contextmanager
def new_directory(
    output_dir: str | Path,
    *,
    overwrite: bool,
    forbidden: Path | None = None,
    is_ours: Callable[[Path], bool] = is_puma_directory,
) -> Iterator[Path]:
    """A hidden sibling of `output_dir` to write into, renamed into place when the block ends without error.

    Args:
        output_dir: The directory to make.
        overwrite: Whether to replace it if it is not empty.
        forbidden: A folder that is being read.
        is_ours: Tells what may be replaced.

    Raises:
        FileExistsError: If `output_dir` is not empty and `overwrite` is false, or if it is not ours.
        ValueError: If it is, or holds, the folder that is being read.
        NotADirectoryError: If it is a file.
        PermissionError: If its parent cannot be written.
    """
    target = Path(output_dir).resolve()
    if forbidden is not None and forbidden.resolve().is_relative_to(target):
        raise ValueError(f"output_dir {str(output_dir)!r} is, or holds, the source itself. Choose another directory.")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"output_dir {str(output_dir)!r} is a file. Choose a directory.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(
            f"output_dir {str(output_dir)!r} is not empty. Choose another, or pass overwrite=True (--overwrite)."
        )
    if target.is_dir() and any(target.iterdir()) and not is_ours(target):
        raise FileExistsError(
            f"output_dir {str(output_dir)!r} holds files, but no PUMA model: overwriting would delete what is not "
            "ours. Choose another directory, or empty it yourself."
        )
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise PermissionError(
            f"output_dir {str(output_dir)!r} cannot be written ({error}). Choose another directory."
        ) from error
    try:
        temporary.chmod(0o755)
        yield temporary
        _move_into_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # somebody else may have put something there
                parent.rmdir()
        raise


def _move_into_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.replace(temporary, target)
        return
    # A directory cannot be replaced in one step when it has content: park it, and only then remove it.
    parked = Path(mkdtemp(prefix=f".{target.name}-old-", dir=target.parent)) / target.name
    os.replace(target, parked)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(parked, target)
        parked.parent.rmdir()
        raise
    shutil.rmtree(parked.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A draft beside a file, which takes its place when the block ends well and is removed when it does not.

    Args:
        path: The file, which is replaced if it is there; its folder is made if need be.

    Yields:
        The draft, an empty file.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = mkstemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        draft.chmod(0o644)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file whole or not at all; its folder is made if need be.

    Several processes may write the same file at once: one of them wins.

    Args:
        path: The file, which is replaced if it is there.
        content: What it is to hold.
        sync: Whether it must be on the disk when this returns; of thousands of small files, that can be copied again,
            this would cost a wait each.

    Raises:
        OSError: If it cannot be written.
    """
    with whole_file(path) as draft, draft.open("wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
