from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from puma_hf.losses import (
    MultimodalMACLoss,
    TemperatureSchedule,
    TemperatureScheduleCallback,
    add_temperature_schedule,
    find_scheduled_losses,
)
from puma_hf.losses.progress_puma import IDLE_FORWARDS_BEFORE_WARNING, ScheduledTemperatureLoss

MakeModel = Callable[[], SentenceTransformer]


class RecordingLoss(MultimodalMACLoss):
    """Notes the hard temperature of every training forward."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.used: list[float] = []

    def compute_loss_from_embeddings(self, *args: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.used.append(self.current_hard_temperature)
        return super().compute_loss_from_embeddings(*args)


@pytest.fixture
def make_trainer(tmp_path: Path, make_model: MakeModel, pairs: Dataset) -> Callable[..., SentenceTransformerTrainer]:
    def make(name: str = "run", loss_kwargs: dict[str, Any] | None = None, **arguments: Any) -> Any:
        model = make_model()
        args = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / name),
            **{
                "num_train_epochs": 2,
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "learning_rate": 0.1,
                "use_cpu": True,
                **arguments,
            },
        )
        loss = RecordingLoss(model, 0.08, 0.04, **({"schedule": "cosine", "schedule_end": 1.0} | (loss_kwargs or {})))
        return SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss)

    return make


@pytest.mark.parametrize(
    ("kind", "start", "middle", "end"),
    [
        ("exponential", 0.08, 0.08 * math.sqrt(0.5), 0.04),
        ("cosine", 0.08, 0.04 + 0.04 * math.sqrt(0.5), 0.04),
        ("linear", 0.08, 0.06, 0.04),
        ("constant", 0.04, 0.04, 0.04),
    ],
)
@pytest.mark.parametrize("schedule_end", [1.0, 0.5, 0.3])
def test_schedule_values(kind: Any, start: float, middle: float, end: float, schedule_end: float) -> None:
    schedule = TemperatureSchedule(0.08, 0.04, kind, schedule_end)
    found = [schedule.value(share * schedule_end) for share in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([start, middle, end])
    assert schedule.value(-0.5) == schedule.value(0.0)
    assert schedule.value(1.5) == schedule.value(1.0) == schedule.value(schedule_end) == 0.04
    assert schedule.value((1 + schedule_end) / 2) == 0.04


# Three decimals at progress 0, 0.1, ..., 1, worked out from 0.03 * exp(-d * 2 * min(0.5, progress)).
RELEASED = {
    0.5: [0.030, 0.027, 0.025, 0.022, 0.020, 0.018, 0.018, 0.018, 0.018, 0.018, 0.018],
    0.2: [0.030, 0.029, 0.028, 0.027, 0.026, 0.025, 0.025, 0.025, 0.025, 0.025, 0.025],
}


@pytest.mark.parametrize("decay", RELEASED)
def test_the_released_values(decay: float) -> None:
    schedule = TemperatureSchedule(0.03, 0.03 * math.exp(-decay))  # the rest is the default
    found = [schedule.value(step / 10) for step in range(11)]
    assert [round(value, 3) for value in found] == RELEASED[decay]
    exact = [0.03 * math.exp(-decay * 2 * min(0.5, step / 10)) for step in range(11)]
    assert found == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.01, math.nan])
def test_a_schedule_ends_within_the_training(value: float) -> None:
    message = rf"^schedule_end is {value}, but it must be a finite number above 0 and at most 1"
    for make in (
        lambda: TemperatureSchedule(0.05, 0.04, "constant", value),
        lambda: MultimodalMACLoss(nn.Identity(), schedule_end=value),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def train_for_long(loss: ScheduledTemperatureLoss) -> None:
    for _ in range(IDLE_FORWARDS_BEFORE_WARNING + 4):
        loss.warn_if_schedule_idles(training=True)


def test_an_idle_schedule_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    moved = ScheduledTemperatureLoss(0.05, 0.04, "cosine")
    moved.progress = 0.0
    for fine in (moved, ScheduledTemperatureLoss(0.05, 0.04, "constant")):
        train_for_long(fine)
    idle = ScheduledTemperatureLoss(0.05, 0.04, "cosine")
    with torch.no_grad():
        train_for_long(idle)  # an evaluation
    assert not caplog.records
    train_for_long(idle)
    assert len(caplog.records) == 1
    assert "never moved: hard_temperature is still 0.05. Call add_temperature_schedule(trainer)" in caplog.text


def test_find_scheduled_losses(make_model: MakeModel) -> None:
    model = make_model()
    one, two = MultimodalMACLoss(model), MultimodalMACLoss(model)
    other = MultipleNegativesRankingLoss(model)
    assert find_scheduled_losses(None) == find_scheduled_losses(other) == find_scheduled_losses({}) == {}
    assert find_scheduled_losses(one) == find_scheduled_losses({"a": one, "b": one, "c": other}) == {"": one}
    assert find_scheduled_losses(MatryoshkaLoss(model, one, [8, 4])) == {"": one}
    assert find_scheduled_losses({"a": one, "b": two}) == {"a_": one, "b_": two}
    assert find_scheduled_losses(nn.ModuleList([one, two])) == {"0_": one, "1_": two}
    nested = {"a": nn.ModuleList([one, two]), "b": lambda model: one}
    assert find_scheduled_losses(nested) == {"a_0_": one, "a_1_": two}


def test_callback_events_by_hand(tmp_path: Path) -> None:
    loss = ScheduledTemperatureLoss(0.08, 0.04, "linear", 1.0)
    callback = TemperatureScheduleCallback(loss)
    args, control = TrainingArguments(output_dir=str(tmp_path)), TrainerControl()
    state = TrainerState(global_step=3, max_steps=4, log_history=[{"loss": 1.0, "step": 3}])
    callback.on_train_begin(args, state, control)
    assert loss.progress == 0.75
    logs: dict[str, Any] = {"loss": 1.0}
    callback.on_log(args, state, control, logs=logs)
    assert logs == {"loss": 1.0, "temperature": 0.08, "hard_temperature": pytest.approx(0.05)}
    assert state.log_history[-1] == {**logs, "step": 3}
    for untouched in ({"eval_loss": 1.0}, {"train_loss": 1.0}):
        logs = dict(untouched)
        callback.on_log(args, state, control, logs=logs)
        assert logs == untouched
    callback.on_log(args, state, control, logs=None)
    state.max_steps = 0  # unknown: keep what there is
    callback.on_step_begin(args, state, control)
    assert loss.progress == 0.75


@pytest.mark.parametrize("accumulation", [1, 2])
def test_schedule_in_a_trainer(make_trainer: Callable[..., SentenceTransformerTrainer], accumulation: int) -> None:
    trainer = make_trainer(gradient_accumulation_steps=accumulation)
    trainer.add_callback(TemperatureScheduleCallback(trainer.loss))
    add_temperature_schedule(trainer)  # twice adds one
    callback = add_temperature_schedule(trainer)
    found = trainer.callback_handler.callbacks
    assert found[1] is callback
    assert [type(known) for known in found].count(TemperatureScheduleCallback) == 1
    trainer.train()

    steps = 8 // accumulation
    expected = [0.04 + 0.04 * math.cos(math.pi / 2 * step / steps) for step in range(steps)]
    assert trainer.state.global_step == steps
    used = [value for value in expected for _ in range(accumulation)]
    assert trainer.loss.used == pytest.approx(used)
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert [record["hard_temperature"] for record in records] == pytest.approx(expected)
    assert [record["temperature"] for record in records] == [0.08] * steps
    assert (trainer.loss.progress, trainer.loss.current_hard_temperature) == (1.0, 0.04)


def test_resuming_continues_the_schedule(make_trainer: Callable[..., SentenceTransformerTrainer]) -> None:
    whole = make_trainer("whole", save_strategy="steps", save_steps=3)
    add_temperature_schedule(whole)
    whole.train()
    resumed = make_trainer("resumed", save_strategy="no")
    add_temperature_schedule(resumed)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))

    assert len(whole.loss.used) == 8
    assert resumed.loss.used == whole.loss.used[3:]
    logged = [
        {record["step"]: (record["hard_temperature"], record["loss"]) for record in history if "loss" in record}
        for history in (whole.state.log_history, resumed.state.log_history)
    ]
    assert logged[0] == logged[1]


def test_losses_without_a_schedule_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    other = MultipleNegativesRankingLoss(make_model())
    for loss, shown in ((other, "MultipleNegatives"), ({"nli": other}, r"\{'nli': Multiple"), ({}, r"\{\}")):
        with pytest.raises(ValueError, match=rf"(?s)loss is {shown}.*needs a MultimodalMACLoss"):
            TemperatureScheduleCallback(loss)
    trainer: Any = Trainer(nn.Linear(1, 1), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    with pytest.raises(ValueError, match="loss is None, but a temperature schedule needs a MultimodalMACLoss"):
        add_temperature_schedule(trainer)


def test_several_losses_log_each_under_its_name() -> None:
    losses = {
        "one": ScheduledTemperatureLoss(0.08, 0.04, "linear", 1.0),
        "two": ScheduledTemperatureLoss(0.05, 0.03, "constant"),
    }
    logs: dict[str, Any] = {"loss": 1.0}
    callback = TemperatureScheduleCallback(losses)
    state: Any = TrainerState(global_step=1, max_steps=2)
    callback.on_step_begin(None, state, None)  # type: ignore[arg-type]
    callback.on_log(None, state, None, logs=logs)  # type: ignore[arg-type]
    names = ("one_temperature", "one_hard_temperature", "two_temperature", "two_hard_temperature")
    assert [logs[name] for name in names] == pytest.approx([0.08, 0.06, 0.05, 0.03])
