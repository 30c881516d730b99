"""The fast path gives the vectors of the plain forward pass, saves what it says, and leaves alone what it must."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers.models.qwen3_vl.modeling_qwen3_vl
from peft import LoraConfig, get_peft_model
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from puma_hf import lora_config, prune
from puma_hf.modeling.fast_path_puma import FastPath, can_pack, fast_vision, packed_states
from puma_hf.modeling.modeling_puma import MODEL_CLASSES
from puma_hf.modeling.packing_puma import PackedBatch
from puma_hf.modeling.sentence_transformers_puma import PumaTransformer
from tests.modeling.mixed_inputs import embed, features_of, mixed_inputs
from tests.tiny import build_checkpoint

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# The limit, of which a picture takes at most 36.
MAX_LENGTH = 208
PATHS = (FastPath(), FastPath(max_tokens=10**6), FastPath(max_tokens=150), FastPath(max_tokens=1))


def made_of(folder: Path, family: str, num_kept_layers: int, **options: Any) -> PumaTransformer:
    build_checkpoint(folder / "original", family)
    prune(folder / "original", folder / "pruned", num_kept_layers=num_kept_layers)
    return PumaTransformer(str(folder / "pruned"), **options).eval()


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PumaTransformer]:
    """A model of each family; of Qwen3-VL one layer more than DeepStack adds to. Leave them as they are."""
    return {
        family: made_of(tmp_path_factory.mktemp(family), family, 4 if family == "qwen3_vl" else 2)
        for family in FAMILIES
    }


def prepared(module: Any, inputs: list[Any], side: str = "left", sizes: tuple[int, ...] = (12,)) -> list[Any]:
    side_of_merged_patch = module.processor.image_processor.patch_size * 2
    size = {"shortest_edge": side_of_merged_patch**2, "longest_edge": (6 * side_of_merged_patch) ** 2}
    limits = {"max_length": MAX_LENGTH, "processing_kwargs": {"image": {"size": size}}}
    return features_of(module, inputs, side, sizes, **limits)


def largest_difference(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


def check_same(module: Any, batches: list[Any]) -> Tensor:
    """The vectors of the plain forward pass, which are also those of the fast path."""
    plain = embed(module, batches, None)
    assert largest_difference(embed(module, batches, FastPath()), plain) <= 1e-5
    return plain


# --- the same vectors


@pytest.mark.parametrize("side", ["left", "right"])
def test_two_hundred_inputs_of_every_kind(modules: dict[str, PumaTransformer], side: str) -> None:
    module: Any = modules["qwen2_vl"]
    batches = prepared(module, mixed_inputs(200), side, (1, 2, 7, 64, 30, 3, 48, 16))
    lengths = torch.cat([features["attention_mask"].sum(dim=1) for features in batches])
    assert lengths.max() in range(MAX_LENGTH - 5, MAX_LENGTH + 1)
    plain = embed(module, batches, None)
    assert (plain @ plain.T).median() < 0.97  # they differ, so the comparison says something
    for path in PATHS:
        assert largest_difference(embed(module, batches, path), plain) <= 1e-5, path
    module.model.to(torch.bfloat16)
    try:
        plain, fast = embed(module, batches, None), embed(module, batches, FastPath())
    finally:
        module.model.float()
    assert fast.dtype == torch.float32
    assert (fast * plain).sum(dim=1).min() >= 0.9995


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_other_backbones(modules: dict[str, PumaTransformer], family: str) -> None:
    module = modules[family]
    for side in ("left", "right"):
        batches = prepared(module, mixed_inputs(24, seed=1), side, (1, 23))
        plain = check_same(module, batches)
        assert (plain @ plain.T).median() < 0.97
        assert largest_difference(embed(module, batches, PATHS[-1]), plain) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_is_attached_counts(family: str, tmp_path: Path) -> None:
    """On a model of one kept layer, which is the first and the last."""
    module = made_of(tmp_path, family, 1)
    batches = prepared(module, mixed_inputs(12, seed=2), "right")
    without = check_same(module, batches)
    module.model.add_adapter(lora_config(r=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    module.eval()
    assert largest_difference(check_same(module, batches), without) > 1e-2


def test_eager_attention_and_autocast(tmp_path: Path) -> None:
    module = made_of(tmp_path, "qwen2_vl", 2, model_kwargs={"attn_implementation": "eager"})
    batches = prepared(module, mixed_inputs(12, seed=4))
    exact = check_same(module, batches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, fast = embed(module, batches, None), embed(module, batches, FastPath())
    assert largest_difference(plain, exact) > 1e-5  # it is on
    assert (plain * fast).sum(dim=1).min() >= 0.9995


# --- what it leaves behind, and alone


def state_of(visual: Any) -> tuple[str, bool]:
    return visual.config._attn_implementation, "forward" in vars(visual.patch_embed)


def test_the_vision_tower_is_as_before(modules: dict[str, PumaTransformer]) -> None:
    visual: Any = modules["qwen2_vl"].model.visual
    before = state_of(visual)
    assert before == ("sdpa", False)
    with fast_vision(visual):
        assert state_of(visual) == ("puma_flash_blocks", True)
        with fast_vision(visual):
            pass
        assert state_of(visual) == ("puma_flash_blocks", True)
    assert state_of(visual) == before
    with pytest.raises(RuntimeError, match="inside"), fast_vision(visual):
        raise RuntimeError("inside")
    assert state_of(visual) == before


def put_forward(part: Any, count: Callable[..., None]) -> None:
    """accelerate's offloading, among others, puts one in the place of a module's own."""
    forward = part.forward
    part.forward = functools.wraps(forward)(lambda *args, **kwargs: (count(), forward(*args, **kwargs))[1])


WATCHES: dict[str, Callable[[Any, Callable[..., None]], Any]] = {
    "pre hook": lambda part, count: part.register_forward_pre_hook(count),
    "hook": lambda part, count: part.register_forward_hook(count),
    "forward": put_forward,
}


@pytest.mark.parametrize("watch", WATCHES)
def test_a_projection_that_must_be_called_is_called(tmp_path: Path, watch: str) -> None:
    """ZeRO-3 gathers its weights, and offloading brings them, when it is."""
    visual: Any = made_of(tmp_path, "qwen2_vl", 1).model.visual
    WATCHES[watch](visual.patch_embed.proj, lambda *_: None)
    with fast_vision(visual):
        assert state_of(visual) == ("puma_flash_blocks", False)


@pytest.mark.parametrize("name", ["", "language_model.layers.1", "language_model.layers.0.self_attn"])
@pytest.mark.parametrize("watch", WATCHES)
def test_who_watches_sees_every_call(tmp_path: Path, watch: str, name: str) -> None:
    """FSDP puts a layer's weights together in a hook; the fast path would not call the layer."""
    module: Any = made_of(tmp_path, "qwen2_vl", 2)
    batches = prepared(module, ["a red apple", "a"])
    calls: list[int] = []
    WATCHES[watch](module.model.get_submodule(name), lambda *_: calls.append(1))
    assert not can_pack(module.model)
    check_same(module, batches)
    assert len(calls) == 2


def test_a_model_that_peft_wraps_embeds_as_the_wrapper_does(tmp_path: Path) -> None:
    module: Any = made_of(tmp_path, "qwen2_vl", 2)
    batches = prepared(module, ["a red apple", "a"])
    before = embed(module, batches, FastPath())
    adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    module.model = get_peft_model(module.model, adapter)
    module.eval()
    assert not can_pack(module.model)
    assert largest_difference(check_same(module, batches), before) > 1e-3


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_embeds_as_before(tmp_path: Path, whole: bool) -> None:
    model = SentenceTransformer(modules=[made_of(tmp_path, "qwen2_vl", 2)])
    inputs = ["a red apple", "a", {"image": Image.new("RGB", (48, 32), "red"), "text": "a cat"}, "a table"]
    before = model.encode(inputs, prompt="Find it.")
    graphs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    module: Any = model[0]
    if whole:
        model.compile(backend="eager", dynamic=True)
    else:
        module.model = torch.compile(module.model, backend=backend)
    assert model.encode(inputs, prompt="Find it.") == pytest.approx(before, abs=1e-5)
    assert bool(graphs) is not whole
    assert model.encode(inputs[::-1], batch_size=3, prompt="Find it.") == pytest.approx(before[::-1], abs=1e-5)


def test_a_model_under_fsdp_embeds_as_before(tmp_path: Path) -> None:
    module: Any = made_of(tmp_path, "qwen2_vl", 2)
    batches = prepared(module, mixed_inputs(12, seed=2))
    plain = embed(module, batches, None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for part in (*module.model.language_model.layers, module.model):
            fully_shard(part, mesh=mesh)
        assert not can_pack(module.model)
        with torch.no_grad():
            vectors = module(dict(batches[0]))["sentence_embedding"]
    finally:
        dist.destroy_process_group()
    assert largest_difference(vectors, plain) <= 1e-5


def test_hidden_states_that_were_once_asked_for_do_not_matter(tmp_path: Path) -> None:
    """transformers leaves its hooks in place."""
    module: Any = made_of(tmp_path, "qwen2_vl", 2)
    (features,) = prepared(module, ["a red apple", "a"])
    with torch.inference_mode():
        module.model(features["input_ids"], features["attention_mask"], output_hidden_states=True)
    assert module.model.language_model.layers[0]._forward_hooks
    assert can_pack(module.model)


@pytest.mark.parametrize(
    ("sliding_window", "devices", "expected"),
    [(None, None, True), (128, None, False), (None, [0, 0], True), (None, ["", 0], False), (None, [0, 1], False)],
)
def test_sliding_windows_and_several_devices_go_the_plain_way(
    tmp_path: Path, sliding_window: int | None, devices: list[Any] | None, expected: bool
) -> None:
    module: Any = made_of(tmp_path, "qwen2_vl", 2)
    module.model.language_model.layers[1].self_attn.sliding_window = sliding_window
    if devices:
        module.model.hf_device_map = dict(zip(("visual", "language_model"), devices, strict=True))
    assert can_pack(module.model) is (module.packer().layout is not None) is expected


# --- no wait for the device


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_read_back_from_the_device(
    modules: dict[str, PumaTransformer], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on the meta device have no values: whoever asks for one, as a host would, fails."""
    module: Any = modules[family]
    (features,) = prepared(module, mixed_inputs(24, seed=7), sizes=(24,))
    monkeypatch.setattr(module, "fast_path", FastPath(max_tokens=10**6))
    batch: PackedBatch = module.packer().pack(features)
    model_class = MODEL_CLASSES[type(module.model.config)]
    with torch.device("meta"):
        model = model_class(module.model.config)
    # Once a batch, before its blocks, Qwen3-VL's tower works out indices from the grid, which it reads.
    source = transformers.models.qwen3_vl.modeling_qwen3_vl
    name = "get_vision_interpolation_indices_and_weights"
    work_out = getattr(source, name)
    monkeypatch.setattr(source, name, lambda *args, **kwargs: [made.to("meta") for made in work_out(*args, **kwargs)])
    (part,) = batch.to("meta").parts
    assert part.images is not None
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        part.last_index.tolist()
    with torch.inference_mode():
        assert packed_states(model, part).shape == (24, 32)
