"""The ways to write an input are tested through `process_inputs`, in test_processing_puma.py."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import pytest

from puma_hf.modeling import MODALITY_IDS, MODALITY_NAMES, messages_puma
from puma_hf.modeling.messages_puma import media_of, modality_of, modality_of_messages, text_items, to_messages


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ((True, False, False), "text"),
        ((False, True, False), "image"),
        ((True, True, False), "image,text"),
        ((False, False, True), "video"),
        ((True, False, True), "video,text"),
        ((True, True, True), "video,text"),
    ],
)
def test_modality_names(parts: tuple[bool, bool, bool], name: str) -> None:
    assert modality_of(*parts) == name
    assert MODALITY_IDS[name] == MODALITY_NAMES.index(name)


def test_a_dict_and_a_chat_become_the_same_messages() -> None:
    said: dict[str, Any] = {"text": "in green", "instruction": " Find it. "}
    chat = [{"role": "system", "content": "Find it."}, {"role": "user", "content": "in green"}]
    expected = [
        {"role": "system", "content": [{"type": "text", "text": "Find it."}]},
        {"role": "user", "content": [{"type": "text", "text": "in green"}]},
    ]
    assert to_messages(said, None, "x") == to_messages(chat, "ignored", "x") == expected
    assert to_messages("in green", "Find it.", "x") == expected
    assert modality_of_messages(expected) == "text"  # the instruction is no part of it
    assert media_of(expected) == {"image": [], "video": []}
    assert [item["text"] for item in text_items(expected)] == ["Find it.", "in green"]
    assert [item["text"] for item in text_items(expected, ("user",))] == ["in green"]


FILE = BytesIO(b"...")


@pytest.mark.parametrize(
    ("item", "image"),
    [
        ({"type": "image", "image": FILE, "text": None}, FILE),
        ({"type": "image", "url": "https://example.org/a"}, "https://example.org/a"),
        ({"type": "image", "url": "file:///a.png"}, "file:///a.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "base64": "AAAA"}, "data:;base64,AAAA"),
        ({"type": "image", "base64": "data:image/png;base64,AAAA"}, "data:image/png;base64,AAAA"),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "data:image/png;base64,AAAA"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}, "a.png"),
    ],
)
def test_how_a_chat_names_an_image(item: dict[str, Any], image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages_puma, "load_rgb_image", lambda value, where: value)
    messages = to_messages([{"role": "user", "content": [item, {"type": "text", "text": "apple"}]}], None, "x")
    assert media_of(messages) == {"image": [image], "video": []}
    assert modality_of_messages(messages) == "image,text"
