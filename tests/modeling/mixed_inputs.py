"""Random inputs of every kind that the fast path must embed like the plain forward pass."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from puma_hf.modeling.fast_path_puma import FastPath

WORDS = ("a", "red", "apple", "on", "table", "the", "green", "of", "wood", "two", "é", "苹果")
PROMPT = "Find a picture of the red apple on the table."
OTHER_PROMPT = "Find a picture of a green apple, or a text."
# The smallest and the largest side of the pictures.
SIDES = (28, 1000)
NAMES = tuple(field.name for field in fields(FastPath) if field.type == "bool")
COMBINATIONS = tuple(itertools.product((True, False), repeat=len(NAMES)))


def fast_path(module: Any, *switches: bool) -> Any:
    """A `FastPath` of the module's own class, which for a model opened from a directory is a copy."""
    return type(type(module).fast_path)(*switches)


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
            inputs.append(
                {"text": _text(generator, 60), "instruction": (PROMPT, OTHER_PROMPT, "Find.")[len(inputs) % 3]}
            )
        else:
            inputs.append(inputs[generator.integers(len(inputs))])
    return inputs


def batches_of(inputs: list[Any], sizes: tuple[int, ...] = (1, 2, 7, 64, 30, 3, 48, 16)) -> list[list[Any]]:
    """The inputs in batches of these sizes, again and again."""
    batches, start = [], 0
    for size in itertools.cycle(sizes):
        if start >= len(inputs):
            return batches
        batches.append(inputs[start : start + size])
        start += size
    raise AssertionError("sizes must not be empty")


def features_of(module: Any, batches: list[list[Any]], side: str, **options: Any) -> list[dict[str, Any]]:
    """Every batch prepared once, every third of them without an instruction."""
    tokenizer = module.processor.tokenizer
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        prompts = itertools.cycle((PROMPT, "", OTHER_PROMPT))
        return [module.preprocess(batch, prompt=next(prompts), **options) for batch in batches]
    finally:
        tokenizer.padding_side = before


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
