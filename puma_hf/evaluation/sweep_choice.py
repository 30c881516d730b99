"""Which k: the knee of the curve, and the smallest k that keeps enough within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_EPSILON = 1e-9


@dataclass(frozen=True)
class Depth:
    """One model cut to k layers, as a choice.

    Args:
        model: Name of the model that is cut.
        k: Layers kept.
        parameters: Its parameters.
        quality: Its quality, from 0 to 1.
    """

    model: str
    k: int
    parameters: int
    quality: float


@dataclass(frozen=True)
class Recommendation:
    """A choice of k.

    Args:
        k: Layers to keep.
        reason: How it was decided, in plain words.
        model: Name of the model to cut.
        kept: Its share of the full model's quality; None if the full model has none.
    """

    k: int
    reason: str
    model: str = ""
    kept: float | None = None


def knee(costs: Sequence[float], qualities: Sequence[float]) -> int | None:
    """Where a curve of quality against cost bends most: the point farthest above the chord from its first to its last.

    Both axes are scaled to their own ranges first, so that units do not matter.

    Args:
        costs: Rising.
        qualities: One a cost.

    Returns:
        The index of the knee, the cheapest of several; None if no point lies above the chord.

    Raises:
        ValueError: If the lengths differ, or the costs do not rise.

    Example:
        >>> knee([1, 2, 3, 4], [0.1, 0.7, 0.8, 0.9])
        1

    Source: the idea of Kneedle, Satopää et al., ICDCS Workshops 2011, without its smoothing.
    """
    if len(costs) != len(qualities) or any(a >= b for a, b in pairwise(costs)):
        raise ValueError(
            f"{len(costs)} costs and {len(qualities)} qualities must be as many, and the costs must rise. Give one "
            "quality a depth, from the shallowest to the deepest."
        )
    span = max(qualities, default=0.0) - min(qualities, default=0.0)
    if len(costs) < 3 or span <= _EPSILON:
        return None
    slope = (qualities[-1] - qualities[0]) / (costs[-1] - costs[0])
    above = [
        (quality - qualities[0] - slope * (cost - costs[0])) / span
        for cost, quality in zip(costs, qualities, strict=True)
    ]
    best = max(range(len(above)), key=lambda index: (round(above[index], 9), -index))
    return best if above[best] > _EPSILON else None


def recommend(
    depths: Sequence[Depth], full: Depth, *, max_params: int | None, keep: float, metric: str = "quality"
) -> Recommendation:
    """The smallest depth within the budget that keeps enough of the full model's quality; else the best there.

    Args:
        depths: What there is to choose from.
        full: The full model.
        max_params: Budget of parameters; None for none.
        keep: Share of the full model's quality to keep, above 0 and at most 1.
        metric: What the reason calls the quality.

    Returns:
        The choice and its reason.

    Raises:
        ValueError: If `keep` is out of range, or nothing fits into the budget.

    Example:
        >>> depths = [Depth("m", 1, 10, 0.2), Depth("m", 2, 20, 0.5), Depth("m", 3, 30, 0.5)]
        >>> recommend(depths, depths[-1], max_params=None, keep=0.97).k
        2
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} must be above 0 and at most 1. It is a share, such as 0.97.")
    fitting = [depth for depth in depths if max_params is None or depth.parameters <= max_params]
    if not fitting:
        least = min(depths, key=lambda depth: depth.parameters)
        raise ValueError(
            f"max_params={max_params:,} must be at least {least.parameters:,}, the parameters of {least.model} cut to "
            f"k = {least.k}. Raise the budget, or sweep a smaller model."
        )
    best = min(fitting, key=lambda depth: (-depth.quality, depth.parameters))
    if full.quality <= 0:
        reason = (
            f"The full model's {metric} is 0, so no share of it can be kept. This is the best there is"
            f"{_within(max_params)}. Look at the data, or at the model, before choosing."
        )
        return Recommendation(best.k, f"{_named(best)}. {reason}", best.model)
    enough = [depth for depth in fitting if depth.quality >= keep * full.quality - _EPSILON]
    if enough:
        chosen = min(enough, key=lambda depth: (depth.parameters, depth.k, -depth.quality))
        reason = f"It is the smallest that keeps at least {_percent(keep)} of the full model{_within(max_params)}."
        smaller = [depth for depth in depths if depth.model == chosen.model and depth.k == chosen.k - 1]
        reason += "".join(f" k = {depth.k} keeps {_percent(depth.quality / full.quality)}." for depth in smaller)
    else:
        chosen = best
        reason = f"None{_within(max_params)} keeps {_percent(keep)} of the full model; this is the best there."
        wanted = [depth for depth in depths if depth.quality >= keep * full.quality - _EPSILON]
        if wanted:
            least = min(wanted, key=lambda depth: (depth.parameters, depth.k))
            reason += f" To keep it takes {_named(least)}, of {least.parameters:,} parameters."
    return Recommendation(
        chosen.k, f"{_summary(chosen, full, metric)} {reason}", chosen.model, chosen.quality / full.quality
    )


def _summary(chosen: Depth, full: Depth, metric: str) -> str:
    return (
        f"{_named(chosen)}: {metric} {100 * chosen.quality:.1f}, {_percent(chosen.quality / full.quality)} of the full "
        f"model's {100 * full.quality:.1f}, with {chosen.parameters:,} parameters, "
        f"{_percent(chosen.parameters / full.parameters)} of its."
    )


def _named(depth: Depth) -> str:
    return f"k = {depth.k} of {depth.model}"


def _within(max_params: int | None) -> str:
    return "" if max_params is None else f" within the budget of {max_params:,} parameters"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace(".0 %", " %")
