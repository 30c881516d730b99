"""Operations of the fast path at the true shapes of Qwen2-VL-7B, counted on the meta device."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from puma_hf.modeling.fast_path_puma import packed_states
from puma_hf.modeling.packing_puma import pack
from tests.full_size import (
    HIDDEN_SIZE,
    RET_TOKEN_ID,
    TEXT_CONFIG,
    TEXT_TOKENS,
    VISION_CONFIG,
    VISUAL_TOKENS,
    build_model,
    count_step,
)

VISION_START, IMAGE = 151_652, 151_655
HEADS, KEY_VALUE_HEADS = TEXT_CONFIG["num_attention_heads"], TEXT_CONFIG["num_key_value_heads"]
HEAD_DIM = HIDDEN_SIZE // HEADS
KEYS_AND_VALUES = 2 * 2 * HIDDEN_SIZE * KEY_VALUE_HEADS * HEAD_DIM
# What a token costs besides its key and value: query, output and MLP.
REST = 2 * 2 * HIDDEN_SIZE * HIDDEN_SIZE + 3 * 2 * HIDDEN_SIZE * TEXT_CONFIG["intermediate_size"]


def pairs(count: int) -> int:
    """Operations of attention for so many pairs of a query and a key, all heads."""
    return 2 * 2 * HEADS * HEAD_DIM * count


def decoder(num_layers: int, num_tokens: int) -> int:
    """All layers for all tokens but the last, which is for the last token alone."""
    inner = num_tokens * (KEYS_AND_VALUES + REST) + pairs(num_tokens**2)
    return (num_layers - 1) * inner + num_tokens * KEYS_AND_VALUES + REST + pairs(num_tokens)


def vision(num_patches: int, depth: int) -> int:
    width, merged = VISION_CONFIG["embed_dim"], num_patches // 4
    block = num_patches * 2 * width * (3 * width + width + 2 * 4 * width) + 2 * 2 * num_patches**2 * width
    merger = merged * 2 * (4 * width) * (4 * width + HIDDEN_SIZE)
    return num_patches * 2 * (3 * 2 * 14 * 14) * width + depth * block + merger


def text(num_tokens: int, start: int = 1000) -> list[int]:
    return [*range(start, start + num_tokens - 1), RET_TOKEN_ID]


def image_and_text(grid: tuple[int, int], num_text_tokens: int, start: int = 1000) -> list[int]:
    """Half of the text before the image, half after it."""
    before = num_text_tokens // 2
    row = [*range(start, start + before - 1), VISION_START, *[IMAGE] * (grid[0] * grid[1] // 4)]
    return [*row, *range(start + 500, start + 500 + num_text_tokens - before - 1), RET_TOKEN_ID]


# 256 visual tokens and 34 of text.
PICTURE = (image_and_text((32, 32), TEXT_TOKENS), (32, 32))


@cache
def model_of(num_kept_layers: int, depth: int) -> Any:
    return build_model(num_kept_layers, adapter=False, depth=depth).eval()


def flops(num_kept_layers: int, inputs: list[tuple[list[int], tuple[int, int] | None]], depth: int = 2) -> int:
    """Of one batch of token ids and, for those with an image, its height and width in patches."""
    longest = max(len(row) for row, _ in inputs)
    grids = [[1, *grid] for _, grid in inputs if grid]
    features: dict[str, Any] = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row, _ in inputs]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row, _ in inputs]),
    }
    if grids:
        features["image_grid_thw"] = torch.tensor(grids)
        num_patches = int(features["image_grid_thw"].prod(dim=1).sum())
        features["pixel_values"] = torch.empty(num_patches, 3 * 2 * 14 * 14)
    (part,) = pack(features, image_token_id=IMAGE, merge_size=2, dtype=torch.bfloat16).to("meta").parts

    def step() -> None:
        with torch.inference_mode():
            assert packed_states(model_of(num_kept_layers, depth), part).shape == (len(inputs), HIDDEN_SIZE)

    return count_step(step).total


@pytest.mark.parametrize(("kept", "depth", "of_text", "of_picture"), [(12, 32, 0.333, 3.00), (8, 2, 0.212, 2.46)])
def test_an_input_costs_what_must_be_computed(kept: int, depth: int, of_text: float, of_picture: float) -> None:
    """The figures of docs/speed.md."""
    assert flops(kept, [(text(64), None)]) == decoder(kept, 64) <= of_text * 10**12
    of_decoder = decoder(kept, VISUAL_TOKENS + TEXT_TOKENS)
    assert flops(kept, [PICTURE], depth) == of_decoder + vision(4 * VISUAL_TOKENS, depth)
    assert of_decoder + vision(4 * VISUAL_TOKENS, VISION_CONFIG["depth"]) <= of_picture * 10**12


MIXED: list[tuple[list[int], tuple[int, int] | None]] = [
    (text(5), None),
    (text(300, 9000), None),
    PICTURE,
    (text(64, 20_000), None),
    (image_and_text((4, 10), 40, 3000), (4, 10)),
    (text(64, 30_000), None),
]


def test_padding_costs_nothing() -> None:
    """A batch of lengths from 5 to 300 costs what its inputs cost alone, to the last operation."""
    assert flops(2, MIXED) == sum(flops(2, [item]) for item in MIXED)
    for row, grid in MIXED:
        assert grid or flops(2, [(row, None)]) == decoder(2, len(row))


@pytest.mark.parametrize("kept", [1, 3])
def test_a_shared_instruction_costs_once(kept: int) -> None:
    prefix, lengths = 50, [60, 52, 300, 75]
    inputs: list[Any] = []
    for number, length in enumerate(lengths, 1):
        inputs.append(([*range(100, 100 + prefix), *text(length - prefix, 1000 * number)], None))
    count = len(inputs)
    inner = (count - 1) * prefix * (KEYS_AND_VALUES + REST)
    # Attention is counted over all pairs: the prefix's queries meet the prefix, once, and no longer every input.
    inner += pairs(prefix * sum(lengths) - prefix**2)
    saved = (kept - 1) * inner + (count - 1) * prefix * KEYS_AND_VALUES
    assert sum(flops(kept, [item]) for item in inputs) - flops(kept, inputs) == saved
