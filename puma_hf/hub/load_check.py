"""Whether a directory loads where puma_hf is not installed, as it will for whoever downloads it.

`check_loads` runs this very file as a script, `python -P load_check.py JOB.json`, in a process of its own: nothing of
puma_hf may be imported here, and what is heavy only in `_load_both`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_SCRIPT = Path(__file__)
# One loader packs inputs and the other pads them, which changes an entry of an embedding by less than this in float32.
_TOLERANCE = 1e-4
# In 16 bits an entry is little larger than its rounding, so directions are compared: this bounds 1 - cosine.
_COSINE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class LoadCheck:
    """What both loaders made of a directory: dimensions and data type, and by how much an entry differs at most."""

    embedding_dim: int
    dtype: str
    difference: float

    def __str__(self) -> str:
        found = f"{self.embedding_dim} dimensions in {self.dtype}, largest difference {self.difference:.1e}"
        return f"loads without puma_hf by AutoModel and SentenceTransformer: {found}"


def check_loads(
    directory: str | Path, *, offline: bool = True, token: str | None = None, shown_as: str | Path | None = None
) -> LoadCheck:
    """Load a directory by AutoModel and SentenceTransformer in a fresh process, and compare what they embed.

    The process cannot import puma_hf, runs only the code that lies in the directory, and caches it in a new place.

    Args:
        directory: The directory, or a Hub id.
        offline: Whether the process must not ask the Hub.
        token: Hub token for it, if it may ask; by default that of `hf auth login` or of HF_TOKEN.
        shown_as: What errors call the directory, if it is a copy.

    Raises:
        ValueError: If it does not load, or the two differ; the message has the reason.
    """
    shown = str(directory if shown_as is None else shown_as)
    with TemporaryDirectory(prefix="puma-hf-load-") as temporary:
        work = Path(temporary)
        name = str(Path(directory).resolve()) if Path(directory).is_dir() else str(directory)
        job = {"directory": name, "output": str(work / "found.json")}
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        # A new cache of modules: an older copy of the directory's code would hide what is missing in it now.
        environment = {**os.environ, "HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if offline:
            environment["HF_HUB_OFFLINE"] = "1"
            environment.pop("HF_TOKEN", None)  # the code in the directory has no use for it
        elif token is not None:
            environment["HF_TOKEN"] = token
        # -P and an empty current directory: nothing lies there that an import could find instead.
        command = [sys.executable, "-P", str(_SCRIPT), str(work / "job.json")]
        process = subprocess.run(command, cwd=work, env=environment, capture_output=True, check=False)
        found: dict[str, Any] = {"error": f"the process ended with {process.returncode}"}
        if process.returncode == 0:
            found = json.loads((work / "found.json").read_text(encoding="utf-8"))
    if problem := found.get("error") or _problem(found):
        problem = f"{shown!r} does not load where puma_hf is not installed ({problem.replace(name, shown)})."
        raise ValueError(f"{problem} Write the directory again with puma-hf prune or merge.")
    return LoadCheck(found["dim"], found["dtype"], found["difference"])


def _problem(found: dict[str, Any]) -> str | None:
    """What is wrong with what both loaders made of the inputs."""
    if found["unread"]:
        return f"it holds {len(found['unread'])} tensors that no loader reads, first {found['unread'][0]}"
    is_exact = found["dtype"] in ("float32", "float64")
    measure, tolerance = ("difference", _TOLERANCE) if is_exact else ("1 - cosine", _COSINE_TOLERANCE)
    if not found[measure] <= tolerance:  # NaN, too
        return f"AutoModel and SentenceTransformer read it differently, {measure} {found[measure]}, not {tolerance:g}"
    return None


def _load_both(directory: str) -> dict[str, Any]:
    """Embed a text, an image and both by either loader."""
    import torch
    from PIL import Image
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoProcessor

    image = Image.new("RGB", (64, 48), (200, 30, 30))
    image.paste((20, 60, 200), (8, 8, 40, 40))
    both = {"image": image, "text": "on a table", "instruction": "Find it."}
    inputs: list[Any] = ["a red apple", {"image": image}, both]
    model: Any = SentenceTransformer(directory, trust_remote_code=True, device="cpu")
    encoded = model.encode(inputs, convert_to_tensor=True, show_progress_bar=False).float()
    model.to("meta")  # it holds itself in a cycle; its weights go before they are loaded again
    processor: Any = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    loaded: Any = AutoModel.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
    backbone, info = loaded[0].eval(), loaded[1]
    with torch.inference_mode():
        embeddings = backbone(**processor.process_inputs(inputs)).embeddings.float()
    # Two of other shapes end here, with torch's own words.
    cosine, difference = torch.cosine_similarity(embeddings, encoded), (embeddings - encoded).abs()
    found: dict[str, Any] = {"difference": float(difference.max()), "1 - cosine": float((1 - cosine).max())}
    found |= {"dim": embeddings.shape[1], "dtype": str(backbone.dtype).removeprefix("torch.")}
    return {**found, "unread": sorted(info["unexpected_keys"])}


def _main() -> None:
    # An import of puma_hf now fails as it does where the package is not installed.
    sys.modules["puma_hf"] = None  # type: ignore[assignment]
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        found = _load_both(job["directory"])
    except Exception as error:  # the parent tells it in its own words
        found = {"error": f"{type(error).__name__}: {error}"}
    Path(job["output"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main()
