from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf.flops import plain_forward
from puma_hf.modeling.packer_puma import Packer

INPUTS = ["a red apple", "a red apple on a table"]


@pytest.fixture
def module(sentence_transformer: SentenceTransformer) -> Any:
    return sentence_transformer[0]


def equal(left: Any, right: Any) -> bool:
    if torch.is_tensor(left):
        return torch.equal(left, right)
    if hasattr(left, "__dataclass_fields__"):
        return all(equal(getattr(left, name), getattr(right, name)) for name in left.__dataclass_fields__)
    return bool(left == right)


def test_a_batch_is_the_processors_without_padding(module: Any, images: list[Image.Image]) -> None:
    packer = module.packer()
    inputs = [*INPUTS, images[0], {"image": images[1:], "text": "both"}]
    features = packer.process(inputs)
    assert type(features) is dict
    assert "content_ids" not in features
    batch = packer(inputs)
    assert equal(batch, packer.pack(features))
    assert batch.num_inputs == 4
    assert batch.num_tokens == features["attention_mask"].sum()
    assert batch.images.pixel_values.dtype == module.model.dtype


def test_shared_tokens_count_once(module: Any) -> None:
    prompt = "Find a picture of the table with the red apple, and nothing else."
    packer = module.packer(prompt)
    batch = packer(INPUTS)
    total = int(packer.process(INPUTS)["attention_mask"].sum())
    shared = batch.sequences.blocks[0]
    assert batch.num_tokens == total - shared.num_keys < total
    assert replace(packer, shared_prefix=False)(INPUTS).num_tokens == total


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "Find it."},
        {"prompt": "Find it.", "max_length": 70},
        {"processing_kwargs": {"text": {"max_length": 70}}},
        {"processing_kwargs": {"image": {"size": {"shortest_edge": 256, "longest_edge": 512}}}},
    ],
)
def test_options_are_those_of_preprocess(module: Any, images: list[Image.Image], options: dict[str, Any]) -> None:
    inputs = ["a red apple " * 50, images[0]]
    features, expected = module.packer(**options).process(inputs), module.preprocess(inputs, **options)
    for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"):
        assert torch.equal(features[name], expected[name]), name


def test_special_tokens_are_split_on_request(module: Any) -> None:
    with pytest.raises(ValueError, match="special token"):
        module.packer()(["a [RET] b"])
    packer = module.packer(processing_kwargs={"text": {"split_special_tokens": True}})
    assert packer(["a [RET] b"]).num_inputs == 1


def test_errors_name_the_input(module: Any) -> None:
    with pytest.raises(ValueError, match=r"inputs\[1\]: a text must be"):
        module.packer()(["a", ""])


def test_another_process_can_do_it(module: Any, images: list[Image.Image]) -> None:
    """Nothing of the model travels: no weights, no module."""
    packer = module.packer("Find it.")
    data = pickle.dumps(packer)
    assert not any(isinstance(value, torch.nn.Module) for value in vars(packer).values())
    batch = packer([images[0], *INPUTS])
    assert equal(pickle.loads(data)([images[0], *INPUTS]), batch)
    assert equal(pickle.loads(pickle.dumps(batch)), batch)


@pytest.mark.parametrize(("packing", "video"), [(False, False), (True, True)])
def test_features_come_back_where_they_cannot_be_packed(module: Any, packing: bool, video: bool) -> None:
    packer: Packer = replace(module.packer(), packing=packing)
    features = packer.process(INPUTS)
    if video:
        features["pixel_values_videos"] = torch.zeros(4, 384)
    assert packer.pack(features) is features
    features["pixel_values_videos"] = None
    assert isinstance(packer.pack(features), dict) is not packing


@pytest.mark.parametrize("masked", [slice(3, 5), slice(None)])
def test_holes_in_the_mask_go_the_plain_way(module: Any, masked: slice) -> None:
    """No processor makes them, but a mask of one's own may have them; positions then count what is masked."""
    features = module.preprocess(INPUTS)
    features["attention_mask"][0, masked] = 0
    with torch.inference_mode(), plain_forward(SentenceTransformer(modules=[module])):
        expected = module(dict(features))["sentence_embedding"]
    assert module.packer().pack(features) is features
    with torch.inference_mode():
        vectors = module(dict(features))["sentence_embedding"]
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-6)
