"""An encoder that costs nothing, for tests of what is done with embeddings."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class FakeEncoder:
    """Three small integers from a checksum of the input and the prompt: plenty of ties, even zero vectors."""

    fingerprint = "fake"

    def __init__(self) -> None:
        self.calls: list[tuple[list[str | dict[str, str]], str, dict[str, Any]]] = []

    def encode(
        self, inputs: list[str | dict[str, str]], prompt: str | None = None, **kwargs: Any
    ) -> NDArray[np.float32]:
        self.calls.append((inputs, str(prompt), kwargs))
        return np.array([self.embed(item, prompt) for item in inputs], dtype=np.float32)

    @staticmethod
    def embed(item: str | dict[str, str], prompt: str | None) -> list[int]:
        if isinstance(item, str):
            item = {"text": item}
        content = [item.get("text", ""), Path(item.get("image", "")).name, prompt or ""]
        return [byte % 3 - 1 for byte in zlib.crc32(repr(content).encode()).to_bytes(4, "big")[:3]]
