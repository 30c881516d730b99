"""Render conversations through the chat template, once for all that differ in their texts alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

Messages = list[dict[str, Any]]
Shape = tuple[tuple[str, tuple[str, ...]], ...]

# SHA-256 of the readings' templates, which put texts into the prompt as they are. Of others nobody knows that.
VERBATIM_TEMPLATES = {
    "b9acb6bfc1962d456be26c53deeb1762619c2adb545485ec53f95424a00ff05d",
    "10920f3ce7fb8eeb7bfb56c58eb2038abfb52cc066a1ca82aaec51b13e682d13",
}
_MOST_SHAPES = 256
_PLACE = re.compile(r"\x00(\d+)\x00")

# Of a template and a shape: the literal parts of the prompt and, between them, which text comes.
_skeletons: dict[tuple[str, Shape], list[str]] = {}


def render(messages: Messages, template: Any, apply_template: Callable[[Messages], str]) -> str:
    """The prompt of a conversation.

    Args:
        messages: Each with a role and a list of content items, `{"type": "text", "text": ...}` or media.
        template: The chat template; `None` or several in a dictionary are applied as they are.
        apply_template: Renders a conversation with it.

    Returns:
        What `apply_template` would return.

    Example:

    ```python
    >>> from puma_hf.modeling.chat_rendering_puma import render

    >>> message = {"role": "user", "content": [{"type": "text", "text": "a red apple"}]}
    >>> render([message], None, lambda messages: messages[0]["content"][0]["text"])
    'a red apple'
    ```
    """
    if not isinstance(template, str) or not _is_verbatim(template):
        return apply_template(messages)
    shape = tuple((message["role"], tuple(item["type"] for item in message["content"])) for message in messages)
    skeleton = _skeletons.get((template, shape))
    if skeleton is None:
        skeleton = _PLACE.split(apply_template(_with_places(messages)))
        if len(_skeletons) >= _MOST_SHAPES:
            _skeletons.clear()
        _skeletons[template, shape] = skeleton
    texts = [item["text"] for message in messages for item in message["content"] if item["type"] == "text"]
    return "".join(texts[int(part)] if number % 2 else part for number, part in enumerate(skeleton))


@lru_cache(maxsize=8)
def _is_verbatim(template: str) -> bool:
    return hashlib.sha256(template.encode()).hexdigest() in VERBATIM_TEMPLATES


def _with_places(messages: Messages) -> Messages:
    """The conversation with the numbers of its texts in their places."""
    copied, number = [], 0
    for message in messages:
        content = []
        for item in message["content"]:
            content.append({**item, "text": f"\0{number}\0"} if item["type"] == "text" else item)
            number += item["type"] == "text"
        copied.append({**message, "content": content})
    return copied


__all__ = ["render"]
