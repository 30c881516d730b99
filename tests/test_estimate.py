"""What a recipe takes, against counts on real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from puma_hf import PumaConfig, PumaModel, lora_config
from puma_hf.estimate import estimate
from puma_hf.modeling.configuration_puma import config_class_of
from puma_hf.modeling.modeling_puma import MODEL_CLASSES
from tests.tiny import FAMILIES, build_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "num_hidden_layers": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {"depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": 128}
BATCH, TOKENS, RANK = 4, 48, 8


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration of a model of which 4 of 6 layers are kept."""
    folder = tmp_path_factory.mktemp("shape")
    config = PumaConfig(text_config=TEXT, vision_config=VISION, num_kept_layers=4, image_token_id=60)
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def write(**values: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        values = {"model": "puma", "output": "out", "data": "pairs.csv", "batch_size": BATCH, **values}
        values = {"lora_r": RANK, "max_length": TOKENS, "bf16": "true", "max_steps": 10, **values}
        path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
        return path

    return write


def trained(shape: Path, checkpointing: bool = False) -> Any:
    torch.manual_seed(0)
    model: Any = PumaModel(PumaConfig.from_pretrained(shape)).bfloat16().requires_grad_(False)
    model.add_adapter(lora_config(r=RANK, dropout=0.05))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    return model.train()


def forward(model: Any) -> torch.Tensor:
    ids, mask = torch.full((BATCH, TOKENS), 5), torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[0, -1] = 0
    with torch.autocast("cpu", torch.bfloat16):
        embeddings: torch.Tensor = model(input_ids=ids, attention_mask=mask).embeddings
    return embeddings


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(shape: Path, recipe: Any, checkpointing: bool) -> None:
    """One column of texts; the tower does not run. The first layer needs no gradient of its input."""
    model = trained(shape, checkpointing)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(model).sum().backward()
    path = recipe(teacher_mode="cached", metric="mse", gradient_checkpointing=str(checkpointing).lower())
    assert estimate(path, model=shape, images=0).flops_step == pytest.approx(counter.get_total_flops(), rel=0.08)


def test_a_frozen_teacher_adds_a_forward_pass_of_all_layers(shape: Path, recipe: Any) -> None:
    full = PumaModel(PumaConfig(text_config=TEXT, vision_config=VISION, image_token_id=60))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        full(input_ids=torch.full((BATCH, TOKENS), 5))
    frozen, cached = (estimate(recipe(teacher_mode=mode), model=shape, images=0) for mode in ("frozen", "cached"))
    assert frozen.flops_step - cached.flops_step == pytest.approx(counter.get_total_flops(), rel=0.02)
    layer = sum(parameter.numel() for parameter in full.language_model.layers[0].parameters())
    assert frozen.peak - cached.peak == 2 * 2 * layer  # two dropped layers in bfloat16


def test_the_vision_tower_runs_once_an_image(shape: Path, recipe: Any) -> None:
    config = PumaConfig.from_pretrained(shape)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        PumaModel(config).get_image_features(torch.zeros(64, 1176), torch.tensor([[1, 8, 8]]))
    path = recipe(max_pixels=64 * 196, max_length=512, loss="mac")
    without, one = (estimate(path, model=shape, images=number) for number in (0, 1))
    assert one.flops_step - without.flops_step == pytest.approx(BATCH * counter.get_total_flops(), rel=0.02)


def test_activations_are_those_that_autograd_keeps(shape: Path, recipe: Any) -> None:
    """On a CPU, where a dropout mask takes four bytes; without the moment that a layer needs besides."""
    model = trained(shape)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (where := tensor.untyped_storage().data_ptr()) not in own:
            kept[where] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(model)
    path = recipe(teacher_mode="cached", train_ret_token="false")
    found = estimate(path, model=shape, images=0, device="cpu")
    moment = BATCH * TOKENS * 12 * TEXT["intermediate_size"]  # type: ignore[operator]
    copies = 2 * found.trainable  # the adapter in bfloat16 has a line of its own
    assert found.memory["activations"] - moment == pytest.approx(sum(kept.values()) - copies, rel=0.1)


def test_gradient_caching_holds_one_mini_batch(shape: Path, recipe: Any) -> None:
    whole = estimate(recipe(loss="mac"), model=shape, images=0)
    cached = estimate(recipe(loss="mac", mini_batch_size=1), model=shape, images=0)
    by_tokens = estimate(recipe(loss="mac", mini_batch_num_tokens=TOKENS), model=shape, images=0)
    assert cached.memory["activations"] < whole.memory["activations"] / 4
    assert by_tokens == cached
    assert cached.flops_step > whole.flops_step  # every row is embedded twice


@pytest.mark.parametrize(("kept", "billions"), [(8, 3.09), (28, 7.75)])
def test_parameters_of_7b_are_those_counted_on_the_meta_device(recipe: Any, kept: int, billions: float) -> None:
    found = estimate(recipe(), model="Qwen/Qwen2-VL-7B-Instruct", num_kept_layers=kept)
    assert found.parameters == pytest.approx(billions * 1e9, abs=5e6)
    assert found.memory["weights"] == 2 * found.parameters


def test_adapter_and_optimiser_by_hand(shape: Path, recipe: Any) -> None:
    found = estimate(recipe(teacher_mode="cached", train_ret_token="false"), model=shape, images=0)
    layer = RANK * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 512))
    assert found.trainable == 4 * layer
    assert found.memory["AdamW's two moments"] == 8 * 4 * layer
    assert sum(p.numel() for p in trained(shape).parameters() if p.requires_grad) == found.trainable


@pytest.mark.parametrize("family", list(FAMILIES)[1:])
def test_other_families_are_counted_with_their_own_classes(family: str, recipe: Any, tmp_path: Path) -> None:
    source = build_checkpoint(tmp_path / "source", family)
    model = MODEL_CLASSES[config_class_of(family)].from_pretrained(source, num_kept_layers=4)
    found = estimate(recipe(train_ret_token="false"), model=source)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    model.add_adapter(lora_config(r=RANK))
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "may keep more" in found.to_markdown()


def test_steps_and_hours(recipe: Any) -> None:
    path = recipe(loss="mac", data="M-BEIR", max_steps=-1, num_train_epochs=2, model="puma-2b-k12")
    one, four = (estimate(path, num_gpus=number) for number in (1, 4))
    assert one.flops_run == one.flops_step * 666_395  # 1,332,790 rows, twice, four at a time
    hours = one.hours("H100")
    assert hours == pytest.approx(one.flops_run / (989e12 * 0.35) / 3600)
    assert four.hours("H100") == pytest.approx(hours / 4, rel=1e-4)
    unknown = estimate(recipe(loss="mac", data="mine.csv", max_steps=-1, model="puma-2b-k12"))
    assert unknown.hours("H100") is None
    for given in ({"num_kept_layers": 0}, {"tokens": 0}):  # not taken for "not given"
        with pytest.raises(ValueError, match="=0 must be at least 1"):
            estimate(path, **given)


def test_what_we_would_run_fits_24_gb_and_what_was_released_the_gpus_it_was_run_on() -> None:
    assert all(estimate(path).fits("RTX 4090") for path in CONFIGS.glob("qwen2*_ours.yaml"))
    released = [estimate(CONFIGS / f"qwen2_vl_7b_stage{stage}.yaml", num_gpus=4) for stage in (1, 2)]
    assert [found.fits("A100 80GB") for found in released] == [True, True]
    assert [found.fits("RTX 4090") for found in released] == [True, False]
