"""What `embed.py` embeds: captions, passages, images, and captions and images together, the same from every seed."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

IMAGE_SIDES = (28, 1000)  # of the longer side, in pixels; as many images between 100 and 200 as between 200 and 400
ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 3.0)
INSTRUCTION_WORDS = 20
# Enough batches for sorting to tell, in some seconds a run.
COUNTS = {
    "cpu": {"captions": 192, "passages": 96, "images": 48, "half": 48},
    "cuda": {"captions": 2048, "passages": 512, "images": 768, "half": 768},
}


@dataclass(frozen=True)
class Workload:
    """Inputs, and the one instruction that all of them are read with."""

    inputs: list[Any]
    prompt: str | None = None


def one_token_words(tokenizer: Any) -> list[str]:
    """Words of the tokenizer that are one token each where a space precedes them, so that words count tokens."""
    return sorted(token[1:] for token in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{2,}", token))


def workloads(tokenizer: Any, *, device: str, scale: float, seed: int) -> dict[str, Workload]:
    """The four workloads, each seeded on its own.

    Args:
        tokenizer: Its words are those of the texts.
        device: "cpu" or "cuda", which takes more inputs.
        scale: Times as many inputs.
        seed: Another one makes other inputs of the same kinds.
    """
    words = one_token_words(tokenizer)

    def generator(number: int) -> np.random.Generator:
        return np.random.default_rng([seed, number])

    def text(number: np.random.Generator, least: int, most: int) -> str:
        return " ".join(number.choice(words, number.integers(least, most, endpoint=True)))

    count = {name: max(2, round(number * scale)) for name, number in COUNTS[device].items()}

    first, second, third, fourth = (generator(number) for number in range(4))
    captions = [text(first, 5, 15) for _ in range(count["captions"])]
    passages = [text(second, 80, 300) for _ in range(count["passages"])]
    images: list[Any] = [{"image": jpeg(third)} for _ in range(count["images"])]
    half: list[Any] = []
    for _ in range(count["half"] // 2):
        half += [text(fourth, 5, 15), {"image": jpeg(fourth)}]
    return {
        "captions": Workload(captions, prompt=text(generator(4), INSTRUCTION_WORDS, INSTRUCTION_WORDS)),
        "passages": Workload(passages),
        "images": Workload(images),
        # As they come, captions beside images: who does not sort pads the ones to the length of the others.
        "half": Workload([half[index] for index in fourth.permutation(len(half))]),
    }


def jpeg(generator: np.random.Generator, size: tuple[int, int] | None = None) -> bytes:
    """A smooth picture with some noise, encoded; upright or lying and of any size, if none is given."""
    size = size or _random_size(generator)
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    noisy = smooth + generator.normal(0, 6, smooth.shape)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def _random_size(generator: np.random.Generator) -> tuple[int, int]:
    low, high = map(math.log, IMAGE_SIDES)
    longer = round(math.exp(generator.uniform(low, high)))
    shorter = max(IMAGE_SIDES[0], round(longer / generator.choice(ASPECTS)))
    return (longer, shorter) if generator.random() < 0.5 else (shorter, longer)
