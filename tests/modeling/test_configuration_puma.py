"""Which layers a configuration keeps, what it records of them, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from puma_hf import PumaConfig, PumaModel


def depths(config: PumaConfig) -> tuple[int, int, int | None, int | None]:
    text: Any = config.text_config
    return text.num_hidden_layers, len(text.layer_types), config.num_kept_layers, config.original_num_hidden_layers


def test_a_list_cuts_layers_and_their_types(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    full: Any = PumaConfig(text_config=dict(text)).text_config
    assert full.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 3
    config = PumaConfig(text_config=dict(text), keep_layers=" 0,2, 4-5")
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
    assert PumaConfig.from_pretrained(tmp_path, num_kept_layers=1).layers_of_original == [0]


@pytest.mark.parametrize("layers", [[], [0, 2, 1], "3-1", "0-2,2-3", "0-4", [-1, 2], "first", [0.0, 1], [True, 2]])
def test_a_bad_list_is_refused(qwen_dir: Path, layers: Any) -> None:
    message = re.escape(f"keep_layers={layers!r} must be rising numbers from 0 to 3, each once")
    with pytest.raises(ValueError, match=message):
        PumaModel.from_pretrained(qwen_dir, keep_layers=layers)


@pytest.mark.parametrize("value", [0, -1, 5, 2.0, "2", True])
def test_a_bad_number_of_layers_is_refused(qwen_dir: Path, value: Any) -> None:
    message = re.escape(f"num_kept_layers={value!r} must be an integer from 1 to 4")
    with pytest.raises(ValueError, match=message):
        PumaConfig.from_pretrained(qwen_dir, num_kept_layers=value)


def test_what_is_left_is_not_what_is_cut(qwen_dir: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'keep_layers': \[0, 3\]}: to cut layers pass num_kept_layers or keep_layers"
    ):
        PumaConfig.from_pretrained(qwen_dir, num_kept_layers=2, keep_layers=[0, 3])
    with pytest.raises(ValueError, match=r"\[0, 3\]: to cut layers pass num_kept_layers or keep_layers"):
        PumaModel.from_pretrained(qwen_dir, kept_layers=[0, 3])


def test_the_lineage_survives_saving_and_further_pruning(qwen_dir: Path, tmp_path: Path) -> None:
    config = PumaConfig.from_pretrained(qwen_dir, num_kept_layers=3)
    config.source_name_or_path, config.source_revision, config.ret_token_id = "org/name", "abc", 7
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is PumaConfig
    assert depths(again) == (3, 3, 3, 4)
    assert (again.source_name_or_path, again.source_revision, again.ret_token_id) == ("org/name", "abc", 7)
    assert depths(AutoConfig.from_pretrained(tmp_path, num_kept_layers=2)) == (2, 2, 2, 4)
    with pytest.raises(ValueError, match="num_kept_layers=4 must be an integer from 1 to 3"):
        PumaConfig.from_pretrained(tmp_path, num_kept_layers=4)
