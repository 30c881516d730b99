from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from sentence_transformers import SentenceTransformerTrainingArguments
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from puma_hf import MultimodalMACLoss, PumaModel, PumaTrainer
from puma_hf.trainer.gradient_checkpointing import set_non_reentrant, spare_frozen_vision
from puma_hf.trainer.lora import puma_model
from tests.full_size import StepFlops, build_model, count_step, image_item
from tests.trainer.conftest import MakeArguments, MakeStudent


@pytest.fixture
def pictures(images: list[Image.Image], tmp_path: Any) -> Dataset:
    """Four rows whose positives are images."""
    paths = []
    for number, image in enumerate([*images, images[0].rotate(90)]):
        image.save(tmp_path / f"{number}.png")
        paths.append(str(tmp_path / f"{number}.png"))
    cell = {"text": Value("string"), "image": Value("string")}
    return Dataset.from_dict(
        {
            "anchor": [{"text": f"query {number}", "image": None} for number in range(4)],
            "positive": [{"text": None, "image": path} for path in paths],
        },
        Features({"anchor": cell, "positive": cell}),
    )


class Calls:
    """How often a module was run, and whether gradients came back to it."""

    def __init__(self, module: nn.Module) -> None:
        self.forward = self.backward = 0
        module.register_forward_pre_hook(self._count_forward)
        module.register_forward_hook(self._watch_backward)

    def _count_forward(self, *args: Any) -> None:
        self.forward += 1

    def _watch_backward(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._count_backward)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward += 1


class GradientsKept(PumaTrainer):
    """Keeps the gradients of the first step."""

    gradients: dict[str, Tensor]

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.gradients = {
            name: parameter.grad.clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        return super()._get_grad_norm(*args, **kwargs)


def train(
    make_student: MakeStudent,
    make_arguments: MakeArguments,
    dataset: Dataset,
    *,
    trained_tower: bool = False,
    **changes: Any,
) -> tuple[GradientsKept, Calls, Calls]:
    """One step, with the calls in the first block of the vision tower and in the first layer."""
    model = make_student(disturbed=True, train_ret_token=False)
    backbone = puma_model(model)
    if trained_tower:
        backbone.visual.requires_grad_(True)
    calls = Calls(backbone.visual.blocks[0].mlp), Calls(backbone.language_model.layers[0].mlp)
    arguments = make_arguments(max_steps=1, **changes)
    trainer = GradientsKept(model=model, args=arguments, train_dataset=dataset, loss=MultimodalMACLoss(model))
    trainer.train()
    return trainer, *calls


def test_only_the_decoder_is_recomputed_and_gradients_stay(
    make_student: MakeStudent, make_arguments: MakeArguments, pictures: Dataset
) -> None:
    plain, vision, decoder = train(make_student, make_arguments, pictures)
    assert (vision.forward, vision.backward) == (1, 0)
    columns = decoder.forward
    ours, vision, decoder = train(make_student, make_arguments, pictures, gradient_checkpointing=True)
    assert (vision.forward, vision.backward) == (1, 0)
    assert decoder.forward == 2 * columns
    assert ours.gradients
    assert all(".lora_" in name for name in ours.gradients)
    assert any(gradient.abs().max() > 1e-3 for gradient in ours.gradients.values())
    torch.testing.assert_close(ours.gradients, plain.gradients, rtol=0, atol=1e-6)


def test_a_stock_trainer_walks_into_the_trap(
    make_student: MakeStudent, make_arguments: MakeArguments, pictures: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the others here guard against; once this fails, the work-around can go."""
    monkeypatch.setattr("puma_hf.trainer.puma.spare_frozen_vision", lambda model: None)
    _, vision, _ = train(make_student, make_arguments, pictures, gradient_checkpointing=True)
    assert vision.forward == 2
    assert vision.backward > 0


def test_a_trained_tower_stays_checkpointed(
    make_student: MakeStudent, make_arguments: MakeArguments, pictures: Dataset
) -> None:
    plain, _, _ = train(make_student, make_arguments, pictures, trained_tower=True)
    ours, vision, _ = train(make_student, make_arguments, pictures, trained_tower=True, gradient_checkpointing=True)
    assert vision.forward == 2
    assert any("visual" in name for name in ours.gradients)
    torch.testing.assert_close(ours.gradients, plain.gradients, rtol=0, atol=1e-5)


def test_reentrant_checkpointing_is_refused(
    make_student: MakeStudent, make_arguments: MakeArguments, pictures: Dataset
) -> None:
    arguments = make_arguments(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    model = make_student()
    with pytest.raises(ValueError, match=r"checkpointing_kwargs has use_reentrant=True, .* pass False\."):
        PumaTrainer(model=model, args=arguments, train_dataset=pictures, loss=MultimodalMACLoss(model))


def test_other_options_are_kept(make_arguments: MakeArguments) -> None:
    arguments: SentenceTransformerTrainingArguments = make_arguments()
    assert not set_non_reentrant(arguments)
    options = {"preserve_rng_state": False}
    arguments = make_arguments(gradient_checkpointing=True, gradient_checkpointing_kwargs=options)
    assert set_non_reentrant(arguments)
    name = "activation" if hasattr(arguments, "activation_checkpointing") else "gradient"
    kept = getattr(arguments, f"{name}_checkpointing_kwargs")
    assert kept == {"preserve_rng_state": False, "use_reentrant": False}


# --- counted at the true shapes of Qwen2-VL-7B, with a quarter of the tower's 32 layers and of 12 of the decoder

NUM_KEPT_LAYERS, DEPTH = 3, 8


def count(prepare: Callable[[PumaModel], None]) -> StepFlops:
    model = build_model(NUM_KEPT_LAYERS, depth=DEPTH).train()
    prepare(model)
    features = image_item(model)
    return count_step(lambda: model(**{key: features[key] for key in features if key != "modality_ids"})[1].sum())


def trap(model: PumaModel) -> None:
    """What sentence-transformers does: it enables checkpointing of the model and of each model inside."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing_enable"):
            module.gradient_checkpointing_enable()


def ours(model: PumaModel) -> None:
    trap(model)
    spare_frozen_vision(model)


def test_it_costs_less_than_the_trap_at_true_shapes() -> None:
    plain, trapped, spared = count(lambda model: None), count(trap), count(ours)
    vision_forward, vision_backward = plain.of("visual")
    assert vision_forward > 1e12 / 4
    assert vision_backward == 0
    assert spared.of("visual") == (vision_forward, 0)
    assert spared.forward == trapped.forward == plain.forward
    # Everything but the tower is run a second time in the backward pass.
    assert spared.backward > plain.backward
    assert trapped.of("visual")[1] > 1.5 * vision_forward  # once again forward, and backward to the first layer
    assert spared.total <= 0.72 * trapped.total


def test_layers_are_really_checkpointed() -> None:
    model = build_model(2, depth=2)
    ours(model)
    assert all(layer.gradient_checkpointing for layer in model.language_model.layers)
    blocks = [block for block in model.visual.blocks if isinstance(block, GradientCheckpointingLayer)]
    assert blocks
    assert not any(block.gradient_checkpointing for block in blocks)
