from __future__ import annotations

import filecmp
import json
import random
import shutil
import string
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor
from transformers.utils.hub import PushToHubMixin
from transformers.utils.import_utils import is_torchvision_available

from puma_hf import PumaProcessor, prune
from puma_hf.modeling import MODALITY_IDS, MODALITY_NAMES, processing_puma, video_puma
from tests.tiny import copy_checkpoint

START, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n[RET]"
IMAGE, VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))

# (has text, has image, has video) -> the prompt that the model reads, with and without an instruction.
PROMPTS = {
    "text": (
        START + "a red apple\nSummarize above sentence in one word: " + END,
        START + "Find it. a red apple\nSummarize above sentence in one word: " + END,
    ),
    "image": (
        START + IMAGE + "\nSummarize above image in one word: " + END,
        START + IMAGE + "Find it.\nSummarize above image in one word: " + END,
    ),
    "image,text": (
        START + IMAGE + "a red apple\nSummarize above image and sentence in one word: " + END,
        START + IMAGE + "Find it. a red apple\nSummarize above image and sentence in one word: " + END,
    ),
    "video": (
        START + VIDEO + "\nSummarize above video in one word: " + END,
        START + VIDEO + "Find it.\nSummarize above video in one word: " + END,
    ),
    "video,text": (
        START + VIDEO + "a red apple\nSummarize above video and sentence in one word: " + END,
        START + VIDEO + "Find it. a red apple\nSummarize above video and sentence in one word: " + END,
    ),
}


@pytest.fixture
def image(images: list[Image.Image]) -> Image.Image:
    return images[0]


def ids(processor: PumaProcessor, item: Any, *args: Any, **kwargs: Any) -> list[int]:
    batch = processor.process_inputs([item], *args, **kwargs)
    result: list[int] = batch["input_ids"][0].tolist()
    return result


def rendered(processor: PumaProcessor, item: Any, *args: Any, **kwargs: Any) -> str:
    """What the model reads, with one placeholder for each image."""
    text = processor.tokenizer.decode(ids(processor, item, *args, **kwargs))
    while "<|image_pad|><|image_pad|>" in text:
        text = text.replace("<|image_pad|><|image_pad|>", "<|image_pad|>")
    return text


def last_tokens(batch: Any) -> list[int]:
    return [int(row[mask.bool()][-1]) for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


# --- the prompt


@pytest.mark.parametrize("name", MODALITY_NAMES)
@pytest.mark.parametrize("with_instruction", [False, True])
def test_the_template_renders_the_prompt(processor: PumaProcessor, name: str, with_instruction: bool) -> None:
    content = [{"type": kind} for kind in name.split(",") if kind != "text"]
    if "text" in name:
        content.append({"type": "text", "text": "a red apple"})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if with_instruction:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": "Find it."}]})
    text = processor.apply_chat_template(messages, tokenize=False)
    assert text == PROMPTS[name][with_instruction]


@pytest.mark.parametrize("name", [name for name in MODALITY_NAMES if "video" not in name])
def test_the_tokens_are_the_prompts(processor: PumaProcessor, image: Image.Image, name: str) -> None:
    parts: dict[str, Any] = {"text": "a red apple", "image": image}
    item = {key: parts[key] for key in name.split(",")}
    assert rendered(processor, item) == PROMPTS[name][0]
    assert rendered(processor, item, "Find it.") == PROMPTS[name][1]


def test_a_system_message_given_as_a_string_renders_alike(processor: PumaProcessor) -> None:
    messages = [{"role": "system", "content": "Find it."}, {"role": "user", "content": "a red apple"}]
    assert processor.apply_chat_template(messages, tokenize=False) == PROMPTS["text"][1]


def test_a_conversation_closes_once(processor: PumaProcessor, image: Image.Image) -> None:
    chat = [
        {"role": "user", "content": [{"type": "image", "image": image}]},
        {"role": "assistant", "content": "An apple."},
        {"role": "user", "content": "a red one"},
    ]
    assert rendered(processor, chat, "Find it.") == (
        "<|im_start|>user\n" + IMAGE + "Find it.<|im_end|>\n"
        "<|im_start|>assistant\nAn apple.<|im_end|>\n"
        "<|im_start|>user\na red one\nSummarize above image and sentence in one word: " + END
    )


# --- one input, many spellings


def test_the_instruction_may_come_three_ways(processor: PumaProcessor, image: Image.Image) -> None:
    def chat(system: Any) -> list[dict[str, Any]]:
        content = [{"type": "image", "image": image}, {"type": "text", "text": "apple"}]
        return [{"role": "system", "content": system}, {"role": "user", "content": content}]

    expected = ids(processor, {"image": image, "text": "apple", "instruction": "Find it."})
    assert ids(processor, {"image": image, "text": "apple"}, "Find it.") == expected
    assert ids(processor, {"image": image, "text": "apple"}, prompt="  Find it. \n") == expected
    assert ids(processor, chat("Find it.")) == expected
    assert ids(processor, chat([{"type": "text", "text": " Find it. "}])) == expected
    assert ids(processor, {"image": image, "text": "apple"}) != expected


@pytest.mark.parametrize("instruction", [None, "", " \n"])
def test_no_instruction_leaves_no_trace(processor: PumaProcessor, instruction: str | None) -> None:
    assert rendered(processor, {"text": "a red apple", "instruction": instruction}) == PROMPTS["text"][0]
    assert rendered(processor, "a red apple", prompt=instruction) == PROMPTS["text"][0]


def test_an_inputs_own_instruction_wins(processor: PumaProcessor) -> None:
    own = {"text": "a red apple", "instruction": "Find it."}
    chat = [{"role": "system", "content": "Find it."}, {"role": "user", "content": "a red apple"}]
    for item in (own, chat):
        assert rendered(processor, item, "Something else.") == PROMPTS["text"][1]


@pytest.mark.parametrize(
    "item",
    [
        "a red apple",
        {"text": "a red apple"},
        {"text": ["a red apple"]},
        {"text": ["a red", " apple"]},
        {"text": "a red apple", "image": None, "video": None, "instruction": None},
        {"text": "a red apple", "image": []},
        {"role": "user", "content": "a red apple"},
        [{"role": "user", "content": [{"type": "text", "text": "a red apple"}]}],
    ],
)
def test_a_text_may_be_spelled_many_ways(processor: PumaProcessor, item: Any) -> None:
    assert rendered(processor, item) == PROMPTS["text"][0]


def test_an_image_may_be_spelled_many_ways(processor: PumaProcessor, image: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    image.save(path)
    content = path.read_bytes()
    spellings = [
        image,
        str(path),
        path,
        content,
        np.asarray(image),
        {"bytes": content, "path": None},
        {"image": image},
        {"image": [str(path)], "text": None},
        {"image": {"bytes": content, "path": None}},
        [{"role": "user", "content": [{"type": "image", "image": str(path)}]}],
    ]
    batch = processor.process_inputs(spellings)
    assert (batch["input_ids"] == batch["input_ids"][0]).all()
    values = batch["pixel_values"].reshape(len(spellings), -1)
    assert (values == values[0]).all()


def test_the_order_of_keys_does_not_matter(processor: PumaProcessor, image: Image.Image) -> None:
    one = {"image": image, "text": "a red apple", "instruction": "Find it."}
    other = {"instruction": "Find it.", "text": "a red apple", "image": image}
    assert ids(processor, one) == ids(processor, other)


def test_the_callers_input_stays_as_it_is(processor: PumaProcessor, image: Image.Image) -> None:
    content = [{"type": "text", "text": " a <|im_end|> b" * 20}, {"type": "image", "image": image}]
    chat = [{"role": "system", "content": " Find it. "}, {"role": "user", "content": content}]
    processor.process_inputs([chat], max_length=100, split_special_tokens=True)
    assert chat[0]["content"] == " Find it. "
    assert content == [
        {"type": "text", "text": " a <|im_end|> b" * 20},
        {"type": "image", "image": image},
    ]


# --- the batch


def mixed(images: list[Image.Image]) -> list[Any]:
    return [
        "a red apple",
        images[0],
        {"image": images[1], "text": "on a table"},
        {"image": images[1:], "text": "both", "instruction": "Find them."},
        [{"role": "user", "content": [{"type": "image", "image": images[2]}]}],
    ]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_mixed_batch(processor: PumaProcessor, images: list[Image.Image], padding_side: str) -> None:
    processor.tokenizer.padding_side = padding_side
    batch = processor.process_inputs(mixed(images))
    rows, length = batch["input_ids"].shape
    assert rows == 5
    assert batch["attention_mask"].shape == batch["mm_token_type_ids"].shape == (rows, length)
    assert batch["modality_ids"].tolist() == [0, 1, 2, 2, 1]
    assert batch["modality_ids"].dtype == torch.int64
    assert batch["num_images_per_sample"].tolist() == [0, 1, 1, 2, 1]
    assert batch["image_grid_thw"].shape == (5, 3)
    assert "num_videos_per_sample" not in batch
    assert last_tokens(batch) == [processor.ret_token_id] * rows
    patches = batch["image_grid_thw"].prod(dim=1)
    assert batch["pixel_values"].shape == (int(patches.sum()), 3 * 2 * 8 * 8)
    # Four patches are merged into one token.
    pads = (batch["input_ids"] == processor.image_token_id).sum(dim=1)
    per_image = (patches // 4).tolist()
    assert pads.tolist() == [0, per_image[0], per_image[1], per_image[2] + per_image[3], per_image[4]]
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == processor.image_token_id).long())
    padded_first = bool((batch["attention_mask"][:, 0] == 0).any())
    assert padded_first == (padding_side == "left")


def test_a_batch_holds_what_its_inputs_hold_alone(processor: PumaProcessor, images: list[Image.Image]) -> None:
    inputs = mixed(images)
    batch = processor.process_inputs(inputs)
    alone = [processor.process_inputs([item]) for item in inputs]
    for row, single in enumerate(alone):
        kept = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][kept], single["input_ids"][0])
    values = torch.cat([single["pixel_values"] for single in alone if "pixel_values" in single])
    torch.testing.assert_close(batch["pixel_values"], values, rtol=0, atol=1e-5)


def test_text_alone_brings_no_image_features(processor: PumaProcessor) -> None:
    batch = processor.process_inputs(["a", "b"])
    assert set(batch) == {"input_ids", "attention_mask", "mm_token_type_ids", "modality_ids"}


def test_ids_are_positions() -> None:
    assert list(MODALITY_IDS.values()) == [0, 1, 2, 3, 4]


# --- length


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("limit", [90, 91, 110, 200])
def test_long_text_is_cut_before_the_end_of_the_prompt(
    processor: PumaProcessor, image: Image.Image, limit: int, padding_side: str
) -> None:
    processor.tokenizer.padding_side = padding_side
    text = "a red apple on a table " * 100
    instruction = "Find it."
    inputs = [text, {"image": image, "text": text}, "short"]
    batch = processor.process_inputs(inputs, instruction, max_length=limit)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert max(lengths) <= limit
    assert min(lengths[:2]) > limit - 8  # no more is cut than needed
    assert last_tokens(batch) == [processor.ret_token_id] * 3
    assert (batch["input_ids"][1] == processor.image_token_id).sum() == batch["image_grid_thw"].prod() // 4
    for row in range(2):
        decoded = processor.tokenizer.decode(batch["input_ids"][row][batch["attention_mask"][row].bool()])
        assert "Find it. a red apple" in decoded
        assert decoded.endswith("in one word: " + END)


def test_the_tokenizers_limit_is_the_default(processor: PumaProcessor) -> None:
    processor.tokenizer.model_max_length = 75
    assert 70 < len(ids(processor, "apple " * 100)) <= 75
    assert len(ids(processor, "apple " * 100, max_length=90)) > 75


def test_what_fits_is_not_cut(processor: PumaProcessor) -> None:
    text = "a red apple on a table"
    whole = ids(processor, text)
    assert ids(processor, text, max_length=len(whole)) == whole
    assert len(ids(processor, text, max_length=len(whole) - 1)) < len(whole)


@pytest.mark.parametrize("text", ["🍎" * 50, "苹果" * 50, "e\u0301" * 50, "ä🍎 x" * 30])
def test_no_character_is_cut_in_half(processor: PumaProcessor, text: str) -> None:
    shortest = len(ids(processor, text[0]))
    for limit in range(shortest, shortest + 12):
        tokens = ids(processor, text, max_length=limit)
        assert len(tokens) <= limit
        decoded = processor.tokenizer.decode(tokens)
        assert "\N{REPLACEMENT CHARACTER}" not in decoded
        kept = decoded.removeprefix(START).partition("\nSummarize")[0]
        assert kept
        assert text.startswith(kept)
        # What is cut off would not have fitted: one more character takes at most 4 tokens.
        assert len(tokens) > limit - 4 or kept == text
        assert tokens[-1] == processor.ret_token_id


def test_random_texts_keep_the_limit(processor: PumaProcessor) -> None:
    generator = random.Random(0)
    alphabet = string.printable + "äß苹🍎\u0301"
    for _ in range(50):
        text = "x" + "".join(generator.choices(alphabet, k=generator.randint(1, 200)))
        limit = generator.randint(70, 150)
        tokens = ids(processor, text, max_length=limit)
        assert len(tokens) <= limit
        assert tokens[-1] == processor.ret_token_id


@pytest.mark.parametrize("item", ["image", "image and text", "text"])
def test_what_cannot_be_cut_is_an_error(processor: PumaProcessor, images: list[Image.Image], item: str) -> None:
    inputs = {"image": images[0], "image and text": {"image": images[0], "text": "apple"}, "text": "apple"}
    for limit in (0, 10):
        message = rf"inputs\[0\]: .*more than max_length={limit} tokens .*Give it fewer or smaller images, or"
        with pytest.raises(ValueError, match=message):
            processor.process_inputs([inputs[item]], max_length=limit)


def test_the_error_counts_the_images_tokens(processor: PumaProcessor, images: list[Image.Image]) -> None:
    pads = ids(processor, {"image": images}).count(processor.image_token_id)
    with pytest.raises(ValueError, match=rf"\({pads} of them for images\)"):
        processor.process_inputs([{"image": images, "text": "apple"}], max_length=60)


@pytest.mark.parametrize(
    "images_kwargs",
    [
        {"size": {"shortest_edge": 256, "longest_edge": 1024}},
        {"size": {"longest_edge": 1024}},
        {"size": {"shortest_edge": 8192}},
        {"max_pixels": 1024},
        None,
    ],
)
def test_the_image_size_is_respected_and_counted(
    processor: PumaProcessor, images_kwargs: dict[str, Any] | None
) -> None:
    item = {"image": Image.new("RGB", (64, 48)), "text": "apple " * 100}
    batch = processor.process_inputs([item], max_length=160, images_kwargs=images_kwargs)
    pads = int((batch["input_ids"] == processor.image_token_id).sum())
    area = pads * 16 * 16
    if images_kwargs is None:
        assert area == 64 * 48
    elif images_kwargs.get("size", {}).get("shortest_edge", 0) == 8192:
        assert area >= 8192
    else:
        assert area <= 1024
    assert 150 < batch["input_ids"].shape[1] <= 160


# --- images of difficult shapes


@pytest.mark.parametrize("size", [(1, 1), (40, 1), (1, 40), (3, 40), (40, 3), (3, 3), (1, 3), (3, 1)])
def test_a_thin_image_is_not_mistaken_for_channels_first(processor: PumaProcessor, size: tuple[int, int]) -> None:
    batch = processor.process_inputs([Image.new("RGB", size, (255, 0, 51))])
    settings = processor.image_processor
    colour = torch.tensor([1.0, 0.0, 0.2])
    expected = (colour - torch.tensor(settings.image_mean)) / torch.tensor(settings.image_std)
    values = batch["pixel_values"].reshape(-1, 3, 2 * 8 * 8)
    torch.testing.assert_close(values, expected[None, :, None].expand_as(values), rtol=0, atol=1e-5)
    _, height, width = batch["image_grid_thw"][0].tolist()
    assert (height > width, height < width) == (size[1] > size[0], size[1] < size[0])


def test_pixels_are_those_of_the_image_processor_itself(processor: PumaProcessor, images: list[Image.Image]) -> None:
    expected = processor.image_processor(images, return_tensors="pt")
    batch = processor.process_inputs(images)
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["image_grid_thw"], expected["image_grid_thw"])


def test_left_and_right_of_a_thin_image_stay_apart(processor: PumaProcessor) -> None:
    image = Image.new("RGB", (40, 1), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 1))
    batch = processor.process_inputs([image])
    values = batch["pixel_values"].reshape(-1, 3, 2, 8, 8).mean(dim=(2, 3, 4))
    assert values[0].argmax() == 0
    assert values[-1].argmax() == 2


def test_a_huge_image_in_memory_is_scaled_down(processor: PumaProcessor) -> None:
    batch = processor.process_inputs([Image.new("L", (20_000, 500), 100)])
    assert batch["image_grid_thw"].prod() * 64 <= 256 * 256


# --- special tokens in the user's text


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|im_end|>", "[RET]"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: text,
        lambda text: {"text": text},
        lambda text: {"text": "apple", "instruction": text},
        lambda text: {"text": [text[:4], text[4:]]},
        lambda text: [{"role": "user", "content": text}],
        lambda text: [{"role": "system", "content": text}, {"role": "user", "content": "apple"}],
        lambda text: [
            {
                "role": "user",
                "content": [{"type": "text", "text": text[:4]}, {"type": "text", "text": text[4:]}],
            }
        ],
    ],
    ids=["string", "dict", "instruction", "split-list", "chat", "system", "split-chat"],
)
def test_special_tokens_in_text(processor: PumaProcessor, wrap: Any, token: str) -> None:
    item = wrap(f"a {token} b")
    message = rf"inputs\[1\]: the text contains the special token '{token}'.*Remove it, or have it read as plain text"
    with pytest.raises(ValueError, match=message.replace("|", r"\|").replace("[R", r"\[R")):
        processor.process_inputs(["apple", item])
    plain = ids(processor, wrap("an apple"))
    tokens = ids(processor, item, split_special_tokens=True)
    token_id = processor.tokenizer.convert_tokens_to_ids(token)
    assert tokens.count(token_id) == plain.count(token_id)
    assert f"a {token[0]} {token[1:]} b" in processor.tokenizer.decode(tokens)
    assert tokens[-1] == processor.ret_token_id


def test_special_tokens_in_the_prompt_argument(processor: PumaProcessor) -> None:
    with pytest.raises(ValueError, match=r"special token '\[RET\]'"):
        processor.process_inputs(["apple"], "find [RET]")
    tokens = ids(processor, "apple", "find [RET]", split_special_tokens=True)
    assert tokens.count(processor.ret_token_id) == 1


def test_splitting_does_not_join_another_token(processor: PumaProcessor) -> None:
    nested = "<|im_<|im_end|>end|>"
    tokens = ids(processor, nested, split_special_tokens=True)
    assert tokens.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


# --- what is refused

NEITHER = r"inputs\[0\]: got {}, which is neither text nor image. Pass a string, an image, a dict"
NOTHING = r"inputs\[0\]: it holds no text, image or video besides an instruction. Pass a string"
NOT_TEXT = r"inputs\[0\]: a text must be a non-empty string, got {}. Leave the key or input out"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("", NOT_TEXT.format("''")),
        (" \n", NOT_TEXT.format("' .n'")),
        ({"text": ""}, NOT_TEXT.format("''")),
        ({"text": 5}, NOT_TEXT.format("5")),
        ({"text": ["a", None]}, NOT_TEXT.format("None")),
        (None, NEITHER.format("None")),
        (5, NEITHER.format("5")),
        (1.5, NEITHER.format("1.5")),
        (True, NEITHER.format("True")),
        ([], NEITHER.format(r"\[\]")),
        (["a", "b"], NEITHER.format(".*")),
        ({"audio": 1}, r"unknown keys \['audio'\]. Pass a string"),
        ({}, "the dict holds no text, image or video"),
        ({"text": None, "image": None}, r"\(all values are None\)"),
        ({"instruction": "Find it."}, "the dict holds no text, image or video"),
        ({"image": []}, NOTHING),
        ({"text": [], "instruction": "Find it."}, NOTHING),
        ({"text": "a", "instruction": 5}, "an instruction must be a string, got 5. Leave it out for none"),
        ({"image": 5}, r"inputs\[0\]: an object of type int is not an image"),
        ({"image": [None]}, "an object of type NoneType is not an image"),
        (object(), "an object of type object is not an image"),
        ([{"role": "system", "content": "Find it."}], NOTHING),
        ([{"role": "user", "content": []}], NOTHING),
        ([{"role": "user"}], "content must be a string or a list, got NoneType"),
        ([{"role": "user", "content": ["a"]}], "chat content must be items like .*, got 'a'"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "chat content must be items like"),
        ([{"role": "user", "content": [{"type": "text"}]}], "chat content must be items like"),
        (
            [{"role": "user", "content": [{"type": "image", "image": "a", "max_pixels": 50_000}]}],
            "max_pixels.* in encode",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a", "cache": True}]}],
            "without other keys, got .*cache",
        ),
        ([{"role": "user", "content": [{"type": "image", "url": "a", "path": "b"}]}], "without other keys"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a", "detail": "low"}}]}], "detail"),
        ([{"role": "user", "content": [{"type": ["image"], "image": "a"}]}], "chat content must be items like"),
        ([{"role": "user", "content": "a", "image": "b"}], r"unknown keys \['image'\] in a chat message"),
        (pd.Series(["a", "b"]), r"a Series may hold inputs, but is none. Pass list\(...\) of it"),
        ("a \ud83d", r"inputs\[0\]: 'a .ud83d' holds half a character \(a lone surrogate\). Mend its encoding"),
        ({"text": "a", "instruction": "\ud83d"}, "holds half a character"),
        ([{"role": "tool", "content": "a"}], "unknown role 'tool' in a chat. Use one of 'system', 'user'"),
        ([{"role": 5, "content": "a"}], "unknown role 5 in a chat"),
        (
            [
                {"role": "system", "content": [{"type": "image", "image": "a"}]},
                {"role": "user", "content": "a"},
            ],
            "a system message is an instruction and holds text only. Put media into a user message",
        ),
    ],
)
def test_bad_inputs_are_refused(processor: PumaProcessor, item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor.process_inputs([item])


def test_the_position_of_a_bad_input_is_named(processor: PumaProcessor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"inputs\[2\]: no image file at"):
        processor.process_inputs(["a", "b", {"image": str(tmp_path / "gone.png")}])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("a red apple", r"inputs must be a list of inputs, got str. Wrap a single one in \[ \]"),
        ({"text": "a"}, "must be a list of inputs, got dict"),
        (5, "must be a list of inputs, got int"),
        (None, "must be a list of inputs, got NoneType"),
        (Image.new("RGB", (2, 2)), "must be a list of inputs, got Image"),
        (np.zeros((20, 20, 3), np.uint8), "must be a list of inputs, got ndarray"),
        (BytesIO(b"a\nb"), "must be a list of inputs, got BytesIO"),
        (pd.DataFrame({"text": ["a"]}), "must be a list of inputs, got DataFrame"),
        ([], "inputs is empty: pass at least one input"),
    ],
)
def test_the_inputs_must_be_a_list(processor: PumaProcessor, inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor.process_inputs(inputs)


@pytest.mark.parametrize(
    "collect",
    [
        tuple,
        iter,
        np.array,
        lambda texts: np.array(texts, dtype=object),
        pd.Series,
        lambda texts: Dataset.from_dict({"text": texts})["text"],
        lambda texts: Dataset.from_dict({"text": texts, "image": [None, None]}),
    ],
    ids=["tuple", "iterator", "strings", "objects", "Series", "Column", "Dataset"],
)
def test_other_collections_are_read_as_lists(processor: PumaProcessor, collect: Any) -> None:
    texts = ["a red apple", "a green one"]
    expected = processor.process_inputs(texts)["input_ids"]
    assert torch.equal(processor.process_inputs(collect(texts))["input_ids"], expected)


def test_the_prompt_must_be_a_string(processor: PumaProcessor) -> None:
    wrong: Any = 5
    with pytest.raises(ValueError, match="an instruction must be a string, got 5"):
        processor.process_inputs(["a"], prompt=wrong)


@pytest.mark.parametrize("text", ["a red apple", ["a red apple"], ["a[RET]", "a[RET] "], "a" * 100])
def test_a_prompt_that_nobody_rendered_is_refused(processor: PumaProcessor, text: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"The prompt 'a.*' does not end in \[RET\].*Pass inputs to process_inputs"):
        processor(text=text)


def test_rendered_prompts_are_taken(processor: PumaProcessor) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "a red apple"}]}]
    expected = processor.process_inputs(["a red apple"])["input_ids"]
    prompt = processor.apply_chat_template(chat, tokenize=False)
    assert torch.equal(processor(text=prompt, return_tensors="pt")["input_ids"], expected)
    tokenized = processor.apply_chat_template([chat], tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(tokenized["input_ids"], expected)


def test_a_template_without_ret_is_refused(processor: PumaProcessor) -> None:
    processor.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    with pytest.raises(ValueError, match=r"does not end in \[RET\].*restore chat_template.jinja"):
        processor.process_inputs(["apple"])


# --- torchvision; what really runs videos is tested in test_video_puma.py


class FakeVideoProcessor(PushToHubMixin):
    """Stands for Qwen2VLVideoProcessor, which without torchvision cannot be made; keeps its settings, as that does."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)


def pretend(monkeypatch: pytest.MonkeyPatch, torchvision: bool) -> None:
    if torchvision and not is_torchvision_available():
        monkeypatch.setattr("transformers.Qwen2VLVideoProcessor", FakeVideoProcessor)
    monkeypatch.setattr(video_puma, "is_torchvision_available", lambda: torchvision)


def test_video_names_its_extra(processor: PumaProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processing_puma, "is_torchvision_available", lambda: False)
    chat = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]
    for item in ({"video": "a.mp4"}, chat):
        message = r"inputs\[0\]: video input needs torchvision.*pip install 'puma-hf\[video\]'"
        with pytest.raises(ImportError, match=message):
            processor.process_inputs([item])


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("made", [False, True])
def test_directories_are_the_same_with_and_without_torchvision(
    qwen_dir: Path, puma_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool, opened: bool
) -> None:
    pretend(monkeypatch, made)
    prune(qwen_dir, tmp_path / "made", num_kept_layers=2)
    names = {path.name for path in puma_dir.iterdir()}
    assert filecmp.cmpfiles(puma_dir, tmp_path / "made", names, shallow=False) == (ANY, [], [])
    pretend(monkeypatch, opened)
    for number, load in enumerate((PumaProcessor.from_pretrained, AutoProcessor.from_pretrained)):
        loaded = load(tmp_path / "made")
        assert isinstance(loaded.video_processor, dict) is not opened
        loaded.save_pretrained(tmp_path / str(number))
        saved = tmp_path / str(number) / "processor_config.json"
        assert saved.read_bytes() == (puma_dir / saved.name).read_bytes()


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("made", [False, True])
def test_directories_of_the_first_release_open(
    puma_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool, opened: bool
) -> None:
    """Made without torchvision they had no video settings; with it transformers added an auto_map to them."""
    shutil.copytree(puma_dir, tmp_path / "old")
    file = tmp_path / "old" / "processor_config.json"
    current = json.loads(file.read_text())
    settings = {**current["video_processor"], "auto_map": current["auto_map"], "fps": 2}
    others = {name: value for name, value in current.items() if name != "video_processor"}
    file.write_text(json.dumps({**others, "video_processor": settings} if made else others))
    pretend(monkeypatch, opened)
    PumaProcessor.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    expected = current["video_processor"] | ({"fps": 2} if made else {})
    assert json.loads((tmp_path / "new" / file.name).read_text()) == {**others, "video_processor": expected}


def test_video_settings_are_those_of_the_source(qwen_dir: Path, tmp_path: Path) -> None:
    source = copy_checkpoint(qwen_dir, tmp_path / "source")
    own = {"size": {"shortest_edge": 5, "longest_edge": 7}, "patch_size": 8, "fps": 3}
    (source / "video_preprocessor_config.json").write_text(json.dumps(own))
    prune(source, tmp_path / "pruned", num_kept_layers=2)
    settings = json.loads((tmp_path / "pruned" / "processor_config.json").read_text())["video_processor"]
    assert {name: settings[name] for name in own} == own


# --- saving


def test_a_saved_processor_gives_the_same_tokens(
    processor: PumaProcessor, images: list[Image.Image], tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path)
    expected = processor.process_inputs(mixed(images), "Find it.")
    for loaded in (PumaProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is PumaProcessor
        assert loaded.ret_token_id == processor.ret_token_id
        batch = loaded.process_inputs(mixed(images), "Find it.")
        assert set(batch) == set(expected)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    copied = {"processing_puma.py", "image_inputs_puma.py", "chat_template.jinja", "tokenizer.json"}
    assert copied <= {path.name for path in tmp_path.iterdir()}
