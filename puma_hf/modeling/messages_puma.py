"""What an input is: a string, an image, a dict or a chat, as chat messages with loaded images; and its modality."""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

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
        raise ValueError(f"{where}: an instruction must be a string, got {prompt!r}. Leave it out for none.")
    if prompt and prompt.strip():
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt.strip()}]})
    return messages


def _role(message: dict[str, Any], where: str) -> str:
    if (role := message["role"]) not in ROLES:
        raise ValueError(f"{where}: unknown role {role!r} in a chat. Use one of {', '.join(map(repr, ROLES))}.")
    return str(role)


def _to_parts(item: Any, where: str) -> dict[str, Any]:
    """Normalise a string, an image or a dict to a dict with media before text and without `None` values."""
    if isinstance(item, str):
        return {"image": item} if is_image_reference(item) else {"text": item}
    if not isinstance(item, dict) or "bytes" in item:
        if item is None or isinstance(item, (list, tuple, set, int, float, bool)):
            raise ValueError(f"{where}: got {item!r}, which is neither text nor image. {_ACCEPTED}")
        return {"image": item}
    if unknown := set(item) - set(INPUT_KEYS):
        raise ValueError(f"{where}: unknown keys {sorted(map(str, unknown))}. {_ACCEPTED}")
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
    items = []
    for entry in content:
        kind = entry.get("type") if isinstance(entry, dict) else None
        if kind not in ("text", "image", "video") or kind not in entry:
            raise ValueError(
                f"{where}: chat content must be items like {{'type': 'text', 'text': ...}}, got {entry!r}."
            )
        items += _content(kind, entry[kind], where)
    if message["role"] == "system":
        return [{"type": "text", "text": item["text"].strip()} for item in items]
    return _join_texts(items)


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
                    f"{where}: a text must be a non-empty string, got {text!r}. Leave the key or input out."
                )
        return [{"type": "text", "text": text} for text in values]
    return [{"type": kind, kind: load_rgb_image(one, where) if kind == "image" else one} for one in values]


def _is_frames(values: Any) -> bool:
    """Whether a list is one video and not many: pictures are frames."""
    return bool(values) and all(isinstance(one, Image) or getattr(one, "ndim", 0) == 3 for one in values)
