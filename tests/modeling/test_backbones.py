"""Every backbone, from an original checkpoint to its embeddings; what Qwen2-VL's own tests do not see."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor

from puma_hf import PumaConfig, PumaModel, PumaProcessor, prune
from puma_hf.modeling import (
    PumaImageTextProcessor,
    PumaQwen3VLConfig,
    PumaQwen3VLModel,
    PumaQwen25VLConfig,
    PumaQwen25VLModel,
    PumaQwen35Config,
    PumaQwen35Model,
)
from puma_hf.modeling.configuration_puma import PumaConfigMixin, config_class_of
from tests.tiny import FAMILIES, LAYOUTS, NUM_LAYERS, build_checkpoint, copy_checkpoint, layer_of, read_weights

CLASSES: dict[str, tuple[Any, Any, Any]] = {
    "qwen2_vl": (PumaConfig, PumaModel, PumaProcessor),
    "qwen2_5_vl": (PumaQwen25VLConfig, PumaQwen25VLModel, PumaImageTextProcessor),
    "qwen3_vl": (PumaQwen3VLConfig, PumaQwen3VLModel, PumaImageTextProcessor),
    "qwen3_5": (PumaQwen35Config, PumaQwen35Model, PumaImageTextProcessor),
}
NEW = ["qwen2_5_vl", "qwen3_vl", "qwen3_5"]
NAMES = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def source(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp(family) / f"tiny-{family}", family)


@pytest.fixture(scope="module")
def pruned(source: Path) -> Path:
    prune(source, source.parent / "pruned", num_kept_layers=2)
    return source.parent / "pruned"


@pytest.fixture(scope="module")
def full_model(family: str, source: Path) -> Any:
    """The original with all layers, as transformers itself loads it."""
    return FAMILIES[family][1].from_pretrained(source).eval()


@pytest.fixture(scope="module")
def batches(pruned: Path, images: list[Image.Image]) -> list[dict[str, Tensor]]:
    """Texts, images, both, and all of them mixed, the last with either padding; also images of many tokens."""
    large = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    texts: list[Any] = ["a red apple", {"text": "a table", "instruction": "Find it."}]
    alone: list[Any] = [images[0], large]
    both: list[Any] = [{"image": images[1:], "text": "two"}, {"image": large, "text": "one", "instruction": "Find."}]
    processor = AutoProcessor.from_pretrained(pruned)
    made = [processor.process_inputs(inputs) for inputs in (texts, alone, both, [*both, *texts, *alone])]
    processor.tokenizer.padding_side = "left"
    made.append(processor.process_inputs([*both, *texts, *alone]))
    return [{name: batch[name] for name in NAMES if name in batch} for batch in made]


def last_positions(batch: dict[str, Tensor]) -> list[int]:
    return [int(row.nonzero().max()) for row in batch["attention_mask"]]


def at_ret(states: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return torch.stack([states[row, position] for row, position in enumerate(last_positions(batch))])


@torch.inference_mode()
def stock_states(full_model: Any, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each k, what the final norm makes of h_k: as transformers records it, and as the next layer gets it."""
    decoder, inputs = full_model.model.language_model, []
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in decoder.layers]
    hidden = full_model(**batch, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    recorded = [*(decoder.norm(state) for state in hidden[1:-1]), hidden[-1]]
    passed_on = [*(decoder.norm(state) for state in inputs[1:]), hidden[-1]]
    return list(zip(recorded, passed_on, strict=True))


# --- exactness


@pytest.mark.parametrize("kept", range(1, NUM_LAYERS + 1))
def test_the_embedding_is_the_stock_models_own(
    family: str, source: Path, full_model: Any, batches: list[dict[str, Tensor]], kept: int
) -> None:
    model = CLASSES[family][1].from_pretrained(source, num_kept_layers=kept).eval()
    for batch in batches:
        recorded, passed_on = stock_states(full_model, batch)[kept - 1]
        with torch.inference_mode():
            output = model(**batch)
        pooled = at_ret(recorded, batch)
        torch.testing.assert_close(output.pooler_output, pooled, rtol=0, atol=1e-6)
        normalised = pooled / pooled.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(output.embeddings, normalised, rtol=0, atol=1e-6)
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(output.last_hidden_state[mask], passed_on[mask], rtol=0, atol=1e-6)


def test_the_layers_matter(full_model: Any, batches: list[dict[str, Tensor]]) -> None:
    """The test above could not fail if all layers gave the same state."""
    for batch in batches:
        states = [at_ret(recorded, batch) for recorded, _ in stock_states(full_model, batch)]
        assert all((left - right).abs().max() > 0.1 for left, right in itertools.pairwise(states))


# --- layers that are not the first

# DeepStack needs the first three of the tiny Qwen3-VL, which gets two more for this.
LISTS = {"qwen2_vl": [0, 3], "qwen2_5_vl": [1, 3], "qwen3_vl": [0, 1, 2, 4], "qwen3_5": [1, 3]}


@pytest.fixture(scope="module")
def deeper(family: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "six"
    return build_checkpoint(folder, family, num_layers=6) if family == "qwen3_vl" else source


def put_together(family: str, source: Path, layers: list[int], ret_row: Tensor) -> Any:
    """The stock model with these of its layers, and with the row of [RET] that pruning gives it."""
    stock = FAMILIES[family][1].from_pretrained(source).eval().model
    decoder = stock.language_model
    decoder.layers = torch.nn.ModuleList(decoder.layers[layer] for layer in layers)
    decoder.config.num_hidden_layers = len(layers)
    types = getattr(decoder.config, "layer_types", None)
    decoder.config.layer_types = types and [types[layer] for layer in layers]
    with torch.no_grad():
        decoder.embed_tokens.weight[-8:] = ret_row  # the padding rows, of which [RET] took the first
    return stock


def test_a_list_of_layers_is_the_stock_model_with_those_put_together(
    family: str, deeper: Path, tmp_path: Path, batches: list[dict[str, Tensor]], images: list[Image.Image]
) -> None:
    layers = LISTS[family]
    report = prune(deeper, tmp_path / "cut", keep_layers=layers)
    assert report.kept_layers == layers
    model = AutoModel.from_pretrained(tmp_path / "cut").eval()
    assert (model.config.kept_layers, model.config.num_kept_layers) == (layers, len(layers))
    stock = put_together(family, deeper, layers, model.get_input_embeddings().weight[model.config.ret_token_id].data)
    for batch in batches:
        with torch.inference_mode():
            states = stock(**batch, use_cache=False).last_hidden_state
            expected = torch.nn.functional.normalize(at_ret(states, batch), dim=-1)
            assert (model(**batch).embeddings - expected).abs().max() <= 1e-5
    inputs: list[Any] = ["a red apple", images[0], {"image": images[1:], "text": "both", "instruction": "Find."}]
    batch = AutoProcessor.from_pretrained(tmp_path / "cut").process_inputs(inputs)
    with torch.inference_mode():
        states = stock(**{name: batch[name] for name in NAMES}, use_cache=False).last_hidden_state
    expected = torch.nn.functional.normalize(at_ret(states, batch), dim=-1).numpy()
    for fast in (True, False):
        sentences = SentenceTransformer(str(tmp_path / "cut"), trust_remote_code=True, device="cpu")
        module: Any = sentences[0]
        module.fast_path = module.fast_path if fast else None
        np.testing.assert_allclose(sentences.encode(inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_key_layout_loads_whole_by_every_way(family: str, deeper: Path, tmp_path: Path, layout: str) -> None:
    layers, model_class = LISTS[family], CLASSES[family][1]
    folder = copy_checkpoint(deeper, tmp_path / "copy", layout=layout, num_shards=2, head=True)
    original = read_weights(deeper)
    config = CLASSES[family][0].from_pretrained(folder, keep_layers=layers)
    ways: list[tuple[list[int], dict[str, Any]]] = [
        ([0, 1], {"num_kept_layers": 2}),
        (layers, {"keep_layers": ",".join(map(str, layers))}),
        (layers, {"config": config}),
    ]
    for kept, way in ways:
        model, info = model_class.from_pretrained(folder, **way, output_loading_info=True)
        assert not info["missing_keys"] | info["unexpected_keys"]
        state = model.state_dict()
        assert len(state) == len([name for name in original if layer_of(name) in (-1, *kept)])
        for name, tensor in state.items():
            old = layer_of(name)
            theirs = name.replace(f"layers.{old}.", f"layers.{kept[old]}.", 1) if old >= 0 else name
            assert torch.equal(tensor, original[theirs])
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert again.config.kept_layers == layers
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert "_loaded_layers" not in (tmp_path / "saved" / "config.json").read_text()


def test_lists_of_lists_are_layers_of_the_original(tmp_path: Path) -> None:
    source = build_checkpoint(tmp_path / "source", "qwen2_vl", num_layers=6)
    prune(source, tmp_path / "four", keep_layers="0-1,3,5")
    report = prune(tmp_path / "four", tmp_path / "two", keep_layers=[0, 3])
    prune(source, tmp_path / "direct", keep_layers=[0, 5])
    two, direct = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "direct"))
    assert set(two) == set(direct)
    assert all(torch.equal(two[name], direct[name]) for name in two)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("two", "direct")]
    assert configs[0]["kept_layers"] == configs[1]["kept_layers"] == [0, 5]
    assert (report.num_source_layers, report.kept_layers) == (4, [0, 3])
    assert "layers 0 and 3 of 4, final norm\ndropped  decoder layers 1 to 2; " in str(report)
    card = (tmp_path / "two" / "README.md").read_text()
    assert "- Dropped: decoder layers 1 to 4, the language-model head\n" in card
    # AutoModel reads the configuration first, and hands it on.
    loaded = AutoModel.from_pretrained(tmp_path / "four", keep_layers=[0, 3])
    assert loaded.config.kept_layers == [0, 5]
    assert all(torch.equal(loaded.state_dict()[name], direct[name]) for name in direct)


def test_a_list_of_the_first_layers_is_their_number(source: Path, pruned: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "pruned", keep_layers="0-1")
    files = {path.name: path.read_bytes() for path in pruned.iterdir() if path.is_file()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir() if path.is_file()} == files
    assert json.loads(files["config.json"])["kept_layers"] is None


@pytest.mark.parametrize("layers", [[0, 3], [0, 1, 3]])
def test_what_deepstack_needs_stays(tmp_path: Path, layers: list[int]) -> None:
    source = build_checkpoint(tmp_path / "source", "qwen3_vl")
    message = r"lacks some of decoder layers 0 to 2; after these Qwen3-VL adds features .*\(DeepStack\)\. Keep these"
    with pytest.raises(ValueError, match=message):
        prune(source, tmp_path / "cut", keep_layers=layers)
    assert not (tmp_path / "cut").exists()


# --- loading


def test_the_auto_classes_find_the_family(family: str, pruned: Path) -> None:
    config_class, model_class, processor_class = CLASSES[family]
    assert type(AutoConfig.from_pretrained(pruned)) is config_class
    assert type(AutoModel.from_pretrained(pruned)) is model_class
    assert type(AutoProcessor.from_pretrained(pruned)) is processor_class
    config = json.loads((pruned / "config.json").read_text())
    assert config["model_type"] == ("puma" if family == "qwen2_vl" else f"puma_{family}")
    assert config["auto_map"]["AutoModel"] == f"modeling_puma.{model_class.__name__}"
    assert (config["num_kept_layers"], config["text_config"]["num_hidden_layers"]) == (2, 2)
    assert config["original_num_hidden_layers"] == NUM_LAYERS


# --- pruning


@pytest.mark.parametrize("name", NEW)
def test_a_dtype_that_only_the_text_tower_names_counts(tmp_path: Path, name: str) -> None:
    source = build_checkpoint(tmp_path / "source", name, dtype=torch.bfloat16)
    change_config(source, lambda config: config["text_config"].update(dtype=config.pop("dtype")))
    report = prune(source, tmp_path / "out", num_kept_layers=2, dtype="float32")
    assert report.bytes_before == 2 * report.parameters_before
    assert report.bytes_after == 4 * report.parameters_after


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# The depth of published checkpoints, written as these write it: flat in Qwen2-VL and Qwen2.5-VL, nested later.
FLAT = {
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "torch_dtype": "bfloat16",
}
WINDOW = {"max_window_layers": 70, "use_sliding_window": False, "sliding_window": 32768}
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2_vl": {**FLAT, "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 2048, "in_chans": 3}},
    "qwen2_5_vl": {**FLAT, **WINDOW, "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 2048}},
    "qwen3_vl": {
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
        },
        "vision_config": {"model_type": "qwen3_vl", "depth": 24, "deepstack_visual_indexes": [5, 11, 17]},
    },
    "qwen3_5": {
        "text_config": {
            "model_type": "qwen3_5_text",
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "full_attention_interval": 4,
            "mtp_num_hidden_layers": 1,
            "rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_theta": 10000000},
        },
        "vision_config": {"model_type": "qwen3_5", "depth": 24, "deepstack_visual_indexes": []},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_cut(tmp_path: Path, name: str) -> None:
    content = {"model_type": name, "image_token_id": 151655, "tie_word_embeddings": True, **PUBLISHED[name]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = config_class_of(name).from_pretrained(tmp_path, num_kept_layers=9)
    text = config.text_config
    assert (config.num_kept_layers, text.num_hidden_layers, config.original_num_hidden_layers) == (9, 9, 36)
    assert (text.hidden_size, config.tie_word_embeddings) == (2048, True)
    assert len(getattr(text, "layer_types", None) or range(9)) == 9
    section = {"qwen3_vl": [24, 20, 20], "qwen3_5": [11, 11, 10]}.get(name, [16, 24, 24])
    assert text.rope_parameters["mrope_section"] == section
    config.save_pretrained(tmp_path / "saved")
    again = AutoConfig.from_pretrained(tmp_path / "saved")
    assert type(again) is type(config)
    assert again.to_diff_dict() == config.to_diff_dict()


def test_the_backbones_own_defaults_stay(family: str) -> None:
    """A field of the mixin, or of transformers' base class, must not win over the backbone's."""
    ours, stock = CLASSES[family][0]().to_dict(), FAMILIES[family][0]().to_dict()
    added = {field.name for field in dataclasses.fields(PumaConfigMixin)}
    assert set(ours) - set(stock) == added
    assert {name for name in stock if ours[name] != stock[name]} == {"model_type"}


# --- inputs


def test_only_qwen2_vl_takes_videos(processor: PumaProcessor) -> None:
    without = PumaImageTextProcessor(processor.image_processor, processor.tokenizer, None, str(processor.chat_template))
    assert "video_processor" not in without.to_dict()
    message = r"inputs\[1\]: only PUMA models cut from Qwen2-VL take videos\. Pass some frames as"
    with pytest.raises(ValueError, match=message):
        without.process_inputs(["a", {"video": "clip.mp4"}])


# --- what cannot be loaded


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_5_text", None])
def test_what_cannot_be_pruned_is_refused(tmp_path: Path, qwen_dir: Path, model_type: str | None) -> None:
    source = copy_checkpoint(qwen_dir, tmp_path / "source")
    change_config(source, lambda config: config.update(model_type=model_type))
    message = rf"model_type={model_type!r}, but PUMA prunes Qwen2-VL .*Qwen3\.5 \(qwen3_5\) here.* Choose one"
    with pytest.raises(ValueError, match=message):
        prune(source, tmp_path / "out", num_kept_layers=2)
    assert not (tmp_path / "out").exists()
