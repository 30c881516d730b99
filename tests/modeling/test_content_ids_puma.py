from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import _create_minibatch
from torch import Tensor

from puma_hf.modeling.content_ids_puma import content_ids
from puma_hf.modeling.processing_puma import PumaProcessor


def ids_of(processor: PumaProcessor, inputs: list[Any]) -> list[int]:
    ids: list[int] = content_ids(processor.process_inputs(inputs)).tolist()
    return ids


def changed(image: Image.Image) -> Image.Image:
    """The image with one colour of one pixel changed by one."""
    copy = image.copy()
    red, green, blue = copy.getpixel((0, 0))  # type: ignore[misc]
    copy.putpixel((0, 0), (red, green, (blue + 1) % 256))
    return copy


# --- equal inputs


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_input_has_one_id_in_every_batch(processor: PumaProcessor, images: list[Image.Image], side: str) -> None:
    inputs = [*images, "a red apple", {"image": images[1:], "text": "both", "instruction": "Find them."}, "a" * 99]
    alone = [ids_of(processor, [item])[0] for item in inputs]
    processor.tokenizer.padding_side = side
    assert processor.process_inputs(inputs)["attention_mask"][0, 0] == (side == "right")
    assert ids_of(processor, inputs) == alone
    assert ids_of(processor, inputs[::-1]) == alone[::-1]
    assert ids_of(processor, inputs[2:5] + inputs[:1]) == alone[2:5] + alone[:1]


def test_the_input_module_stamps_them(sentence_transformer: SentenceTransformer, images: list[Image.Image]) -> None:
    inputs = ["a red apple", *images, "a red apple"]
    features = sentence_transformer.preprocess(inputs)
    ids = features["content_ids"]
    assert (ids.dtype, ids.shape, len(set(ids.tolist()))) == (torch.int64, (5,), 4)
    assert ids[0] == ids[4]
    # sentence-transformers slices batches into mini-batches without knowing the key.
    assert torch.equal(_create_minibatch(features, 1, 4)["content_ids"], ids[1:4])
    # The prompt is part of what the model sees.
    assert sentence_transformer.preprocess(inputs[:1], prompt="Find it.")["content_ids"][0] != ids[0]


# --- different inputs


def test_every_difference_shows(processor: PumaProcessor, images: list[Image.Image]) -> None:
    image, text = images[0], "a red apple"
    inputs = [
        text,
        "a red apple.",
        image,
        changed(image),
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        {"image": image, "text": text},
        {"image": changed(image), "text": text},
        {"image": image, "text": text, "instruction": "Find it."},
        {"image": [image, images[1]], "text": text},
        {"image": [images[1], image], "text": text},
        {"image": [image, image], "text": text},
    ]
    ids = ids_of(processor, inputs)
    assert len(set(ids)) == len(inputs)


def one(pixels: Tensor, grid: tuple[tuple[int, ...], ...] = ((1, 1, 4),), *, video: bool = False) -> int:
    """The id of one input with these images, or with these videos."""
    names = ["pixel_values", "image_grid_thw", "num_images_per_sample"]
    if video:
        names = ["pixel_values_videos", "video_grid_thw", "num_videos_per_sample"]
    tokens = torch.ones(1, 3, dtype=torch.long)
    media = dict(zip(names, (pixels, torch.tensor(grid), torch.tensor([len(grid)])), strict=True))
    return int(content_ids({"input_ids": tokens, "attention_mask": tokens, **media}).item())


def test_videos_and_other_shapes_differ() -> None:
    pixels = torch.arange(48.0).reshape(4, 12)
    ids = {one(pixels, grid) for grid in (((1, 2, 2),), ((1, 1, 4),), ((1, 4, 1),), ((1, 1, 2), (1, 2, 1)))}
    assert len({*ids, one(pixels, video=True), one(pixels + 1, video=True)}) == 6
