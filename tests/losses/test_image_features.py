"""Rows are taken out of a column with their own images and no more padding than they need."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor

from puma_hf.losses.image_features import MiniBatches, row_lengths, take_rows


@pytest.fixture
def inputs(images: list[Image.Image]) -> list[Any]:
    small, square, wide = images
    return ["a red apple", {"image": [square, wide], "text": "both"}, {"image": small}, "a table " * 9]


@pytest.mark.parametrize("rows", [[0], [1], [2], [3, 0], [2, 1], [0, 1, 2, 3], [3, 2, 1, 0], [1, 3]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_taken_rows_are_as_if_made_alone(
    sentence_transformer: SentenceTransformer, inputs: list[Any], rows: list[int], side: str
) -> None:
    tokenizer = sentence_transformer[0].processor.tokenizer
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        taken = take_rows(sentence_transformer.preprocess(inputs), rows)
        alone = sentence_transformer.preprocess([inputs[row] for row in rows])
    finally:
        tokenizer.padding_side = before
    counts = taken.pop("num_images_per_sample")
    assert torch.equal(counts, alone.pop("num_images_per_sample", torch.zeros(len(rows), dtype=torch.long)))
    assert taken.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(taken[key], value) if isinstance(value, Tensor) else taken[key] == value


def test_only_tokens_lose_padding() -> None:
    features: dict[str, Any] = {
        "input_ids": torch.arange(6).view(2, 3),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "position_ids": torch.arange(18).view(3, 2, 3),
        "teacher_state": torch.arange(6.0).view(2, 3),  # as wide as the tokens
        "modality_ids": torch.tensor([3, 4]),
        "scale": torch.tensor(2.0),
        "modality": "message",
    }
    taken = take_rows(features, [0])
    assert taken["input_ids"].tolist() == [[0, 1]]
    assert taken["position_ids"].tolist() == [[[0, 1]], [[6, 7]], [[12, 13]]]
    assert taken["teacher_state"].tolist() == [[0.0, 1.0, 2.0]]
    assert taken["modality_ids"].tolist() == [3]
    assert taken["scale"].item() == 2.0
    assert taken["modality"] == "message"
    empty = take_rows({**features, "attention_mask": torch.zeros(2, 3)}, [1])
    assert empty["input_ids"].tolist() == [[3, 4, 5]]
    no_mask = take_rows({"input_ids": features["input_ids"]}, [1])
    assert no_mask["input_ids"].tolist() == [[3, 4, 5]]


def test_image_features_in_place_of_pixels() -> None:
    features: dict[str, Any] = {
        "input_ids": torch.zeros(3, 2),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 4], [1, 4, 4]]),
        "num_images_per_sample": torch.tensor([1, 0, 2]),
        "mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=[torch.zeros(1), torch.ones(2), torch.ones(4)])},
    }
    taken = take_rows(features, [2])
    assert [len(item) for item in taken["mm_encoder_outputs"]["image"].pooler_output] == [2, 4]
    assert taken["image_grid_thw"].tolist() == [[1, 2, 4], [1, 4, 4]]
    without = take_rows(features, [1])
    assert not {"mm_encoder_outputs", "image_grid_thw", "pixel_values"} & without.keys()


def test_whose_images_they_are_must_be_known() -> None:
    features: dict[str, Any] = {
        "input_ids": torch.zeros(2, 2),
        "image_grid_thw": torch.tensor([[1, 1, 1], [1, 1, 2]]),
        "pixel_values": torch.arange(3.0),
    }
    assert take_rows(features, [1])["pixel_values"].tolist() == [1.0, 2.0]  # one each
    features["image_grid_thw"] = features["image_grid_thw"][:1]
    with pytest.raises(ValueError, match=r"hold 1 images or videos of 2 samples but no 'num_images_per_sample'.*Make"):
        take_rows(features, [1])


def masked(*lengths: int) -> dict[str, Any]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": torch.arange(mask.numel()).view(mask.shape), "attention_mask": mask}


def test_row_lengths() -> None:
    assert row_lengths(masked(3, 1, 2)) == [3, 1, 2]
    assert row_lengths({"input_ids": torch.zeros(2, 5)}) == [5, 5]


@pytest.mark.parametrize(
    ("lengths", "budget", "sizes"),
    [
        ((2, 9, 3, 2, 4), 8, [2, 2, 1]),  # 2 2 | 3 4 | 9
        ((2, 9, 3, 2, 4), 1, [1, 1, 1, 1, 1]),
        ((2, 9, 3, 2, 4), 18, [4, 1]),  # 2 2 3 4 | 9
        ((1, 1, 1), 3, [3]),
        ((1, 1, 1, 1), 3, [3, 1]),
        ((5, 5, 5), 11, [2, 1]),
    ],
)
def test_a_budget_counts_padding(lengths: tuple[int, ...], budget: int, sizes: list[int]) -> None:
    batches = MiniBatches(masked(*lengths), 1, budget, "cpu")
    # A greedy packing by cost, as the mixin does it.
    found, total = [0], 0
    for cost in batches.costs.flatten().tolist():
        found, total = ([*found, 0], 0) if total + cost > budget else (found, total)
        found[-1] += 1
        total += cost
    assert found == sizes
    assert sorted(batches.order) == list(range(len(lengths)))
    ordered = [lengths[row] for row in batches.order]
    assert ordered == (sorted(lengths) if len(sizes) > 1 else list(lengths))


def test_one_mini_batch_keeps_the_order_and_equal_lengths_too() -> None:
    assert MiniBatches(masked(1, 3, 2), 3, None, "cpu").order == [0, 1, 2]
    assert MiniBatches(masked(1, 3, 2), 2, None, "cpu").order == [0, 2, 1]
    assert MiniBatches(masked(2, 2, 2), 1, None, "cpu").order == [0, 1, 2]
    assert MiniBatches(masked(1, 3, 2), 1, 9, "cpu").order == [0, 1, 2]
    assert MiniBatches(masked(1, 3, 2), 2, None, "cpu").take(0, 2)["input_ids"].tolist() == [[0, 1], [6, 7]]


def test_images_come_last() -> None:
    features = {**masked(1, 3, 2, 4), "num_images_per_sample": torch.tensor([2, 0, 1, 0])}
    assert MiniBatches(features, 2, None, "cpu").order == [1, 3, 0, 2]
    features["num_videos_per_sample"] = torch.tensor([0, 0, 0, 1])
    assert MiniBatches(features, 2, None, "cpu").order == [1, 0, 2, 3]


def test_autocast_of_the_first_pass() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = MiniBatches(masked(1), 1, None, "cpu")
    with inside.autocast():
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16
    outside = MiniBatches(masked(1), 1, None, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16), outside.autocast():
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.float32
    with MiniBatches(masked(1), 1, None, "meta").autocast():
        pass
