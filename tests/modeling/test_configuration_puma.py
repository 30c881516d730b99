"""Which layers a configuration keeps, what it records of them, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from puma_hf import PumaConfig, PumaModel
from puma_hf.modeling.configuration_puma import chosen_layers, named_layers


def depths(config: PumaConfig) -> tuple[int, int, int | None, int | None]:
    text: Any = config.text_config
    return text.num_hidden_layers, len(text.layer_types), config.num_kept_layers, config.original_num_hidden_layers


def with_config(folder: Path, **values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("kept", [None, 1, 3, 4])
def test_layers_and_their_types_are_cut_together(qwen_dir: Path, kept: int | None) -> None:
    config = PumaConfig.from_pretrained(qwen_dir, num_kept_layers=kept)
    assert config.model_type == "puma"
    assert depths(config) == (kept or 4, kept or 4, kept or 4, 4)
    text = PumaConfig.from_pretrained(qwen_dir).text_config.to_dict()
    assert depths(PumaConfig(text_config=text, num_kept_layers=kept)) == depths(config)


def test_a_list_cuts_layers_and_their_types(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    full: Any = PumaConfig(text_config=dict(text)).text_config
    assert full.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 3
    config = PumaConfig(text_config=dict(text), keep_layers="0,2,4-5")
    cut: Any = config.text_config
    assert depths(config) == (4, 4, 4, 6)
    assert (config.kept_layers, config.layers_of_original) == ([0, 2, 4, 5], [0, 2, 4, 5])
    assert cut.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert cut.max_window_layers == 2
    config.save_pretrained(tmp_path)
    again = PumaConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()
    assert PumaConfig.from_pretrained(tmp_path, keep_layers=[1, 3]).kept_layers == [2, 5]
    assert PumaConfig.from_pretrained(tmp_path, num_kept_layers=3).kept_layers == [0, 2, 4]
    assert PumaConfig.from_pretrained(tmp_path, num_kept_layers=1).kept_layers is None
    assert PumaConfig.from_pretrained(tmp_path, num_kept_layers=1).layers_of_original == [0]


BAD_LISTS = ([], " ", [0, 2, 1], "3-1", [0, 1, 1], "0-2,2-3", "0-4", [-1, 2], "first", "0,,3", [0.0, 1], [True, 2], 3.5)


@pytest.mark.parametrize("layers", BAD_LISTS)
def test_a_bad_list_is_refused(qwen_dir: Path, layers: Any) -> None:
    message = re.escape(f"keep_layers={layers!r} must be rising numbers from 0 to 3, each once")
    for load in (PumaConfig.from_pretrained, PumaModel.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(qwen_dir, keep_layers=layers)


@pytest.mark.parametrize("value", [0, -1, 5, 2.0, "2", True])
def test_a_bad_number_of_layers_is_refused(qwen_dir: Path, value: Any) -> None:
    message = re.escape(f"num_kept_layers={value!r} must be an integer from 1 to 4")
    with pytest.raises(ValueError, match=message):
        PumaConfig.from_pretrained(qwen_dir, num_kept_layers=value)
    with pytest.raises(ValueError, match=message):
        PumaConfig(text_config={"num_hidden_layers": 4}, num_kept_layers=value)


def test_what_is_left_is_not_what_is_cut(qwen_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"num_kept_layers=2 and keep_layers=\[0, 3\]: one of them must say which"):
        PumaConfig.from_pretrained(qwen_dir, num_kept_layers=2, keep_layers=[0, 3])
    text = PumaConfig.from_pretrained(qwen_dir).text_config.to_dict()
    with pytest.raises(ValueError, match=r"kept_layers=\[0, 3\] tells which layers .* has 4.*pass keep_layers"):
        PumaConfig(text_config=text, kept_layers=[0, 3])
    for load in (PumaConfig.from_pretrained, PumaModel.from_pretrained):
        with pytest.raises(ValueError, match=r"kept_layers tells which layers are left .* pass keep_layers"):
            load(qwen_dir, kept_layers=[0, 3])


def test_layers_in_words() -> None:
    assert named_layers([4]) == "decoder layer 4"
    assert named_layers([0, 1]) == "decoder layers 0 to 1"
    assert named_layers([0, 2, 3, 9]) == "decoder layers 0, 2 to 3 and 9"
    assert chosen_layers(None, " 0-1, 3", 4) == [0, 1, 3]


def test_the_lineage_survives_saving_and_further_pruning(qwen_dir: Path, tmp_path: Path) -> None:
    config = PumaConfig.from_pretrained(qwen_dir, num_kept_layers=3)
    config.source_name_or_path, config.source_revision, config.ret_token_id = "org/name", "abc", 7
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is PumaConfig
    assert depths(again) == (3, 3, 3, 4)
    assert (again.source_name_or_path, again.source_revision, again.ret_token_id) == ("org/name", "abc", 7)
    smaller = AutoConfig.from_pretrained(tmp_path, num_kept_layers=2)
    assert depths(smaller) == (2, 2, 2, 4)
    assert smaller.source_name_or_path == "org/name"
    with pytest.raises(ValueError, match="num_kept_layers=4 must be an integer from 1 to 3"):
        PumaConfig.from_pretrained(tmp_path, num_kept_layers=4)


def test_the_flat_file_of_published_checkpoints_is_cut_too(tmp_path: Path) -> None:
    folder = with_config(
        tmp_path,
        model_type="qwen2_vl",
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        torch_dtype="bfloat16",
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "in_chans": 3},
    )
    config = PumaConfig.from_pretrained(folder, num_kept_layers=14)
    text: Any = config.text_config
    assert depths(config) == (14, 14, 14, 28)
    assert (text.hidden_size, text.vocab_size) == (1536, 151936)
    assert text.rope_parameters["mrope_section"] == [16, 24, 24]


@pytest.mark.parametrize("model_type", ["llama", "qwen2_5_vl", None])
def test_another_architecture_is_refused(tmp_path: Path, model_type: str | None) -> None:
    message = rf"model_type={model_type!r}, but PUMA prunes Qwen2-VL checkpoints \(qwen2_vl, puma\) here\. Choose one"
    with pytest.raises(ValueError, match=message):
        PumaConfig.from_pretrained(with_config(tmp_path, **({"model_type": model_type} if model_type else {"a": 1})))
    with pytest.raises(ValueError, match=message):
        PumaConfig.from_dict({"model_type": model_type})
