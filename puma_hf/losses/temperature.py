"""Temperature schedules of the MAC-Loss, and the callback that moves them along a training run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from puma_hf.settings import SCHEDULE, SCHEDULE_END, Schedule

if TYPE_CHECKING:
    from sentence_transformers.base.trainer import BaseTrainer

logger = logging.getLogger(__name__)

# Large enough that a hand-written loop with gradient accumulation, which sets `progress` once per optimizer
# step, has done so at least once; small enough that a forgotten schedule is noticed within the first minute.
IDLE_FORWARDS_BEFORE_WARNING = 32


@dataclass(frozen=True)
class TemperatureSchedule:
    """How one temperature moves from `start` to `end` over a training run.

    It gets there at the share `schedule_end` of the training and then stays. With `t = min(1, progress /
    schedule_end)`:

    - `"exponential"`: by the same factor at every step, `start * (end / start) ** t`. The released code of PUMA
      (ACM MM 2025, arXiv 2507.08064) has `0.03 * exp(-d * 2 * min(0.5, progress))`, rounded to three decimals: this
      one with `end = start * exp(-d)` and `schedule_end = 0.5`, where d is 0.5 (0.2 in its first version).
    - `"cosine"`: the first quarter of a cosine, `end + (start - end) * cos(pi / 2 * t)`, concave as the curve in the
      paper's figure.
    - `"linear"`: a straight line, `start + (end - start) * t`.
    - `"constant"`: `end` from the first step on; `start` and `schedule_end` are never used.

    Args:
        start: Temperature at progress 0. Positive and finite.
        end: Temperature from progress `schedule_end` on. Positive and finite. It may be larger than `start`.
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
        check_temperature("start", self.start)
        check_temperature("end", self.end)
        kinds = get_args(Schedule)
        if self.kind not in kinds:
            raise ValueError(f"schedule is {self.kind!r}, but it must be one of {kinds}. Choose one of these.")
        if not 0 < self.schedule_end <= 1:
            raise ValueError(
                f"schedule_end is {self.schedule_end}, but it must be above 0 and at most 1, a share of the training. "
                "Use 0.5 as released, 1.0 to let the temperature move to the end, or schedule='constant'."
            )

    def value(self, progress: float) -> float:
        """Temperature after the fraction `progress` of the training steps.

        Args:
            progress: Done steps over all steps; values outside [0, 1] are moved to the nearer end.

        Returns:
            The temperature.

        Raises:
            ValueError: If `progress` is NaN.
        """
        done = _clamp_progress(progress) / self.schedule_end
        if self.kind == "constant" or done >= 1:
            return self.end
        if self.kind == "exponential":
            return float(self.start * (self.end / self.start) ** done)
        if self.kind == "linear":
            return self.start + (self.end - self.start) * done
        return self.end + (self.start - self.end) * math.cos(math.pi / 2 * done)


class ScheduledTemperatureLoss(nn.Module):
    """Base of the losses with a fixed temperature and a second, scheduled one.

    A module cannot see the step count of the trainer that calls it, so the position on the schedule comes
    from outside: `TemperatureScheduleCallback` sets `progress`, and so does a hand-written training loop.

    Args:
        temperature: Temperature of the inter-modality candidates, and the start of the schedule.
        hard_temperature: End of the schedule of the intra-modality candidates.
        schedule: Its kind, see `TemperatureSchedule`.
        schedule_end: Share of the training after which the hard temperature stays, in (0, 1].

    Raises:
        ValueError: If a temperature is not positive and finite, the schedule is unknown, or its end is out of range.

    Example:
        >>> loss = ScheduledTemperatureLoss(temperature=0.05, hard_temperature=0.04, schedule="linear")
        >>> loss.progress = 0.25
        >>> round(loss.current_hard_temperature, 6)
        0.045
    """

    def __init__(
        self, temperature: float, hard_temperature: float, schedule: Schedule, schedule_end: float = SCHEDULE_END
    ) -> None:
        super().__init__()
        # Checked by these names first: the schedule would call them `start` and `end`.
        check_temperature("temperature", temperature)
        check_temperature("hard_temperature", hard_temperature)
        self.temperature_schedule = TemperatureSchedule(temperature, hard_temperature, schedule, schedule_end)
        self._progress = 0.0
        self._progress_was_set = False
        self._idle_forwards = 0
        if hard_temperature > temperature:
            # A legitimate ablation, hence no error, but the opposite of the method and what two swapped
            # arguments look like.
            logger.warning(
                "hard_temperature=%g is above temperature=%g, so intra-modality candidates get the softer "
                "distribution, the reverse of PUMA. Swap the two if this is not intended.",
                hard_temperature,
                temperature,
            )

    @property
    def temperature(self) -> float:
        """Temperature of the inter-modality candidates, the same during the whole run."""
        return self.temperature_schedule.start

    @property
    def hard_temperature(self) -> float:
        """Temperature of the intra-modality candidates once the schedule has ended."""
        return self.temperature_schedule.end

    @property
    def current_hard_temperature(self) -> float:
        """Temperature of the intra-modality candidates at the present `progress`."""
        return self.temperature_schedule.value(self._progress)

    @property
    def progress(self) -> float:
        """Done training steps over all training steps, in [0, 1]."""
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        self._progress = _clamp_progress(value)
        self._progress_was_set = True

    def warn_if_schedule_idles(self, training: bool, moves: bool = False) -> None:
        """Warn once when the loss is trained and nobody moves its schedule.

        Args:
            training: Whether the model is in training mode; evaluation never counts.
            moves: Whether something else is to move along with the training.
        """
        moves |= self.temperature_schedule.kind != "constant" and self.temperature != self.hard_temperature
        if self._progress_was_set or not moves or not training or not torch.is_grad_enabled():
            return
        self._idle_forwards += 1
        if self._idle_forwards == IDLE_FORWARDS_BEFORE_WARNING:
            logger.warning(
                "%s has been trained for %d forward passes, but its %r schedule never moved: "
                "hard_temperature is still %g instead of going to %g, and a weight that moves is at its start. Call "
                "puma_hf.losses.add_temperature_schedule(trainer) before trainer.train(), set loss.progress "
                "in your own training loop, or choose schedule='constant'.",
                type(self).__name__,
                self._idle_forwards,
                self.temperature_schedule.kind,
                self.current_hard_temperature,
                self.hard_temperature,
            )


class TemperatureScheduleCallback(TrainerCallback):
    """Move the temperature schedules of a loss along with the trainer's optimizer steps.

    Before every optimizer step `progress = global_step / max_steps`. Both numbers belong to the trainer's
    restored state, so a run that resumes from a checkpoint continues at the temperature it stopped at, and
    gradient accumulation changes nothing. Training logs gain `temperature` and `hard_temperature` (the value
    of the last step); with several scheduled losses each name is prefixed by the dataset's name and an
    underscore.

    An evaluation loss uses the temperature of its step too, so `eval_loss` values of different steps are not
    on one scale: choose the best checkpoint by a retrieval metric.

    Prefer `add_temperature_schedule(trainer)`: it also places the callback before the reporting ones
    (TensorBoard, W&B), which otherwise send the logs before the temperatures are in them.

    Args:
        loss: A scheduled loss, a loss that wraps one, or a dict from dataset name to loss.

    Raises:
        ValueError: If `loss` contains no `ScheduledTemperatureLoss`.

    Example:
        >>> loss = ScheduledTemperatureLoss(temperature=0.05, hard_temperature=0.04, schedule="cosine")
        >>> list(TemperatureScheduleCallback(loss).losses) == [""]
        True
    """

    def __init__(self, loss: nn.Module | Mapping[str, Any]) -> None:
        super().__init__()
        self.losses = find_scheduled_losses(loss)
        if not self.losses:
            raise ValueError(
                f"loss is {_describe(loss)}, but a temperature schedule needs a ScheduledTemperatureLoss in "
                "it. Pass the MultimodalMACLoss that the trainer uses, or leave the schedule out."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the progress of the restored (or zero) step."""
        self._advance(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the progress of this optimizer step."""
        self._advance(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the progress after the last step, 1.0 unless the run stopped early."""
        self._advance(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the temperatures to a training record."""
        if logs is None or "loss" not in logs:
            return
        temperatures = {
            f"{prefix}{name}": getattr(loss, attribute)
            for prefix, loss in self.losses.items()
            for name, attribute in (
                ("temperature", "temperature"),
                ("hard_temperature", "current_hard_temperature"),
            )
        }
        logs.update(temperatures)
        # The trainer appends a copy of the logs to the history before it calls the callbacks.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(temperatures)

    def _advance(self, state: TrainerState) -> None:
        if state.max_steps > 0:
            for loss in self.losses.values():
                loss.progress = state.global_step / state.max_steps


def find_scheduled_losses(loss: nn.Module | Mapping[str, Any] | None) -> dict[str, ScheduledTemperatureLoss]:
    """Collect the losses with a temperature schedule, also inside wrappers such as `MatryoshkaLoss`.

    Args:
        loss: What a trainer holds as `trainer.loss`: a module or a dict from dataset name to module.

    Returns:
        From log prefix to loss, each loss once. A single loss has the prefix `""`.
    """
    named = loss if isinstance(loss, Mapping) else {"": loss}
    found: dict[str, ScheduledTemperatureLoss] = {}
    for name, module in named.items():
        if not isinstance(module, nn.Module):
            continue
        inner = [child for child in module.modules() if isinstance(child, ScheduledTemperatureLoss)]
        for index, child in enumerate(inner):
            if all(child is not known for known in found.values()):
                parts = [part for part in (name, str(index) if len(inner) > 1 else "") if part]
                found["".join(f"{part}_" for part in parts)] = child
    # One loss needs no name to tell it apart, whatever the dataset or the wrapper is called.
    return dict(zip([""], found.values(), strict=True)) if len(found) == 1 else found


def add_temperature_schedule(trainer: BaseTrainer) -> TemperatureScheduleCallback:
    """Give a sentence-transformers trainer the callback that moves its loss's temperature schedule.

    A plain `SentenceTransformerTrainer` calls its loss with features and labels only and offers the loss no
    hook, so one line is needed after building it. Calling this twice does nothing more.

    Args:
        trainer: A built `SentenceTransformerTrainer`, whose `loss` is, wraps, or is a dict with a
            `MultimodalMACLoss`.

    Returns:
        The callback, placed right after the trainer's flow control so that reporting callbacks see its
        values.

    Raises:
        ValueError: If the trainer's loss has no temperature schedule.

    Example::

        loss = MultimodalMACLoss(model)
        trainer = SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss)
        add_temperature_schedule(trainer)
        trainer.train()
    """
    if getattr(trainer, "loss", None) is None:
        raise ValueError(
            f"A {type(trainer).__name__} has no attribute loss, of which the schedule would be read. Name the loss: "
            "trainer.add_callback(TemperatureScheduleCallback(loss))."
        )
    callback = TemperatureScheduleCallback(trainer.loss)
    callbacks: list[TrainerCallback] = trainer.callback_handler.callbacks
    for known in callbacks:
        if isinstance(known, TemperatureScheduleCallback):
            known_ids = {id(loss) for loss in known.losses.values()}
            if known_ids >= {id(loss) for loss in callback.losses.values()}:
                callback = known
                callbacks.remove(known)
                break
    callbacks.insert(1, callback)
    return callback


def check_temperature(name: str, value: float) -> None:
    """Raise unless a temperature can divide similarities.

    Args:
        name: Argument name for the message.
        value: The temperature.

    Raises:
        ValueError: If `value` is not a positive, finite number.
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}, but a temperature must be positive and finite. Use a value such as 0.05.")


def _clamp_progress(progress: float) -> float:
    if math.isnan(progress):
        raise ValueError("progress is nan, but it must be a number in [0, 1]. Pass the done steps over all steps.")
    return min(max(float(progress), 0.0), 1.0)


def _describe(loss: object) -> str:
    if isinstance(loss, Mapping):
        return f"a dict of {[type(module).__name__ for module in loss.values()]}"
    return f"a {type(loss).__name__}"
