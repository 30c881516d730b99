from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from puma_hf import PumaConfig
from puma_hf.hub.template import write_model_card

FACTS: dict[str, Any] = {
    "source": "/home/somebody/secret/qwen",
    "output_dir": "/home/somebody/out",
    "num_kept_layers": 8,
    "original_num_hidden_layers": 28,
    "parameters_before": 9_876_543,
    "parameters_after": 1_234_567,
    "bytes_before": 19_753_086,
    "bytes_after": 2_469_134,
}


def config(source: str | None) -> PumaConfig:
    text = {"num_hidden_layers": 28, "hidden_size": 1536}
    return PumaConfig(text_config=text, num_kept_layers=8, source_name_or_path=source)


def test_the_card_shows_the_facts(tmp_path: Path) -> None:
    write_model_card(tmp_path, config("Qwen/Qwen2-VL-2B-Instruct"), FACTS)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "sentence-similarity"
    assert card.data.base_model == "Qwen/Qwen2-VL-2B-Instruct"
    assert {"puma", "sentence-transformers", "custom_code"} <= set(card.data.tags)
    for shown in (
        "`Qwen/Qwen2-VL-2B-Instruct`",
        "layers 0 to 7",
        "8 to 27",
        "1,234,567",
        "9,876,543",
        "1536",
    ):
        assert shown in card.text
    assert "Nothing has been measured" in card.text


def test_one_layer_is_no_range(tmp_path: Path) -> None:
    write_model_card(tmp_path, config(None), FACTS | {"num_kept_layers": 1, "original_num_hidden_layers": 2})
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "the token embedding, decoder layer 0, the final norm" in card
    assert "Dropped: decoder layer 1, the language-model head" in card


def test_no_path_of_this_machine_is_published(tmp_path: Path) -> None:
    write_model_card(tmp_path, config("qwen"), FACTS)
    content = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "somebody" not in content
    assert "Made from `qwen`" in content
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


@pytest.mark.parametrize("source", ["models/qwen/2b", "../qwen", "./qwen"])
def test_a_path_is_no_name_on_the_hub(tmp_path: Path, source: str) -> None:
    write_model_card(tmp_path, config(source), FACTS)
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_a_pruned_directory_has_its_card(puma_dir: Path, qwen_dir: Path) -> None:
    card = ModelCard.load(puma_dir / "README.md")
    assert "layers 0 to 1" in card.text
    assert f"`{qwen_dir.name}`" in card.text
    assert str(qwen_dir.parent) not in card.content
