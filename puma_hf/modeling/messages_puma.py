"""What an input is: a string, an image, a dict or a chat, as chat messages with loaded images; and its modality."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from .image_inputs_puma import is_image_reference, load_rgb_image

# M-BEIR's names for the modality of an input; an id is the position in this tuple.
MODALITY_NAMES = ("text", "image", "image,text", "video", "video,text")
MODALITY_IDS = {name: index for index, name in enumerate(MODALITY_NAMES)}

ROLES = ("system", "user", "assistant")
INPUT_KEYS = ("text", "image", "video", "instruction")
_ACCEPTED = (
    "Pass a string, an image, a dict with any of the keys "
    f"{', '.join(map(repr, INPUT_KEYS))}, or a list of chat messages."
)

# Tokens that stand for something else than text in the vocabularies of these families, `[RET]` among them.
SPECIAL_TOKEN = re.compile(
    r"<\|((object_ref|box|quad|vision|im)_(start|end)|endoftext|(vision|image|video)_pad)\|>|\[RET\]"
)
# By the type of a chat's item: what it is, and the keys that its value may have.
_MEDIA_KEYS = ("url", "path", "base64")
_CHAT_ITEMS = {
    "text": ("text", ("text",)),
    **{kind: (kind, (kind, *_MEDIA_KEYS)) for kind in ("image", "video")},
    **{f"{kind}_url": (kind, (f"{kind}_url",)) for kind in ("image", "video")},
}


IMAGE_SIZE_REMEDY = (
    "The size of images is one for all of a call: processing_kwargs={'image': {'size': {'shortest_edge': ..., "
    "'longest_edge': ...}}} in encode, images_kwargs={'size': ...} in process_inputs."
)
SPECIAL_TOKEN_REMEDY = (
    "Remove it, or have it read as plain text: --special-tokens split in a command, processing_kwargs={'text': "
    "{'split_special_tokens': True}} in encode, split_special_tokens=True in process_inputs."
)


def shown(value: Any) -> str:
    """A value as a message shows it: at most a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-37:]}"


def holds_inputs(value: Any) -> bool:
    """Whether a value holds inputs in an order: a list, a column, a pandas Series, a generator, an array of strings."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and value.dtype.kind in "OUT"  # of numbers it is one image
    one = (str, bytes, bytearray, Mapping, set, frozenset, Image.Image, torch.Tensor)
    if isinstance(value, one) or hasattr(value, "read") or hasattr(value, "columns"):
        return False  # a file yields lines, a table of pandas the names of its columns
    return isinstance(value, Iterable)


def modality_of(has_text: bool, has_image: bool, has_video: bool) -> str:
    """Name in `MODALITY_NAMES` of an input with these parts; a video counts before an image.

    Example:

    ```python
    >>> from puma_hf.modeling.messages_puma import modality_of

    >>> modality_of(has_text=True, has_image=True, has_video=False)
    'image,text'
    ```
    """
    medium = "video" if has_video else "image" if has_image else ""
    return ",".join(filter(None, (medium, "text" if has_text else "")))


def text_items(messages: list[dict[str, Any]], roles: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [
        item
        for message in messages
        if not roles or message["role"] in roles
        for item in message["content"]
        if item["type"] == "text"
    ]


def media_of(messages: list[dict[str, Any]]) -> dict[str, list[Any]]:
    items = [item for message in messages for item in message["content"]]
    return {kind: [item[kind] for item in items if item["type"] == kind] for kind in ("image", "video")}


def modality_of_messages(messages: list[dict[str, Any]]) -> str:
    media = media_of(messages)
    has_text = bool(text_items(messages, ("user", "assistant")))
    return modality_of(has_text, bool(media["image"]), bool(media["video"]))


def to_messages(item: Any, prompt: str | None, where: str) -> list[dict[str, Any]]:
    """Normalise one input to chat messages whose content is a list of typed items with loaded images."""
    if isinstance(item, dict) and "role" in item:
        item = [item]
    if isinstance(item, list) and item and all(isinstance(part, dict) and "role" in part for part in item):
        messages = [{"role": _role(part, where), "content": _chat_content(part, where)} for part in item]
        if any(message["role"] == "system" for message in messages):
            prompt = None  # the chat brings its own instruction
    else:
        parts = _to_parts(item, where)
        prompt = parts.pop("instruction", None) or prompt
        content = [entry for kind in parts for entry in _content(kind, parts[kind], where)]
        messages = [{"role": "user", "content": _join_texts(content)}]
    if not any(message["content"] for message in messages if message["role"] != "system"):
        raise ValueError(f"{where}: it holds no text, image or video besides an instruction. {_ACCEPTED}")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{where}: an instruction must be a string, got {shown(prompt)}. Leave it out for none.")
    if prompt and prompt.strip():
        _check_unicode(prompt, where)
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt.strip()}]})
    return messages


def _role(message: dict[str, Any], where: str) -> str:
    if (role := message["role"]) not in ROLES:
        raise ValueError(f"{where}: unknown role {shown(role)} in a chat. Use one of {', '.join(map(repr, ROLES))}.")
    if unknown := {key for key in message if message[key] is not None} - {"role", "content"}:
        raise ValueError(
            f"{where}: unknown keys {shown(sorted(map(str, unknown)))} in a chat message. It has a role and a content, "
            "and media are items of the content."
        )
    return str(role)


def _to_parts(item: Any, where: str) -> dict[str, Any]:
    """Normalise a string, an image or a dict to a dict with media before text and without `None` values."""
    if isinstance(item, str):
        return {"image": item} if is_image_reference(item) else {"text": item}
    if not isinstance(item, dict) or "bytes" in item:
        if item is None or isinstance(item, (list, tuple, set, int, float, bool)):
            raise ValueError(f"{where}: got {shown(item)}, which is neither text nor image. {_ACCEPTED}")
        if holds_inputs(item):
            raise ValueError(f"{where}: a {type(item).__name__} may hold inputs, but is none. Pass list(...) of it.")
        return {"image": item}
    if unknown := set(item) - set(INPUT_KEYS):
        raise ValueError(f"{where}: unknown keys {shown(sorted(map(str, unknown)))}. {_ACCEPTED}")
    parts = {key: item[key] for key in ("image", "video", "text", "instruction") if item.get(key) is not None}
    if not set(parts) - {"instruction"}:
        raise ValueError(f"{where}: the dict holds no text, image or video (all values are None). {_ACCEPTED}")
    return parts


def _chat_content(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"{where}: a chat message's content must be a string or a list, got {type(content).__name__}.")
    if message["role"] == "system" and any(
        isinstance(entry, dict) and entry.get("type") != "text" for entry in content
    ):
        raise ValueError(
            f"{where}: a system message is an instruction and holds text only. Put media into a user message."
        )
    items = [part for entry in content for part in _content(*_chat_item(entry, where), where)]
    if message["role"] == "system":
        return [{"type": "text", "text": item["text"].strip()} for item in items]
    return _join_texts(items)


def _chat_item(entry: Any, where: str) -> tuple[str, Any]:
    """Kind and value of an item of a chat's content, as Qwen, transformers or OpenAI write it."""
    given = {key: value for key, value in entry.items() if value is not None} if isinstance(entry, dict) else {}
    name = given.pop("type", None)
    kind, keys = _CHAT_ITEMS.get(name, ("", ())) if isinstance(name, str) else ("", ())
    if len(given) == 1 and set(given) <= set(keys):
        ((key, value),) = given.items()
        if key.endswith("_url") and isinstance(value, dict) and set(value) - {"detail"} == {"url"}:
            given, value = value, value["url"]
        if given.get("detail", "auto") == "auto":
            is_bare = key == "base64" and isinstance(value, str) and not value.startswith("data:")
            return kind, f"data:;base64,{value}" if is_bare else value
    raise ValueError(
        f"{where}: chat content must be items like {{'type': 'text', 'text': ...}}, {{'type': 'image', 'image': ...}} "
        "(or 'url', 'path', 'base64') and {'type': 'image_url', 'image_url': {'url': ...}}, without other keys, got "
        f"{shown(entry)}. {IMAGE_SIZE_REMEDY}"
    )


def _join_texts(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring texts as one, as the template renders them: a special token may span two of them."""
    joined: list[dict[str, Any]] = []
    for item in items:
        if joined and joined[-1]["type"] == item["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + item["text"]}
        else:
            joined.append(item)
    return joined


def _content(kind: str, value: Any, where: str) -> list[dict[str, Any]]:
    values = value if isinstance(value, (list, tuple)) and not (kind == "video" and _is_frames(value)) else [value]
    if kind == "text":
        for text in values:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"{where}: a text must be a non-empty string, got {shown(text)}. Leave the key or input out."
                )
            _check_unicode(text, where)
        return [{"type": "text", "text": text} for text in values]
    return [{"type": kind, kind: load_rgb_image(one, where) if kind == "image" else one} for one in values]


def _is_frames(values: Any) -> bool:
    """Whether a list is one video and not many: pictures are frames."""
    return bool(values) and all(isinstance(one, Image.Image) or getattr(one, "ndim", 0) == 3 for one in values)


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: {shown(text)} holds half a character (a lone surrogate). Mend its encoding."
        ) from None
