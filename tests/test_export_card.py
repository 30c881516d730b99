from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import Qwen2VLConfig

from puma_hf.export import export
from puma_hf.export_card import write_export_card
from puma_hf.hub.check import embed_features, features_of, open_auto_model

LINEAGE = {"num_kept_layers": 14, "original_num_hidden_layers": 28, "source_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"}


def write(folder: Path, **changes: object) -> str:
    write_export_card(folder, Qwen2VLConfig(text_config={"hidden_size": 1536}), LINEAGE | changes)
    return (folder / "README.md").read_text()


def test_card(tmp_path: Path) -> None:
    card = write(tmp_path)
    for part in (
        "decoder layers 0 to 13 of the 28\nof",
        "`Qwen/Qwen2-VL-2B-Instruct`",
        "1536 numbers",
        "**Not run:** vLLM",
        "`qwen2_vl`",
    ):
        assert part in card
    assert "--runner pooling --convert embed" in card
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "feature-extraction")


def test_card_of_a_list_of_layers(tmp_path: Path) -> None:
    assert "decoder layers 0 to 10 and 27 of the 28\nof" in write(tmp_path, kept_layers=[*range(11), 27])


def test_card_of_a_reading(tmp_path: Path) -> None:
    config = Qwen2VLConfig(text_config={"hidden_size": 1536})
    write_export_card(tmp_path, config, LINEAGE, onnx=True, told="as sentences")
    told = "is the system message.\nThe model was made to read inputs as sentences: bring texts into that form first.\n"
    assert told in (tmp_path / "README.md").read_text()


def test_the_python_of_the_card_gives_the_embedding(puma_dir: Path, tmp_path: Path) -> None:
    export(puma_dir, tmp_path / "stock")
    card = (tmp_path / "stock" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", str(tmp_path / "stock"))
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    one = {"text": "a red apple", "instruction": "Find an image that matches the sentence."}
    expected = embed_features(open_auto_model(puma_dir, torch.float32, "cpu"), features_of(puma_dir, [one]))
    torch.testing.assert_close(names["embedding"], expected, rtol=0, atol=1e-5)


def test_the_request_of_the_card_is_json(tmp_path: Path) -> None:
    assert len(json.loads(write(tmp_path).split("-d '")[1].split("'\n")[0])["messages"]) == 1


def test_an_unknown_source(tmp_path: Path) -> None:
    card = write(tmp_path, source_name_or_path=None)
    assert "of its source, without" in card
    assert "# qwen2_vl, 14 layers" in card


def test_lineage_that_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="source_name_or_path"):
        write_export_card(tmp_path, Qwen2VLConfig(), {})
