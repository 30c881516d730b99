"""Random inputs of every kind that the fast path must embed like the plain forward pass."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

WORDS = ("a", "red", "apple", "on", "table", "the", "green", "of", "wood", "two", "é", "苹果")
PROMPT = "Find a picture of the red apple on the table."
OTHER_PROMPT = "Find a picture of a green apple, or a text."
# The smallest and the largest side of the pictures.
SIDES = (28, 1000)


def mixed_inputs(count: int, seed: int = 0, *, longest: int = 600) -> list[Any]:
    """Texts of 1 character to more than a model takes, pictures, both, several pictures; some twice."""
    generator = np.random.default_rng(seed)
    inputs: list[Any] = ["a", "x" * longest]
    while len(inputs) < count:
        kind = generator.random()
        if kind < 0.45:
            inputs.append(_text(generator, longest))
        elif kind < 0.6:
            inputs.append(_picture(generator))
        elif kind < 0.75:
            inputs.append({"image": _picture(generator), "text": _text(generator, 60)})
        elif kind < 0.85:
            several = [_picture(generator, 200) for _ in range(generator.integers(2, 4))]
            inputs.append({"image": several, "text": _text(generator, 40), "instruction": OTHER_PROMPT})
        elif kind < 0.92:
            instruction = (PROMPT, OTHER_PROMPT, "Find.")[len(inputs) % 3]
            inputs.append({"text": _text(generator, 60), "instruction": instruction})
        else:
            inputs.append(inputs[generator.integers(len(inputs))])
    return inputs


def features_of(module: Any, inputs: list[Any], side: str, sizes: tuple[int, ...], **options: Any) -> list[Any]:
    """The inputs in batches of these sizes, again and again, prepared once; every third without an instruction."""
    tokenizer = module.processor.tokenizer
    before, tokenizer.padding_side = tokenizer.padding_side, side
    prompts, start, batches = itertools.cycle((PROMPT, "", OTHER_PROMPT)), 0, []
    try:
        for size in itertools.cycle(sizes):
            if start >= len(inputs):
                return batches
            batches.append(module.preprocess(inputs[start : start + size], prompt=next(prompts), **options))
            start += size
    finally:
        tokenizer.padding_side = before
    raise AssertionError("sizes must not be empty")


@torch.inference_mode()
def embed(module: Any, batches: list[dict[str, Any]], path: Any) -> Tensor:
    """The vectors of all batches under a `FastPath` or, if it is None, the plain forward pass."""
    before, module.fast_path = module.fast_path, path
    try:
        return torch.cat([module(dict(features))["sentence_embedding"] for features in batches])
    finally:
        module.fast_path = before


def _text(generator: np.random.Generator, longest: int) -> str:
    """Of a length whose logarithm is uniform."""
    text = " ".join(WORDS[number] for number in generator.integers(0, len(WORDS), longest))
    return text[: int(np.exp(generator.uniform(0, np.log(longest))))].strip() or "a"


def _picture(generator: np.random.Generator, largest: int = SIDES[1]) -> Image.Image:
    width, height = (int(side) for side in np.exp(generator.uniform(np.log(SIDES[0]), np.log(largest + 1), 2)))
    pixels = generator.integers(0, 256, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))
