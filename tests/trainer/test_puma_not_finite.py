"""What a PumaTrainer does about a loss that is not finite."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, DatasetDict
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn

from puma_hf import PumaTrainer
from tests.trainer.conftest import MakeArguments, MakeStudent

ROWS = 16
# Four answers, each right for four rows.
POSITIVES = [[f"answer {row % 4}"] for row in range(ROWS)]


@pytest.fixture
def pairs() -> Dataset:
    return Dataset.from_dict(
        {"anchor": [f"query {row}" for row in range(ROWS)], "positive": [f"apple {row}" for row in range(ROWS)]}
    )


class BreakingLoss(nn.Module):
    """InfoNCE whose n-th call breaks."""

    def __init__(self, model: nn.Module, call: int, value: float = math.nan, *, gradient_only: bool = False) -> None:
        super().__init__()
        self.loss = MultipleNegativesRankingLoss(model)
        self.model = model
        self.call, self.value, self.gradient_only = call, value, gradient_only

    def forward(self, features: Any, labels: Tensor | None = None) -> Tensor:
        loss: Tensor = self.loss(features, labels)
        self.call -= 1
        if self.call != 0:
            return loss
        if self.gradient_only:  # the root of 0 is 0, its derivative infinite
            return loss + (loss - loss.detach()).sqrt()
        return loss * self.value


class RowsSeen(PumaTrainer):
    """Notes the rows of each batch that is trained on, as their texts tell them."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        texts = self.model.tokenizer.batch_decode(inputs["anchor_input_ids"])
        self.rows = [*getattr(self, "rows", []), [int(re.findall(r"query (\d+)", text)[0]) for text in texts]]
        self.before = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.fixture
def breaking(make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset) -> Any:
    """A trainer of which the n-th batch, counted from the start of the process, breaks."""

    def make(call: int, value: float = math.nan, *, gradient_only: bool = False, **changes: Any) -> RowsSeen:
        positives = changes.pop("positives", None)
        dataset = changes.pop("train_dataset", pairs)
        model = make_student()
        return RowsSeen(
            model=model,
            args=make_arguments(**{"max_steps": 12, **changes}),
            train_dataset=dataset,
            loss=BreakingLoss(model, call, value, gradient_only=gradient_only),
            positives=positives,
        )

    return make


def expect_stop(trainer: RowsSeen, message: str, **train: Any) -> str:
    with pytest.raises(ValueError, match=message) as caught:
        trainer.train(**train)
    # The weights are those before the batch, and nothing is left that a next step would add.
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, trainer.before[name]), name
        assert parameter.grad is None
    return str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("filtered", [True, False])
def test_a_loss_that_is_not_finite_stops_before_the_step(value: float, filtered: bool, breaking: Any) -> None:
    trainer = breaking(6, value, logging_nan_inf_filter=filtered)
    message = expect_stop(trainer, rf"^The loss is {value} in optimizer step 6, batch 2 of epoch 2, rows \[")
    assert f"rows {trainer.rows[-1]} of train_dataset" in message
    assert "lower learning_rate" in message
    assert "bfloat16" in message
    assert trainer.state.global_step == 5
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2},
        {"positives": POSITIVES},
        {"batch_sampler": "no_duplicates"},
    ],
)
def test_the_rows_are_named_however_batches_are_made(changes: dict[str, Any], breaking: Any) -> None:
    trainer = breaking(6, **changes)
    message = expect_stop(trainer, r"epoch 2")
    assert f"rows {trainer.rows[5]} of train_dataset" in message


def test_the_batch_of_an_accumulated_step_is_named(breaking: Any) -> None:
    trainer = breaking(7, gradient_accumulation_steps=4)
    message = expect_stop(trainer, r"optimizer step 2, batch 3 of epoch 2, rows")
    assert len(trainer.rows) == 8
    assert f"rows {trainer.rows[6]} of train_dataset" in message


def test_rows_are_named_after_a_resumed_epoch(breaking: Any) -> None:
    breaking(99, max_steps=6, save_strategy="steps", save_steps=6).train()
    trainer = breaking(2, save_strategy="steps", save_steps=6)
    message = expect_stop(trainer, r"step 8, batch 4 of epoch 2", resume_from_checkpoint=True)
    assert f"rows {trainer.rows[-1]} of train_dataset" in message
    assert "the last whole checkpoint is" in message
    assert "checkpoint-6'" in message


def test_rows_are_named_in_each_of_several_processes(breaking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of the second of two processes."""
    trainer = breaking(3, positives=POSITIVES)
    monkeypatch.setattr(
        trainer.accelerator,
        "prepare",
        lambda *prepared: (
            prepare_data_loader(*prepared, num_processes=2, process_index=1, even_batches=False, put_on_device=False)
            if isinstance(prepared[0], torch.utils.data.DataLoader)
            else type(trainer.accelerator).prepare(trainer.accelerator, *prepared)
        ),
    )
    message = expect_stop(trainer, r"batch 1 of epoch 2|batch 3 of epoch 1|batch 2 of epoch 2")
    assert f"rows {trainer.rows[2]} of train_dataset" in message


def test_rows_of_several_datasets_are_named_with_theirs(breaking: Any, pairs: Dataset) -> None:
    datasets = DatasetDict(first=pairs.select(range(8)), second=pairs.select(range(8, 16)))
    trainer = breaking(2, train_dataset=datasets)
    message = expect_stop(trainer, r"batch 2 of epoch 1, rows")
    named = [f"first:{row}" if row < 8 else f"second:{row - 8}" for row in trainer.rows[1]]
    assert f"rows {named} of train_dataset" in message


class Whimsical(DefaultBatchSampler):
    """Never the same twice."""

    calls = 0

    def __iter__(self) -> Iterator[list[int]]:
        type(self).calls += 1
        yield from ([(row + self.calls) % ROWS for row in range(start, start + 4)] for start in range(0, ROWS, 4))


def test_rather_no_rows_than_wrong_ones(breaking: Any) -> None:
    message = expect_stop(breaking(2, batch_sampler=Whimsical), r"batch 2 of epoch 1\. The step")
    assert "rows [" not in message


def test_gradients_that_are_not_finite_stop_too(breaking: Any) -> None:
    trainer = breaking(4, gradient_only=True, gradient_accumulation_steps=2)
    message = expect_stop(
        trainer, r"^The norm of the gradients is (nan|inf) in optimizer step 2, batch 3, 4 of epoch 1"
    )
    assert f"rows {trainer.rows[2] + trainer.rows[3]} of train_dataset" in message
    assert "another process" not in message


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_weights_that_the_last_step_spoils_are_not_saved(max_grad_norm: float, breaking: Any) -> None:
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "warmup_steps": 1}
    trainer = breaking(99, learning_rate=1e30, max_grad_norm=max_grad_norm, **changes)
    message = (
        r"^Optimizer step 2 has left \d+ of \d+ trained tensors not finite, or too large .*\(first: .*"
        r"The last whole checkpoint is '.*checkpoint-1': resume from there with a lower learning_rate, and with max_gr"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_weights_are_looked_at(value: float, breaking: Any) -> None:
    trainer = breaking(99)
    trainer.check_weights()
    trained = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    name, tensor = list(trained.items())[3]
    tensor.data.view(-1)[-1] = value
    message = rf"step 0 has left 1 of {len(trained)} .*\(first: {re.escape(name)}\), so .* saved\. Start again with a"
    with pytest.raises(ValueError, match=message):
        trainer.check_weights()
