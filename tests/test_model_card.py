from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from puma_hf import PumaConfig
from puma_hf.pruning import PruneReport, fill_template, write_model_card

SIZES = {"parameters_before": 9_876_543, "parameters_after": 1_234_567, "bytes_before": 19_753_086}


def write(folder: Path, source: str | None) -> ModelCard:
    text = {"num_hidden_layers": 28, "hidden_size": 1536}
    config = PumaConfig(text_config=text, num_kept_layers=8, source_name_or_path=source)
    layers = {"kept_layers": list(range(8)), "num_source_layers": 28, "original_num_hidden_layers": 28}
    pixels = {"max_pixels": 235_200, "max_visual_tokens": 300}
    how = {**pixels, "reading": "puma", "found": "a generative checkpoint"}
    report = PruneReport("/home/somebody/out", 8, **layers, **SIZES, bytes_after=2_469_134, **how)
    write_model_card(folder, config, report, is_original=True)
    return ModelCard.load(folder / "README.md")


def test_the_card_shows_the_facts(tmp_path: Path) -> None:
    card = write(tmp_path, "Qwen/Qwen2-VL-2B-Instruct")
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert data.base_model == "Qwen/Qwen2-VL-2B-Instruct"
    assert {"puma", "sentence-transformers", "custom_code"} <= set(data.tags)
    assert "layers 0 to 7" in card.text


@pytest.mark.parametrize("source", ["qwen", "models/qwen/2b", "../qwen", "./qwen"])
def test_no_path_of_this_machine_is_a_name_on_the_hub(tmp_path: Path, source: str) -> None:
    card = write(tmp_path, source)
    assert card.data.base_model is None
    assert "somebody" not in card.content


def test_the_template_renders_without_any_value() -> None:
    card = ModelCard(fill_template(ModelCardData()))
    assert (card.data.library_name, card.data.pipeline_tag) == ("sentence-transformers", "feature-extraction")
    assert "Nothing has been measured" in card.text
    assert not re.search(r"None|Undefined|\{\{|\{%|\n{4}", card.text)
