"""Whole checkpoints: a marker, written last, tells a finished one from what a kill or a full disk left."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MARKER = "puma_manifest.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of a run that was written last of those that are whole; None if there is none.

    `transformers` writes a checkpoint file by file, and its `get_last_checkpoint` takes any folder of the right name.
    This one passes over those without a marker, or with files of other sizes than it notes, and logs why.

    Args:
        folder: Output directory of a run, with `checkpoint-<step>` folders in it.

    Example:
        >>> last_whole_checkpoint("a-folder-without-checkpoints") is None
        True
    """
    for checkpoint in _checkpoints(Path(folder)):
        if (reason := why_not_whole(checkpoint)) is None:
            return str(checkpoint)
        logger.warning("Passing over %s: %s.", checkpoint, reason)
    return None


def require_whole_checkpoint(checkpoint: str | Path) -> str:
    """The same path, or a ValueError that names the last whole checkpoint beside it."""
    folder = Path(checkpoint)
    reason = why_not_whole(folder) if folder.is_dir() else "there is no such folder"
    if reason is not None:
        last = last_whole_checkpoint(folder.parent)
        remedy = f"The last whole one is {last!r}: resume from that." if last else "There is no whole one: start again."
        raise ValueError(f"The checkpoint {str(checkpoint)!r} is not whole: {reason}. {remedy}")
    return str(checkpoint)


def why_not_whole(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not whole, or None if it is."""
    sizes = _read(Path(checkpoint)).get("files")
    if not isinstance(sizes, dict):
        return f"it has no {MARKER}, which is written last"
    for name, noted in sizes.items():
        path = Path(checkpoint, name)
        # The Trainer goes on without a word where the state of its optimizer is missing.
        if not path.is_file() or path.stat().st_size != noted["size"]:
            return f"{name} is missing or cut off"
    return None


def mark_whole(checkpoint: str | Path) -> None:
    """Declare a checkpoint whole; `PumaTrainer` does so at the end of each save."""
    folder = Path(checkpoint)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(MARKER)]
    for path in files:
        with path.open("r+b") as file:
            os.fsync(file.fileno())  # a power cut must not leave a marker without its files
    # Checkpoints are numbered as they are written: a run that went back to an earlier one writes smaller steps anew,
    # and times of change do not survive a copy of the folder.
    others = [_number(other) for other in _checkpoints(folder.parent) if other.name != folder.name]
    number = 1 + max((other for other in others if other < math.inf), default=0)
    sizes = {path.relative_to(folder).as_posix(): {"size": path.stat().st_size} for path in files}
    temporary = folder / f"{MARKER}.unfinished"
    temporary.write_text(json.dumps({"number": number, "files": sizes}, indent=1), encoding="utf-8")
    os.replace(temporary, folder / MARKER)


def unmark(checkpoint: str | Path) -> None:
    """Take back that a checkpoint is whole, before its files are written anew."""
    Path(checkpoint, MARKER).unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Folders named as checkpoints, the one that was written last first, and before it those of unknown age."""
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (_number(path), int(path.name[11:])), reverse=True)


def _number(checkpoint: Path) -> float:
    marker = _read(checkpoint)
    return float(marker.get("number", 0)) if marker else math.inf


def _read(checkpoint: Path) -> dict[str, Any]:
    try:
        content = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
