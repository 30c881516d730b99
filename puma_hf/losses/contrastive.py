"""The maths of the contrastive losses: cross-entropies over one matrix of similarities, in little memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puma_hf.losses.temperature import check_temperature

# Default share of the second sum of the split loss.
SPLIT_WEIGHT = 0.2
# Added to the logit of a candidate that is left out. Not infinite, since it is multiplied by 0 elsewhere.
_LEFT_OUT = -1e30
# A block of rows has at most this part of a matrix, so that several temporaries of its size stay below one matrix;
# smaller ones are not worth the calls. On a CPU it should also fit into the cache.
_PARTS = 8
_SMALLEST_BLOCK = {"cpu": 2**14, "cuda": 2**18}
_LARGEST_BLOCK = {"cpu": 2**17}


def mac_loss(
    similarities: Tensor,
    positive_index: Tensor,
    same_modality: Tensor,
    temperature: float,
    hard_temperature: float,
    false_negatives: Tensor | None = None,
) -> Tensor:
    """Cross-entropy over candidates whose temperature depends on their modality.

    `- mean_i log( exp(s_ip / tau_ip) / sum_j exp(s_ij / tau_ij) )`, where `tau_ij` is `hard_temperature` if
    `same_modality[i, j]` and `temperature` otherwise: the MAC-Loss of PUMA (ACM MM 2025, arXiv 2507.08064).

    Args:
        similarities: `(batch_size, num_candidates)`.
        positive_index: Column of each query's positive, integers of shape `(batch_size,)`.
        same_modality: Booleans of shape `(batch_size, num_candidates)`.
        temperature: Temperature of the inter-modality candidates.
        hard_temperature: Temperature of the intra-modality candidates.
        false_negatives: Booleans of the same shape: candidates left out of the sum, see `find_false_negatives`.
            The positive's own column must not be among them.

    Returns:
        The loss, a scalar in float32 (float64 for float64 similarities). It can be differentiated once.

    Raises:
        ValueError: If a shape or dtype does not fit, or a temperature is not positive and finite.

    Example:
        >>> similarities = torch.zeros(1, 2)  # equal similarities, two candidates: log 2
        >>> same_modality = torch.tensor([[True, False]])
        >>> round(mac_loss(similarities, torch.tensor([0]), same_modality, 0.05, 0.04).item(), 4)
        0.6931
    """
    check_temperature("temperature", temperature)
    check_temperature("hard_temperature", hard_temperature)
    terms = (_Term(1.0, 1 / hard_temperature, 1 / temperature),)
    return _cross_entropy(similarities, positive_index, same_modality, false_negatives, terms)


def split_loss(
    similarities: Tensor,
    positive_index: Tensor,
    same_modality: Tensor,
    temperature: float,
    hard_temperature: float,
    split_weight: float = SPLIT_WEIGHT,
    false_negatives: Tensor | None = None,
) -> Tensor:
    """Weighted mean of InfoNCE over all candidates and InfoNCE within the intra-modality group.

    This library's own, not the paper's: `(1 - split_weight) * InfoNCE(all candidates, temperature) +
    split_weight * InfoNCE(intra-modality candidates and the positive, hard_temperature)`. In the MAC-Loss a
    low hard temperature also takes weight from the inter-modality negatives; here they keep theirs.

    Args:
        similarities: `(batch_size, num_candidates)`.
        positive_index: Column of each query's positive, integers of shape `(batch_size,)`.
        same_modality: Booleans of shape `(batch_size, num_candidates)`.
        temperature: Temperature of the sum over all candidates.
        hard_temperature: Temperature of the sum over the group.
        split_weight: Weight of the group's term, in [0, 1].
        false_negatives: As for `mac_loss`.

    Returns:
        The loss, a scalar in float32 (float64 for float64 similarities). It can be differentiated once.

    Raises:
        ValueError: If a shape, dtype or number does not fit.

    Example:
        >>> similarities = torch.zeros(1, 4)  # four candidates, two of them in the group
        >>> same_modality = torch.tensor([[True, True, False, False]])
        >>> loss = split_loss(similarities, torch.tensor([0]), same_modality, 0.05, 0.04, split_weight=0.5)
        >>> round(loss.item(), 4)  # (log 4 + log 2) / 2
        1.0397
    """
    check_temperature("temperature", temperature)
    check_temperature("hard_temperature", hard_temperature)
    check_split_weight(split_weight)
    whole = _Term(1 - split_weight, 1 / temperature, 1 / temperature)
    group = _Term(split_weight, 1 / hard_temperature, None)
    terms = tuple(term for term in (whole, group) if term.weight > 0)
    return _cross_entropy(similarities, positive_index, same_modality, false_negatives, terms)


def check_split_weight(value: float) -> None:
    """Raise unless a weight of `split_loss` is a share.

    Args:
        value: The weight.

    Raises:
        ValueError: If `value` is not in [0, 1].
    """
    if not 0 <= value <= 1:
        raise ValueError(
            f"split_weight is {value}, but it is the share of the intra-modality term and must be in [0, 1]. "
            "Use 0.5 for equal shares."
        )


class _Term(NamedTuple):
    """One cross-entropy of a loss: its weight, and the inverse temperatures of the two kinds of candidates."""

    weight: float
    intra_scale: float
    inter_scale: float | None  # None leaves them out, the positive excepted


class _CrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies over the rows of one similarity matrix.

    The gradient is computed along with the loss, in blocks of rows: one matrix of the similarities' size is
    kept, where autograd would keep and make one for almost every operation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        similarities: Tensor,
        positive_index: Tensor,
        same_modality: Tensor,
        false_negatives: Tensor | None,
        terms: tuple[_Term, ...],
    ) -> Tensor:
        gradient = torch.empty_like(similarities) if ctx.needs_input_grad[0] else None
        num_rows = similarities.shape[0]
        terms = tuple(term._replace(weight=term.weight / num_rows) for term in terms)
        loss = similarities.new_zeros(())
        for rows in row_blocks(similarities):
            loss += _block_of_rows(
                similarities[rows],
                positive_index[rows],
                same_modality[rows],
                None if false_negatives is None else false_negatives[rows],
                terms,
                None if gradient is None else gradient[rows],
            )
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Second derivatives would be silently zero.
            raise RuntimeError(
                "create_graph=True asks for second derivatives, but this loss can be differentiated once only. "
                "Leave it out, or write the loss with torch's own operations."
            )
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None, None


def _block_of_rows(
    similarities: Tensor,
    positive_index: Tensor,
    same_modality: Tensor,
    false_negatives: Tensor | None,
    terms: tuple[_Term, ...],
    gradient: Tensor | None,
) -> Tensor:
    """Loss of some rows; their gradient is written into `gradient`."""
    column = positive_index.unsqueeze(1)
    positive = similarities.gather(1, column)
    total = similarities.new_zeros(())
    for number, (weight, intra, inter) in enumerate(terms):
        scale: Tensor | float = intra
        positive_scale: Tensor | float = intra
        left_out = None if false_negatives is None else as_numbers(false_negatives, similarities.dtype)
        if inter is None:
            others = as_numbers(~same_modality, similarities.dtype).scatter_(1, column, 0.0)
            left_out = others if left_out is None else left_out.add_(others)
        elif inter != intra:
            scale = as_numbers(same_modality, similarities.dtype).mul_(intra - inter).add_(inter)
            positive_scale = scale.gather(1, column)
        # The first term needs no matrix of its own beside the gradient.
        work = torch.mul(similarities, scale, out=gradient if number == 0 else None)
        if left_out is not None:
            work.add_(left_out, alpha=_LEFT_OUT)
        highest = work.amax(dim=1, keepdim=True)
        sums = work.sub_(highest).exp_().sum(dim=1, keepdim=True)
        total += weight * (highest + sums.log() - positive * positive_scale).sum()
        if gradient is None:
            continue
        # d loss / d s_ij = weight * scale_ij * (softmax_ij - [j is the positive])
        if isinstance(scale, Tensor):
            work.mul_(scale).mul_(weight / sums)
        else:
            work.mul_(weight * scale / sums)
        work.scatter_add_(1, column, torch.ones_like(positive) * positive_scale * -weight)
        if number:
            gradient.add_(work)
    return total


def _cross_entropy(
    similarities: Tensor,
    positive_index: Tensor,
    same_modality: Tensor,
    false_negatives: Tensor | None,
    terms: tuple[_Term, ...],
) -> Tensor:
    if (
        similarities.ndim != 2
        or similarities.numel() == 0
        or positive_index.shape != similarities.shape[:1]
        or same_modality.shape != similarities.shape
        or positive_index.dtype != torch.int64
        or same_modality.dtype != torch.bool
    ):
        raise ValueError(
            f"similarities are {describe(similarities)}, positive_index {describe(positive_index)} and "
            f"same_modality {describe(same_modality)}, but they must be floats (batch_size, num_candidates), "
            "int64 (batch_size,) and bool (batch_size, num_candidates). Pass one row per query and one "
            "column per candidate."
        )
    if false_negatives is not None and (
        false_negatives.shape != similarities.shape or false_negatives.dtype != torch.bool
    ):
        raise ValueError(
            f"false_negatives are {describe(false_negatives)}, but they must be bool {tuple(similarities.shape)} as "
            "the similarities are. Pass what find_false_negatives returns."
        )
    loss: Tensor = _CrossEntropy.apply(
        at_least_float32(similarities), positive_index, same_modality, false_negatives, terms
    )
    return loss


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def describe(tensor: Tensor) -> str:
    """Dtype and shape for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Booleans as 0 and 1. Through bytes, since the direct conversion is several times slower on a CPU."""
    return mask.view(torch.uint8).to(dtype)


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Ranges of rows that together cover a matrix, each small beside it."""
    kind = matrix.device.type
    elements = max(matrix.numel() // _PARTS, _SMALLEST_BLOCK.get(kind, 2**18))
    elements = min(elements, _LARGEST_BLOCK.get(kind, elements))
    num_rows, num_columns = matrix.shape
    step = max(1, elements // max(1, num_columns))
    return (slice(begin, begin + step) for begin in range(0, num_rows, step))
