from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from puma_hf import prune
from puma_hf.card import CardOptions, render_card, write_card
from puma_hf.card_results import MeasuredModel
from puma_hf.hub import with_training_note
from tests.evaluation.sweep_reports import make_model, make_report
from tests.test_card_results import PRINT, write_results
from tests.tiny import build_checkpoint


@pytest.fixture
def folder(puma_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "work" / "puma"
    shutil.copytree(puma_dir, copy)
    monkeypatch.setattr(MeasuredModel, "fingerprint", lambda self, truncate_dim: PRINT)
    return copy


def test_without_result_files_the_card_has_no_results(folder: Path) -> None:
    card = ModelCard(render_card(folder, options=CardOptions("org/puma")))
    assert "Nothing has been measured on this model yet." in card.text
    assert not {"model-index", "model_name"} & card.data.to_dict().keys()
    assert "M-BEIR: none of its 16 rows." in card.text
    assert "Operations per text and image." in card.text
    assert "# org/puma" in card.text
    assert "%" not in card.text


def test_other_directories_have_no_card(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a PUMA directory nor that of a LoRA adapter"):
        write_card(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_number_written_by_hand_does_not_survive(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    card = card.replace("Nothing has been measured on this model yet.", "hit@5 is 99.9 %.")
    card = with_training_note(card, "A LoRA adapter of rank 64 was trained and merged into the weights.")
    card = with_training_note(card, "It was trained for 123 hours.")
    (folder / "README.md").write_text(card)
    assert write_card(folder) == (folder / "README.md").read_text()
    written = (folder / "README.md").read_text()
    assert not re.search(r"99\.9|123 hours|rank 64", written)
    assert written.count("A LoRA adapter was trained and merged into the weights; its recipe is not at hand.") == 1


def test_metadata_are_valid_and_hold_the_files_own_values(folder: Path) -> None:
    write_results(folder / "results.json", data="M-BEIR")
    options = CardOptions("org/puma", "Qwen/Qwen2-VL-2B-Instruct", "apache-2.0", ("TIGER-Lab/M-BEIR",))
    content = render_card(folder, options=options)
    card = ModelCard(content)
    data = card.data.to_dict()
    assert ModelCardData(**data).to_dict() == data
    assert data["library_name"] == "sentence-transformers"
    assert data["pipeline_tag"] == "sentence-similarity"
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen2-VL-2B-Instruct", "finetune")
    assert (data["license"], data["datasets"]) == ("apache-2.0", ["TIGER-Lab/M-BEIR"])
    result = card.data.eval_results[0]
    assert (result.metric_value, result.metric_type, result.dataset_split) == (0.625, "hit_at_5", "test")
    assert result.dataset_config == "mscoco_task0-local"
    assert data["model-index"][0]["name"] == "org/puma"


def test_the_table_names_its_file_and_what_is_missing(folder: Path) -> None:
    path = write_results(folder / "results.json", data="M-BEIR")
    card = render_card(folder, results=[path])
    assert "| 62.5 |" in card
    assert re.search(r"From `puma/results\.json`, SHA-256 [0-9a-f]{12}, written by `puma-hf evaluate`", card)
    assert "| 79.5 |" in card  # as published, beside
    assert "Of M-BEIR's 16 rows: visualnews_task0," in card
    assert "The global pools." in card
    assert "The local pools." not in card
    assert "none of its 16 rows" not in card


def test_operations_come_from_the_sweep(folder: Path) -> None:
    count = int(re.search(r"Parameters: ([\d,]+)", render_card(folder))[1].replace(",", ""))  # type: ignore[index]
    model = make_model("full", [0.1, 0.2, 0.3, 0.4], parameters=count)
    (folder / "sweep.json").write_text(json.dumps(make_report(model).to_dict()))
    card = render_card(folder)
    assert "Operations: 2,000,000,000 for a text of 64 tokens (all layers: 4,000,000,000), 18,000,000,000 for" in card
    assert "Operations per text and image." not in card


def test_stages_are_told_from_their_recipes_without_paths(folder: Path) -> None:
    train = {"model": "/home/somebody/distilled", "data": "/home/somebody/M-BEIR", "split": "train", "loss": "mac"}
    train |= {"temperature": 0.05, "hard_temperature": 0.04, "lora_r": 64, "seed": 0, "matryoshka_dims": []}
    distill = {
        "model": "/x/pruned",
        "teacher": "/home/somebody/full",
        "metric": "mse",
        "max_steps": 150,
        "data": "/d/emoji",
    }
    for name, file, recipe in (("puma", "train", train), ("distilled", "distill", distill)):
        lora = folder.with_name(f"{name}-lora")
        lora.mkdir()
        (lora / f"{file}.yaml").write_text(yaml.safe_dump(recipe))
    card = render_card(folder)
    training = card.partition("## Training")[2].partition("## Use")[0]
    first, second = (line for line in training.splitlines() if line.startswith("- "))
    assert first.startswith("- Distilled without labels; teacher: `full`, metric `mse`, on `emoji`")
    assert "max_steps 150" in first
    assert "- Trained with the loss `mac`, on `M-BEIR`, split train: temperature 0.05, hard_temperature 0.04" in second
    assert "matryoshka_dims" not in second
    assert "somebody" not in card


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_parameters_and_bytes_are_those_that_pruning_counted(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "puma"
    report = prune(build_checkpoint(tmp_path / "original", family), folder, num_kept_layers=2)
    card = render_card(folder)
    assert f"{report.parameters_after:,}, of {report.parameters_before:,} with all" in card
    assert str(tmp_path) not in card


def test_an_adapter_names_its_base(puma_dir: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"base_model_name_or_path": str(puma_dir)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    content = render_card(tmp_path, options=CardOptions("org/lora", "org/puma"))
    card = ModelCard(content)
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert {"peft", "lora"} <= set(card.data.tags)
    assert "holds a LoRA adapter alone" in card.text
    assert "`org/puma`" in card.text
    assert str(puma_dir) not in content
