"""Collect rows in the order of the inputs, in the numbers that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from torch import Tensor

from puma_hf.configs import Precision
from puma_hf.embedding.results import BrokenInput, EmbedResult

_SCALED = ("int8", "uint8")
Array = np.ndarray[Any, Any]


def check_precision(precision: str, ranges: Any = None) -> None:
    """Refuse a precision that does not exist, and ranges that it has no use for.

    Raises:
        ValueError: If there is a fault.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}, must be one of {', '.join(get_args(Precision))}.")
    if ranges is not None and precision not in _SCALED:
        raise ValueError(f"ranges are for precision int8 and uint8, not {precision!r}. Leave them out.")


def quantize(rows: Array, precision: Precision, ranges: Array | None = None) -> Array:
    """Float rows in another precision, through sentence-transformers.

    Args:
        rows: `(num_rows, embedding_dim)`, float32.
        precision: Numbers of the result.
        ranges: `(2, embedding_dim)`, lowest and highest value of each dimension, for int8 and uint8; by default
            those of the rows.

    Returns:
        `(num_rows, embedding_dim)`, or an eighth of the dimensions, rounded up, with a bit for each.

    Example:

    ```python
    >>> import numpy as np
    >>> from puma_hf.embedding.precision import quantize

    >>> quantize(np.array([[0.2, -0.1, 0.3, -0.4, -0.1, -0.2, -0.3, 0.1]], dtype=np.float32), "ubinary").tolist()
    [[161]]
    ```
    """
    if precision in ("float32", "float16"):
        return rows.astype(precision, copy=False)
    from sentence_transformers.util import quantize_embeddings

    quantized: Array = quantize_embeddings(rows, precision=precision, ranges=ranges)  # type: ignore[arg-type,assignment]
    return quantized


def ranges_of(rows: Array, precision: Precision) -> Array:
    """Lowest and highest value of each dimension, `(2, embedding_dim)`.

    Raises:
        ValueError: If there are fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(
            f"precision={precision!r} takes the range of each dimension from the embeddings, and there are only "
            f"{len(rows)}, must be 2 or more. Pass ranges, lowest and highest value, of shape (2, {rows.shape[1]})."
        )
    return np.stack([rows.min(axis=0), rows.max(axis=0)])


class Collector:
    """Puts rows where their inputs are. What needs no range over all rows is stored small at once.

    Args:
        num_inputs: Number of inputs.
        dim: Dimensions of a row.
        precision: Numbers of the result.
        ranges: For int8 and uint8.

    Raises:
        ValueError: If the ranges have another shape than `(2, dim)`.
    """

    def __init__(self, num_inputs: int, dim: int, precision: Precision, ranges: Any = None) -> None:
        self._precision, self._ranges = precision, None if ranges is None else np.asarray(ranges, dtype=np.float32)
        if self._ranges is not None and self._ranges.shape != (2, dim):
            raise ValueError(
                f"ranges have shape {self._ranges.shape}, must be (2, {dim}): the lowest value of each dimension, and "
                "the highest."
            )
        self._at_the_end = precision in _SCALED and self._ranges is None
        empty = np.zeros((0, dim), dtype=np.float32)
        kept = empty if self._at_the_end else quantize(empty, precision, self._ranges)
        self._rows: Array = np.zeros((num_inputs, kept.shape[1]), dtype=kept.dtype)
        self._there = np.zeros(num_inputs, dtype=bool)

    def add(self, indices: Tensor, rows: Tensor) -> None:
        """Store the float32 rows of these inputs."""
        values: Array = rows.numpy()
        places = indices.numpy()
        self._rows[places] = values if self._at_the_end else quantize(values, self._precision, self._ranges)
        self._there[places] = True

    def result(self, errors: Sequence[BrokenInput] = (), *, is_complete: bool = True) -> EmbedResult:
        """What was stored.

        Args:
            errors: Inputs that are broken. The zeros of those that were stored have no part in the ranges of int8.
            is_complete: Whether all inputs were seen; if not, int8 without ranges stays float32.
        """
        indices = np.flatnonzero(self._there)
        rows = self._rows if len(indices) == len(self._rows) else self._rows[indices]
        if self._at_the_end and is_complete and len(rows):
            good = rows[~np.isin(indices, [error.index for error in errors])]
            rows = quantize(rows, self._precision, ranges_of(good, self._precision))
        return EmbedResult(rows, indices, tuple(sorted(errors)))
