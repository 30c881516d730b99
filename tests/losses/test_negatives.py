from __future__ import annotations

import math

import pytest
import torch

from puma_hf.losses import contrastive
from puma_hf.losses.negatives import check_margin, find_false_negatives, survey_negatives

ROWS, COLUMNS = 6, 17


def test_copies_of_the_positive_are_found() -> None:
    # Candidates: three positives, then three explicit negatives; the second negative is query 0's own positive.
    contents = torch.tensor([7, 8, 7, 9, 7, 8])
    found = find_false_negatives(torch.zeros(3, 6), torch.arange(3), contents, contents[:3])
    assert found is not None
    assert found.tolist() == [
        [False, False, True, False, True, False],
        [False, False, False, False, False, True],
        [True, False, False, False, True, False],
    ]


def test_the_margin_finds_what_exceeds_the_positive() -> None:
    similarities = torch.tensor([[0.5, 0.59, 0.61, 0.9], [0.2, 0.9, 0.95, -1.0]], requires_grad=True)
    positives = torch.tensor([0, 1])
    found = find_false_negatives(similarities, positives, margin=0.1)
    assert found is not None
    assert found.tolist() == [[False, False, True, True], [False, False, False, False]]
    at_zero = find_false_negatives(similarities, positives, margin=0.0)
    assert at_zero is not None
    assert at_zero.tolist() == [[False, True, True, True], [False, False, True, False]]


def test_copies_and_margin_add_up() -> None:
    similarities = torch.tensor([[0.5, 0.1, 0.9, 0.2]])
    contents = torch.tensor([3, 3, 4, 5])
    found = find_false_negatives(similarities, torch.tensor([0]), contents, contents[:1], margin=0.1)
    assert found is not None
    assert found.tolist() == [[False, True, True, False]]


def test_nothing_to_compare_finds_nothing() -> None:
    assert find_false_negatives(torch.zeros(2, 2), torch.arange(2)) is None


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("smallest_block", [1, 2**14])
def test_the_survey_by_loops(monkeypatch: pytest.MonkeyPatch, left_out: bool, smallest_block: int) -> None:
    monkeypatch.setattr(contrastive, "_SMALLEST_BLOCK", {"cpu": smallest_block})
    generator = torch.Generator().manual_seed(0)
    similarities = torch.rand(ROWS, COLUMNS, generator=generator)
    positives = torch.randperm(COLUMNS, generator=generator)[:ROWS]
    same = torch.rand(ROWS, COLUMNS, generator=generator) < 0.4
    false = torch.rand(ROWS, COLUMNS, generator=generator) < 0.3
    false[torch.arange(ROWS), positives] = False
    assert not same[torch.arange(ROWS), positives].all()  # the positive counts in neither group, whatever its own

    survey = survey_negatives(similarities, positives, same, false if left_out else None)
    groups: dict[bool, list[list[float]]] = {True: [], False: []}
    dropped = []
    for row, positive in enumerate(positives.tolist()):
        kept = [c for c in range(COLUMNS) if c != positive and not (left_out and false[row, c])]
        dropped.append(COLUMNS - 1 - len(kept))
        for intra in groups:
            groups[intra].append([similarities[row, c].item() for c in kept if same[row, c].item() is intra])
    assert survey.intra_counts.tolist() == [len(row) for row in groups[True]]
    assert survey.inter_counts.tolist() == [len(row) for row in groups[False]]
    assert survey.false_counts.tolist() == dropped
    assert survey.intra_counts.dtype == survey.inter_counts.dtype == survey.false_counts.dtype == torch.int64
    for mean, rows in ((survey.intra_similarity, groups[True]), (survey.inter_similarity, groups[False])):
        numbers = [number for row in rows for number in row]
        assert mean.item() == pytest.approx(sum(numbers) / len(numbers), abs=1e-6)
    expected = similarities[torch.arange(ROWS), positives].mean().item()
    assert survey.positive_similarity.item() == pytest.approx(expected, abs=1e-6)


def test_means_of_nothing_are_nan() -> None:
    survey = survey_negatives(torch.tensor([[0.5, 0.25]]), torch.tensor([0]), torch.tensor([[True, True]]))
    assert survey.positive_similarity == 0.5
    assert survey.intra_similarity == 0.25
    assert survey.inter_similarity.isnan()
    assert (survey.intra_counts.item(), survey.inter_counts.item(), survey.false_counts.item()) == (1, 0, 0)


def test_the_survey_has_no_gradients() -> None:
    similarities = torch.zeros(1, 2, requires_grad=True)
    survey = survey_negatives(similarities, torch.tensor([0]), torch.tensor([[True, True]]))
    assert not any(tensor.requires_grad for tensor in survey)


@pytest.mark.parametrize("value", [None, 0.0, 0.1, 2])
def test_margins_that_are_fine(value: float | None) -> None:
    check_margin(value)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_margin_errors(value: float) -> None:
    with pytest.raises(
        ValueError, match=rf"^false_negative_margin is {value}, but .*at least 0: .*Use a value such as"
    ):
        check_margin(value)
