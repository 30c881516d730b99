"""What comes out of embedding: rows, which inputs they belong to, and which inputs are broken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, order=True)
class BrokenInput:
    """An input that has no embedding.

    Args:
        index: Its position in the inputs.
        message: What is wrong with it.
    """

    index: int
    message: str


@dataclass(frozen=True)
class EmbedResult:
    """Embeddings, in the order of the inputs.

    Args:
        embeddings: `(num_rows, embedding_dim)`; for binary precisions one eighth of it.
        indices: `(num_rows,)`, int64: the input that each row belongs to.
        errors: Inputs that are broken, by index.
    """

    embeddings: np.ndarray[Any, Any]
    indices: np.ndarray[Any, Any]
    errors: tuple[BrokenInput, ...] = ()


class BrokenInputError(ValueError):
    """An input cannot be embedded.

    Args:
        broken: The input.
        done: What was embedded before, by `embed`; None from `iterate_embeddings`, which has yielded it.
    """

    def __init__(self, broken: BrokenInput, done: EmbedResult | None = None) -> None:
        super().__init__(broken, done)
        self.broken, self.done = broken, done

    @property
    def index(self) -> int:
        """Position of the broken input in the inputs."""
        return self.broken.index

    def __str__(self) -> str:
        reason = self.broken.message.rstrip(".")
        return (
            f"{reason}. Repair or remove this input, or pass on_error='skip' to leave out what is broken, 'zero' to "
            "have zeros in its place."
        )
