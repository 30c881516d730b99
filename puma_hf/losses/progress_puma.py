"""How far a training is: the losses whose temperature depends on it, and the callback that moves them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from .schedule_puma import SCHEDULE_END, Schedule, TemperatureSchedule, check_range

logger = logging.getLogger(__name__)

# Large enough that a hand-written loop with gradient accumulation, which sets `progress` once per optimizer
# step, has done so at least once; small enough that a forgotten schedule is noticed within the first minute.
IDLE_FORWARDS_BEFORE_WARNING = 32


class ScheduledTemperatureLoss(nn.Module):
    """Base of the losses with a fixed temperature and a second, scheduled one; see `MultimodalMACLoss` for both.

    A module cannot see the step count of the trainer that calls it, so the position on the schedule comes from outside:
    `TemperatureScheduleCallback` sets `progress`, and so does a hand-written training loop.

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
        check_range(temperature=temperature, hard_temperature=hard_temperature)
        self.temperature, self.hard_temperature = temperature, hard_temperature
        self.temperature_schedule = TemperatureSchedule(temperature, hard_temperature, schedule, schedule_end)
        # Done training steps over all training steps, in [0, 1]; None until somebody says.
        self.progress: float | None = None
        self._idle_forwards = 0

    @property
    def current_hard_temperature(self) -> float:
        """Temperature of the intra-modality candidates at the present `progress`."""
        return self.temperature_schedule.value(self.progress or 0.0)

    def warn_if_schedule_idles(self, training: bool, moves: bool = False) -> None:
        """Warn once when the loss is trained and nobody moves its schedule, or whatever else `moves` with it.

        `training` says whether the model is in training mode; evaluation never counts.
        """
        schedule = self.temperature_schedule
        moves |= schedule.kind != "constant" and schedule.start != schedule.end
        if self.progress is not None or not moves or not training or not torch.is_grad_enabled():
            return
        self._idle_forwards += 1
        if self._idle_forwards == IDLE_FORWARDS_BEFORE_WARNING:
            logger.warning(
                f"{type(self).__name__} has been trained for {self._idle_forwards} forward passes, but its schedule "
                f"never moved: hard_temperature is still {self.current_hard_temperature:g}. Call "
                "add_temperature_schedule(trainer) before trainer.train(), or set loss.progress in your own loop."
            )


class TemperatureScheduleCallback(TrainerCallback):
    """Move the temperature schedules of a loss along with the trainer's optimizer steps.

    Before every optimizer step `progress = global_step / max_steps`. Both numbers belong to the trainer's restored
    state, so a run that resumes from a checkpoint continues at the temperature it stopped at, and gradient accumulation
    changes nothing. Training logs gain `temperature` and `hard_temperature` (the value of the last step); with several
    scheduled losses each name is prefixed by the dataset's name and an underscore. Prefer
    `add_temperature_schedule(trainer)`, which places the callback before those that send the logs away.

    An evaluation loss uses the temperature of its step too, so `eval_loss` values of different steps are not on one
    scale: choose the best checkpoint by a retrieval metric.

    Args:
        loss: A scheduled loss, a loss that wraps one, or a dict from dataset name to loss; a ValueError without one.

    Example:
        >>> loss = ScheduledTemperatureLoss(temperature=0.05, hard_temperature=0.04, schedule="cosine")
        >>> list(TemperatureScheduleCallback(loss).losses) == [""]
        True
    """

    def __init__(self, loss: nn.Module | Mapping[str, Any]) -> None:
        super().__init__()
        self.losses = find_scheduled_losses(loss)
        if not self.losses:
            raise ValueError(f"loss is {loss!r:.99}, but a temperature schedule needs a MultimodalMACLoss in it.")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the progress of this optimizer step."""
        if state.max_steps > 0:
            for loss in self.losses.values():
                loss.progress = state.global_step / state.max_steps

    # That of the restored (or zero) step, and that after the last one: 1.0 unless the run stopped early.
    on_train_begin = on_train_end = on_step_begin

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Add the temperatures to a training record."""
        if logs is not None and "loss" in logs:
            for prefix, loss in self.losses.items():
                values = {"temperature": loss.temperature, "hard_temperature": loss.current_hard_temperature}
                add_to_logs({f"{prefix}{name}": value for name, value in values.items()}, logs, state)


def add_to_logs(values: Mapping[str, float], logs: dict[str, float], state: TrainerState) -> None:
    """Add values to the record that a callback gets, and to the history's copy, which the trainer has made before."""
    logs.update(values)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(values)


def find_scheduled_losses(loss: nn.Module | Mapping[str, Any] | None) -> dict[str, ScheduledTemperatureLoss]:
    """From log prefix to loss, those with a temperature schedule, also inside wrappers such as `MatryoshkaLoss`, once.

    `loss` is what a trainer holds: a module or a dict from dataset name to module. A single loss has the prefix `""`.
    """
    return find_losses(loss, "temperature_schedule")


def find_losses(loss: nn.Module | Mapping[str, Any] | None, attribute: str) -> dict[str, Any]:
    """From log prefix to loss, those with an attribute of their own: a wrapper may show that of the loss inside."""
    found: dict[nn.Module, str] = {}
    for name, module in (loss if isinstance(loss, Mapping) else {"": loss}).items():
        modules = module.modules() if isinstance(module, nn.Module) else ()
        inner = [child for child in modules if attribute in vars(child)]
        for index, child in enumerate(inner):
            parts = [name, str(index) if len(inner) > 1 else ""]
            found.setdefault(child, "".join(f"{part}_" for part in parts if part))
    # One loss needs no name to tell it apart, whatever the dataset or the wrapper is called.
    return {prefix if len(found) > 1 else "": child for child, prefix in found.items()}


def add_temperature_schedule(trainer: Any) -> TemperatureScheduleCallback:
    """Give a sentence-transformers trainer the callback that moves its loss's temperature schedule.

    A plain `SentenceTransformerTrainer` offers its loss no hook, so one line is needed after building it. A ValueError
    says if its loss is, wraps or holds no `MultimodalMACLoss`. Calling this twice does nothing more.
    """
    callback = TemperatureScheduleCallback(getattr(trainer, "loss", None))  # type: ignore[arg-type]
    handler = trainer.callback_handler
    handler.callbacks = [known for known in handler.callbacks if not isinstance(known, TemperatureScheduleCallback)]
    # After the flow control, which comes first, and before all that reports: these send the logs as they find them.
    handler.callbacks.insert(1, callback)
    return callback
