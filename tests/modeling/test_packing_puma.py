"""Batches without padding: every input is there once, in its place, with its own images and positions."""

from __future__ import annotations

import pickle
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor

from puma_hf.checkpoint import plain_forward
from puma_hf.modeling.modeling_puma import MODEL_CLASSES
from puma_hf.modeling.packing_puma import Group, PackedBatch, PackedPart, group_by_prefix, mrope_positions, pack
from tests.tiny import tiny_config, tiny_tokenizer

MERGE = 2
START, IMAGE, PAD, RET = 100, 101, 0, 99
TEXTS = ["a red apple", "a red apple on a table"]


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
        features["pixel_values"] = torch.arange(num_patches).float()[:, None].expand(-1, 5).contiguous()
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


def flat(grids: list[list[list[int]]]) -> list[list[int]]:
    return [grid for of_row in grids for grid in of_row]


def input_at(part: PackedPart, last: int) -> tuple[list[int], Tensor, list[int]]:
    """Of the input whose last token is there what the decoder sees: tokens, positions, and what only it has."""
    for block in part.sequences.blocks:
        for member in range(block.count):
            start = block.first_query + member * block.num_queries
            if start + block.num_queries - 1 == last:
                prefix = range(block.first_prefix_key, block.first_prefix_key + block.num_prefix_keys)
                first_key = block.first_key + member * block.num_keys
                own = range(first_key, first_key + block.num_keys)
                index = torch.tensor([*prefix, *own])
                return part.input_ids[index].tolist(), part.position_ids[:, 0, index], list(own)
    raise AssertionError(f"no sequence ends at {last}")


# --- positions


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_are_the_models_own(family: str) -> None:
    source = tiny_config(tiny_tokenizer(), family=family)
    model_class = next(model for config, model in MODEL_CLASSES.items() if config.source_model_type == family)
    config = model_class.config_class(**source.to_dict(), num_kept_layers=1, ret_token_id=RET)
    config.image_token_id, config.vision_start_token_id = IMAGE, START
    with torch.device("meta"):
        model: Any = model_class(config)
    generator = np.random.default_rng(0)
    for num_images in (0, 1, 1, 2, 3, 4, 7):
        row, grids = random_row(generator, num_images)
        ids = torch.tensor([row])
        grid = torch.tensor(grids) if grids else None
        mask = torch.ones_like(ids)
        expected, _ = model.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=grid, attention_mask=mask)
        merged = [[time, height // MERGE, width // MERGE] for time, height, width in grids]
        # Images of later inputs do not matter.
        positions, count = mrope_positions(ids[0].numpy() == IMAGE, [*merged, [1, 9, 9]])
        assert count == num_images
        assert torch.equal(torch.from_numpy(positions.copy()), expected[-3:, 0])


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


@pytest.mark.parametrize("max_tokens", [float("inf"), 70, 1])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(4))
def test_every_input_is_there_in_its_place(seed: int, side: str, max_tokens: float) -> None:
    rows, grids = random_batch(seed)
    features = features_of(rows, flat(grids), side)
    batch = packed(features, max_tokens=max_tokens)
    assert sorted(row for part in batch.parts for row in part.rows) == list(range(len(rows)))
    first_patches = np.cumsum([0, *(sum(int(np.prod(grid)) for grid in of_row) for of_row in grids)])
    for part in batch.parts:
        assert len(part.input_ids) <= max_tokens or len(part.rows) == 1
        used: list[int] = []
        slots = {int(token): slot for slot, token in enumerate(part.images.token_index)} if part.images else {}
        for row, last in zip(part.rows, part.last_index.tolist(), strict=True):
            tokens, positions, own = input_at(part, last)
            assert tokens == rows[row]
            merged = [[1, height // MERGE, width // MERGE] for _, height, width in grids[row]]
            assert positions.tolist() == mrope_positions(np.array(tokens) == IMAGE, merged)[0].tolist()
            # Four patches, whose numbers are their values, make one token.
            pixels: Any = part.images.pixel_values if part.images else None
            patches = [int(pixels[4 * slots[token] + of, 0]) for token in own if token in slots for of in range(4)]
            assert patches == list(range(first_patches[row], first_patches[row + 1]))
            used += own
        assert len(used) == len(set(used))
        if part.images:
            ends = part.images.sequences.query_ends.diff()
            assert ends.tolist() == (part.images.grid_thw[:, 1] * part.images.grid_thw[:, 2]).tolist()
            assert len(part.images.patch_positions) == len(part.images.pixel_values)
    if max_tokens == 1:
        assert len(batch.parts) == len(rows)
    whole = sum(map(len, rows))
    assert batch.num_tokens < whole if max_tokens > whole else batch.num_tokens >= whole - 80


def test_parts_hold_inputs_of_one_length_and_pay_for_their_prefix() -> None:
    rows = [[*range(200, 240), number, *range(length), RET] for number, length in enumerate((7, 0, 7, 0, 4), 1)]
    batch = packed(features_of(rows, []), max_tokens=58)
    assert [part.rows for part in batch.parts] == [(1, 3, 4), (0, 2)]
    assert [len(part.input_ids) for part in batch.parts] == [40 + 2 + 2 + 6, 40 + 9 + 9]


def test_nothing_is_shared_past_an_image_or_a_whole_input() -> None:
    text = list(range(200, 240))
    image = [START, *[IMAGE] * 4, START + 2]
    rows = [[*text, *image, 1, RET], [*text, *image, 1, RET], [*text, RET], [*text, RET], [*image, *text, RET]]
    batch = packed(features_of(rows, [[1, 4, 4]] * 3))
    prefix, *_ = batch.parts[0].sequences.blocks
    assert (prefix.count, prefix.num_keys) == (1, 40)  # not the start of the image, which two of four have
    assert batch.num_tokens == sum(map(len, rows)) - 3 * 40


def test_last_tokens_see_their_whole_input() -> None:
    rows, grids = random_batch(3)
    (part,) = packed(features_of(rows, flat(grids))).parts
    assert {block.num_queries for block in part.last_sequences.blocks} == {1}
    assert part.last_sequences.query_ends.tolist() == list(range(len(rows) + 1))
    assert part.last_sequences.key_ends.diff().tolist() == [len(rows[row]) for row in part.rows]
    assert part.input_ids[part.last_index].tolist() == [RET] * len(rows)


def test_frames_attend_apart_and_pixels_come_in_the_models_type() -> None:
    (part,) = packed(features_of([[*[IMAGE] * 8, RET]], [[2, 4, 4]]), dtype=torch.bfloat16).parts
    assert part.images is not None
    assert part.images.sequences.query_ends.tolist() == [0, 16, 32]
    assert part.images.pixel_values.dtype == torch.bfloat16
    assert part.position_ids[0, 0].tolist() == [0] * 4 + [1] * 4 + [2]


def test_without_a_mask_every_token_counts() -> None:
    (part,) = packed({"input_ids": torch.tensor([[5, 6, RET], [7, 8, RET]])}).parts
    assert (part.input_ids.tolist(), part.images) == ([5, 6, RET, 7, 8, RET], None)


# --- shared prefixes

INSTRUCTION = list(range(100, 140))


def group(*rows: list[int], heads: list[int] | None = None) -> list[Group]:
    arrays = [np.array(row, dtype=np.int64) for row in rows]
    return group_by_prefix(arrays, [len(row) - 1 for row in rows] if heads is None else heads)


def saved(groups: list[Group]) -> int:
    return sum((len(rows) - 1) * length - 32 for rows, length in groups if length)


SECOND = list(range(200, 250))
GROUPS: dict[str, tuple[list[list[int]], list[Group]]] = {
    "one instruction": ([[*INSTRUCTION, number, 99] for number in range(3)], [Group([0, 1, 2], 40)]),
    "two instructions and a row of its own": (
        [[*INSTRUCTION, 1, 99], [*SECOND, 1, 99], [7, 8, 99], [*INSTRUCTION, 2, 99], [*SECOND, 2, 3, 99]],
        [Group([2], 0), Group([0, 3], 40), Group([1, 4], 50)],
    ),
    "equal rows keep their last token": ([[*INSTRUCTION, 99]] * 4, [Group([0, 1, 2, 3], 40)]),
    "the template's first tokens do not pay": ([[1, 2, 3, row, 99] for row in range(90)], [Group(list(range(90)), 0)]),
    "nor does a short instruction of two": ([[*INSTRUCTION[:32], row, 99] for row in (1, 2)], [Group([0, 1], 0)]),
    # Ids of more than one byte: neighbours in the order of bytes must be neighbours as numbers.
    "large ids": ([[*INSTRUCTION, token, 99] for token in (70_000, 3, 256, 65_536, 3)], [Group([0, 1, 2, 3, 4], 40)]),
    "none": ([], []),
}


@pytest.mark.parametrize("name", GROUPS)
def test_prefixes_are_shared_where_it_pays(name: str) -> None:
    rows, expected = GROUPS[name]
    assert group(*rows) == expected


def test_what_may_not_be_shared_is_not() -> None:
    rows = [[*INSTRUCTION, 5, 5, 5, 99]] * 2
    assert group(*rows, heads=[35, 40]) == [Group([0, 1], 35)]
    assert group(*rows, heads=[0, 40]) == [Group([0, 1], 0)]


NUM_ROWS = 4096
MANY = {
    "one instruction": [[*INSTRUCTION, number % 7, number, 99] for number in range(NUM_ROWS)],
    "nothing in common": [[number, *INSTRUCTION, 99] for number in range(NUM_ROWS)],
    "each goes on where another ends": [[*range(number + 1), 99] for number in range(0, NUM_ROWS // 2)],
    "each parts one token later": [[*[5] * number, 6, 7, 99] for number in range(NUM_ROWS // 2)],
}


@pytest.mark.parametrize("kind", MANY)
def test_many_rows_are_planned_fast(kind: str) -> None:
    rows = MANY[kind]
    started = time.process_time()
    groups = group(*rows)
    assert time.process_time() - started < 20.0  # quadratic time would be minutes
    assert sorted(row for group in groups for row in group.rows) == list(range(len(rows)))
    for members, length in groups:
        assert all(rows[row][:length] == rows[members[0]][:length] and length < len(rows[row]) for row in members)
    assert saved(groups) > 15 * len(rows) or kind == "nothing in common"


# --- the packer


@pytest.fixture
def module(sentence_transformer: SentenceTransformer) -> Any:
    return sentence_transformer[0]


def same(left: Any, right: Any) -> bool:
    if torch.is_tensor(left):
        return torch.equal(left, right)
    if hasattr(left, "__dataclass_fields__"):
        return all(same(getattr(left, name), getattr(right, name)) for name in left.__dataclass_fields__)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "Find it.", "max_length": 70},
        {"processing_kwargs": {"text": {"max_length": 70}}},
        {"processing_kwargs": {"image": {"size": {"shortest_edge": 256, "longest_edge": 512}}}},
    ],
)
def test_options_are_those_of_preprocess(module: Any, images: list[Image.Image], options: dict[str, Any]) -> None:
    inputs = ["a red apple " * 50, images[0]]
    packer = module.packer(**options)
    features, expected = packer.process(inputs), module.preprocess(inputs, **options)
    assert "content_ids" not in features
    for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"):
        assert torch.equal(features[name], expected[name]), name
    assert same(packer(inputs), packer.pack(features))


def test_another_process_can_do_it(module: Any, images: list[Image.Image]) -> None:
    """Nothing of the model travels: no weights, no module."""
    packer = module.packer("Find it.")
    assert not any(isinstance(value, torch.nn.Module) for value in vars(packer).values())
    inputs = [images[0], *TEXTS]
    batch = packer(inputs)
    assert same(pickle.loads(pickle.dumps(packer))(inputs), batch)
    assert same(pickle.loads(pickle.dumps(batch)), batch)
    with pytest.raises(ValueError, match=r"inputs\[1\]: a text must be"):
        packer(["a", ""])


@pytest.mark.parametrize("how", ["to", "pin_memory"])
def test_all_but_the_grid_moves(
    module: Any, images: list[Image.Image], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = module.packer()([images[0], *TEXTS])
    if how == "pin_memory":
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.to("meta"))  # which has no GPU to be pinned for
    moved = batch.to("meta", non_blocking=True) if how == "to" else batch.pin_memory()
    (part,) = moved.parts
    held = {**vars(part.images), **vars(part), **vars(part.sequences), **vars(part.images.sequences)}
    tensors = {name: tensor.device.type for name, tensor in held.items() if torch.is_tensor(tensor)}
    assert {name for name, device in tensors.items() if device == "cpu"} == {"grid_thw"}
    assert len(tensors) >= 9
    assert moved.num_tokens == batch.num_tokens


@pytest.mark.parametrize(("packing", "video"), [(False, False), (True, True)])
def test_features_come_back_where_they_cannot_be_packed(module: Any, packing: bool, video: bool) -> None:
    packer = module.packer()
    packer = packer if packing else replace(packer, layout=None)
    features = packer.process(TEXTS)
    if video:
        features["pixel_values_videos"] = torch.zeros(4, 384)
    assert packer.pack(features) is features
    features["pixel_values_videos"] = None
    assert isinstance(packer.pack(features), dict) is not packing


@pytest.mark.parametrize("masked", [slice(3, 5), slice(None)])
def test_holes_in_the_mask_go_the_plain_way(module: Any, masked: slice) -> None:
    """No processor makes them, but a mask of one's own may have them; positions then count what is masked."""
    features = module.preprocess(TEXTS)
    features["attention_mask"][0, masked] = 0
    with torch.inference_mode(), plain_forward(SentenceTransformer(modules=[module])):
        expected = module(dict(features))["sentence_embedding"]
    assert module.packer().pack(features) is features
    with torch.inference_mode():
        vectors = module(dict(features))["sentence_embedding"]
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-6)
