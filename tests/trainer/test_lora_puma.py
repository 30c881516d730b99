from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from puma_hf import MultimodalMACLoss, PumaModel, PumaTrainer, lora_config, prune
from puma_hf.trainer import merge_adapter
from puma_hf.trainer.lora_puma import (
    DECODER_LINEARS,
    PREFIX,
    add_lora,
    checkpoint_decoder,
    puma_model,
    quantization_config,
)
from tests.full_size import StepFlops, build_model, count_step, image_item
from tests.tiny import HIDDEN_SIZE, build_qwen2_vl
from tests.trainer.conftest import MakeArguments, MakeStudent

STOCK = getattr(PumaModel, f"{PREFIX}_checkpointing_enable")
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
RET_ROW = "language_model.embed_tokens.token_adapter.trainable_tokens_delta.default"


# --- the recipe


@pytest.mark.parametrize("train_ret_token", [False, True])
def test_only_decoder_linears_and_the_ret_row_are_trained(make_student: MakeStudent, train_ret_token: bool) -> None:
    backbone = puma_model(make_student(train_ret_token=train_ret_token))
    trained = {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    expected = {
        f"language_model.layers.{layer}.{linear}.lora_{side}.default.weight"
        for layer in range(2)
        for linear in LINEARS
        for side in "AB"
    }
    assert set(trained) == expected | ({RET_ROW} if train_ret_token else set())
    if train_ret_token:
        assert trained[RET_ROW].shape == (1, HIDDEN_SIZE)
    assert {type(module).__name__ for name, module in backbone.visual.named_modules() if "lora" in name} == set()


def test_adapter_of_a_bfloat16_model_is_float32(tmp_path: Path, make_student: MakeStudent) -> None:
    base = tmp_path / "base"
    prune(build_qwen2_vl(tmp_path / "original", dtype=torch.bfloat16), base, num_kept_layers=2)
    model = make_student(base, disturbed=True)
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    model.eval()
    before = model.encode(["a red apple"])
    model.save_pretrained(str(tmp_path / "adapter"))
    assert 0 < merge_adapter(tmp_path / "adapter", tmp_path / "merged") < 0.1
    merged = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu")
    assert merged.dtype == torch.bfloat16
    assert (before * merged.encode(["a red apple"])).sum() > 0.995


def test_second_adapter_and_other_models_are_refused(make_student: MakeStudent) -> None:
    model = make_student()
    with pytest.raises(ValueError, match=r"Adapter .* already exists"):
        add_lora(model, lora_config())
    other = SentenceTransformer(modules=[torch.nn.Identity()], device="cpu")
    with pytest.raises(ValueError, match=r"A Identity holds no model that puma-hf prune has cut"):
        add_lora(other, lora_config())


def test_what_is_quantised_is_what_has_an_adapter(puma_dir: Path) -> None:
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    config = quantization_config()
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    for name, module in PumaModel.from_pretrained(puma_dir).named_modules():
        if isinstance(module, torch.nn.Linear):
            converts = utils.should_convert_module(name, config.llm_int8_skip_modules)
            assert converts is bool(re.fullmatch(DECODER_LINEARS, name)), name


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
    # With the other kind of checkpointing no gradient would reach the adapter: it is never taken.
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    ours, vision, decoder = train(make_student, make_arguments, pictures, **reentrant)
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
    monkeypatch.setattr("puma_hf.trainer.trainer_puma.checkpoint_decoder", STOCK)
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


# --- counted at the true shapes of Qwen2-VL-7B, with a quarter of the tower's 32 layers and of 12 of the decoder

NUM_KEPT_LAYERS, DEPTH = 3, 8


def count(prepare: Callable[[PumaModel], None]) -> StepFlops:
    model = build_model(NUM_KEPT_LAYERS, depth=DEPTH).train()
    prepare(model)
    features = image_item(model)
    return count_step(lambda: model(**{key: features[key] for key in features if key != "modality_ids"})[1].sum())


def test_it_costs_less_than_the_trap_at_true_shapes() -> None:
    plain, trapped, spared = (
        count(lambda model: None),
        count(PumaModel.activation_checkpointing_enable),
        count(checkpoint_decoder),
    )
    vision_forward, vision_backward = plain.of("visual")
    assert vision_forward > 1e12 / 4
    assert vision_backward == 0
    assert spared.of("visual") == (vision_forward, 0)
    assert spared.forward == trapped.forward == plain.forward
    # Everything but the tower is run a second time in the backward pass.
    assert spared.backward > plain.backward
    assert trapped.of("visual")[1] > 1.5 * vision_forward  # once again forward, and backward to the first layer
    assert spared.total <= 0.72 * trapped.total
