"""How a model reads an input: template, what becomes of a text, positions of the tokens; a table of the ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .messages_puma import text_items


@dataclass(frozen=True)
class Reading:
    """One way to read an input. A model keeps the one that it was trained with.

    The embedding is read at the last token, where every template ends.

    Args:
        template: File of the chat template beside this one.
        system: What the template calls `system`: the text of a system turn that every input has.
        positions: "mrope", in time, height and width, as the backbone was made; "sequential", one after another, those
            of images too.
        to_sentence: What becomes of the instruction, and then of both, it and the text, with a line break between.
        max_text_tokens: After so many tokens that text is cut.
        backbones: The `model_type` of originals that can be read so; None for all.
        told: The rest of the sentence "Inputs are read as ..." on a card.
    """

    template: str
    system: str | None = None
    positions: str = "mrope"
    to_sentence: Callable[[str], str] | None = None
    max_text_tokens: int | None = None
    backbones: tuple[str, ...] | None = None
    told: str = ""


def released_sentence(text: str) -> str:
    """A text as the authors' code has it: without space or quotation marks around it, as a sentence.

    Example:

    ```python
    >>> from puma_hf.modeling.reading_puma import released_sentence

    >>> released_sentence(" a red apple\\n"), released_sentence("Which one?")
    ('A red apple.', 'Which one?')
    ```
    """
    text = text.replace("\r", "").strip().strip('"')
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) or not text else ".")


READINGS = {
    "puma": Reading("chat_template.jinja"),
    # As in the code that PUMA's authors have released, which is built on Qwen2-VL's own template.
    "puma-released": Reading(
        "chat_template_released.jinja",
        system="You are a helpful assistant.",
        positions="sequential",
        to_sentence=released_sentence,
        max_text_tokens=450,
        backbones=("qwen2_vl", "qwen2_5_vl"),
        told="with the system turn of Qwen2-VL and positions that count every token (no M-RoPE); instruction and text "
        "begin with a capital, end in a full stop, and are cut at 450 tokens",
    ),
}


def reading_of(name: str) -> Reading:
    """The reading of this name, or a ValueError that tells the known ones."""
    if name not in READINGS:
        raise ValueError(f"reading={name!r} is not known here. Choose one of {', '.join(map(repr, READINGS))}.")
    return READINGS[name]


def one_text(messages: list[dict[str, Any]], to_sentence: Callable[[str], str]) -> list[dict[str, Any]]:
    """Messages of `to_messages` whose instruction stands before the first text, without a system turn, as sentences."""
    instruction = to_sentence(" ".join(item["text"] for item in text_items(messages, ("system",))))
    turns = [message for message in messages if message["role"] != "system"]
    if instruction and not text_items(turns):
        turns[-1]["content"].append({"type": "text", "text": ""})
    for number, item in enumerate(text_items(turns)):
        joined = f"{instruction}\n{item['text']}" if instruction and number == 0 else item["text"]
        item["text"] = to_sentence(joined)
    return turns


__all__ = ["READINGS", "Reading", "one_text", "reading_of", "released_sentence"]
