"""Batches without padding: every input is there once, in its place, with its own images and positions."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf.checkpoint import plain_forward
from puma_hf.modeling.packing_puma import Group, PackedBatch, group_by_prefix, mrope_positions, pack

START, IMAGE, RET = 100, 101, 99
TEXTS = ["a red apple", "a red apple on a table"]


def packed(rows: list[list[int]], grids: list[list[int]]) -> PackedBatch:
    """Of token ids and of images of these sizes in patches."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    pixels = torch.zeros(int(np.prod(grids, axis=1).sum()), 5)
    features = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels}
    return pack({**features, "image_grid_thw": torch.tensor(grids)}, image_token_id=IMAGE, merge_size=2)


# --- positions


def test_image_tokens_and_images_that_do_not_fit_are_refused() -> None:
    for is_image in ([True, False, True], [True, True, True]):
        with pytest.raises(ValueError, match=r"grid \[.*\] in tokens does not fit. Make the features with PumaProc"):
            mrope_positions(np.array(is_image), [[1, 1, 2]])
    with pytest.raises(ValueError, match=r"belong to 0 images, but image_grid_thw has 1\. Make the features"):
        packed([[1, 2, RET]], [[1, 2, 2]])


# --- layout


def test_nothing_is_shared_past_an_image_or_a_whole_input() -> None:
    text = list(range(200, 240))
    image = [START, *[IMAGE] * 4, START + 2]
    rows = [[*text, *image, 1, RET], [*text, *image, 1, RET], [*text, RET], [*text, RET], [*image, *text, RET]]
    batch = packed(rows, [[1, 4, 4]] * 3)
    prefix, *_ = batch.parts[0].sequences.blocks
    assert (prefix.count, prefix.num_keys) == (1, 40)  # not the start of the image, which two of four have
    assert sum(len(part.input_ids) for part in batch.parts) == sum(map(len, rows)) - 3 * 40


def test_parts_hold_inputs_of_one_length_and_pay_for_their_prefix() -> None:
    rows = [[*range(200, 240), number, *range(length), RET] for number, length in enumerate((7, 0, 7, 0, 4), 1)]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)
    features = {"input_ids": ids, "attention_mask": (ids >= 0).long()}
    batch = pack(features, image_token_id=IMAGE, merge_size=2, max_tokens=58)
    assert [part.rows for part in batch.parts] == [(1, 3, 4), (0, 2)]
    assert [len(part.input_ids) for part in batch.parts] == [40 + 2 + 2 + 6, 40 + 9 + 9]


# --- shared prefixes

INSTRUCTION = list(range(100, 140))


def group(*rows: list[int]) -> list[Group]:
    return group_by_prefix([np.array(row, dtype=np.int64) for row in rows], [len(row) - 1 for row in rows])


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


# --- the packer


@pytest.fixture
def module(sentence_transformer: SentenceTransformer) -> Any:
    return sentence_transformer[0]


def test_another_process_can_do_it(module: Any, images: list[Image.Image]) -> None:
    """Nothing of the model travels: no weights, no module."""
    packer = module.packer("Find it.", max_length=70)
    assert not any(isinstance(value, torch.nn.Module) for value in vars(packer).values())
    inputs = [images[0], *TEXTS, "a red apple " * 50]
    batch = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(packer))(inputs)))
    expected = module.model(**module.preprocess(inputs, prompt="Find it.", max_length=70)).embeddings
    torch.testing.assert_close(module.embed_batch(batch)["sentence_embedding"], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"inputs\[1\]: a text must be"):
        packer(["a", ""])


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
