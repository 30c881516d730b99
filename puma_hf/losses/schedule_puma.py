"""What the losses can be set to, without torch: names, defaults, and how a temperature moves over a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Schedule = Literal["exponential", "cosine", "linear", "constant"]
ModalityGrouping = Literal["target", "query"]
MACObjective = Literal["mac", "split"]
DistillationMetric = Literal["mse", "mse-mean", "cosine", "relational"]
DepthWeights = Literal["equal", "linear", "last", "sampled"]

# MAC-Loss as its authors released it: 0.03 falls to 0.03 * exp(-0.5), rounded, over the first half of training.
TEMPERATURE, HARD_TEMPERATURE = 0.03, 0.018
SCHEDULE: Schedule = "exponential"
SCHEDULE_END = 0.5
# Share of the second sum in the split objective: chosen on the emoji's validation split, with tiny models.
SPLIT_WEIGHT = 0.2
# How much each of several depths counts: chosen on the emoji, with tiny models.
DEPTH_WEIGHTS: DepthWeights = "linear"
# Of both softmaxes over a batch's similarities, student's and teacher's: ours.
RELATIONAL_TEMPERATURE = 0.05


@dataclass(frozen=True)
class TemperatureSchedule:
    """How one temperature moves from `start` to `end` over a training run.

    It gets there at the share `schedule_end` of the training and stays. With `t = min(1, progress / schedule_end)`:

    - `"exponential"`: by the same factor at every step, `start * (end / start) ** t`. The released code of PUMA (ACM MM
      2025, arXiv 2507.08064) has `0.03 * exp(-d * 2 * min(0.5, progress))`, rounded to three decimals: this one with
      `end = start * exp(-d)` and `schedule_end = 0.5`, where d is 0.5 (0.2 in its first version).
    - `"cosine"`: the first quarter of a cosine, `end + (start - end) * cos(pi / 2 * t)`, concave as the curve in the
      paper's figure.
    - `"linear"`: a straight line, `start + (end - start) * t`.
    - `"constant"`: `end` from the first step on; `start` and `schedule_end` are never used.

    Args:
        start: Temperature at progress 0.
        end: Temperature from progress `schedule_end` on.
        kind: One of the above.
        schedule_end: Share of the training after which the temperature stays, in (0, 1].

    Raises:
        ValueError: If a temperature is not positive and finite, `kind` is unknown, or `schedule_end` is outside (0, 1].

    Example:
        >>> schedule = TemperatureSchedule(start=0.03, end=0.018)
        >>> [round(schedule.value(progress), 4) for progress in (0.0, 0.25, 0.5, 1.0)]
        [0.03, 0.0232, 0.018, 0.018]
    """

    start: float
    end: float
    kind: Schedule = SCHEDULE
    schedule_end: float = SCHEDULE_END

    def __post_init__(self) -> None:
        check_range(start=self.start, end=self.end)
        check_range(most=1, schedule_end=self.schedule_end)
        check_choice("schedule", self.kind, Schedule)

    def value(self, progress: float) -> float:
        """Temperature after the share `progress` of the training steps; outside of [0, 1] that of the nearer end."""
        # The authors round to three decimals; here the temperature moves with every step.
        done = max(progress, 0.0) / self.schedule_end
        if self.kind == "constant" or done >= 1:
            return self.end
        if self.kind == "exponential":
            return float(self.start * (self.end / self.start) ** done)
        if self.kind == "linear":
            return self.start + (self.end - self.start) * done
        return self.end + (self.start - self.end) * math.cos(math.pi / 2 * done)


def check_range(most: float = math.inf, *, zero: bool = False, **values: float) -> None:
    """Raise a ValueError unless these arguments are finite, above 0 (with `zero` 0 or more) and at most `most`."""
    for name, value in values.items():
        if not (math.isfinite(value) and value <= most and (value > 0 or (zero and value == 0))):
            bounds = f"{'at least' if zero else 'above'} 0{'' if most == math.inf else f' and at most {most:g}'}"
            raise ValueError(f"{name} is {value}, but it must be a finite number {bounds}.")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise a ValueError unless the value of an argument is one of a `Literal`."""
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}, but it must be one of {get_args(choices)}.")
