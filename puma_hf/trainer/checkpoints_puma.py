"""Whole checkpoints: a marker, written last, tells a finished one from what a kill or a full disk left."""

from __future__ import annotations

import json
import logging
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
    whole = []
    for checkpoint in Path(folder).glob("checkpoint-*"):
        if (name := CHECKPOINT_NAME.fullmatch(checkpoint.name)) is None or not checkpoint.is_dir():
            continue
        if (reason := why_not_whole(checkpoint)) is None:
            whole.append((_read_marker(checkpoint).get("number", 0), int(name[1]), str(checkpoint)))
        else:
            logger.warning("Passing over %s: %s.", checkpoint, reason)
    return max(whole)[-1] if whole else None


def why_not_whole(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not whole, or None if it is."""
    sizes = _read_marker(Path(checkpoint)).get("files")
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
    number = 1 + max(_read_marker(other).get("number", 0) for other in folder.parent.glob("checkpoint-*"))
    sizes = {path.relative_to(folder).as_posix(): {"size": path.stat().st_size} for path in files}
    temporary = folder / f"{MARKER}.unfinished"
    temporary.write_text(json.dumps({"number": number, "files": sizes}, indent=1), encoding="utf-8")
    os.replace(temporary, folder / MARKER)


def _read_marker(checkpoint: Path) -> dict[str, Any]:
    try:
        content = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
