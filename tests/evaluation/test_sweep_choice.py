from __future__ import annotations

import pytest

from puma_hf.evaluation.sweep_choice import Depth, knee, recommend

# 10, 20, 30, 40, 50 parameters.
DEPTHS = [Depth("m", k, 10 * k, quality) for k, quality in enumerate([0.2, 0.7, 0.78, 0.79, 0.8], start=1)]
FULL = DEPTHS[-1]


def test_knee_by_hand() -> None:
    # Above the chord from (0, 0) to (4, 1): 0.75, 0.5, 0.25.
    assert knee([0, 1, 2, 3, 4], [0.0, 1.0, 1.0, 1.0, 1.0]) == 1
    assert knee([0, 1, 2, 3, 4], [0.0, 0.3, 0.9, 0.95, 1.0]) == 2


def test_units_do_not_move_the_knee() -> None:
    qualities = [0.1, 0.4, 0.7, 0.72]
    assert knee([1, 2, 3, 4], qualities) == knee([1.01e12, 1.02e12, 1.03e12, 1.04e12], qualities) == 2
    assert knee([1, 2, 3, 4], [100 * quality + 3 for quality in qualities]) == 2


def test_a_peak_in_the_middle_is_a_knee() -> None:
    assert knee([1, 2, 3, 4], [0.5, 0.6, 0.9, 0.5]) == 2


def test_the_cheapest_of_equals() -> None:
    assert knee([0, 1, 2, 3], [0.0, 0.6, 0.6 + 1 / 3, 1.0]) == 1


@pytest.mark.parametrize("qualities", [[0.1, 0.2, 0.3, 0.4], [0.5] * 4, [0.0, 0.1, 0.2, 1.0]])
def test_straight_flat_and_hollow_curves_have_none(qualities: list[float]) -> None:
    assert knee([1, 2, 3, 4], qualities) is None


def test_two_points_have_none() -> None:
    assert knee([1, 2], [0.1, 0.9]) is None
    assert knee([], []) is None


@pytest.mark.parametrize(("costs", "qualities"), [([1, 1, 2], [0.0, 0.1, 0.2]), ([1, 2], [0.1])])
def test_costs_must_rise(costs: list[float], qualities: list[float]) -> None:
    with pytest.raises(ValueError, match="must be as many, and the costs must rise"):
        knee(costs, qualities)


def test_the_smallest_that_keeps_enough() -> None:
    chosen = recommend(DEPTHS, FULL, max_params=None, keep=0.97)
    assert (chosen.k, chosen.model, chosen.kept) == (3, "m", pytest.approx(0.975))
    assert chosen.reason == (
        "k = 3 of m: quality 78.0, 97.5 % of the full model's 80.0, with 30 parameters, 60 % of its. It is the "
        "smallest that keeps at least 97 % of the full model. k = 2 keeps 87.5 %."
    )
    assert recommend(DEPTHS, FULL, max_params=None, keep=0.8).k == 2
    assert recommend(DEPTHS, FULL, max_params=None, keep=1).k == 5
    assert recommend(DEPTHS, FULL, max_params=None, keep=0.975).k == 3  # a share exactly kept is kept


def test_a_budget_that_suffices_is_named() -> None:
    chosen = recommend(DEPTHS, FULL, max_params=40, keep=0.97, metric="hit@1")
    assert chosen.k == 3
    assert "hit@1 78.0" in chosen.reason
    assert "at least 97 % of the full model within the budget of 40 parameters." in chosen.reason


def test_the_best_within_a_budget_that_does_not_suffice() -> None:
    chosen = recommend(DEPTHS, FULL, max_params=29, keep=0.97)
    assert (chosen.k, chosen.kept) == (2, pytest.approx(0.875))
    assert chosen.reason.endswith(
        "None within the budget of 29 parameters keeps 97 % of the full model; this is the best there. To keep it "
        "takes k = 3 of m, of 30 parameters."
    )


def test_the_best_in_a_budget_need_not_be_the_deepest() -> None:
    depths = [Depth("m", 1, 10, 0.3), Depth("m", 2, 20, 0.1), Depth("m", 3, 30, 0.9)]
    assert recommend(depths, depths[-1], max_params=25, keep=0.97).k == 1


def test_a_distilled_model_wins_if_it_is_smaller_or_better() -> None:
    distilled = [Depth("d", k, 10 * k, quality) for k, quality in enumerate([0.3, 0.79, 0.8], start=1)]
    assert recommend([*DEPTHS, *distilled], FULL, max_params=None, keep=0.97).model == "d"
    same_size = [Depth("d", 3, 30, 0.79)]
    chosen = recommend([*DEPTHS, *same_size], FULL, max_params=None, keep=0.97)
    assert (chosen.model, chosen.k) == ("d", 3)


def test_a_full_model_that_finds_nothing() -> None:
    depths = [Depth("m", 1, 10, 0.0), Depth("m", 2, 20, 0.1), Depth("m", 3, 30, 0.0)]
    chosen = recommend(depths, depths[-1], max_params=None, keep=0.97)
    assert (chosen.k, chosen.kept) == (2, None)
    assert "The full model's quality is 0, so no share of it can be kept" in chosen.reason


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"keep=0 must be above 0 and at most 1\."):
        recommend(DEPTHS, FULL, max_params=None, keep=0)
    with pytest.raises(ValueError, match=r"max_params=9 must be at least 10, the parameters of m cut to k = 1"):
        recommend(DEPTHS, FULL, max_params=9, keep=0.97)
