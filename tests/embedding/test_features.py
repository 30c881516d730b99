from __future__ import annotations

from typing import Any

import pytest
import torch

from puma_hf.embedding.features import take


@pytest.fixture
def inputs(images: list[Any]) -> list[Any]:
    return ["text alone", images[0], {"text": "two", "image": [images[1], images[2]]}, images[2], "x"]


@pytest.mark.parametrize(("start", "end"), [(0, 5), (0, 1), (0, 2), (1, 3), (2, 5), (3, 4), (4, 5)])
def test_it_is_what_the_processor_makes_of_these_inputs(
    processor: Any, inputs: list[Any], start: int, end: int
) -> None:
    processor.tokenizer.padding_side = "right"
    taken = take(dict(processor.process_inputs(inputs)), start, end)
    expected = dict(processor.process_inputs(inputs[start:end]))
    assert set(taken) - {"num_images_per_sample"} == set(expected) - {"num_images_per_sample"}
    width = expected["input_ids"].shape[1]
    for name, value in expected.items():
        found = taken[name]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            assert (taken["attention_mask"][:, width:] == 0).all()
            found = found[:, :width]
        assert torch.equal(found, value), name


def test_videos_are_taken_too_and_the_rest_stays(processor: Any) -> None:
    features = {
        "input_ids": torch.arange(6).reshape(2, 3),
        "pixel_values_videos": torch.arange(10)[:, None],
        "video_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 1], [1, 2, 2]]),
        "num_videos_per_sample": torch.tensor([1, 2]),
        "modality": "message",
        "other": torch.zeros(3, 2),
    }
    taken = take(features, 1, 2)
    assert taken["pixel_values_videos"].flatten().tolist() == [4, 5, 6, 7, 8, 9]
    assert taken["video_grid_thw"].tolist() == [[1, 2, 1], [1, 2, 2]]
    assert taken["num_videos_per_sample"].tolist() == [2]
    assert taken["modality"] == "message"
    assert taken["other"].shape == (3, 2)
    assert features["input_ids"].shape == (2, 3)


def test_grids_with_as_many_rows_as_inputs_are_cut_by_their_counts() -> None:
    features = {
        "input_ids": torch.zeros(2, 1),
        "pixel_values": torch.zeros(2, 4),
        "image_grid_thw": torch.tensor([[1, 1, 1], [1, 1, 1]]),
        "num_images_per_sample": torch.tensor([0, 2]),
    }
    taken = take(features, 1, 2)
    assert len(taken["pixel_values"]) == len(taken["image_grid_thw"]) == 2
    assert "pixel_values" not in take(features, 0, 1)
