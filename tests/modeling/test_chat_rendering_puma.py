from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from puma_hf import PumaProcessor
from puma_hf.modeling import chat_rendering_puma
from puma_hf.modeling.chat_rendering_puma import VERBATIM_TEMPLATES, render
from puma_hf.modeling.reading_puma import READINGS
from puma_hf.pruning import template_of

Messages = list[dict[str, Any]]
TEMPLATE = Path(chat_rendering_puma.__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


IMAGE = {"type": "image", "image": object()}
CHATS: list[Messages] = [
    [{"role": "user", "content": [text(" a red\napple ")]}],
    [{"role": "user", "content": [text("{{ messages }} {% if %} \0 1 \0")]}],
    [{"role": "user", "content": [IMAGE]}],
    [{"role": "system", "content": [text("Find it.")]}, {"role": "user", "content": [IMAGE]}],
    [{"role": "system", "content": [text("Find it.")]}, {"role": "user", "content": [IMAGE, IMAGE, text("in green")]}],
    [{"role": "system", "content": [text("Find"), text("it.")]}, {"role": "user", "content": [text("0"), IMAGE]}],
    [
        {"role": "user", "content": [text("Is it red?")]},
        {"role": "assistant", "content": [text("No.")]},
        {"role": "user", "content": [{"type": "video", "video": object()}, text("And here?")]},
    ],
]


@pytest.mark.parametrize("messages", CHATS)
def test_the_prompt_is_the_templates(processor: PumaProcessor, messages: Messages) -> None:
    def apply(chat: Messages) -> str:
        return str(processor.apply_chat_template(chat, tokenize=False))

    expected = apply(messages)
    for _ in range(2):  # as it is first rendered, and as it is after that
        assert render(messages, processor.chat_template, apply) == expected


def test_a_shape_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_rendering_puma, "_skeletons", {})
    rendered: list[Messages] = []

    def apply(chat: Messages) -> str:
        rendered.append(chat)
        return f"<{chat[0]['content'][0]['text']}>"

    prompts = [render([{"role": "user", "content": [text(one)]}], TEMPLATE, apply) for one in ("a", "b", "c")]
    assert prompts == ["<a>", "<b>", "<c>"]
    assert len(rendered) == 1


def test_another_template_is_applied_every_time() -> None:
    """It may change the texts."""
    chats = [[{"role": "user", "content": [text(one)]}] for one in ("a", "b")]
    for template in (TEMPLATE + " ", None):
        assert [render(chat, template, lambda chat: chat[0]["content"][0]["text"].upper()) for chat in chats] == [
            "A",
            "B",
        ]


def test_shapes_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_rendering_puma, "_skeletons", {})
    for count in range(2 * chat_rendering_puma._MOST_SHAPES):
        render([{"role": "user", "content": [text("a")] * (count + 1)}], TEMPLATE, lambda chat: "")
        assert len(chat_rendering_puma._skeletons) <= chat_rendering_puma._MOST_SHAPES


def test_the_template_is_the_one_that_was_read() -> None:
    found = {hashlib.sha256(template_of(reading).encode()).hexdigest() for reading in READINGS.values()}
    assert found == VERBATIM_TEMPLATES
