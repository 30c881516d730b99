from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoImageProcessor

from puma_hf import PumaProcessor, prune
from puma_hf.hub.card import make_card
from puma_hf.limits import read_limits, set_limits, told_limits
from puma_hf.trainer import merge_adapter
from tests.tiny import build_checkpoint


def with_size(folder: Path, **size: int) -> Path:
    """Change an original's preprocessor_config.json to the form of Qwen2-VL's own, with these limits."""
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings.pop("size")
    path.write_text(json.dumps(settings | size))
    return folder


def longest(folder: Path) -> int:
    """As a stock class reads it."""
    return int(AutoImageProcessor.from_pretrained(folder).size["longest_edge"])


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
    assert (report.max_pixels, report.max_visual_tokens, report.source_max_pixels) == (expected, tokens, 12_845_056)
    assert f"\nimages   at most {tokens:,} visual tokens, {expected:,} pixels (source: 12,845,056)\n" in str(report)
    told = (
        f"- Images are scaled down to at most {expected:,} pixels, {tokens:,} visual tokens; texts are cut at 512 tok"
    )
    assert told in (tmp_path / "k3" / "README.md").read_text()
    assert told in make_card(tmp_path / "k3").text
    # Cut further, it keeps what it has.
    assert prune(tmp_path / "k3", tmp_path / "k2", num_kept_layers=2).max_pixels == expected
    assert [longest(tmp_path / name) for name in ("k3", "k2")] == [expected, expected]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"min_pixels": 256, "max_pixels": 65_536}, 65_536),  # less than 300 tokens, as the demo's
        ({"min_pixels": 100_000, "max_pixels": 12_845_056}, 100_000),  # more than 300 tokens
    ],
)
def test_the_default_is_within_the_sources_own(qwen_dir: Path, tmp_path: Path, size: Any, expected: int) -> None:
    source = with_size(Path(shutil.copytree(qwen_dir, tmp_path / "source")), **size)
    assert prune(source, tmp_path / "out", num_kept_layers=1).max_pixels == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (1023, r"max_pixels=1023 must be a whole number of at least 1024: .*enlarges images to 1024 \(shortest_edge"),
        (2e5, r"max_pixels=200000\.0 must be a whole number"),
        ("all", r"max_pixels='all' must be a whole number, or 'source' to keep the source's limit\."),
    ],
)
def test_limits_that_cannot_be(qwen_dir: Path, tmp_path: Path, given: Any, message: str) -> None:
    source = with_size(Path(shutil.copytree(qwen_dir, tmp_path / "source")), min_pixels=1024, max_pixels=2048)
    with pytest.raises(ValueError, match=message):
        prune(source, tmp_path / "out", num_kept_layers=1, max_pixels=given)
    assert not (tmp_path / "out").exists()


def test_no_limit_is_less_than_a_visual_token(processor: PumaProcessor) -> None:
    with pytest.raises(ValueError, match=r"max_pixels=255 must be .* at least 256: one visual token has 256 pixels"):
        set_limits(processor, min_pixels=1, max_pixels=255)


def test_a_call_may_go_beyond_the_limits_but_not_below_the_least(processor: PumaProcessor) -> None:
    set_limits(processor, min_pixels=1024, max_pixels=2048, max_length=100)
    inputs = [{"image": Image.new("RGB", (200, 150)), "text": "red apple " * 30}]
    assert processor.process_inputs(inputs)["input_ids"].shape[1] <= 100
    options: dict[str, Any] = {"images_kwargs": {"size": {"longest_edge": 65_536}}, "max_length": 500}
    assert processor.process_inputs(inputs, **options)["input_ids"].shape[1] > 200
    with pytest.raises(ValueError, match=r"longest_edge=512 \(max_pixels\), less than shortest_edge=1024 \(min_pixels"):
        processor.process_inputs(inputs, images_kwargs={"max_pixels": 512})


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
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card.count("Images are scaled down") == 1
    assert "- Images are scaled down to at most 4,096 pixels, 16 visual tokens; texts are cut at 70 tokens" in card


def test_nothing_is_told_of_a_folder_that_says_nothing(tmp_path: Path) -> None:
    assert (read_limits(tmp_path), told_limits(tmp_path)) == ({}, None)
