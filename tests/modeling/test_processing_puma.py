"""What a processor makes of inputs: the prompt to the byte, the batch, its lengths, what is refused, what is saved."""

from __future__ import annotations

import filecmp
import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from PIL import ExifTags, Image
from transformers import AutoProcessor
from transformers.dynamic_module_utils import check_imports, get_relative_import_files
from transformers.utils.hub import PushToHubMixin
from transformers.utils.import_utils import is_torchvision_available

from puma_hf import PumaProcessor, prune
from puma_hf.modeling import MODALITY_NAMES, inputs_puma, processing_puma

START, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n[RET]"
IMAGE, VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))

# What is summarized -> what stands before it, and whether there is a text.
PROMPTS = {
    "text": ("sentence", "", True),
    "image": ("image", IMAGE, False),
    "image,text": ("image and sentence", IMAGE, True),
    "video": ("video", VIDEO, False),
    "video,text": ("video and sentence", VIDEO, True),
}


def prompt_of(name: str, instruction: str = "") -> str:
    """The prompt that the model reads."""
    named, media, has_text = PROMPTS[name]
    said = f"{instruction} a red apple".strip() if has_text else instruction
    return f"{START}{media}{said}\nSummarize above {named} in one word: {END}"


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
def test_the_template_renders_the_prompt(
    processor: PumaProcessor, image: Image.Image, name: str, with_instruction: bool
) -> None:
    content: list[dict[str, Any]] = [{"type": kind} for kind in name.split(",") if kind != "text"]
    content += [{"type": "text", "text": "a red apple"}] if "text" in name else []
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if with_instruction:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": "Find it."}]})
    expected = prompt_of(name, "Find it." if with_instruction else "")
    assert processor.apply_chat_template(messages, tokenize=False) == expected
    if "video" not in name:
        item = {key: {"text": "a red apple", "image": image}[key] for key in name.split(",")}
        assert rendered(processor, item, "Find it." if with_instruction else None) == expected


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
    as_strings = [{"role": "system", "content": "Find it."}, {"role": "user", "content": "a red apple"}]
    assert processor.apply_chat_template(as_strings, tokenize=False) == prompt_of("text", "Find it.")


# --- one input, many spellings


def test_the_instruction_may_come_three_ways(processor: PumaProcessor, image: Image.Image) -> None:
    def chat(system: Any) -> list[dict[str, Any]]:
        content = [{"type": "image", "image": image}, {"type": "text", "text": "apple"}]
        return [{"role": "system", "content": system}, {"role": "user", "content": content}]

    expected = ids(processor, {"image": image, "text": "apple", "instruction": "Find it."})
    assert ids(processor, {"instruction": "Find it.", "text": "apple", "image": image}) == expected
    assert ids(processor, {"image": image, "text": "apple"}, prompt="  Find it. \n") == expected
    assert ids(processor, chat("Find it."), "Something else.") == expected
    assert ids(processor, chat([{"type": "text", "text": " Find it. "}])) == expected
    assert ids(processor, {"image": image, "text": "apple"}) != expected
    own = {"text": "a red apple", "instruction": "Find it."}
    assert rendered(processor, own, "Something else.") == prompt_of("text", "Find it.")
    for item in ({"text": ["a red", " apple"], "image": []}, {"role": "user", "content": "a red apple"}):
        assert rendered(processor, item) == prompt_of("text")


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
    inputs = mixed(images)
    alone = [processor.process_inputs([item]) for item in inputs]
    assert set(alone[0]) == {"input_ids", "attention_mask", "mm_token_type_ids", "modality_ids"}
    processor.tokenizer.padding_side = padding_side
    batch = processor.process_inputs(inputs)
    assert batch["attention_mask"].shape == batch["mm_token_type_ids"].shape == batch["input_ids"].shape
    assert batch["modality_ids"].tolist() == [0, 1, 2, 2, 1]
    assert batch["num_images_per_sample"].tolist() == [0, 1, 1, 2, 1]
    assert "num_videos_per_sample" not in batch
    assert last_tokens(batch) == [processor.ret_token_id] * 5
    patches = batch["image_grid_thw"].prod(dim=1)
    assert batch["pixel_values"].shape == (int(patches.sum()), 3 * 2 * 8 * 8)
    pads = batch["input_ids"] == processor.image_token_id
    per_image = (patches // 4).tolist()  # four patches are merged into one token
    per_row = [0, per_image[0], per_image[1], per_image[2] + per_image[3], per_image[4]]
    assert pads.sum(dim=1).tolist() == per_row
    assert torch.equal(batch["mm_token_type_ids"], pads.long())
    assert bool((batch["attention_mask"][:, 0] == 0).any()) == (padding_side == "left")
    # It holds what its inputs hold alone.
    for row, single in enumerate(alone):
        assert torch.equal(batch["input_ids"][row][batch["attention_mask"][row].bool()], single["input_ids"][0])
    values = torch.cat([single["pixel_values"] for single in alone if "pixel_values" in single])
    torch.testing.assert_close(batch["pixel_values"], values, rtol=0, atol=1e-5)


# --- length


@pytest.mark.parametrize(("limit", "padding_side"), [(90, "left"), (91, "right"), (200, "right")])
def test_long_text_is_cut_before_the_end_of_the_prompt(
    processor: PumaProcessor, image: Image.Image, limit: int, padding_side: str
) -> None:
    processor.tokenizer.padding_side = padding_side
    text = "a red apple on a table " * 100
    batch = processor.process_inputs([text, {"image": image, "text": text}, "short"], "Find it.", max_length=limit)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert max(lengths) <= limit
    assert min(lengths[:2]) > limit - 8  # no more is cut than needed
    assert last_tokens(batch) == [processor.ret_token_id] * 3
    assert (batch["input_ids"][1] == processor.image_token_id).sum() == batch["image_grid_thw"].prod() // 4
    for row in range(2):
        decoded = processor.tokenizer.decode(batch["input_ids"][row][batch["attention_mask"][row].bool()])
        assert "Find it. a red apple" in decoded
        assert decoded.endswith("in one word: " + END)


@pytest.mark.parametrize("text", ["🍎" * 50, "e\u0301" * 50, "ä🍎 x" * 30])
def test_no_character_is_cut_in_half(processor: PumaProcessor, text: str) -> None:
    shortest = len(ids(processor, text[0]))
    for limit in range(shortest, shortest + 12):
        tokens = ids(processor, text, max_length=limit)
        decoded = processor.tokenizer.decode(tokens)
        assert "\N{REPLACEMENT CHARACTER}" not in decoded
        kept = decoded.removeprefix(START).partition("\nSummarize")[0]
        assert kept
        assert text.startswith(kept)
        # What is cut off would not have fitted: one more character takes at most 4 tokens.
        assert limit - 4 < len(tokens) <= limit or kept == text
        assert tokens[-1] == processor.ret_token_id


def test_what_cannot_be_cut_is_an_error(processor: PumaProcessor, images: list[Image.Image]) -> None:
    message = r"inputs\[0\]: .*more than max_length=10 tokens .*Give it fewer or smaller images, or"
    with pytest.raises(ValueError, match=message):
        processor.process_inputs([images[0]], max_length=10)
    pads = ids(processor, {"image": images}).count(processor.image_token_id)
    with pytest.raises(ValueError, match=rf"\({pads} of them for images\)"):
        processor.process_inputs([{"image": images, "text": "apple"}], max_length=60)


# --- images of difficult shapes


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 3), (3, 3), (3, 1)])
def test_a_thin_image_is_not_mistaken_for_channels_first(processor: PumaProcessor, size: tuple[int, int]) -> None:
    batch = processor.process_inputs([Image.new("RGB", size, (255, 0, 51))])
    settings = processor.image_processor
    colour = torch.tensor([1.0, 0.0, 0.2])
    expected = (colour - torch.tensor(settings.image_mean)) / torch.tensor(settings.image_std)
    values = batch["pixel_values"].reshape(-1, 3, 2 * 8 * 8)
    torch.testing.assert_close(values, expected[None, :, None].expand_as(values), rtol=0, atol=1e-5)
    _, height, width = batch["image_grid_thw"][0].tolist()
    assert (height > width, height < width) == (size[1] > size[0], size[1] < size[0])


# --- special tokens in the user's text


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "[RET]"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: text,
        lambda text: {"text": "apple", "instruction": text},
        lambda text: [{"role": "user", "content": [{"type": "text", "text": t} for t in (text[:4], text[4:])]}],
    ],
    ids=["string", "instruction", "split-chat"],
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


# --- what is refused

NO_IMAGE = r"inputs\[0\]: an object of type {} cannot be read as an image \(it is no PIL image, path, URL"
NOTHING = r"inputs\[0\]: it holds no text, image or video besides an instruction. Pass a string"
NOT_TEXT = r"inputs\[0\]: a text must be a non-empty string, got {}. Leave the key or input out"
NO_ITEM = "chat content must be items like .*, without other keys, got "


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("", NOT_TEXT.format("''")),
        ({"text": ["a", None]}, NOT_TEXT.format("None")),
        (1.5, NO_IMAGE.format("float")),
        (pd.Series(["a", "b"]), NO_IMAGE.format("Series")),
        ({"audio": 1}, r"unknown keys \['audio'\]. Pass a string"),
        ({"text": None, "image": None}, NOTHING),
        ({"instruction": "Find it."}, NOTHING),
        ({"text": "a", "instruction": 5}, "an instruction must be a string, got 5. Leave it out for none"),
        ({"image": [None]}, NO_IMAGE.format("NoneType")),
        ([{"role": "system", "content": "Find it."}], NOTHING),
        ([{"role": "user"}], "'content': a string or a list} without other keys, got {'role': 'user'}"),
        (user({"type": "audio"}), NO_ITEM),
        (user({"type": "image", "image": "a", "max_pixels": 50_000}), "max_pixels.* in encode"),
        (user({"type": "image_url", "image_url": {"url": "a", "detail": "low"}}), "detail"),
        (["a.png", "b.png"], r"inputs\[0\]: got \['a.png', 'b.png'\], which is neither text nor image"),
        ([{"role": "user", "content": "a", "image": "b"}], r"a chat message must be .* Images and videos are content"),
        ("a \ud83d", r"inputs\[0\]: .*surrogates not allowed"),
        ([{"role": "tool", "content": "a"}], "'role': one of 'system', 'user', 'assistant', .* got {'role': 'tool'"),
        ([{"role": "system", "content": [{"type": "image", "image": "a"}]}, *user("a")], "holds text only. Put media"),
    ],
)
def test_bad_inputs_are_refused(processor: PumaProcessor, item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor.process_inputs([item])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("a red apple", r"inputs must be a list of inputs, got str. Wrap a single one in \[ \]"),
        (pd.DataFrame({"text": ["a"]}), "must be a list of inputs, got DataFrame"),
        (frozenset({"a", "b"}), "must be a list of inputs, got frozenset"),  # which has no order
        (np.zeros((8, 8, 3), np.uint8), "must be a list of inputs, got ndarray"),
        ([], "inputs is empty: pass at least one input"),
    ],
)
def test_the_inputs_must_be_a_list(processor: PumaProcessor, inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor.process_inputs(inputs)


def test_other_collections_are_read_as_lists(processor: PumaProcessor) -> None:
    texts = ["a red apple", "a green one"]
    expected = processor.process_inputs(texts)["input_ids"]
    rows = Dataset.from_dict({"text": texts, "image": [None, None]})
    for inputs in (iter(texts), np.array(texts, dtype=object), pd.Series(texts), rows["text"], rows):
        assert torch.equal(processor.process_inputs(inputs)["input_ids"], expected)


def test_older_names_of_the_image_size_count(
    processor: PumaProcessor, images: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    """Counted and cut alike, whether transformers still knows them or not; another limit is said once."""
    sizes: list[dict[str, Any]] = [{"size": {"shortest_edge": 12544, "longest_edge": 25088}}]
    sizes += [{"min_pixels": 12544, "max_pixels": 25088}, {}]
    found = [processor.process_inputs(images[:1], images_kwargs=size)["image_grid_thw"].tolist() for size in sizes]
    assert found[0] == found[1] != found[2]
    assert [one.partition(":")[0] for one in caplog.messages] == [
        "Images are scaled down to 25,088 pixels, and the model was saved with 65,536"
    ]


def test_a_prompt_that_nobody_rendered_is_refused(processor: PumaProcessor, qwen_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"The prompt 'a.*' does not end in \[RET\].*Pass inputs to process_inputs"):
        processor(text=["a[RET]", "a[RET] "])
    own, processor.tokenizer = processor.tokenizer, type(processor.tokenizer).from_pretrained(qwen_dir)
    with pytest.raises(ValueError, match=r"\[RET\] is no token of this tokenizer"):
        processor.process_inputs(["apple"])
    processor.tokenizer = own
    processor.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    with pytest.raises(ValueError, match=r"does not end in \[RET\].*restore chat_template.jinja"):
        processor.process_inputs(["apple"])
    for places in (0, 2):
        processor.chat_template = "<|image_pad|>" * places + "[RET]"
        with pytest.raises(ValueError, match=rf"have {places} places <\|image_pad\|>, for 1 inputs. Restore"):
            processor.process_inputs([Image.new("RGB", (32, 32))])


# --- torchvision; what really runs videos is tested in test_inputs_puma.py


class FakeVideoProcessor(PushToHubMixin):
    """Stands for Qwen2VLVideoProcessor, which without torchvision cannot be made; keeps its settings, as that does."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)


def pretend(monkeypatch: pytest.MonkeyPatch, torchvision: bool) -> None:
    if torchvision and not is_torchvision_available():
        monkeypatch.setattr("transformers.Qwen2VLVideoProcessor", FakeVideoProcessor)
    monkeypatch.setattr(inputs_puma, "is_torchvision_available", lambda: torchvision)


def test_video_names_its_extra(puma_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, False)
    processor = PumaProcessor.from_pretrained(puma_dir)
    for item in ({"video": "a.mp4"}, user({"type": "video", "video": "a.mp4"})):
        message = r"inputs\[0\]: video input needs torchvision.*pip install 'puma-hf\[video\]'"
        with pytest.raises(ImportError, match=message):
            processor.process_inputs([item])
    with pytest.raises(ImportError, match=r"decode='torchvision' needs torchvision.*pip install 'puma-hf\[video\]'"):
        processor.process_inputs([b""], images_kwargs={"decode": "torchvision"})


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision: bash .ci/torchvision")
@pytest.mark.parametrize("kind", ["upright", "turned", "grey", "CMYK", "PNG", "cut"])
def test_torchvision_decodes_what_pillow_does(processor: PumaProcessor, kind: str) -> None:
    photo, file = Image.effect_noise((200, 150), 90).resize((400, 300)), io.BytesIO()
    photo = photo.convert({"grey": "L", "CMYK": "CMYK"}.get(kind, "RGB"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6 if kind == "turned" else 1
    photo.save(file, "PNG" if kind == "PNG" else "JPEG", exif=exif)
    data = file.getvalue()[: -100 if kind == "cut" else None]
    ways = ("exact", "torchvision")
    one, two = (partial(processor.process_inputs, [data], images_kwargs={"decode": way}) for way in ways)
    if kind == "cut":
        for way in (one, two):
            with pytest.raises(ValueError, match=r"inputs\[0\]: .*truncated"):
                way()
    else:
        assert torch.equal(one()["pixel_values"], two()["pixel_values"])


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("made", [False, True])
def test_directories_are_the_same_with_and_without_torchvision(
    qwen_dir: Path, puma_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool, opened: bool
) -> None:
    pretend(monkeypatch, made)
    prune(qwen_dir, tmp_path / "made", num_kept_layers=2)
    names = {path.name for path in puma_dir.iterdir()} - {"processor_config.json"}
    assert filecmp.cmpfiles(puma_dir, tmp_path / "made", names, shallow=False) == (ANY, [], [])
    ours, other = (json.loads((made / "processor_config.json").read_text()) for made in (puma_dir, tmp_path / "made"))
    settings = ours.pop("video_processor"), other.pop("video_processor")
    assert ours == other
    # What torchvision's class adds are its own defaults.
    both = settings[0].keys() & settings[1].keys()
    assert {"size", "patch_size", "merge_size", "image_mean", "video_processor_type"} <= both
    assert all(settings[0][name] == settings[1][name] for name in both)
    pretend(monkeypatch, opened)
    for number, load in enumerate((PumaProcessor.from_pretrained, AutoProcessor.from_pretrained)):
        loaded = load(tmp_path / "made")
        assert isinstance(loaded.video_processor, dict) is not opened
        loaded.save_pretrained(tmp_path / str(number))
        saved = json.loads((tmp_path / str(number) / "processor_config.json").read_text())["video_processor"]
        assert saved.items() >= settings[1].items()


# --- saving, and the files of sentence-transformers


@pytest.mark.parametrize("load", [PumaProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_settings_of_the_directory_are_saved_again(load: Any, puma_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(puma_dir, tmp_path / "source")
    file = tmp_path / "source" / "config_sentence_transformers.json"
    settings = json.loads(file.read_text()) | {"prompts": {"find": "Finde es: ä"}, "default_prompt_name": "find"}
    file.write_text(json.dumps(settings))
    load(tmp_path / "source").save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / file.name).read_text(encoding="utf-8")) == settings


def test_code_opens_without_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before transformers opens code of the Hub, it asks of each file whether all that it imports is installed."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    for file in get_relative_import_files(processing_puma.__file__):
        check_imports(file)


def test_an_upload_is_whole(processor: PumaProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By push_to_hub, which uploads all files; of a save with push_to_hub transformers uploads what it wrote itself."""
    uploads: list[Any] = []
    monkeypatch.setattr(processor, "push_to_hub", lambda *args, **options: uploads.append((*args, options)))
    processor.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert uploads == [("mine", {"private": True})]
    assert (tmp_path / "mine" / "modules.json").is_file()
