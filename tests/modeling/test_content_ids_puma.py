from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import _create_minibatch
from torch import Tensor

from puma_hf.modeling.content_ids_puma import content_ids
from puma_hf.modeling.processing_puma import PumaProcessor


def inputs_of_every_kind(images: list[Image.Image]) -> list[Any]:
    return [
        "a red apple",
        images[0],
        {"image": images[1], "text": "on a table"},
        {"image": images[1:], "text": "both", "instruction": "Find them."},
        "a red apple on a table, seen from above, with a knife beside it",
        images[2],
        {"image": [images[2], images[1]], "text": "both", "instruction": "Find them."},
    ]


def ids_of(processor: PumaProcessor, inputs: list[Any], **options: Any) -> list[int]:
    ids: list[int] = content_ids(processor.process_inputs(inputs, **options)).tolist()
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
    inputs = inputs_of_every_kind(images)
    alone = [ids_of(processor, [item])[0] for item in inputs]
    processor.tokenizer.padding_side = side
    assert processor.process_inputs(inputs)["attention_mask"][0, 0] == (side == "right")
    assert ids_of(processor, inputs) == alone
    assert ids_of(processor, inputs[::-1]) == alone[::-1]
    assert ids_of(processor, inputs[2:5] + inputs[:1]) == alone[2:5] + alone[:1]


def test_the_input_module_stamps_them(sentence_transformer: SentenceTransformer, images: list[Image.Image]) -> None:
    inputs = [*inputs_of_every_kind(images), "a red apple"]
    features = sentence_transformer.preprocess(inputs)
    ids = features["content_ids"]
    assert ids.dtype == torch.int64
    assert ids.shape == (8,)
    assert ids[0] == ids[7]
    assert len(set(ids.tolist())) == 7
    part = sentence_transformer.preprocess(inputs[3:6])
    assert torch.equal(part["content_ids"], ids[3:6])
    # sentence-transformers slices batches into mini-batches without knowing the key.
    assert torch.equal(_create_minibatch(features, 3, 6)["content_ids"], ids[3:6])
    # The prompt is part of what the model sees.
    assert sentence_transformer.preprocess(inputs[:1], prompt="Find it.")["content_ids"][0] != ids[0]


def test_they_stay_the_same_from_version_to_version() -> None:
    """Stored teacher states are found by them."""
    features = {
        "input_ids": torch.tensor([[3, 1, 4], [0, 3, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
        "pixel_values": torch.arange(8.0).reshape(2, 4),
        "image_grid_thw": torch.tensor([[1, 1, 2]]),
        "num_images_per_sample": torch.tensor([1, 0]),
    }
    seen = (
        struct.pack("<3q", 3, 1, 4) + b"pixel_values [[1, 1, 2]]" + struct.pack("<8f", *range(8)),
        struct.pack("<2q", 3, 1),
    )
    expected = [struct.unpack("<q", hashlib.sha256(content).digest()[:8])[0] for content in seen]
    assert content_ids(features).tolist() == expected


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


def media(shape: list[list[int]], counts: list[int], *, video: bool = False, seed: int = 0) -> dict[str, Tensor]:
    patches = sum(t * h * w for t, h, w in shape)
    pixels = torch.randn(patches, 6, generator=torch.Generator().manual_seed(seed))
    names = (
        ("pixel_values_videos", "video_grid_thw", "num_videos_per_sample")
        if video
        else ("pixel_values", "image_grid_thw", "num_images_per_sample")
    )
    return dict(zip(names, (pixels, torch.tensor(shape), torch.tensor(counts)), strict=True))


def texts(rows: int) -> dict[str, Tensor]:
    return {"input_ids": torch.ones(rows, 3, dtype=torch.long), "attention_mask": torch.ones(rows, 3, dtype=torch.long)}


def test_videos_count_and_are_no_images() -> None:
    def one(**options: Any) -> int:
        return int(content_ids({**texts(1), **media([[2, 1, 2]], [1], **options)}).item())

    ids = {one(), one(video=True), one(seed=1), one(video=True, seed=1), int(content_ids(texts(1)).item())}
    assert len(ids) == 5


def test_the_same_patches_in_another_shape_differ() -> None:
    pixels = torch.arange(48.0).reshape(4, 12)
    ids = [
        content_ids(
            {
                **texts(1),
                "pixel_values": pixels,
                "image_grid_thw": torch.tensor(grid),
                "num_images_per_sample": torch.tensor([len(grid)]),
            }
        ).item()
        for grid in ([[1, 2, 2]], [[1, 1, 4]], [[1, 4, 1]], [[1, 1, 2], [1, 2, 1]])
    ]
    assert len(set(ids)) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch_dim", [1, 8])
def test_every_number_of_every_patch_counts(dtype: torch.dtype, patch_dim: int) -> None:
    """Also where a patch is no multiple of eight bytes."""

    def one(pixels: Tensor) -> int:
        grid, count = torch.tensor([[1, 1, 4]]), torch.tensor([1])
        features = {**texts(1), "pixel_values": pixels, "image_grid_thw": grid, "num_images_per_sample": count}
        return int(content_ids(features).item())

    pixels = torch.arange(4.0 * patch_dim).reshape(4, patch_dim).to(dtype)
    ids = {one(pixels)}
    for place in range(4 * patch_dim):
        other = pixels.clone()
        other.view(-1)[place] += 0.5
        ids.add(one(other))
    assert len(ids) == 4 * patch_dim + 1
    # Patches cut from a larger tensor need not lie in one piece.
    wide = torch.cat([pixels, pixels], dim=1)[:, :patch_dim]
    assert one(wide) == one(pixels)


# --- bad input


def test_pixels_without_their_owners_are_refused() -> None:
    for video in (False, True):
        features = {**texts(1), **media([[1, 1, 2]], [1], video=video)}
        del features["num_videos_per_sample" if video else "num_images_per_sample"]
        with pytest.raises(ValueError, match=r"hold 'pixel_values.*' but not 'num_.*_per_sample'.*process_inputs"):
            content_ids(features)
