"""Whether a directory loads where puma_hf is not installed, as it will for whoever downloads it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

_SCRIPT = Path(__file__).with_name("fresh_load.py")
# One loader packs inputs, the other pads them. Largest difference of an entry of their embeddings ...
_TOLERANCE = 1e-4
# ... and in 16 bits, where an entry is little larger than its rounding, of 1 - cosine.
_COSINE_TOLERANCE = 1e-2
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|NotFound)\b")
_MAX_REASON = 600


@dataclass(frozen=True)
class LoadCheck:
    """What both loaders made of a directory.

    Args:
        embedding_dim: Dimensions of an embedding.
        dtype: Data type that the weights were loaded in.
        difference: Largest difference of an entry between AutoModel's and SentenceTransformer's embeddings.
    """

    embedding_dim: int
    dtype: str
    difference: float

    def __str__(self) -> str:
        return (
            f"loads without puma_hf by AutoModel and SentenceTransformer: {self.embedding_dim} dimensions in "
            f"{self.dtype}, largest difference {self.difference:.1e}"
        )


def check_loads(
    directory: str | Path, *, offline: bool = True, token: str | None = None, shown_as: str | Path | None = None
) -> LoadCheck:
    """Load a directory by AutoModel and SentenceTransformer in a fresh process, and compare what they embed.

    The process cannot import puma_hf, runs only the code that lies in the directory, and keeps that in a new cache.

    Args:
        directory: The directory, or a Hub id.
        offline: Whether the process must not ask the Hub.
        token: Hub token for it, if it may ask; by default that of `hf auth login` or of HF_TOKEN.
        shown_as: What errors call the directory, if it is a copy.

    Returns:
        What was found.

    Raises:
        ValueError: If it does not load, or the two differ; the message has the reason.
    """
    shown = str(directory if shown_as is None else shown_as)
    with TemporaryDirectory(prefix="puma-hf-load-") as temporary:
        work = Path(temporary)
        name = str(Path(directory).resolve()) if Path(directory).is_dir() else str(directory)
        job = {"directory": name, "output": str(work / "found.json")}
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        environment = {**os.environ, "HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if offline:
            environment["HF_HUB_OFFLINE"] = "1"
            environment.pop("HF_TOKEN", None)  # the code in the directory has no use for it
        elif token is not None:
            environment["HF_TOKEN"] = token
        process = subprocess.run(
            [sys.executable, "-P", str(_SCRIPT), str(work / "job.json")],
            cwd=work,  # nothing lies there that an import could find
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if process.returncode != 0:
            reason = _reason(process.stderr) or f"the process ended with {process.returncode}"
            raise ValueError(
                f"{shown!r} does not load where puma_hf is not installed ({reason.replace(name, shown)}). Write the "
                "directory again with puma-hf prune or merge."
            )
        found = json.loads((work / "found.json").read_text(encoding="utf-8"))
    if found["unread"]:
        raise ValueError(
            f"{shown!r} holds {len(found['unread'])} tensors that no loader reads (first: {found['unread'][0]}). They "
            "may be of another model: write the directory again with puma-hf prune or merge."
        )
    is_exact = found["dtype"] in ("float32", "float64")
    measure, tolerance = ("difference", _TOLERANCE) if is_exact else ("1 - cosine", _COSINE_TOLERANCE)
    if not found["same_shape"] or not found["finite"] or not found[measure] <= tolerance:
        raise ValueError(
            f"AutoModel and SentenceTransformer read {shown!r} differently: largest {measure} {found[measure]}, "
            f"allowed {tolerance:g}, all finite: {found['finite']}. A file of the two may be of another model: write "
            "the directory again."
        )
    return LoadCheck(found["shape"][1], found["dtype"], found["difference"])


def _reason(stderr: str) -> str:
    """The error that ended a process, of all that it wrote: Python's own last words, however many lines they have."""
    lines = [line.rstrip() for line in stderr.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if _ERROR.match(line)]
    words = " ".join(line.strip() for line in (lines[starts[-1] :] if starts else lines[-1:]))
    return words[:_MAX_REASON]
