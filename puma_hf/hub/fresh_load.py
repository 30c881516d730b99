"""Runs as a script in a process of its own where puma_hf cannot be imported: both loaders open a directory.

python -P fresh_load.py JOB.json, with {"directory": ..., "output": ...}. What was found is written to `output`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def _inputs() -> list[Any]:
    from PIL import Image

    image = Image.new("RGB", (64, 48), (200, 30, 30))
    image.paste((20, 60, 200), (8, 8, 40, 40))
    return ["a red apple", {"image": image}, {"image": image, "text": "on a table", "instruction": "Find it."}]


def _load_both(directory: str) -> dict[str, Any]:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoProcessor

    inputs = _inputs()
    model: Any = SentenceTransformer(directory, trust_remote_code=True, device="cpu")
    encoded = model.encode(inputs, convert_to_tensor=True, show_progress_bar=False).float()
    model.to("meta")  # it holds itself in a cycle; its weights go before they are loaded again
    processor: Any = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    loaded: Any = AutoModel.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
    backbone, info = loaded[0].eval(), loaded[1]
    with torch.inference_mode():
        embeddings = backbone(**processor.process_inputs(inputs)).embeddings.float()
    same_shape = embeddings.shape == encoded.shape
    cosine = torch.cosine_similarity(embeddings, encoded) if same_shape else torch.zeros(1)
    return {
        "shape": list(embeddings.shape),
        "same_shape": same_shape,
        "finite": bool(encoded.isfinite().all() and embeddings.isfinite().all()),
        "difference": float((embeddings - encoded).abs().max()) if same_shape else None,
        "1 - cosine": float((1 - cosine).max()),
        "unread": sorted(info["unexpected_keys"]),
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }


def _main() -> None:
    # An import of puma_hf now fails as it does where the package is not installed.
    sys.modules["puma_hf"] = None  # type: ignore[assignment]
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = _load_both(job["directory"])
    Path(job["output"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main()
