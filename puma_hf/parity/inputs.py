"""A few texts and drawn pictures, by a seed, on which the forms of a model are compared."""

from __future__ import annotations

import random
from typing import Any

from PIL import Image, ImageDraw

from puma_hf.modeling.inputs_puma import modality_of

_WORDS = (
    *("a", "red", "apple", "on", "the", "wooden", "table", "of", "two", "old", "boats", "under", "grey", "sky", "who"),
    *("painted", "7", "windows?", "é", "苹果", "in", "1998,", "near", "it", "(north)", "bread", "and", "salt.", "How"),
)
_INSTRUCTIONS = ("Find an image that matches the sentence.", "Retrieve a passage that answers the question.")
_SIDES = (56, 168)


def check_inputs(seed: int = 0) -> list[dict[str, Any]]:
    """Texts of 1 to 40 words, pictures, both, and two pictures at once, some with an instruction.

    Args:
        seed: What they are drawn by; the same number gives the same inputs on every machine.

    Returns:
        Dicts with keys among "image", "text" and "instruction", as `PumaProcessor.process_inputs` takes them.

    Example:

    ```python
    >>> from puma_hf.parity.inputs import check_inputs

    >>> [sorted(one) for one in check_inputs()[:2]]
    [['text'], ['text']]
    ```
    """
    rng = random.Random(seed)
    return [
        {"text": _text(rng, 1)},
        {"text": _text(rng, 9)},
        {"text": _text(rng, 40)},
        {"text": _text(rng, 12), "instruction": _INSTRUCTIONS[0]},
        {"text": _text(rng, 5), "instruction": _INSTRUCTIONS[1]},
        {"image": _picture(rng)},
        {"image": _picture(rng), "instruction": _INSTRUCTIONS[0]},
        {"image": _picture(rng), "text": _text(rng, 6)},
        {"image": _picture(rng), "text": _text(rng, 15), "instruction": _INSTRUCTIONS[1]},
        {"image": [_picture(rng), _picture(rng)], "text": _text(rng, 7)},
    ]


def kind_of(one: dict[str, Any]) -> str:
    """What an input is, such as "image,text, instructed"."""
    name = modality_of("text" in one, "image" in one, has_video=False)
    return f"{name}, instructed" if "instruction" in one else name


def pictures_of(one: dict[str, Any]) -> list[Image.Image]:
    """The pictures of an input."""
    pictures = one.get("image", [])
    return pictures if isinstance(pictures, list) else [pictures]


def to_chat(one: dict[str, Any]) -> list[dict[str, Any]]:
    """An input as the chat that other programs send: the instruction is the system message, pictures come first."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in pictures_of(one)]
    if "text" in one:
        content.append({"type": "text", "text": one["text"]})
    chat = [{"role": "user", "content": content}]
    if "instruction" in one:
        chat.insert(0, {"role": "system", "content": [{"type": "text", "text": one["instruction"]}]})
    return chat


def _text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(num_words))


def _picture(rng: random.Random) -> Image.Image:
    """Shapes on a ground of one colour."""
    size = (rng.randint(*_SIDES), rng.randint(*_SIDES))
    picture = Image.new("RGB", size, _colour(rng))
    draw = ImageDraw.Draw(picture)
    for number in range(rng.randint(3, 6)):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        box = (x // 2, y // 2, x // 2 + rng.randint(8, 60), y // 2 + rng.randint(8, 60))
        if number % 2:
            draw.rectangle(box, fill=_colour(rng))
        else:
            draw.ellipse(box, fill=_colour(rng))
    return picture


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return (rng.randrange(256), rng.randrange(256), rng.randrange(256))
