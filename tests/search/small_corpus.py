"""A small corpus of texts and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TEXTS = ("a red apple", "a table", "on", "a red table on an apple", "apple apple apple")


def write_picture(path: Path, seed: int) -> Path:
    values = np.random.default_rng(seed).integers(0, 256, (24, 16 + 8 * (seed % 3), 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def write_corpus(folder: Path) -> Path:
    """Five texts, two pictures, and a picture with a text, the kinds mixed."""
    lines: list[dict[str, Any]] = [{"id": f"t{row}", "text": text} for row, text in enumerate(TEXTS)]
    lines.insert(1, {"id": "i0", "image": write_picture(folder / "i0.png", 0).name})
    lines.insert(4, {"id": "b", "text": "a red picture", "image": write_picture(folder / "b.png", 1).name})
    lines.append({"id": "i1", "image": write_picture(folder / "i1.png", 2).name})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "corpus.jsonl"
