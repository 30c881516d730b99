"""The stored weights of two forms, tensor by tensor: drawn inputs never reach every row of an embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from puma_hf.checkpoint import open_checkpoint
from puma_hf.export import own_name
from puma_hf.parity.report import ParityRow


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a directory by PUMA's own names, each read when it is asked for; a tied head is left out.

    Args:
        folder: A PUMA directory, or what `puma_hf.export.export` wrote.

    Example:

    ```python
    >>> from puma_hf.parity.weights import StoredWeights

    >>> StoredWeights(Path("puma-k14"))["language_model.norm.weight"].shape  # doctest: +SKIP
    torch.Size([1536])
    ```
    """

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        self._places = {
            own_name(name): (checkpoint.fetch(file), name)
            for name, file in checkpoint.weight_files.items()
            if not name.startswith("lm_head.")
        }

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._places[name]
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


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
