from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import Tensor, nn
from transformers.trainer_callback import TrainerState

from puma_hf import MultimodalMACLoss, PumaTrainer
from puma_hf.trainer import statistics_puma as statistics
from puma_hf.trainer.statistics_puma import LOSS_STATISTICS, TrainingStatistics, effective_rank, uniformity
from tests.trainer.conftest import MakeArguments, MakeStudent


class Telling(nn.Module):
    """A loss that keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.hard_temperature = 0.05, 0.04
        self.statistics: dict[str, Tensor] | None = None
        self.candidates_seen: Tensor | None = None

    def tell(self, candidates: Tensor | None = None, **values: float) -> None:
        self.statistics = {name: torch.tensor(values.get(name, math.nan)) for name in LOSS_STATISTICS}
        self.candidates_seen = candidates


class Wrapper(nn.Module):
    """Shows the statistics of the loss inside as its own."""

    def __init__(self, loss: Telling) -> None:
        super().__init__()
        self.loss = loss

    @property
    def statistics(self) -> Any:
        return self.loss.statistics


# --- spread


def test_effective_rank_of_known_sets() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(7, 3)) == pytest.approx(1, abs=1e-3)
    # Singular values 3 and 1: shares 3/4 and 1/4.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected)
    assert effective_rank(torch.eye(3).bfloat16()) == pytest.approx(3)


def test_uniformity_of_known_sets() -> None:
    assert uniformity(torch.ones(4, 1)) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8)  # distance 2
    # Distances squared 2, 2 and 4.
    three = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert uniformity(three) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))


def test_the_threshold_of_a_collapse_is_what_it_says() -> None:
    """A narrow cone is no collapse; one in which vectors hardly differ is."""

    def share(cosine: float) -> float:
        torch.manual_seed(0)
        common, own = torch.nn.functional.normalize(torch.randn(65, 512), dim=1).split([1, 64])
        return effective_rank(math.sqrt(cosine) * common + math.sqrt(1 - cosine) * own) / 64

    assert share(0.95) > 8 * statistics.COLLAPSED_SHARE
    assert share(0.9995) < statistics.COLLAPSED_SHARE


# --- windows


def collect(statistics: TrainingStatistics, step: int = 1) -> dict[str, float]:
    """What is added to a training record, and to its copy in the history."""
    logs, state = {"loss": 1.0}, TrainerState(max_steps=100, global_step=step, log_history=[{"step": step}])
    arguments = SimpleNamespace(device=torch.device("cpu"))
    statistics.on_log(arguments, state, None, logs)
    found = {name: value for name, value in logs.items() if name != "loss"}
    assert state.log_history == [{"step": step, **found}]
    return found


def test_values_are_averaged_from_log_to_log() -> None:
    loss = Telling()
    collected = TrainingStatistics(nn.Sequential(Wrapper(loss)))
    assert collected.losses == {"": loss}
    for step in (1.0, 2.0):
        loss.tell(intra_negatives=step, positive_similarity=step / 10)
        collected.add({})
        collected.add({})  # nothing new was computed
    loss.tell(intra_negatives=6.0)
    collected.add({})
    # A step without a positive similarity does not count for it; one that nobody had is left out.
    assert collect(collected) == {"intra_negatives": 3.0, "positive_similarity": 0.15}
    assert collect(collected) == {}
    loss.tell(intra_negatives=8.0)
    collected.add({})
    assert collect(collected) == {"intra_negatives": 8.0}
    evaluation = {"eval_loss": 1.0}
    collected.on_log(None, None, None, evaluation)
    assert evaluation == {"eval_loss": 1.0}


def test_several_losses_are_told_apart() -> None:
    one, other = Telling(), Telling()
    collected = TrainingStatistics({"first": one, "second": other, "third": nn.Linear(1, 1)})
    one.tell(intra_negatives=1.0)
    collected.add({})
    one.tell(intra_negatives=2.0)
    other.tell(intra_negatives=5.0)
    collected.add({})
    assert collect(collected) == {"first_intra_negatives": 1.5, "second_intra_negatives": 5.0}
    assert TrainingStatistics(nn.ModuleList([one, other, one])).losses == {"0_": one, "1_": other}
    assert TrainingStatistics({"first": one, "second": one}).losses == {"": one}


def test_speed_counts_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    collected = TrainingStatistics(nn.Identity())
    batch = {"anchor_input_ids": torch.zeros(3, 7), "anchor_attention_mask": torch.zeros(3, 7), "label": torch.zeros(3)}
    collected.add({**batch, "anchor_image_grid_thw": torch.zeros(5, 3), "positive_input_ids": torch.zeros(3, 9)})
    now[0] = 102.0
    assert collect(collected) == {"items_per_second": 3.0, "images_per_second": 2.5}
    collected.add(batch)
    now[0] = 103.0
    assert collect(collected) == {"items_per_second": 3.0}


def test_spread_is_that_of_the_last_candidates(caplog: pytest.LogCaptureFixture) -> None:
    loss = Telling()
    collected = TrainingStatistics(loss)
    loss.tell(candidates=torch.ones(8, 8))
    collected.add({})
    loss.tell(candidates=3 * torch.eye(8))  # normalised here
    collected.add({})
    assert collect(collected) == {"effective_rank": 8.0, "uniformity": -4.0}
    loss.tell(candidates=torch.ones(statistics.MIN_SPREAD_ROWS - 1, 8))  # too few to tell
    collected.add({})
    assert collect(collected) == {}
    assert not caplog.records
    for _ in range(2):  # a collapse is warned of once
        loss.tell(candidates=torch.ones(8, 16))
        collected.add({})
        assert collect(collected)["effective_rank"] == pytest.approx(1, abs=0.01)
    assert len(caplog.records) == 1
    assert "collapse: 8 candidates have an effective rank of 1.00 of at most 8" in caplog.text


def test_states_and_teacher_states_of_the_model_are_seen() -> None:
    class Student(nn.Module):
        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return features

    model, collected = Student(), TrainingStatistics(nn.Identity())
    collected.on_train_begin(None, None, None, model=model)
    states, teacher = torch.eye(4), torch.eye(4)
    model({"pooler_output": states, "teacher_state": teacher})
    model({"pooler_output": states, "teacher_state": teacher.roll(1, 0)})
    model({"sentence_embedding": states})
    model.eval()({"pooler_output": torch.ones(4, 4), "teacher_state": -states})
    assert collect(collected) == {"teacher_cosine": 0.5, "effective_rank": 4.0, "uniformity": -4.0}
    collected.on_train_end(None, None, None)
    assert not model._forward_hooks
    assert collect(collected) == {}


@pytest.mark.parametrize(
    ("mixed_step", "hard_temperature", "warnings"), [(None, 0.04, 1), (7, 0.04, 0), (None, 0.05, 0)]
)
def test_batches_of_one_modality_are_warned_of_once(
    mixed_step: int | None, hard_temperature: float, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One mixed batch is enough, and nobody is told that InfoNCE is InfoNCE."""
    loss = Telling()
    loss.hard_temperature = hard_temperature
    collected = TrainingStatistics(loss)
    for step in range(1, 2 * statistics.WATCHED_STEPS):
        loss.tell(intra_negatives=3.0, inter_negatives=float(step == mixed_step))
        collected.add({})
        collect(collected, step)
        assert step >= statistics.WATCHED_STEPS or not caplog.records
    assert len(caplog.records) == warnings
    assert caplog.text.count("concatenate_datasets") == warnings


# --- in a trainer


def mixed_rows(image: str, modalities: str) -> Dataset:
    """A row for each letter: its positive is a text or an image."""
    cell = {"text": Value("string"), "image": Value("string")}
    anchors = [{"text": f"query {row}", "image": None} for row in range(len(modalities))]
    answers = [
        {"text": f"answer {row}" if letter == "t" else None, "image": image if letter == "i" else None}
        for row, letter in enumerate(modalities)
    ]
    return Dataset.from_dict({"anchor": anchors, "positive": answers}, Features({"anchor": cell, "positive": cell}))


@pytest.fixture
def image(images: list[Image.Image], tmp_path: Any) -> str:
    images[1].save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@pytest.mark.parametrize("wrapped", [False, True])
def test_mac_loss_is_logged_in_full(
    wrapped: bool, make_student: MakeStudent, make_arguments: MakeArguments, image: str
) -> None:
    model = make_student()
    loss: nn.Module = MultimodalMACLoss(model)
    loss = MatryoshkaLoss(model, loss, [32, 16]) if wrapped else loss
    arguments = make_arguments(max_steps=2, logging_steps=2, gradient_accumulation_steps=2)
    trainer = PumaTrainer(model=model, args=arguments, train_dataset=mixed_rows(image, "titi"), loss=loss)
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    # Of each row's three negatives one is of its target's modality; the images are one and the same.
    assert entry["intra_negatives"] + entry["masked_negatives"] == 1.0
    assert entry["inter_negatives"] == 2.0
    assert -1 <= entry["inter_similarity"] <= 1
    assert -1 <= entry["positive_similarity"] <= 1
    assert 1 <= entry["effective_rank"] <= 4
    assert entry["uniformity"] <= 0
    assert entry["items_per_second"] == pytest.approx(4 * entry["images_per_second"], rel=0.01)
    assert entry["temperature"] == 0.03
    assert "teacher_cosine" not in entry
    assert not model._forward_hooks
