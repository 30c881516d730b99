"""A PUMA model as a stock checkpoint and as ONNX: the same embeddings without a trace of us."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Qwen2VLForConditionalGeneration,
)
from transformers.utils.import_utils import is_torchvision_available

import puma_hf.export as export_module
from puma_hf import prune
from puma_hf.export import LINEAGE_KEY, export
from puma_hf.hub.check import embed_stock, open_model, stock_features
from puma_hf.hub.load_check import check_inputs, embed_features, features_of
from puma_hf.modeling.configuration_puma import PumaConfigMixin
from tests.tiny import HIDDEN_SIZE, build_checkpoint, canonical_name, read_weights

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
}
ONE = {"text": "a red apple", "instruction": "Find an image that matches the sentence."}  # as in the card
# Family, layers kept, and what is special about the original.
SHAPES = (
    ("qwen2_vl", 1, {"tie_word_embeddings": False}),
    ("qwen2_5_vl", 2, {}),
    ("qwen3_vl", 3, {}),
    ("qwen3_5", 4, {}),
)


def settings_of(folder: Path, name: str = "config.json") -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / name).read_text())
    return content


def largest_difference(puma: Path, stock: Path, **cut: int) -> float:
    """Of the embeddings by AutoModel to those by stock classes and files alone."""
    inputs = check_inputs(3)
    expected = embed_features(open_model(puma, torch.float32, **cut), features_of(puma, inputs))
    found = embed_stock(open_model(stock, torch.float32, stock=True), stock_features(stock, inputs))
    assert found.shape == (len(inputs), HIDDEN_SIZE)
    return float((found - expected).abs().max())


@pytest.mark.parametrize(("family", "kept", "changes"), SHAPES)
def test_the_same_embeddings(family: str, kept: int, changes: dict[str, object], tmp_path: Path) -> None:
    original = build_checkpoint(tmp_path / "original", family, seed=kept, **changes)
    prune(original, tmp_path / "puma", num_kept_layers=kept)
    report = export(tmp_path / "puma", tmp_path / "stock")
    assert (report.model_type, report.num_layers) == (family, kept)
    assert largest_difference(tmp_path / "puma", tmp_path / "stock") < 1e-5
    if is_torchvision_available():  # without it transformers' own processors of these families cannot be made
        processor = AutoProcessor.from_pretrained(tmp_path / "stock")
        assert processor.video_processor.patch_size == processor.image_processor.patch_size
    if family == "qwen3_5" and find_spec("onnxruntime"):
        with pytest.raises(ValueError, match=r"puma' has linear attention, .* \(--format stock\)"):
            export(tmp_path / "puma", tmp_path / "onnx", format="onnx")
    # In the layout that was published for the family, which the original of these tests has, too.
    names = set(load_file(original / "model.safetensors"))
    assert set(load_file(tmp_path / "stock" / "model.safetensors")) - names <= {"lm_head.weight"}


def test_nothing_of_puma_is_in_it(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES
    for path in exported.glob("*.json"):
        assert not [word for word in ("auto_map", "Puma", "is_local") if word in path.read_text()], path.name
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        assert settings_of(exported, name)["processor_class"] == "Qwen2VLProcessor"


def test_the_configuration_is_the_stock_classes_own(exported: Path, puma_dir: Path) -> None:
    config = AutoConfig.from_pretrained(exported)
    assert type(config).__name__ == "Qwen2VLConfig"
    assert config.architectures == ["Qwen2VLForConditionalGeneration"]
    assert (config.text_config.num_hidden_layers, len(config.text_config.layer_types)) == (2, 2)
    written, puma = settings_of(exported), settings_of(puma_dir)
    names = {field.name for field in fields(PumaConfigMixin)}
    assert written[LINEAGE_KEY] == {name: puma[name] for name in names}
    assert not names & set(written)


def test_positions_that_stock_classes_do_not_have(qwen_dir: Path, tmp_path: Path) -> None:
    prune(qwen_dir, tmp_path / "puma", num_kept_layers=1, reading="puma-released")
    with pytest.raises(ValueError, match=r"puma' has sequential positions, .* export its texts \(--format onnx\)"):
        export(tmp_path / "puma", tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_a_list_of_layers_is_told(qwen_dir: Path, tmp_path: Path) -> None:
    prune(qwen_dir, tmp_path / "puma", keep_layers="0,3")
    export(tmp_path / "puma", tmp_path / "stock")
    assert settings_of(tmp_path / "stock")[LINEAGE_KEY]["kept_layers"] == [0, 3]  # type: ignore[index]
    assert largest_difference(tmp_path / "puma", tmp_path / "stock") < 1e-5


def test_the_first_layers_alone(elastic_dir: Path, tmp_path: Path) -> None:
    report = export(elastic_dir, tmp_path / "stock", num_kept_layers=2)
    assert report.num_layers == AutoConfig.from_pretrained(tmp_path / "stock").text_config.num_hidden_layers == 2
    lineage: Any = settings_of(tmp_path / "stock")[LINEAGE_KEY]
    assert (lineage["num_kept_layers"], lineage["trained_depths"]) == (2, [1, 2])
    assert largest_difference(elastic_dir, tmp_path / "stock", num_kept_layers=2) < 1e-5
    with pytest.raises(ValueError, match="num_kept_layers=5 must be an integer from 1 to 4"):
        export(elastic_dir, tmp_path / "other", num_kept_layers=5)


def test_weights_are_the_same_bit_for_bit_under_published_names(exported: Path, puma_dir: Path) -> None:
    found = load_file(exported / "model.safetensors")
    assert {name.split(".")[0] for name in found} == {"model", "visual"}
    assert {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"} <= set(found)
    expected = read_weights(puma_dir)
    assert {canonical_name(name) for name in found} == set(expected)
    assert all(torch.equal(tensor, expected[canonical_name(name)]) for name, tensor in found.items())


def test_the_stock_class_finds_every_tensor_and_ties_its_head(exported: Path) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(exported, output_loading_info=True)
    assert isinstance(model, Qwen2VLForConditionalGeneration)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a red apple"}], tokenize=False)
    assert tokenizer(text)["input_ids"][-1] == settings_of(exported)[LINEAGE_KEY]["ret_token_id"]  # type: ignore[index]


# --- what is refused, leaving nothing behind


def test_what_is_no_puma_model(qwen_dir: Path, puma_dir: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_type='qwen2_vl' and is no PUMA model"):
        export(qwen_dir, tmp_path / "stock")
    with pytest.raises(ValueError, match=r"is an adapter\. Merge it first \(puma-hf merge\)"):
        export(adapter, tmp_path / "stock")
    damaged = Path(shutil.copytree(puma_dir, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    tensors["language_model.norm.weight"] = torch.ones(HIDDEN_SIZE + 1)
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(ValueError, match=r"has other tensors than its config.json says(.|\n)*norm.weight"):
        export(damaged, tmp_path / "stock")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_output_in_use(puma_dir: Path, tmp_path: Path) -> None:
    export(puma_dir, tmp_path / "stock")
    (tmp_path / "stock" / "stray.txt").write_text("old")
    with pytest.raises(FileExistsError, match=r"is not empty\. .*--overwrite"):
        export(puma_dir, tmp_path / "stock")
    export(puma_dir, tmp_path / "stock", overwrite=True)
    assert {path.name for path in (tmp_path / "stock").iterdir()} == FILES
    prune(puma_dir, tmp_path / "puma", num_kept_layers=1)
    with pytest.raises(FileExistsError, match="holds files"):
        export(puma_dir, tmp_path / "puma", overwrite=True)


def test_the_python_of_the_card_gives_the_embedding(puma_dir: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", str(exported))
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    expected = embed_features(open_model(puma_dir, torch.float32), features_of(puma_dir, [ONE]))
    torch.testing.assert_close(names["embedding"], expected, rtol=0, atol=1e-5)


# --- ONNX

TEXTS = [ONE, "a", "a longer text, of an apple on a table with a red cloth", {"text": "no", "instruction": "Find it."}]

needs_onnx = pytest.mark.skipif(not all(map(find_spec, export_module._NEEDED_FOR_ONNX)), reason="needs puma-hf[onnx]")


@needs_onnx
@pytest.mark.slow
def test_the_graph_embeds_texts_of_any_number_and_length(tmp_path: Path) -> None:
    from onnxruntime import InferenceSession

    puma, output = tmp_path / "puma", tmp_path / "onnx"
    prune(build_checkpoint(tmp_path / "original", "qwen2_vl"), puma, num_kept_layers=1)
    report = export(puma, output, format="onnx")
    graph = {"model.onnx", "model.onnx.data"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in output.iterdir()} == {"README.md", "config.json", *tokenizer, *graph}
    assert report.num_bytes == sum((output / name).stat().st_size for name in graph)
    model, session = open_model(puma, torch.float32), InferenceSession(output / "model.onnx")
    for inputs, side in ((TEXTS, "left"), (TEXTS, "right"), (TEXTS[:1], "left")):
        features = features_of(puma, inputs, padding_side=side)
        given = {name: features[name].numpy() for name in ("input_ids", "attention_mask")}
        (found,) = session.run(["sentence_embedding"], given)
        torch.testing.assert_close(torch.from_numpy(found), embed_features(model, features), rtol=0, atol=1e-5)
    code = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(compile(code.replace("path/to/this/directory", str(output)), "card", "exec"), names)
    expected = embed_features(model, features_of(puma, [ONE]))
    torch.testing.assert_close(torch.from_numpy(names["embedding"]), expected, rtol=0, atol=1e-5)
