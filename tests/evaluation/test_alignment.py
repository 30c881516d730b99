from __future__ import annotations

import math

import pytest
import torch

from puma_hf.evaluation import alignment
from puma_hf.evaluation.alignment import linear_cka, mean_cosine

torch.manual_seed(0)
SPACE = torch.randn(50, 6)
OTHER = torch.randn(50, 4)


def gram_cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """The same through the inputs' similarities: HSIC of centred Gram matrices, equation 3 of the paper."""
    centre = torch.eye(len(first), dtype=torch.float64) - 1 / len(first)
    grams = [centre @ (space.double() @ space.double().T) @ centre for space in (first, second)]
    hsic = [[float((one * other).sum()) for other in grams] for one in grams]
    return hsic[0][1] / math.sqrt(hsic[0][0] * hsic[1][1])


def test_by_hand() -> None:
    # Centred columns (-1, 0, 1) and (-1/3, -1/3, 2/3): 1 / sqrt(2 * 2/3), squared.
    first, second = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [0.0], [1.0]])
    assert linear_cka(first, second) == pytest.approx(0.75, abs=1e-12)


def test_equals_the_form_with_gram_matrices() -> None:
    assert linear_cka(SPACE, OTHER) == pytest.approx(gram_cka(SPACE, OTHER), abs=1e-12)
    assert linear_cka(OTHER, SPACE) == pytest.approx(linear_cka(SPACE, OTHER), abs=1e-12)
    assert 0 < linear_cka(SPACE, OTHER) < 0.5


def test_turning_scaling_and_moving_change_nothing() -> None:
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert linear_cka(SPACE, SPACE) == pytest.approx(1, abs=1e-12)
    assert linear_cka(SPACE, 3 * SPACE @ rotation + 7) == pytest.approx(1, abs=1e-6)
    stretched = SPACE * torch.tensor([1.0, 1, 1, 1, 1, 20])  # one axis alone: another space
    assert linear_cka(SPACE, stretched) < 0.8


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = linear_cka(SPACE, OTHER), mean_cosine(SPACE, -SPACE)
    monkeypatch.setattr(alignment, "_BLOCK", 7)
    assert (linear_cka(SPACE, OTHER), mean_cosine(SPACE, -SPACE)) == pytest.approx(whole, abs=1e-12)


def test_a_space_of_one_point_has_no_similarities() -> None:
    assert math.isnan(linear_cka(SPACE, torch.zeros(50, 3)))


def test_cosine_by_hand() -> None:
    assert mean_cosine(SPACE, 2 * SPACE) == pytest.approx(1, abs=1e-12)
    first, second = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [-1.0, 0.0]])
    assert mean_cosine(first, second) == pytest.approx((24 / 25 - 1) / 2, abs=1e-12)


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(50, 6\) and \(49, 4\) must be \(num_inputs, dim\)"):
        linear_cka(SPACE, OTHER[:49])
    with pytest.raises(ValueError, match="1 rows, must be 2 or more"):
        linear_cka(SPACE[:1], OTHER[:1])
    with pytest.raises(ValueError, match=r"\(50, 6\) and \(50, 4\) must be equal"):
        mean_cosine(SPACE, OTHER)
    with pytest.raises(ValueError, match="with a row or more"):
        mean_cosine(SPACE[:0], SPACE[:0])
