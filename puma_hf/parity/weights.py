"""The stored weights of two forms, tensor by tensor: drawn inputs never reach every row of an embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from puma_hf.parity.report import ParityRow


def compare_weights(
    form: str, compared_with: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, bound: float
) -> ParityRow:
    """Compare two sets of tensors of the same names.

    Args:
        form: What `found` is of.
        compared_with: What `expected` is of.
        found: Tensors by name.
        expected: Tensors by name, in any data type; they are compared in that of `found`.
        bound: What the largest difference may be, as a share of the largest number of its tensor.

    Returns:
        The largest difference, and the tensor it is in; infinite if a tensor is missing or of another shape.
    """
    largest, worst = 0.0, ""
    for name in sorted(found.keys() | expected.keys()):
        difference = _difference(found[name], expected[name]) if name in found and name in expected else math.inf
        if not difference <= largest:  # NaN, too
            largest, worst = difference, name
        if math.isnan(largest):
            break
    return ParityRow(form, compared_with, "relative difference", largest, bound, worst or "all tensors")


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    rounded = expected.cpu().to(found.dtype)
    if torch.equal(found, rounded):  # the copies below are large
        return 0.0
    rounded = rounded.double()
    difference = float((found.double() - rounded).abs().max())
    largest = float(rounded.abs().max())
    return difference / largest if largest else (math.inf if difference else 0.0)
