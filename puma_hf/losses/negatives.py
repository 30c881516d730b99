"""Negatives of a contrastive batch: which must not count as such, how many remain, and how similar they are."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from puma_hf.losses.contrastive import as_numbers, row_blocks


def find_false_negatives(
    similarities: Tensor,
    positive_index: Tensor,
    candidate_content: Tensor | None = None,
    positive_content: Tensor | None = None,
    margin: float | None = None,
) -> Tensor | None:
    """Mark the candidates that must not count as negatives: copies of the positive, and suspiciously good ones.

    Args:
        similarities: `(batch_size, num_candidates)`.
        positive_index: Column of each query's positive, integers of shape `(batch_size,)`.
        candidate_content: Content ids of the candidates, `(num_candidates,)`; `None` compares no contents.
        positive_content: Content ids of the queries' positives, `(batch_size,)`.
        margin: A candidate more similar to the query than the positive by more than this is left out; `None`
            leaves out none.

    Returns:
        Booleans `(batch_size, num_candidates)`, never true for a positive's own column, or `None` if nothing was
        compared.

    Example:
        >>> contents = torch.tensor([7, 8, 7])  # the third candidate is a copy of the first query's positive
        >>> find_false_negatives(torch.zeros(2, 3), torch.tensor([0, 1]), contents, contents[:2]).tolist()
        [[False, False, True], [False, False, False]]
    """
    found: Tensor | None = None
    column = positive_index.unsqueeze(1)
    if candidate_content is not None and positive_content is not None:
        found = positive_content.unsqueeze(1) == candidate_content.unsqueeze(0)
    if margin is not None:
        # Which candidates are left out is a decision, not a quantity to learn from.
        scores = similarities.detach()
        too_good = scores > scores.gather(1, column) + margin
        found = too_good if found is None else found.logical_or_(too_good)
    return None if found is None else found.scatter_(1, column, False)


class NegativeSurvey(NamedTuple):
    """What stands in the sums of one batch of queries.

    Attributes:
        intra_counts: Number of each query's intra-modality negatives, integers of shape `(batch_size,)`.
        inter_counts: Number of its inter-modality negatives, likewise.
        false_counts: Number of its candidates that were left out, likewise.
        positive_similarity: Mean similarity of the positives, a scalar.
        intra_similarity: Mean similarity of the intra-modality negatives; nan where there are none.
        inter_similarity: Mean similarity of the inter-modality negatives; nan where there are none.
    """

    intra_counts: Tensor
    inter_counts: Tensor
    false_counts: Tensor
    positive_similarity: Tensor
    intra_similarity: Tensor
    inter_similarity: Tensor


@torch.no_grad()
def survey_negatives(
    similarities: Tensor,
    positive_index: Tensor,
    same_modality: Tensor,
    false_negatives: Tensor | None = None,
) -> NegativeSurvey:
    """Count the negatives of each query and average their similarities, by whether they are intra-modality.

    Args:
        similarities: `(batch_size, num_candidates)`.
        positive_index: Column of each query's positive, integers of shape `(batch_size,)`.
        same_modality: Which candidates are intra-modality, booleans of shape `(batch_size, num_candidates)`.
        false_negatives: Which were left out, booleans of the same shape, or `None`.

    Returns:
        The counts and the means, without gradients.

    Example:
        >>> same_modality = torch.tensor([[True, True, False]])
        >>> survey = survey_negatives(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([0]), same_modality)
        >>> survey.intra_counts.item(), survey.inter_counts.item(), round(survey.intra_similarity.item(), 4)
        (1, 1, 0.5)
    """
    blocks = [
        _sums_of_rows(
            similarities[rows], same_modality[rows], None if false_negatives is None else false_negatives[rows]
        )
        for rows in row_blocks(similarities)
    ]
    all_counts, all_sums, intra_counts, intra_sums = torch.cat(blocks, dim=1)
    column = positive_index.unsqueeze(1)
    positive = similarities.gather(1, column).squeeze(1)
    is_intra = same_modality.gather(1, column).squeeze(1).to(positive.dtype)
    # The positive was counted too.
    intra_counts, intra_sums = intra_counts - is_intra, intra_sums - positive * is_intra
    inter_counts, inter_sums = all_counts - 1 - intra_counts, all_sums - positive - intra_sums
    return NegativeSurvey(
        intra_counts.long(),
        inter_counts.long(),
        (similarities.shape[1] - all_counts).long(),
        positive.mean(),
        intra_sums.sum() / intra_counts.sum(),
        inter_sums.sum() / inter_counts.sum(),
    )


def _sums_of_rows(similarities: Tensor, same_modality: Tensor, false_negatives: Tensor | None) -> Tensor:
    """Number and sum of all candidates, then of the intra-modality ones, without those left out: `(4, num_rows)`."""
    intra = as_numbers(same_modality, similarities.dtype)
    if false_negatives is None:
        counts, sums = torch.full_like(intra[:, 0], intra.shape[1]), similarities.sum(dim=1)
    else:
        kept = as_numbers(~false_negatives, similarities.dtype)
        intra.mul_(kept)
        counts = kept.sum(dim=1)
        sums = kept.mul_(similarities).sum(dim=1)
    return torch.stack([counts, sums, intra.sum(dim=1), intra.mul_(similarities).sum(dim=1)])


def check_margin(value: float | None) -> None:
    """Raise unless a margin of `find_false_negatives` can be added to similarities.

    Args:
        value: The margin, or `None`.

    Raises:
        ValueError: If `value` is negative or not finite.
    """
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"false_negative_margin is {value}, but it must be finite and at least 0: candidates more similar than "
            "the positive by more than it are left out. Use a value such as 0.1, or None to leave out none."
        )
