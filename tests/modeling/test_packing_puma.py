from __future__ import annotations

import pickle
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from puma_hf.modeling.modeling_puma import MODEL_CLASSES
from puma_hf.modeling.packing_puma import PackedBatch, mrope_positions, pack
from tests.tiny import tiny_config, tiny_tokenizer

MERGE = 2
PATCH_DIM = 5
START, IMAGE, PAD, RET = 100, 101, 0, 99
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def random_row(generator: np.random.Generator, num_images: int) -> tuple[list[int], list[list[int]]]:
    """Texts of 0 to 5 tokens around images, and the images' grids in patches."""
    row, grids = [int(token) for token in generator.integers(1, 90, generator.integers(0, 6))], []
    for _ in range(num_images):
        height, width = (int(side) for side in generator.integers(1, 5, 2))
        grids.append([1, height * MERGE, width * MERGE])
        row += [START, *[IMAGE] * (height * width), START + 2]
        row += [int(token) for token in generator.integers(1, 90, generator.integers(0, 6))]
    return [*row, RET], grids


def features_of(rows: list[list[int]], grids: list[list[int]], side: str = "right") -> dict[str, Any]:
    """What a processor makes; the patches are numbered."""
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        input_ids[number, place], mask[number, place] = torch.tensor(row), 1
    features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
    if grids:
        num_patches = int(np.prod(grids, axis=1).sum())
        features["pixel_values"] = torch.arange(num_patches).float()[:, None].expand(-1, PATCH_DIM).contiguous()
        features["image_grid_thw"] = torch.tensor(grids)
    return features


def packed(features: dict[str, Any], **options: Any) -> PackedBatch:
    return pack(features, image_token_id=IMAGE, merge_size=MERGE, **options)


def random_batch(seed: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    generator = np.random.default_rng(seed)
    made = [random_row(generator, int(generator.integers(0, 4))) for _ in range(6)]
    # Some share a long beginning, some are equal.
    rows = [[*range(200, 240), *row] if number % 2 else row for number, (row, _) in enumerate(made)]
    return [*rows, rows[1]], [*(grids for _, grids in made), made[1][1]]


def input_at(batch: PackedBatch, number: int) -> tuple[list[int], Tensor, list[int]]:
    """Of one input what the decoder sees: tokens, positions, and the queries that only it has."""
    last = int(batch.last_index[batch.order[number]])
    for block in batch.sequences.blocks:
        for member in range(block.count):
            start = block.first_query + member * block.num_queries
            if start + block.num_queries - 1 == last:
                prefix = range(block.first_prefix_key, block.first_prefix_key + block.num_prefix_keys)
                first_key = block.first_key + member * block.num_keys
                own = range(first_key, first_key + block.num_keys)
                index = torch.tensor([*prefix, *own])
                return batch.input_ids[index].tolist(), batch.position_ids[:, 0, index], list(own)
    raise AssertionError(f"no sequence ends at {last}")


# --- positions


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_the_models_own(family: str) -> None:
    tokenizer = tiny_tokenizer()
    source = tiny_config(tokenizer, family=family)
    model_class = next(model for config, model in MODEL_CLASSES.items() if config.source_model_type == family)
    config = model_class.config_class(**source.to_dict(), num_kept_layers=1, ret_token_id=RET)
    config.image_token_id, config.vision_start_token_id = IMAGE, START
    with torch.device("meta"):
        model: Any = model_class(config)
    generator = np.random.default_rng(0)
    for num_images in (0, 1, 1, 2, 3, 4, 7):
        row, grids = random_row(generator, num_images)
        ids = torch.tensor([row])
        types = (ids == IMAGE).int()
        grid = torch.tensor(grids) if grids else None
        expected, _ = model.get_rope_index(ids, types, image_grid_thw=grid, attention_mask=torch.ones_like(ids))
        merged = [[time, height // MERGE, width // MERGE] for time, height, width in grids]
        # Images of later inputs do not matter.
        positions, count = mrope_positions(ids[0].numpy() == IMAGE, [*merged, [1, 9, 9]])
        assert count == num_images
        assert positions.dtype == np.int64
        assert torch.equal(torch.from_numpy(positions), expected[-3:, 0])


def test_images_side_by_side_are_told_apart_by_their_grids() -> None:
    positions, count = mrope_positions(np.array([True] * 5 + [False]), [[1, 1, 2], [1, 3, 1]])
    assert count == 2
    assert positions.tolist() == [[0, 0, 2, 2, 2, 5], [0, 0, 2, 3, 4, 5], [0, 1, 2, 2, 2, 5]]


@pytest.mark.parametrize(
    ("is_image", "grids"),
    [
        ([True, True], []),
        ([True, True], [[1, 1, 3]]),
        ([True, False, True], [[1, 1, 2]]),
        ([True, True, True], [[1, 1, 2]]),
        ([True], [[0, 1, 1]]),
    ],
)
def test_image_tokens_that_fit_no_image_are_refused(is_image: list[bool], grids: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"grid \[.*\] in tokens does not fit. Make the features with PumaProcessor"):
        mrope_positions(np.array(is_image), grids)


def test_an_image_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"belong to 0 images, but image_grid_thw has 1\. Make the features"):
        packed(features_of([[1, 2, RET]], [[1, 2, 2]]))


# --- layout


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(8))
def test_every_input_is_there_in_its_place(seed: int, side: str, shared_prefix: bool) -> None:
    rows, grids = random_batch(seed)
    flat = [grid for of_row in grids for grid in of_row]
    batch = packed(features_of(rows, flat, side), shared_prefix=shared_prefix)
    assert batch.num_inputs == len(rows)
    assert len(batch.input_ids) == batch.num_tokens == batch.position_ids.shape[-1]
    assert batch.position_ids.shape[:2] == (3, 1)
    used: set[int] = set()
    for number, row in enumerate(rows):
        tokens, positions, own = input_at(batch, number)
        assert tokens == row
        merged = [[1, height // MERGE, width // MERGE] for _, height, width in grids[number]]
        assert torch.equal(positions, torch.from_numpy(mrope_positions(np.array(row) == IMAGE, merged)[0]))
        assert not used & set(own)
        used |= set(own)
    num_shared = sum(block.num_keys * block.count for block in batch.sequences.blocks) - len(used)
    assert batch.num_tokens == len(used) + num_shared
    if shared_prefix:
        assert batch.num_tokens < sum(map(len, rows))
    else:
        assert num_shared == 0
        assert batch.num_tokens == sum(map(len, rows))


@pytest.mark.parametrize("seed", range(8))
def test_images_follow_their_tokens(seed: int) -> None:
    rows, grids = random_batch(seed)
    flat = [grid for of_row in grids for grid in of_row]
    features = features_of(rows, flat)
    batch = packed(features)
    images = batch.images
    assert images is not None
    assert torch.equal(batch.input_ids[images.token_index], torch.full((len(images.token_index),), IMAGE))
    assert int((batch.input_ids == IMAGE).sum()) == len(images.token_index) == len(images.pixel_values) // MERGE**2
    assert (images.token_index.diff() > 0).all()
    # Each input's image tokens, in the packed order, are those of its own patches, whose numbers are their values.
    starts = np.cumsum([0, *(int(np.prod(grid)) for grid in flat)])
    numbers = np.cumsum([0, *map(len, grids)])
    place = {int(token): slot for slot, token in enumerate(images.token_index)}
    for number in range(len(rows)):
        _, _, own = input_at(batch, number)
        slots = [place[token] for token in own if token in place]
        patches = [images.pixel_values[slot * MERGE**2 + part, 0] for slot in slots for part in range(MERGE**2)]
        first, last = starts[numbers[number]], starts[numbers[number + 1]]
        assert [int(patch) for patch in patches] == list(range(first, last))
    assert int(images.grid_thw.prod(dim=1).sum()) == len(images.pixel_values) == len(images.patch_positions)
    assert images.sequences.query_ends.diff().tolist() == (images.grid_thw[:, 1] * images.grid_thw[:, 2]).tolist()


def test_nothing_is_shared_past_an_image_or_a_whole_input() -> None:
    text = list(range(200, 240))
    image = [START, *[IMAGE] * 4, START + 2]
    rows = [[*text, *image, 1, RET], [*text, *image, 1, RET], [*text, RET], [*text, RET], [*image, *text, RET]]
    batch = packed(features_of(rows, [[1, 4, 4]] * 3))
    prefix, *_ = batch.sequences.blocks
    assert (prefix.count, prefix.num_keys) == (1, 40)  # not the start of the image, which two of four have
    assert batch.num_tokens == sum(map(len, rows)) - 3 * 40
    assert int((batch.input_ids == RET).sum()) == 5
    assert int((batch.input_ids == IMAGE).sum()) == 12


def test_two_images_after_the_same_text_keep_their_own_tokens() -> None:
    """Their tokens are the same, their pixels are not."""
    rows = [[*range(200, 240), START, IMAGE, START + 2, RET]] * 2
    batch = packed(features_of(rows, [[1, 2, 2]] * 2))
    assert batch.sequences.blocks[0].num_keys == 41
    assert int((batch.input_ids == IMAGE).sum()) == 2


def test_last_tokens_see_their_whole_input() -> None:
    rows, grids = random_batch(3)
    batch = packed(features_of(rows, [grid for of_row in grids for grid in of_row]))
    assert sum(block.count for block in batch.last_sequences.blocks) == len(rows)
    assert {block.num_queries for block in batch.last_sequences.blocks} == {1}
    assert batch.last_sequences.query_ends.tolist() == list(range(len(rows) + 1))
    lengths = batch.last_sequences.key_ends.diff()[batch.order].tolist()
    assert lengths == list(map(len, rows))
    assert batch.input_ids[batch.last_index].tolist() == [RET] * len(rows)


def test_without_a_mask_every_token_counts() -> None:
    batch = packed({"input_ids": torch.tensor([[5, 6, RET], [7, 8, RET]])}, shared_prefix=False)
    assert batch.input_ids.tolist() == [5, 6, RET, 7, 8, RET]
    assert batch.images is None


def test_frames_of_an_image_attend_apart() -> None:
    """As in transformers, where each frame is a sequence of its own."""
    row = [*[IMAGE] * 8, RET]
    batch = packed(features_of([row], [[2, 4, 4]]))
    assert batch.images is not None
    assert batch.images.sequences.query_ends.tolist() == [0, 16, 32]
    assert batch.position_ids[0, 0].tolist() == [0] * 4 + [1] * 4 + [2]


def test_pixels_come_in_the_models_type() -> None:
    batch = packed(features_of([[IMAGE, RET]], [[1, 2, 2]]), dtype=torch.bfloat16)
    assert batch.images is not None
    assert batch.images.pixel_values.dtype == torch.bfloat16


# --- moving


def tensors_of(part: Any) -> dict[str, Tensor]:
    found = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if torch.is_tensor(value):
            found[field.name] = value
        elif hasattr(value, "__dataclass_fields__"):
            found |= {f"{field.name}.{name}": tensor for name, tensor in tensors_of(value).items()}
    return found


@pytest.mark.parametrize("how", ["to", "pin_memory"])
def test_all_but_the_grid_moves(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, grids = random_batch(1)
    batch = packed(features_of(rows, [grid for of_row in grids for grid in of_row]))
    if how == "pin_memory":
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.to("meta"))  # which has no GPU to be pinned for
    moved = batch.to("meta", non_blocking=True) if how == "to" else batch.pin_memory()
    before, after = tensors_of(batch), tensors_of(moved)
    assert before.keys() == after.keys()
    assert len(after) == 16
    assert [name for name, tensor in after.items() if tensor.device.type != "meta"] == ["images.grid_thw"]
    assert all(tensor.device.type == "cpu" for tensor in before.values())
    assert (moved.num_inputs, moved.num_tokens) == (batch.num_inputs, batch.num_tokens)


def test_a_batch_can_be_pickled() -> None:
    rows, grids = random_batch(2)
    batch = packed(features_of(rows, [grid for of_row in grids for grid in of_row]))
    again = tensors_of(pickle.loads(pickle.dumps(batch)))
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors_of(batch).items())
