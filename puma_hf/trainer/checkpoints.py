"""Whole checkpoints: a manifest written last tells a finished one from what a kill or a full disk left."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puma_hf.files import ADAPTER_CONFIG, is_full_disk

logger = logging.getLogger(__name__)

MANIFEST_FILE = "puma_manifest.json"
UNFINISHED = ".unfinished"  # where an adapter is written before it goes to its place
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
# Files up to this size are compared by content too; larger ones only by their size, which a save that was cut
# off betrays just as well.
HASHED_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of a run that was written to the end.

    `transformers` writes a checkpoint file by file, and `get_last_checkpoint` takes any folder of the right
    name. This one passes over checkpoints that a kill, a full disk or a rotation left unfinished, and logs why.

    Args:
        folder: Output directory of a run, with `checkpoint-<step>` folders in it.

    Returns:
        Path of the checkpoint that was written last of those whose files all match their manifest, or None. It need
        not have the highest step: a run that went back to an earlier checkpoint writes smaller steps anew.

    Example:

    ```python
    >>> from puma_hf.trainer.checkpoints import last_whole_checkpoint

    >>> last_whole_checkpoint("a-folder-without-checkpoints") is None
    True
    ```
    """
    for checkpoint in _checkpoints(Path(folder)):
        reason = why_not_whole(checkpoint)
        if reason is None:
            return str(checkpoint)
        logger.warning("Passing over %s: %s.", checkpoint, reason)
    return None


def require_whole_checkpoint(checkpoint: str | Path) -> str:
    """The same path, if its checkpoint is whole.

    Args:
        checkpoint: A `checkpoint-<step>` folder.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is not whole. The message names the last whole one beside it.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(f"The checkpoint {str(checkpoint)!r} is no folder. {_remedy(folder)}")
    if (reason := why_not_whole(folder)) is not None:
        raise ValueError(f"The checkpoint {str(checkpoint)!r} is not whole: {reason}. {_remedy(folder)}")
    return str(checkpoint)


def why_not_whole(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not whole, or None if it is.

    Args:
        checkpoint: A `checkpoint-<step>` folder.
    """
    folder = Path(checkpoint)
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = dict(manifest["files"])
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}, which is written last"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST_FILE} cannot be read ({error})"
    for name, noted in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != noted["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {noted['size']}"
        if "sha256" in noted and _sha256(path) != noted["sha256"]:
            return f"{name} was changed"
    return None


def write_manifest(checkpoint: str | Path) -> Path:
    """Declare a checkpoint whole: note the size of each of its files, and of small ones the content.

    `PumaTrainer` does so at the end of each save. Call it for a checkpoint of another trainer that is known
    to be complete.

    Args:
        checkpoint: A `checkpoint-<step>` folder.

    Returns:
        Path of the manifest.
    """
    folder = Path(checkpoint)
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith(MANIFEST_FILE):
            continue
        _to_disk(path)
        size = path.stat().st_size
        files[path.relative_to(folder).as_posix()] = {"size": size}
        if size <= HASHED_BYTES:
            files[path.relative_to(folder).as_posix()]["sha256"] = _sha256(path)
    manifest, temporary = folder / MANIFEST_FILE, folder / f"{MANIFEST_FILE}.unfinished"
    others = [_number(other) or 0 for other in _checkpoints(folder.parent) if other.name != folder.name]
    content = {"version": 1, "number": max(others, default=0) + 1, "files": files}
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _to_disk(temporary)
    os.replace(temporary, manifest)
    return manifest


def remove_manifest(checkpoint: str | Path) -> None:
    """Take back that a checkpoint is whole, before its files are written anew.

    Args:
        checkpoint: A `checkpoint-<step>` folder, which need not exist.
    """
    Path(checkpoint, MANIFEST_FILE).unlink(missing_ok=True)


def rotate_checkpoints(newest: str | Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints of a run, those that are not whole first.

    Args:
        newest: The checkpoint that was just written, whole; it always stays.
        limit: How many to keep; None or 0 for all.
        best: A checkpoint that stays besides, as the best so far.
    """
    kept = {Path(path).resolve() for path in (newest, best) if path is not None}
    found = _checkpoints(Path(newest).parent)
    surplus = len(found) - max(limit or 0, len(kept))
    if not limit or surplus <= 0:
        return
    others = [checkpoint for checkpoint in reversed(found) if checkpoint.resolve() not in kept]
    others.sort(key=lambda checkpoint: why_not_whole(checkpoint) is None)
    for checkpoint in others[:surplus]:
        # First of all it stops being whole: a kill in the middle must not leave half of one that claims to be.
        remove_manifest(checkpoint)
        shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def explain_full_disk(folder: str | Path, checkpoints: str | Path | None = None) -> Iterator[None]:
    """Turn what a full disk raises inside the block into one clear OSError.

    Args:
        folder: What is being written.
        checkpoints: Where the run keeps its checkpoints; by default beside `folder`.

    Raises:
        OSError: With errno ENOSPC. It names the folder, the last whole checkpoint and the remedy.
    """
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        safe = last_whole_checkpoint(Path(folder).parent if checkpoints is None else checkpoints)
        kept = f"The last whole checkpoint is {safe!r}" if safe else "There is no whole checkpoint yet"
        then = "resume from there" if safe else "start again"
        explained = OSError(
            f"{str(folder)!r} could not be written, as on a full disk ({error}). {kept}; what is unfinished is "
            f"never taken for one and can be deleted. Free some space, or lower save_total_limit, and {then}."
        )
        explained.errno = errno.ENOSPC
        raise explained from error


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """A hidden folder to write into, whose files go into `folder` when the block ends without error.

    An adapter that stands there stays as it is until the new one is on the disk.

    Args:
        folder: Where the files are to be; it may hold others.
    """
    target = Path(folder)
    temporary = target / UNFINISHED
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for path in files:
            _to_disk(path)
        # What makes a folder an adapter goes last, and first if there was one: no mixture is ever taken for whole.
        files.sort(key=lambda path: path.name == ADAPTER_CONFIG)
        (target / ADAPTER_CONFIG).unlink(missing_ok=True)
        for path in files:
            place = target / path.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Folders named as checkpoints, the one that was written last first, and before it those of unknown age."""
    if not folder.is_dir():
        return []
    steps = {path: CHECKPOINT_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()}
    found = {path: (_number(path), int(match.group(1))) for path, match in steps.items() if match}
    # By number and not by step: a run that went back to an earlier checkpoint writes smaller steps anew.
    return sorted(found, key=lambda path: (found[path][0] is None, found[path][0] or 0, found[path][1]), reverse=True)


def _number(checkpoint: Path) -> int | None:
    """Its place in the order in which the run wrote checkpoints; None if its manifest cannot be read."""
    try:
        return int(json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8")).get("number", 0))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _remedy(checkpoint: Path) -> str:
    last = last_whole_checkpoint(checkpoint.parent)
    if last is None:
        return f"No whole checkpoint is in {str(checkpoint.parent)!r}: start again without resume_from_checkpoint."
    return f"The last whole one is {last!r}: resume from that."


def _to_disk(path: Path) -> None:
    """Wait until a file is on the disk: a power cut must not leave a manifest without its files."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
