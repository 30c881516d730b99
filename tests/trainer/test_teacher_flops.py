"""What each teacher costs at the true shapes of Qwen2-VL-7B, counted without a GPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from puma_hf.losses import SelfDistillationLoss
from puma_hf.trainer.teachers import FrozenTeacher, Teacher, WholeTeacher
from tests.full_size import (
    HIDDEN_SIZE,
    StepFlops,
    build_model,
    count_step,
    image_item,
    sentence_transformer,
    weight_bytes,
)

KEPT = 12
MODES = ("naive", "frozen", "cached")


@cache
def step(mode: str, checkpointed: bool = False) -> StepFlops:
    """One distillation step on one image of 290 tokens."""
    student = build_model(KEPT).train()
    student.config.original_num_hidden_layers = 28
    if checkpointed:
        student.gradient_checkpointing_enable({"use_reentrant": False})
        student.disable_input_require_grads()
    model = sentence_transformer(student).train()
    features = image_item(student)
    full = build_model(adapter=False).eval()
    layers = full.language_model.layers[KEPT:]
    teacher: Teacher | None = None
    if mode == "naive":
        teacher = WholeTeacher(full, student)
    elif mode == "frozen":
        teacher = FrozenTeacher(student, layers)

    def run() -> Tensor:
        if teacher is None:  # stored states
            return Loss(model)([{**features, "teacher_state": torch.empty(1, HIDDEN_SIZE, device="meta")}])
        teacher.add_states(features)
        return Loss(model)([features])

    return count_step(run)


class Loss(SelfDistillationLoss):
    """Compares states that have no values to check."""

    def compute_loss_from_outputs(self, outputs: list[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        return torch.stack([(o["pooler_output"] - o["teacher_state"]).float().square().sum() for o in outputs]).mean()


def test_the_step_is_what_the_arithmetic_says() -> None:
    """Counted by hand in method.md's way: 0.466 GFLOP per token and layer, 1.49 TFLOP per image."""
    naive = step("naive")
    layer, tower = 290 * 0.466e9, 1.486e12
    assert naive.of("visual")[0] == pytest.approx(2 * tower, rel=0.001)
    teacher_and_student = (28 + KEPT) * layer
    # LoRA adds a little; attention, whose cost grows with the square of the length, a little more.
    assert naive.forward == pytest.approx(2 * tower + teacher_and_student, rel=0.03)
    # Backward to the inputs alone, as base weights need no gradient.
    assert naive.backward == pytest.approx(KEPT * layer, rel=0.08)


@pytest.mark.parametrize(("mode", "bound"), [("frozen", 0.88), ("cached", 0.56)])
def test_cost_against_two_models(mode: str, bound: float) -> None:
    assert step(mode).total <= bound * step("naive").total


@pytest.mark.parametrize("mode", MODES)
def test_the_vision_tower_is_never_propagated_back(mode: str) -> None:
    forward, backward = step(mode).of("visual")
    runs = 2 if mode == "naive" else 1
    assert forward == runs * step("cached").of("visual")[0] > 1e12
    assert backward == 0


def test_modes_differ_by_what_they_leave_out() -> None:
    tower = step("cached").of("visual")[0]
    naive, frozen, cached = (step(mode) for mode in MODES)
    assert naive.backward == frozen.backward == cached.backward
    assert naive.forward - frozen.forward == tower
    assert frozen.forward - cached.forward == pytest.approx(28 * 290 * 0.466e9, rel=0.03)


def test_gradient_checkpointing_does_not_run_the_teacher_again() -> None:
    plain, checkpointed = step("frozen"), step("frozen", checkpointed=True)
    assert checkpointed.forward == plain.forward
    assert checkpointed.of("visual") == plain.of("visual")
    # The kept layers a second time, and nothing else.
    layer = (plain.forward - step("cached").forward) / 28
    assert checkpointed.backward - plain.backward == pytest.approx(KEPT * layer, rel=0.05)


def test_one_copy_of_the_weights() -> None:
    student, full = build_model(KEPT), build_model(adapter=False)
    two = weight_bytes(student, full)
    one = weight_bytes(student, full.language_model.layers[KEPT:])
    assert one <= 0.68 * two
    # Without the adapter it is exactly the full model.
    bare = build_model(KEPT, adapter=False)
    assert weight_bytes(bare, full.language_model.layers[KEPT:]) == weight_bytes(full)
