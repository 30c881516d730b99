from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf import prune
from puma_hf.flops import count_flops, count_parameters, plain_forward
from tests.tiny import HIDDEN_SIZE, build_qwen2_vl

HEADS, KEY_VALUE_HEADS, INTERMEDIATE = 4, 2, 64
HEAD_DIM = HIDDEN_SIZE // HEADS
EMBED, PATCH_VALUES, MLP_RATIO, VISION_DEPTH = 32, 3 * 2 * 8 * 8, 2, 2


def matrix(rows: int, inner: int, columns: int) -> int:
    """Operations of a product: one multiplication and one addition each."""
    return 2 * rows * inner * columns


def decoder_layer(tokens: int) -> int:
    """Without the rotary angles, whose outer product torch computes elementwise."""
    projections = 2 * matrix(tokens, HIDDEN_SIZE, HIDDEN_SIZE)  # queries and output
    projections += 2 * matrix(tokens, HIDDEN_SIZE, KEY_VALUE_HEADS * HEAD_DIM)
    attention = 2 * HEADS * matrix(tokens, HEAD_DIM, tokens)
    return projections + attention + 3 * matrix(tokens, HIDDEN_SIZE, INTERMEDIATE)


def vision_tower(patches: int) -> int:
    block = matrix(patches, EMBED, 3 * EMBED) + matrix(patches, EMBED, EMBED)
    block += 2 * matrix(patches, EMBED, patches)  # attention, all heads
    block += 2 * matrix(patches, EMBED, MLP_RATIO * EMBED)
    merged = patches // 4
    merger = matrix(merged, 4 * EMBED, 4 * EMBED) + matrix(merged, 4 * EMBED, HIDDEN_SIZE)
    return matrix(patches, PATCH_VALUES, EMBED) + VISION_DEPTH * block + merger


def test_text_by_hand(sentence_transformer: SentenceTransformer) -> None:
    tokens = sentence_transformer[0].preprocess(["a red apple"])["input_ids"].shape[1]
    expected = 2 * decoder_layer(tokens)
    assert count_flops(sentence_transformer, "a red apple") == expected


def test_instruction_counts(sentence_transformer: SentenceTransformer) -> None:
    tokens = sentence_transformer[0].preprocess(["apple"], prompt="Find it.")["input_ids"].shape[1]
    expected = 2 * decoder_layer(tokens)
    assert count_flops(sentence_transformer, "apple", prompt="Find it.") == expected
    assert expected > count_flops(sentence_transformer, "apple")


def test_the_fast_path_spends_the_last_layer_on_ret_alone(sentence_transformer: SentenceTransformer) -> None:
    tokens = sentence_transformer[0].preprocess(["a red apple"])["input_ids"].shape[1]
    keys_and_values = 2 * matrix(tokens, HIDDEN_SIZE, KEY_VALUE_HEADS * HEAD_DIM)
    one_token = 2 * matrix(1, HIDDEN_SIZE, HIDDEN_SIZE) + 3 * matrix(1, HIDDEN_SIZE, INTERMEDIATE)
    attention = 2 * HEADS * matrix(1, HEAD_DIM, tokens)
    expected = decoder_layer(tokens) + keys_and_values + one_token + attention
    assert count_flops(sentence_transformer, "a red apple", fast=True) == expected


def test_the_fast_path_is_back_after_a_plain_forward(sentence_transformer: SentenceTransformer) -> None:
    before = sentence_transformer[0].fast_path
    with plain_forward(sentence_transformer):
        assert sentence_transformer[0].fast_path is None
        with suppress(RuntimeError), plain_forward(sentence_transformer):
            raise RuntimeError
        assert sentence_transformer[0].fast_path is None
    assert sentence_transformer[0].fast_path is before is not None


def test_image_by_hand(sentence_transformer: SentenceTransformer, images: list[Image.Image]) -> None:
    features = sentence_transformer[0].preprocess([{"image": images[0]}])
    tokens, patches = features["input_ids"].shape[1], features["pixel_values"].shape[0]
    assert patches == features["image_grid_thw"].prod() > 4
    expected = 2 * decoder_layer(tokens) + vision_tower(patches)
    assert count_flops(sentence_transformer, {"image": images[0]}) == expected


def test_a_dropped_layer_saves_what_it_costs(
    qwen_dir: Path, sentence_transformer: SentenceTransformer, images: list[Image.Image], tmp_path: Path
) -> None:
    prune(qwen_dir, tmp_path / "full", num_kept_layers=4)
    full = SentenceTransformer(str(tmp_path / "full"), trust_remote_code=True, device="cpu")
    for item in ("a red apple", {"image": images[0], "text": "red"}):
        tokens = full[0].preprocess([item])["input_ids"].shape[1]
        difference = count_flops(full, item) - count_flops(sentence_transformer, item)
        assert difference == 2 * decoder_layer(tokens)
    layers = full[0].model.language_model.layers
    dropped = sum(count_parameters(layer) for layer in layers[2:])
    assert count_parameters(full) - count_parameters(sentence_transformer) == dropped


def test_counting_changes_nothing(sentence_transformer: SentenceTransformer) -> None:
    before = sentence_transformer.encode(["a red apple"])
    assert count_flops(sentence_transformer, "a red apple") == count_flops(sentence_transformer, "a red apple")
    assert (sentence_transformer.encode(["a red apple"]) == before).all()


@pytest.mark.parametrize("tied", [True, False])
def test_shared_parameters_count_once(tied: bool) -> None:
    first, second = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 2, bias=False)
    if tied:
        second.weight = first.weight
    assert count_parameters(torch.nn.Sequential(first, second)) == (6 if tied else 12)


def test_parameters_of_the_whole_model(tmp_path: Path) -> None:
    source = build_qwen2_vl(tmp_path / "source")
    report = prune(source, tmp_path / "pruned", num_kept_layers=2)
    model = SentenceTransformer(str(tmp_path / "pruned"), trust_remote_code=True, device="cpu")
    assert count_parameters(model) == report.parameters_after
