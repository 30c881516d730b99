"""The ways to read an input: tokens as the stock template gives them, positions as the stock decoder takes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

from puma_hf import PumaProcessor, prune
from puma_hf.configs import PruneConfig
from puma_hf.modeling.readings_puma import READINGS, released_sentence
from tests.test_sources import written_out
from tests.tiny import build_checkpoint

INSTRUCTION = "Find an image that shows this."


@pytest.fixture(scope="module")
def released(qwen_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "puma"
    prune(qwen_dir, folder, num_kept_layers=2, reading="puma-released")
    return folder


@pytest.fixture
def processor(released: Path) -> PumaProcessor:
    loaded: PumaProcessor = AutoProcessor.from_pretrained(released)
    return loaded


def test_a_long_text_is_cut_at_450_tokens(processor: PumaProcessor, images: list[Image.Image]) -> None:
    processor.tokenizer.model_max_length = 2000
    words = "on the wooden table, " * 100
    ids = processor.tokenizer(released_sentence(f"{INSTRUCTION}\n{words}"))["input_ids"]
    assert len(ids) > 450
    for image in (None, images[0]):
        found = processor.process_inputs([{"text": words, "image": image}], INSTRUCTION)["input_ids"][0].tolist()
        # The cut takes the full stop along.
        told = ids[:450] + processor.tokenizer("\nSummarize above")["input_ids"]
        assert told in [found[start : start + len(told)] for start in range(len(found))]
    # The template alone does the rest, as for programs that render it themselves.
    chat: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A red apple."}]}]
    rendered = processor.apply_chat_template(chat, tokenize=False)
    assert f"{rendered}." == written_out("puma-released", 1, "a red apple", "")


def test_the_directory_records_its_reading(qwen_dir: Path, puma_dir: Path, released: Path, tmp_path: Path) -> None:
    configs = [json.loads((folder / "config.json").read_text()) for folder in (released, puma_dir)]
    assert [config["positions"] for config in configs] == ["sequential", "mrope"]
    assert json.loads((released / "processor_config.json").read_text())["reading"] == "puma-released"
    # Cut further, saved again, it stays as it is.
    assert prune(released, tmp_path / "one", num_kept_layers=1).reading == "puma-released"
    SentenceTransformer(str(tmp_path / "one"), trust_remote_code=True, device="cpu").save(str(tmp_path / "saved"))
    for name in ("chat_template.jinja", "processor_config.json"):
        assert (tmp_path / "saved" / name).read_text() == (released / name).read_text()
    assert AutoModel.from_pretrained(tmp_path / "saved").config.positions == "sequential"


def test_the_command_offers_every_reading() -> None:
    offered = get_args(get_type_hints(PruneConfig)["reading"])
    assert {name for one in offered for name in get_args(one)} == set(READINGS)


def test_a_reading_that_the_source_cannot_have(qwen_dir: Path, puma_dir: Path, released: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reading='clip' is not known here\. Choose one of 'puma', 'puma-released'"):
        prune(qwen_dir, tmp_path / "out", num_kept_layers=1, reading="clip")
    with pytest.raises(ValueError, match=r"was made for 'puma'\. Leave it out"):
        prune(puma_dir, tmp_path / "out", num_kept_layers=1, reading="puma-released")
    source = build_checkpoint(tmp_path / "source", "qwen3_vl")
    message = r"made for qwen2_vl and qwen2_5_vl, but .* is a Qwen3-VL\. Choose reading='puma'"
    with pytest.raises(ValueError, match=message):
        prune(source, tmp_path / "out", num_kept_layers=1, reading="puma-released")
    assert not (tmp_path / "out").exists()
    shutil.copytree(released, tmp_path / "changed")
    for name, key, loader in (("processor_config", "reading", AutoProcessor), ("config", "positions", AutoModel)):
        file = tmp_path / "changed" / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: "newer"}))
        with pytest.raises(ValueError, match=f"{key}='newer'"):
            loader.from_pretrained(file.parent)
