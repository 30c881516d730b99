"""How alike two sets of embeddings of the same inputs are."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 8192


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment: how alike the similarities among the inputs are in both spaces.

    `||Y^T X||^2 / (||X^T X|| ||Y^T Y||)` in Frobenius norms, with the columns of X and Y centred. Turning, mirroring or
    scaling a space as a whole changes nothing. Computed in float64, block by block.

    Args:
        first: `(num_inputs, dim)`.
        second: `(num_inputs, other_dim)`, of the same inputs in the same order.

    Returns:
        A number from 0 to 1; 1 if one space is the other, turned and scaled. NaN where all rows of one are alike.

    Raises:
        ValueError: If the numbers of rows differ, or there are fewer than two.

    Example:
        >>> import torch
        >>> square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> round(linear_cka(square, 3 * square.flip(1)), 6), round(linear_cka(square, square[:, :1]), 6)
        (1.0, 0.707107)

    Source: Kornblith et al., ICML 2019, arXiv 1905.00414, equations 3 and 4.
    """
    _check_rows(first, second)
    if len(first) < 2:
        raise ValueError(f"{len(first)} rows, must be 2 or more: one input has no similarities. Give more inputs.")
    cross = _product(second, first).square().sum()
    norms = _product(first, first).norm() * _product(second, second).norm()
    return float(cross / norms) if norms > 0 else float("nan")


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine between an input's embeddings in the one and in the other space.

    Args:
        first: `(num_inputs, dim)`.
        second: `(num_inputs, dim)`, of the same inputs in the same order.

    Returns:
        A number from -1 to 1.

    Raises:
        ValueError: If the shapes differ, or there are no rows.

    Example:
        >>> import torch
        >>> mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 3.0], [0.0, 4.0]]))
        0.5
    """
    _check_rows(first, second)
    if not len(first) or first.shape != second.shape:
        raise ValueError(
            f"shapes {tuple(first.shape)} and {tuple(second.shape)} must be equal, with a row or more. Embed the same "
            "inputs with models of one hidden size."
        )
    blocks = zip(first.split(_BLOCK), second.split(_BLOCK), strict=True)
    total = sum(torch.cosine_similarity(one.double(), other.double()).sum() for one, other in blocks)
    return float(total / len(first))


def _check_rows(first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
        raise ValueError(
            f"shapes {tuple(first.shape)} and {tuple(second.shape)} must be (num_inputs, dim) with one number of "
            "inputs. Embed the same inputs with both models."
        )


def _mean(rows: Tensor) -> Tensor:
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for block in rows.split(_BLOCK):
        total += block.double().sum(dim=0)
    return total / len(rows)


def _product(first: Tensor, second: Tensor) -> Tensor:
    """`first^T second` of the centred columns, `(dim, other_dim)`, float64."""
    means = _mean(first), _mean(second)
    total = torch.zeros(first.shape[1], second.shape[1], dtype=torch.float64, device=first.device)
    for one, other in zip(first.split(_BLOCK), second.split(_BLOCK), strict=True):
        total += (one.double() - means[0]).T @ (other.double() - means[1])
    return total
