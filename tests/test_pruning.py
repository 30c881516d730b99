from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from puma_hf import PumaModel, PumaProcessor, prune
from puma_hf.data.tasks import MBEIR_INSTRUCTIONS
from puma_hf.pruning import read_limits
from puma_hf.trainer import merge_adapter
from tests.test_files import listing
from tests.tiny import build_checkpoint, build_qwen2_vl, copy_checkpoint, layer_of, read_weights, tiny_tokenizer

# Counted by hand from the sizes in tests/tiny.py: hidden 32, intermediate 64, 4 heads of 8, 2 for keys.
EMBEDDING = 285 * 32
ATTENTION = (32 * 32 + 32) + 2 * (32 * 16 + 16) + 32 * 32
LAYER = ATTENTION + 3 * 32 * 64 + 2 * 32
NORM = 32
BLOCK = (32 * 96 + 96) + (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 4 * 32
VISION = 3 * 2 * 8 * 8 * 32 + 2 * BLOCK + 2 * 32 + (128 * 128 + 128) + (128 * 32 + 32)


def original_rows(folder: Path) -> torch.Tensor:
    return read_weights(folder)["language_model.embed_tokens.weight"]


def ret_row(folder: Path) -> torch.Tensor:
    model = PumaModel.from_pretrained(folder)
    row: torch.Tensor = model.get_input_embeddings().weight[model.config.ret_token_id].detach()
    return row


# --- the report


@pytest.mark.parametrize("kept", [1, 4])
def test_the_report_equals_a_count_by_hand(qwen_dir: Path, tmp_path: Path, kept: int) -> None:
    report = prune(qwen_dir, tmp_path / "out", num_kept_layers=kept)
    before, after = EMBEDDING + 4 * LAYER + NORM + VISION, EMBEDDING + kept * LAYER + NORM + VISION
    assert (report.parameters_before, report.parameters_after) == (before, after)
    assert (report.bytes_before, report.bytes_after) == (4 * before, 4 * after)
    assert after == sum(tensor.numel() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


def test_an_untied_head_counts_before_and_is_gone_after(tmp_path: Path) -> None:
    source = build_qwen2_vl(tmp_path / "source", tie_word_embeddings=False, dtype=torch.bfloat16)
    report = prune(source, tmp_path / "out", num_kept_layers=2, dtype="float16")
    assert report.parameters_before == 2 * EMBEDDING + 4 * LAYER + NORM + VISION
    assert report.parameters_after == EMBEDDING + 2 * LAYER + NORM + VISION
    assert report.bytes_before == 2 * report.parameters_before
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.float16


# --- the weights


def test_everything_kept_is_bit_equal(qwen_dir: Path, puma_dir: Path) -> None:
    original, pruned = read_weights(qwen_dir), load_file(puma_dir / "model.safetensors")
    assert set(pruned) == {name for name in original if layer_of(name) < 2}
    ret = PumaModel.from_pretrained(puma_dir).config.ret_token_id
    for name, tensor in pruned.items():
        if name.endswith("embed_tokens.weight"):
            others = torch.arange(len(tensor)) != ret
            assert torch.equal(tensor[others], original[name][others])
        else:
            assert torch.equal(tensor, original[name]), name


# --- [RET]


def test_ret_starts_as_the_mean_of_the_vocabulary(qwen_dir: Path, puma_dir: Path, tmp_path: Path) -> None:
    words = len(tiny_tokenizer())
    rows = original_rows(qwen_dir)
    assert len(rows) == words + 8  # the padding rows do not count
    assert torch.equal(ret_row(puma_dir), rows[:words].mean(dim=0))
    assert PumaModel.from_pretrained(puma_dir).config.ret_token_id == words
    # Of a model in bfloat16 the mean is taken in float32.
    source = build_qwen2_vl(tmp_path / "source", dtype=torch.bfloat16)
    prune(source, tmp_path / "out", num_kept_layers=1)
    assert torch.equal(ret_row(tmp_path / "out"), original_rows(source)[:words].float().mean(dim=0).bfloat16())


def test_a_vocabulary_without_padding_grows(tmp_path: Path) -> None:
    words = len(tiny_tokenizer())
    source = build_qwen2_vl(tmp_path / "source", vocab_size=words)
    report = prune(source, tmp_path / "out", num_kept_layers=2)
    assert report.parameters_after - report.parameters_before == 32 - 2 * LAYER
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model.config.text_config.vocab_size == words + 1 == len(model.get_input_embeddings().weight)
    rows = original_rows(source)
    assert torch.equal(model.get_input_embeddings().weight[:words], rows)
    assert torch.equal(ret_row(tmp_path / "out"), rows.mean(dim=0))


@pytest.mark.parametrize("special", [False, True])
def test_a_tokenizer_with_ret_keeps_its_row(tmp_path: Path, special: bool) -> None:
    source = build_qwen2_vl(tmp_path / "source", extra_tokens=() if special else ("[RET]",))
    if special:
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.add_tokens(["[RET]"], special_tokens=True)
        tokenizer.save_pretrained(source)
    prune(source, tmp_path / "out", num_kept_layers=1)
    token_id = len(tiny_tokenizer())
    assert torch.equal(ret_row(tmp_path / "out"), original_rows(source)[token_id])
    processor = PumaProcessor.from_pretrained(tmp_path / "out")
    assert processor.ret_token_id == token_id
    assert len(processor.tokenizer) == token_id + 1
    # Either way it is special afterwards, so that it cannot hide in a user's text.
    with pytest.raises(ValueError, match="special token"):
        processor.process_inputs(["a [RET]"])


# --- the directory


def test_prompts_can_be_chosen(qwen_dir: Path, puma_dir: Path, tmp_path: Path) -> None:
    default = SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu").prompts
    assert {name: prompt for name, prompt in default.items() if prompt} == MBEIR_INSTRUCTIONS
    prompts = {"find": "Finde ein Bild: ä"}
    prune(qwen_dir, tmp_path / "out", num_kept_layers=1, prompts=prompts)
    model = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    assert {name: prompt for name, prompt in model.prompts.items() if prompt} == prompts
    named = model.encode(["a"], prompt_name="find")
    np.testing.assert_array_equal(named, model.encode([{"text": "a", "instruction": prompts["find"]}]))


def test_a_pruned_directory_can_be_pruned_further(qwen_dir: Path, puma_dir: Path, tmp_path: Path) -> None:
    prune(qwen_dir, tmp_path / "three", num_kept_layers=3)
    report = prune(tmp_path / "three", tmp_path / "two", num_kept_layers=2)
    two, direct = (load_file(folder / "model.safetensors") for folder in (tmp_path / "two", puma_dir))
    assert set(two) == set(direct)
    assert all(torch.equal(two[name], direct[name]) for name in two)
    assert report.parameters_before == EMBEDDING + 3 * LAYER + NORM + VISION
    assert report.original_num_hidden_layers == 4
    assert PumaModel.from_pretrained(tmp_path / "two").config.source_name_or_path == qwen_dir.name


# --- errors; none of them leaves anything behind


# By what is changed in config.json: the layers asked for, and what is said.
DAMAGES: dict[str, tuple[dict[str, Any], int, str]] = {
    "another model": ({"model_type": "llama"}, 2, "model_type='llama', but PUMA prunes"),
    "too few layers": (
        {"text_config": {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}},
        5,
        "damaged' lacks 12 of the tensors that a Qwen2-VL with 5 layers needs",
    ),
    "no tokenizer": ({}, 2, r"damaged' lacks its tokenizer, with '<\|image_pad\|>'\. Download it again"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_leaves_nothing_behind(qwen_dir: Path, tmp_path: Path, damage: str) -> None:
    changes, kept, message = DAMAGES[damage]
    source = copy_checkpoint(qwen_dir, tmp_path / "damaged")
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"] | changes.get("text_config", {})
    (source / "config.json").write_text(json.dumps(config | changes | {"text_config": text}))
    for name in ("tokenizer.json", "tokenizer_config.json") if damage == "no tokenizer" else ():
        (source / name).unlink()
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=message):
        prune(source, tmp_path / "out", num_kept_layers=kept)
    assert listing(tmp_path) == before


def test_a_bad_list_of_layers_leaves_nothing_behind(qwen_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_layers='0,4' must be rising numbers from 0 to 3, each once"):
        prune(qwen_dir, tmp_path / "out", keep_layers="0,4")
    assert listing(tmp_path) == {}


# --- limits: how large an image, how long a text is read


def with_size(folder: Path, **size: int) -> Path:
    """Change an original's preprocessor_config.json to the form of Qwen2-VL's own, with these limits."""
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings.pop("size")
    path.write_text(json.dumps(settings | size))
    return folder


# A visual token has 16 x 16 pixels in the tiny models, 32 x 32 in the tiny Qwen3-VL.
@pytest.mark.parametrize(
    ("family", "given", "expected"),
    [
        ("qwen2_vl", None, 300 * 16 * 16),
        ("qwen3_vl", None, 300 * 32 * 32),
        ("qwen2_vl", "source", 12_845_056),
        ("qwen2_vl", 64 * 16 * 16, 64 * 16 * 16),
    ],
)
def test_prune_sets_a_limit_of_images(tmp_path: Path, family: str, given: Any, expected: int) -> None:
    source = with_size(build_checkpoint(tmp_path / "source", family), min_pixels=3136, max_pixels=12_845_056)
    report = prune(source, tmp_path / "k3", num_kept_layers=3, max_pixels=given)
    tokens = expected // (1024 if family == "qwen3_vl" else 256)
    assert (report.max_pixels, report.max_visual_tokens) == (expected, tokens)
    # Cut further, it keeps what it has.
    assert prune(tmp_path / "k3", tmp_path / "k2", num_kept_layers=2).max_pixels == expected
    for name in ("k3", "k2"):  # as a stock class reads it
        assert AutoImageProcessor.from_pretrained(tmp_path / name).size["longest_edge"] == expected


def test_limits_that_cannot_be(qwen_dir: Path, tmp_path: Path) -> None:
    source = with_size(Path(shutil.copytree(qwen_dir, tmp_path / "source")), min_pixels=1024, max_pixels=2048)
    for given in (1023, "all"):
        with pytest.raises(ValueError, match=rf"max_pixels={given!r} must be a whole number of at least 1024: .*"):
            prune(source, tmp_path / "out", num_kept_layers=1, max_pixels=given)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_merge_takes_what_the_adapter_was_trained_with(puma_dir: Path, adapter: Path, tmp_path: Path) -> None:
    """Also where the SentenceTransformer was told it and not the processor, as by PumaTrainer's users."""
    copy = tmp_path / "adapter"
    model = SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu")
    module: Any = model[0]
    size = {"shortest_edge": 512, "longest_edge": 4096}
    module.processing_kwargs = {"image": {"size": size}, "text": {"max_length": 70}}
    model.save_pretrained(str(copy), create_model_card=False)
    for file in adapter.iterdir():
        if file.name.startswith(("adapter", "puma_base")):
            shutil.copy(file, copy)
    (copy / "model.safetensors").unlink()
    limits = {"min_pixels": 512, "max_pixels": 4096, "max_length": 70}
    assert read_limits(copy) == limits
    merge_adapter(copy, tmp_path / "merged", base=puma_dir)
    merged = PumaProcessor.from_pretrained(tmp_path / "merged")
    assert read_limits(tmp_path / "merged") == limits
    assert merged.tokenizer.model_max_length == 70
