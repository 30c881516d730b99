"""The ways to read an input, by name: PUMA's own, and those of embedders that are cut and go on reading as they do."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace

RET_TOKEN = "[RET]"
ANSWER = "<|im_start|>assistant\n"  # what templates ask for an answer with


@dataclass(frozen=True)
class Reading:
    """One way to read an input: template, text, limits, positions. A model keeps the one that it was trained with.

    The embedding is read at the last token, where every template ends: what a model's authors let follow it, such as a
    full stop after `[RET]` or the `<emb>` after the state that is read, cannot be seen from there.
    """

    template: str | None  # the file of the chat template beside this one; None for the one that the source brings
    system: str | None = None  # what the template calls so: the text of the system turn, if no instruction is it
    # What the template ends in, and calls so, after "assistant"; None where the source says.
    end: str | None = RET_TOKEN
    positions: str = "mrope"  # in time, height and width; "sequential", one after another, those of images too
    to_instruction: Callable[[str], str] | None = str.strip
    to_sentence: Callable[[str], str] | None = None  # for the instruction, then for both, it and the text
    max_text_tokens: int | None = None  # of that text
    empty_text: str | None = None  # what an input without any part is read as; None refuses it
    # What an embedder's own code sets, and not its files: visual tokens of an image, at least and at most; tokens.
    visual_tokens: tuple[int, int] | None = None
    max_length: int | None = None
    padding_side: str | None = None
    backbones: tuple[str, ...] | None = None  # the model_type of originals that can be read so; None for all
    known_by: str | None = None  # a pattern of the names that its checkpoints have
    told: str = ""  # the rest of the sentence "Inputs are read as ..." on a card


def released_sentence(text: str) -> str:
    """A text as the authors' code has it: without space or quotation marks around it, as a sentence.

    Example:

    ```python
    >>> from puma_hf.modeling.readings_puma import released_sentence

    >>> released_sentence(" a red apple\\n"), released_sentence("Which one?")
    ('A red apple.', 'Which one?')
    ```
    """
    text = text.replace("\r", "").strip().strip('"')
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) or not text else ".")


def with_full_stop(instruction: str) -> str:
    """An instruction as Qwen3-VL-Embedding's authors have it: with a full stop if it ends in no punctuation.

    Example:

    ```python
    >>> from puma_hf.modeling.readings_puma import with_full_stop

    >>> with_full_stop(" Find it "), with_full_stop("Find it\u3002")
    ('Find it.', 'Find it\u3002')
    ```
    """
    instruction = instruction.strip()
    is_whole = not instruction or unicodedata.category(instruction[-1]).startswith("P")
    return instruction if is_whole else f"{instruction}."


# As in the code that PUMA's authors have released, which is built on Qwen2-VL's own template.
_RELEASED = Reading(
    "chat_template_released.jinja",
    system="You are a helpful assistant.",
    positions="sequential",
    to_sentence=released_sentence,
    max_text_tokens=450,
    backbones=("qwen2_vl", "qwen2_5_vl"),
    told="with the system turn of Qwen2-VL and positions that count every token (no M-RoPE); instruction and text "
    "begin with a capital, end in a full stop, and are cut at 450 tokens",
)
# How a model reads, by name. Another embedder is another entry: what its authors' inference code does.
READINGS = {
    "puma": Reading("chat_template.jinja"),
    "puma-released": _RELEASED,
    # What a sentence-transformers directory says of itself.
    "source": Reading(
        None,
        end=None,
        to_instruction=None,
        told="with the chat template, the prompts and the limits of the embedder that was cut; an instruction is the "
        "system message",
    ),
    "qwen3-vl-embedding": Reading(
        "chat_template_instructed.jinja",
        system="Represent the user's input.",
        end="",
        to_instruction=with_full_stop,
        empty_text="NULL",
        visual_tokens=(4, 1800),
        max_length=8192,
        padding_side="right",
        backbones=("qwen3_vl",),
        known_by="qwen3-?vl-?embedding",
        told="by Qwen3-VL-Embedding's own code: the instruction is the system turn, and without one \"Represent the "
        "user's input.\"",
    ),
    "gme": Reading(
        "chat_template_instructed.jinja",
        system="You are a helpful assistant.",
        end="<|endoftext|>",
        positions="sequential",
        visual_tokens=(256, 1280),
        max_length=1800,
        padding_side="left",
        backbones=("qwen2_vl",),
        known_by="gme-?qwen2",
        told='by GME\'s own code: the instruction is the system turn, and without one "You are a helpful assistant."; '
        "`<|endoftext|>` ends the prompt, and positions count every token (no M-RoPE)",
    ),
    # The user turn that PUMA's authors have taken over; the state before `<emb>` is the last of the prompt.
    "lamra": replace(
        _RELEASED,
        end="",
        visual_tokens=(4, 300),
        known_by="lamra-?ret",
        told=f"by LamRA's own code, up to the token before `<emb>`, {_RELEASED.told}",
    ),
}


def reading_of(name: str) -> Reading:
    """The reading of this name, or a ValueError that tells the known ones."""
    if name not in READINGS:
        raise ValueError(f"reading={name!r} is not known here. Choose one of {', '.join(map(repr, READINGS))}.")
    return READINGS[name]
