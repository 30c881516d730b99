"""The ways to read an input: tokens as the stock template gives them, positions as the stock decoder takes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel, AutoProcessor, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from puma_hf import PumaProcessor, prune
from puma_hf.configs import PruneConfig
from puma_hf.modeling.fast_path_puma import FastPath
from puma_hf.modeling.readings_puma import READINGS, released_sentence
from tests.tiny import build_checkpoint

# Of the published Qwen2-VL checkpoints, without its counting of pictures and its videos.
STOCK_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)
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


def stock_ids(processor: PumaProcessor, image: Image.Image | None, sentence: str, told: str) -> list[int]:
    """What the stock processor makes of the released messages, up to [RET]."""
    content: list[dict[str, Any]] = [{"type": "image"}] if image is not None else []
    content.append({"type": "text", "text": f"{sentence}\nSummarize above {told} in one word: "})
    answer = [{"type": "text", "text": "[RET]."}]
    messages: Any = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    text = processor.apply_chat_template(messages, chat_template=STOCK_TEMPLATE, tokenize=False)
    batch = Qwen2VLProcessor.__call__(processor, images=None if image is None else [image], text=[text])
    ids: list[int] = list(batch["input_ids"][0])
    return ids[: ids.index(processor.ret_token_id) + 1]


# By name: has an image, the text, the instruction, the sentence that is read, and what it is called.
CASES: dict[str, tuple[bool, str | None, str | None, str, str]] = {
    "text": (False, "a red apple", None, "A red apple.", "sentence"),
    "text, instructed": (False, "a red apple", INSTRUCTION, f"{INSTRUCTION}\na red apple.", "sentence"),
    "a question": (False, " which one?\r\n", None, "Which one?", "sentence"),
    "a poor instruction": (False, "An apple!", ' "find it" ', "Find it.\nAn apple!", "sentence"),
    "image": (True, None, None, "", "image"),
    "image, instructed": (True, None, INSTRUCTION, INSTRUCTION, "image and sentence"),
    "both, instructed": (True, "a red apple", INSTRUCTION, f"{INSTRUCTION}\na red apple.", "image and sentence"),
}


@pytest.mark.parametrize("name", CASES)
def test_released_tokens_are_the_stock_templates(processor: Any, images: list[Image.Image], name: str) -> None:
    has_image, text, instruction, sentence, told = CASES[name]
    image = images[0] if has_image else None
    item = {key: value for key, value in (("image", image), ("text", text)) if value is not None}
    expected = stock_ids(processor, image, sentence, told)
    found = processor.process_inputs([item], instruction)
    assert found["input_ids"][0].tolist() == expected
    assert processor.process_inputs([{**item, "instruction": instruction}])["input_ids"][0].tolist() == expected
    assert int(found["modality_ids"][0]) == {"sentence": 0, "image": 1}.get(told, 2 if text else 1)
    chat: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}] if has_image else []}]
    chat[0]["content"] += [{"type": "text", "text": sentence}] if sentence else []
    # The template alone does the rest, as for programs that render it themselves.
    rendered = processor.apply_chat_template(chat, tokenize=False)
    assert rendered == processor.tokenizer.decode(stock_ids(processor, None, sentence, told)).replace(
        "user\n", "user\n<|vision_start|><|image_pad|><|vision_end|>" if has_image else "user\n"
    )


def test_a_long_text_is_cut_at_450_tokens(processor: PumaProcessor, images: list[Image.Image]) -> None:
    processor.tokenizer.model_max_length = 2000
    words = "on the wooden table, " * 100
    ids = processor.tokenizer(released_sentence(f"{INSTRUCTION}\n{words}"))["input_ids"]
    assert len(ids) > 450
    for image, told in ((None, "sentence"), (images[0], "image and sentence")):
        item = {"text": words} if image is None else {"text": words, "image": image}
        found = processor.process_inputs([item], INSTRUCTION)["input_ids"][0].tolist()
        # The cut takes the full stop along.
        assert found == stock_ids(processor, image, processor.tokenizer.decode(ids[:450]), told)


@torch.inference_mode()
def by_hand(source: Path, model: Any, batch: Any, *, kept: int) -> Tensor:
    """The stock model of `kept` layers, its decoder given embedded inputs and positions that count every token."""
    stock = Qwen2VLForConditionalGeneration.from_pretrained(source).eval().model
    decoder = stock.language_model
    decoder.layers = decoder.layers[:kept]
    decoder.embed_tokens.weight.data = model.get_input_embeddings().weight.data
    rows = []
    grids, pixels = batch["image_grid_thw"], batch["pixel_values"]
    features = iter(stock.get_image_features(pixels, grids).pooler_output)
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        ids = ids[mask]
        embedded = decoder.embed_tokens(ids)
        places = ids == stock.config.image_token_id
        if places.any():
            embedded[places] = next(features)
        positions = torch.arange(len(ids))[None]
        states = decoder(inputs_embeds=embedded[None], position_ids=positions, use_cache=False).last_hidden_state
        rows.append(torch.nn.functional.normalize(states[0, -1], dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_every_token_by_every_way(
    qwen_dir: Path, puma_dir: Path, released: Path, processor: PumaProcessor, images: list[Image.Image], side: str
) -> None:
    inputs: list[Any] = [
        {"text": "a red apple", "instruction": INSTRUCTION},
        {"image": images[0]},
        {"image": images[1], "text": "red", "instruction": INSTRUCTION},
        {"image": images[2], "instruction": INSTRUCTION},
        "a table",
    ]
    processor.tokenizer.padding_side = side
    batch = processor.process_inputs(inputs)
    model = AutoModel.from_pretrained(released).eval()
    expected = by_hand(qwen_dir, model, batch, kept=2)
    with torch.inference_mode():
        found = model(**batch).embeddings
        features = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
        without = {name: value for name, value in batch.items() if name != "pixel_values"}
        once = model(**without, mm_encoder_outputs={"image": features}).embeddings
        model.config.positions = "mrope"
        other = model(**batch).embeddings
    assert (found - expected).abs().max() <= 1e-5
    assert (once - expected).abs().max() <= 1e-5
    assert (other - expected).abs().amax(dim=1)[[1, 2, 3]].min() > 3e-4  # images show which positions they got
    assert (other - expected).abs().amax(dim=1)[[0, 4]].max() <= 1e-5  # and texts have but one kind
    sentences = SentenceTransformer(str(released), trust_remote_code=True, device="cpu")
    module: Any = sentences[0]
    for fast_path in (FastPath(), FastPath(max_tokens=1), None):
        module.fast_path = fast_path
        np.testing.assert_allclose(sentences.encode(inputs), expected.numpy(), rtol=0, atol=1e-5)


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
