from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers.models.qwen3_vl.modeling_qwen3_vl
from peft import LoraConfig, get_peft_model
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from puma_hf import lora_config, prune
from puma_hf.modeling.fast_path_puma import FastPath, can_pack, fast_vision, packed_states
from puma_hf.modeling.modeling_puma import MODEL_CLASSES
from puma_hf.modeling.packing_puma import PackedBatch
from puma_hf.modeling.sentence_transformers_puma import PumaTransformer
from tests.modeling.mixed_inputs import COMBINATIONS, NAMES, batches_of, embed, features_of, mixed_inputs
from tests.tiny import build_checkpoint

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# The limit, of which a picture takes at most 36.
MAX_LENGTH = 208
ALL_OFF = FastPath(*[False] * len(NAMES))
# Without packing two switches mean nothing.
WITHOUT_REPEATS = [switches for switches in COMBINATIONS if switches[0] or not any(switches[1:3])]


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


def prepared(module: Any, inputs: list[Any], side: str, **options: Any) -> list[dict[str, Any]]:
    side_of_merged_patch = module.processor.image_processor.patch_size * 2
    size = {"shortest_edge": side_of_merged_patch**2, "longest_edge": (6 * side_of_merged_patch) ** 2}
    limits = {"max_length": MAX_LENGTH, "processing_kwargs": {"image": {"size": size}}}
    return features_of(module, batches_of(inputs, **options), side, **limits)


def largest_difference(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


# --- the same vectors


@pytest.fixture(scope="module")
def two_hundred(modules: dict[str, PumaTransformer]) -> dict[str, list[dict[str, Any]]]:
    inputs = mixed_inputs(200)
    return {side: prepared(modules["qwen2_vl"], inputs, side) for side in ("left", "right")}


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_switch_alone_and_together_gives_the_same_vectors(
    modules: dict[str, PumaTransformer], two_hundred: dict[str, list[dict[str, Any]]], side: str
) -> None:
    module, batches = modules["qwen2_vl"], two_hundred[side]
    lengths = torch.cat([features["attention_mask"].sum(dim=1) for features in batches])
    assert len(lengths) == 200
    assert lengths.max() in range(MAX_LENGTH - 5, MAX_LENGTH + 1)
    plain = embed(module, batches, None)
    # They differ, so the comparison says something.
    assert (plain @ plain.T).median() < 0.97
    for switches in COMBINATIONS if side == "right" else WITHOUT_REPEATS:
        assert largest_difference(embed(module, batches, FastPath(*switches)), plain) <= 1e-5, switches


def test_every_switch_gives_the_same_vectors_in_bfloat16(
    modules: dict[str, PumaTransformer], two_hundred: dict[str, list[dict[str, Any]]]
) -> None:
    module, batches = modules["qwen2_vl"], two_hundred["left"]
    module.model.to(torch.bfloat16)
    try:
        plain = embed(module, batches, None)
        # Two of the switches mean nothing without packing.
        for names in ((), NAMES, *[("packing", name) if name in NAMES[1:3] else (name,) for name in NAMES]):
            path = replace(ALL_OFF, **dict.fromkeys(names, True))
            vectors = embed(module, batches, path)
            assert vectors.dtype == torch.float32
            assert (vectors * plain).sum(dim=1).min() >= 0.9995, path
    finally:
        module.model.float()


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_other_backbones_give_the_same_vectors(modules: dict[str, PumaTransformer], family: str) -> None:
    module, inputs = modules[family], mixed_inputs(24, seed=1)
    for side, combinations in (("left", COMBINATIONS), ("right", WITHOUT_REPEATS[-5:])):
        batches = prepared(module, inputs, side, sizes=(1, 23))
        plain = embed(module, batches, None)
        assert (plain @ plain.T).median() < 0.97
        for switches in combinations:
            assert largest_difference(embed(module, batches, FastPath(*switches)), plain) <= 1e-5, (side, switches)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_is_attached_counts(family: str, tmp_path: Path) -> None:
    module = made_of(tmp_path, family, 2)
    batches = prepared(module, mixed_inputs(12, seed=2), "right", sizes=(12,))
    without = embed(module, batches, FastPath())
    module.model.add_adapter(lora_config(r=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    module.eval()
    plain = embed(module, batches, None)
    assert largest_difference(plain, without) > 1e-2
    assert largest_difference(embed(module, batches, FastPath()), plain) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_one_kept_layer(family: str, tmp_path: Path) -> None:
    module = made_of(tmp_path, family, 1)
    batches = prepared(module, mixed_inputs(12, seed=3), "left", sizes=(12,))
    plain = embed(module, batches, None)
    for switches in ((True,) * 5, (True, True, False, True, True)):
        assert largest_difference(embed(module, batches, FastPath(*switches)), plain) <= 1e-5


def test_autocast_as_in_the_plain_forward_pass(modules: dict[str, PumaTransformer]) -> None:
    module = modules["qwen2_vl"]
    batches = prepared(module, mixed_inputs(12, seed=5), "left", sizes=(12,))
    exact = embed(module, batches, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, fast = embed(module, batches, None), embed(module, batches, FastPath())
    assert largest_difference(plain, exact) > 1e-5  # it is on
    assert (plain * fast).sum(dim=1).min() >= 0.9995


# --- which switch does what


def calls_of(modules_to_watch: dict[str, nn.Module], run: Callable[[], Any]) -> dict[str, list[int]]:
    """For each module, the number of tokens of each call."""
    seen: dict[str, list[int]] = {name: [] for name in modules_to_watch}
    hooks = [
        watched.register_forward_hook(
            lambda _, args, output, name=name: seen[name].append(output.numel() // output.shape[-1])
        )
        for name, watched in modules_to_watch.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def test_each_switch_saves_what_it_says(modules: dict[str, PumaTransformer], monkeypatch: pytest.MonkeyPatch) -> None:
    module = modules["qwen2_vl"]
    (features,) = prepared(module, mixed_inputs(16, seed=6), "left", sizes=(16,))
    first, last = module.model.language_model.layers[0], module.model.language_model.layers[-1]
    watched = {
        "first": first.mlp.down_proj,
        "keys": last.self_attn.k_proj,
        "queries": last.self_attn.q_proj,
        "last": last.mlp.down_proj,
    }
    # Not watched by a hook, for the sake of which it would be called.
    convolved: list[int] = []
    convolve = nn.Conv3d.forward

    def counted(self: nn.Conv3d, patches: Tensor) -> Tensor:
        convolved.append(len(patches))
        return convolve(self, patches)

    monkeypatch.setattr(nn.Conv3d, "forward", counted)
    num_tokens, padded = int(features["attention_mask"].sum()), features["input_ids"].numel()
    shared = padded - num_tokens
    assert shared > 0
    patches = len(features["pixel_values"])
    seen = {}
    for switches in COMBINATIONS:
        convolved.clear()
        calls = calls_of(watched, lambda s=switches: embed(module, [features], FastPath(*s)))
        seen[switches] = {name: sum(counts) for name, counts in calls.items()} | {"convolution": sum(convolved)}
    fewer = seen[(True, True, False, False, False)]["first"]
    assert fewer < num_tokens
    for (packing, prefix, last_only, _, linear), counts in seen.items():
        tokens = padded if not packing else fewer if prefix else num_tokens
        wanted = 16 if packing and last_only else tokens
        assert counts == {
            "first": tokens,
            "keys": tokens,
            "queries": wanted,
            "last": wanted,
            "convolution": 0 if linear else patches,
        }
        assert linear or counts["convolution"] >= patches


def test_vision_attention_is_batched(modules: dict[str, PumaTransformer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight pictures of one size take one call in each block that sees whole pictures."""
    calls: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0].shape[0])
        return original(*args, **kwargs)

    monkeypatch.setattr("puma_hf.modeling.attention_puma.scaled_dot_product_attention", counted)
    module = modules["qwen2_vl"]
    picture = next(item for item in mixed_inputs(50) if hasattr(item, "size"))
    (features,) = prepared(module, [picture] * 8, "left", sizes=(8,))
    embed(module, [features], replace(ALL_OFF, batched_vision=True))
    assert calls == [8, 8]


# --- what it leaves behind


def state_of(visual: Any) -> tuple[str, bool]:
    return visual.config._attn_implementation, "forward" in vars(visual.patch_embed)


@pytest.mark.parametrize("switches", [(True, True), (True, False), (False, True), (False, False)])
def test_the_vision_tower_is_as_before(modules: dict[str, PumaTransformer], switches: tuple[bool, bool]) -> None:
    visual: Any = modules["qwen2_vl"].model.visual
    before, path = state_of(visual), FastPath(batched_vision=switches[0], linear_patch_embedding=switches[1])
    assert before == ("sdpa", False)
    with fast_vision(visual, path):
        assert state_of(visual) == ("puma_flash_blocks" if switches[0] else "sdpa", switches[1])
        with fast_vision(visual, path):
            pass
    assert state_of(visual) == before
    with pytest.raises(RuntimeError, match="inside"), fast_vision(visual, path):
        raise RuntimeError("inside")
    assert state_of(visual) == before


@pytest.mark.parametrize("hook", ["pre hook", "hook", "device hook", "forward"])
def test_a_projection_that_must_be_called_is_called(tmp_path: Path, hook: str) -> None:
    """ZeRO-3 gathers its weights, and offloading brings them, when it is."""
    module: Any = made_of(tmp_path, "qwen2_vl", 1)
    projection = module.model.visual.patch_embed.proj
    if hook == "pre hook":
        projection.register_forward_pre_hook(lambda *_: None)
    elif hook == "hook":
        projection.register_forward_hook(lambda *_: None)
    elif hook == "forward":
        projection.forward = projection.forward
    else:
        projection._hf_hook = object()
    with fast_vision(module.model.visual, FastPath()):
        assert state_of(module.model.visual) == ("puma_flash_blocks", False)


# --- models it cannot pack


@pytest.mark.parametrize("name", ["", "language_model", "language_model.layers.1", "language_model.layers.0.self_attn"])
@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_hook_sees_every_call(tmp_path: Path, kind: str, name: str) -> None:
    """FSDP puts a layer's weights together in one; the fast path would not call the layer."""
    module: Any = made_of(tmp_path, "qwen2_vl", 2)
    batches = prepared(module, ["a red apple", "a"], "right", sizes=(2,))
    calls: list[int] = []
    handle = getattr(module.model.get_submodule(name), kind)(lambda *_: calls.append(1))
    assert not can_pack(module.model)
    assert largest_difference(embed(module, batches, FastPath()), embed(module, batches, None)) <= 1e-5
    assert len(calls) == 2
    handle.remove()
    assert can_pack(module.model)


@pytest.mark.parametrize("name", ["", "language_model", "language_model.layers.1", "language_model.layers.0.self_attn"])
def test_another_forward_is_called(tmp_path: Path, name: str) -> None:
    """accelerate's offloading, among others, puts one in the place of a module's own."""
    module: Any = made_of(tmp_path, "qwen2_vl", 2)
    batches = prepared(module, ["a red apple", "a"], "right", sizes=(2,))
    part = module.model.get_submodule(name)
    calls, forward = [], part.forward

    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    part.forward = counted
    assert not can_pack(module.model)
    assert largest_difference(embed(module, batches, FastPath()), embed(module, batches, None)) <= 1e-5
    assert len(calls) == 2


def test_a_model_that_peft_wraps_embeds_as_the_wrapper_does(tmp_path: Path) -> None:
    module: Any = made_of(tmp_path, "qwen2_vl", 2)
    batches = prepared(module, ["a red apple", "a"], "right", sizes=(2,))
    before = embed(module, batches, FastPath())
    adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    module.model = get_peft_model(module.model, adapter)
    module.eval()
    assert not can_pack(module.model)
    vectors = embed(module, batches, FastPath())
    assert largest_difference(vectors, before) > 1e-3
    assert largest_difference(vectors, embed(module, batches, None)) <= 1e-5


def test_a_compiled_model_is_called(tmp_path: Path) -> None:
    module: Any = made_of(tmp_path, "qwen2_vl", 2)
    batches = prepared(module, ["a red apple", "a"], "right", sizes=(2,))
    before = embed(module, batches, FastPath())
    graphs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    module.model = torch.compile(module.model, backend=backend)
    first = embed(module, batches, FastPath())
    compiled = len(graphs)
    assert compiled
    assert largest_difference(first, before) <= 1e-5
    embed(module, batches, FastPath())
    assert len(graphs) == compiled


def test_a_sentence_transformer_that_is_compiled_embeds_as_before(tmp_path: Path) -> None:
    model = SentenceTransformer(modules=[made_of(tmp_path, "qwen2_vl", 2)])
    inputs = ["a red apple", "a", {"image": Image.new("RGB", (48, 32), "red"), "text": "a cat"}, "a table"]
    before = model.encode(inputs, prompt="Find it.")
    model.compile(backend="eager", dynamic=True)
    assert model.encode(inputs, prompt="Find it.") == pytest.approx(before, abs=1e-5)
    assert model.encode(inputs[::-1], batch_size=3, prompt="Find it.") == pytest.approx(before[::-1], abs=1e-5)


def test_a_model_under_fsdp_embeds_as_before(tmp_path: Path) -> None:
    module: Any = made_of(tmp_path, "qwen2_vl", 2)
    batches = prepared(module, mixed_inputs(12, seed=2), "right", sizes=(12,))
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
    (features,) = prepared(module, ["a red apple", "a"], "right", sizes=(2,))
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
    assert can_pack(module.model) is expected
    assert module.packer().packing is expected


# --- no wait for the device


@pytest.mark.parametrize("switches", [(True,) * 5, (True, False, False, True, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_read_back_from_the_device(
    modules: dict[str, PumaTransformer], family: str, switches: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on the meta device have no values: whoever asks for one, as a host would, fails."""
    module: Any = modules[family]
    (features,) = prepared(module, mixed_inputs(24, seed=7), "left", sizes=(24,))
    module.fast_path = FastPath(*switches, max_tokens=10**6)
    (part,) = module.packer().pack(features).parts
    module.fast_path = FastPath()
    assert part.images is not None
    model_class = MODEL_CLASSES[type(module.model.config)]
    with torch.device("meta"):
        model = model_class(module.model.config)
    # Once a batch, before its blocks, Qwen3-VL's tower works out indices from the grid, which it reads.
    source = transformers.models.qwen3_vl.modeling_qwen3_vl
    name = "get_vision_interpolation_indices_and_weights"
    work_out = getattr(source, name)
    monkeypatch.setattr(source, name, lambda *args, **kwargs: [made.to("meta") for made in work_out(*args, **kwargs)])
    (meta,) = PackedBatch((part,)).to("meta").parts
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        meta.last_index.tolist()
    with torch.inference_mode():
        states = packed_states(model, meta, FastPath(*switches))
    assert states.shape == (24, 32)
