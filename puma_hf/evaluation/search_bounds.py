"""Cosines exact and quick: how far a score in low precision can be from the one that decides.

The score that decides is the cosine in float64 with one fixed order of summation, see `ordered_sum`. A quick score is
a product of rounded unit vectors a and b, which stand for the true unit vectors x and y. By Cauchy-Schwarz

    |fl(a.b) - x.y|  <=  |fl(a.b) - a.b|  +  |a - x| |b|  +  |b - y|

The distances |a - x| and |b - y| are measured, not assumed, where a type rounds coarsely: this covers float16's
underflow too. Products and sums in float32 add at most (d + 1) u |a| |b| for d numbers in whatever order they are
summed (u = 2^-24, since sum |a_i b_i| <= |a| |b|); tensor cores cut instead of rounding, which is taken as 4 u. A
score that is itself rounded to 16 bits is off by its unit roundoff more, relative to its size.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT64_UNIT = 2.0**-53
_FLOAT32_UNIT = 2.0**-24
# Unit roundoff of the score itself. float32 is summed as it is, so that its error is that of the sum.
_SCORE_UNITS = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# What float32 inputs are cut to where a matmul may use fewer bits: TensorFloat-32 keeps 10 of them, bfloat16 7.
_INPUT_CUTS = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}
_ONEDNN_MODES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
# Rows whose squares neither overflow nor vanish in float32.
_SAFE_NORMS = (1e-12, 1e15)


class LowRows(NamedTuple):
    """Unit vectors in a type of low precision.

    Attributes:
        rows: `(num_rows, embedding_dim)`.
        errors: At least the distance of each row from its true unit vector, `(num_rows,)` float64.
        is_finite: Whether the embedding it was made of is finite, `(num_rows,)`.
    """

    rows: Tensor
    errors: Tensor
    is_finite: Tensor


class ScoreErrors(NamedTuple):
    """How far quick scores can be from the scores that decide: `absolute + relative * |score|`.

    Attributes:
        absolute: `(num_queries, 1)` float64.
        relative: That of a score rounded to 16 bits.
    """

    absolute: Tensor
    relative: float

    def above(self, scores: Tensor) -> Tensor:
        """The most that the true scores of `(num_queries, n)` quick ones can be; grows with the score."""
        return scores + self.absolute + self.relative * scores.abs()

    def below(self, scores: Tensor) -> Tensor:
        """The least that they can be."""
        return scores - self.absolute - self.relative * scores.abs()


def ordered_sum(values: Tensor) -> Tensor:
    """Sums of rows in an order that depends on the width alone: bit-equal whatever the batch and the device.

    Halves are added to each other until one column is left. The values are overwritten.

    Args:
        values: `(num_rows, width)`.

    Returns:
        `(num_rows,)`.
    """
    width = values.shape[1]
    while width > 1:
        half = width // 2
        values[:, :half] += values[:, width - half : width]
        width -= half
    return values[:, 0].clone()


def double_rows(embeddings: Tensor) -> Tensor:
    """Rows in float64, scaled so that squares neither overflow nor vanish; the scale is a power of two, hence exact."""
    if embeddings.dtype is not torch.float64:
        return embeddings.double()
    largest = embeddings.abs().amax(dim=1, keepdim=True).clamp(min=2.0**-1000)
    mantissa, _ = torch.frexp(largest)
    return embeddings * (mantissa / largest)


def norms_of(doubles: Tensor) -> Tensor:
    """Lengths `(num_rows,)` of rows of `double_rows`; bit-equal whatever the batch."""
    return ordered_sum(doubles * doubles).sqrt_()


def unit_rows(doubles: Tensor, norms: Tensor) -> Tensor:
    """Rows of length 1 in float64; zero vectors stay zero."""
    return doubles / norms.where(norms > 0, 1.0)[:, None]


def low_rows(embeddings: Tensor, dtype: torch.dtype) -> LowRows:
    """Round unit vectors to a type, with bounds of what that costs.

    Args:
        embeddings: `(num_rows, embedding_dim)`, of any length and floating type.
        dtype: float32, float16 or bfloat16.
    """
    dim = embeddings.shape[1]
    norms = None if embeddings.dtype is torch.float64 else torch.linalg.vector_norm(embeddings.float(), dim=1)
    if norms is not None and bool(((norms > _SAFE_NORMS[0]) & (norms < _SAFE_NORMS[1])).all()):
        units = embeddings.float() / norms[:, None]
        # d squares are summed in any order (d u / 2 after the root); the root and the quotient are rounded too.
        error = (dim / 2 + 4) * _FLOAT32_UNIT
        finite = torch.ones_like(norms, dtype=torch.bool)
    else:  # very long or very short rows, zero vectors, or values that are not finite
        doubles = double_rows(embeddings)
        lengths = norms_of(doubles)
        finite = lengths.isfinite()
        units = unit_rows(doubles, lengths).float()
        error = 2 * _FLOAT32_UNIT
    errors = torch.full((len(units),), error, dtype=torch.float64, device=units.device)
    if dtype is torch.float32:
        return LowRows(units, errors, finite)
    rows = units.to(dtype)
    rounding = torch.linalg.vector_norm(units - rows.float(), dim=1).double()
    return LowRows(rows, errors + rounding * (1 + (dim + 4) * _FLOAT32_UNIT), finite)


def score_errors(
    query_errors: Tensor, candidate_error: float, dim: int, dtype: torch.dtype, device: str
) -> ScoreErrors:
    """How far quick scores can be from the scores that decide.

    Args:
        query_errors: `(num_queries,)`, of `low_rows`.
        candidate_error: The largest of the candidates.
        dim: Size of an embedding.
        dtype: Type of the products and of the scores.
        device: Kind of device, such as "cuda".
    """
    cut = _input_cut(device) if dtype is torch.float32 else 0.0
    query_errors = query_errors + cut * (1 + query_errors)
    candidate_error = candidate_error + cut * (1 + candidate_error)
    lengths = (1 + query_errors) * (1 + candidate_error)
    cuts = 1 if device == "cpu" and dtype is torch.float32 else 4
    summing = (dim + 8) * cuts * _FLOAT32_UNIT * lengths
    smallest = 2.0**-24 if dtype is torch.float16 else 0.0  # half a step where float16 runs out of exponents
    absolute = query_errors * (1 + candidate_error) + candidate_error + summing + smallest
    return ScoreErrors(absolute[:, None], _SCORE_UNITS[dtype] / (1 - _SCORE_UNITS[dtype]))


def float64_error(dim: int) -> float:
    """The same for a product of unit vectors in float64, summed in any order."""
    return 4 * (dim + 8) * FLOAT64_UNIT


def _input_cut(device: str) -> float:
    """What a float32 matmul may cut off its inputs, under the settings that are in force."""
    modes = [mode for name in _ONEDNN_MODES if (mode := os.environ.get(name, "").lower()) not in ("", "strict")]
    if modes and device == "cpu":
        return _INPUT_CUTS["medium"]
    try:
        return _INPUT_CUTS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # set by torch.backends' newer names, which this function refuses to sum up
        return _INPUT_CUTS["medium"]
