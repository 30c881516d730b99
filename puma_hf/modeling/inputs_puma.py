"""What an input is: a string, an image, a dict or a chat, as chat messages with upright RGB images; and videos."""

from __future__ import annotations

import base64
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, url2pathname, urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile
from transformers.utils.import_utils import is_av_available, is_torchvision_available
from transformers.video_utils import load_video, read_video_pyav

# M-BEIR's names for the modality of an input; an id is the position in this tuple.
MODALITY_NAMES = ("text", "image", "image,text", "video", "video,text")
MODALITY_IDS = {name: index for index, name in enumerate(MODALITY_NAMES)}

ROLES = ("system", "user", "assistant")
_KEYS = ("image", "video", "text", "instruction")  # in the order in which an input is read
_ACCEPTED = f"Pass a string, an image, a dict with any of the keys {', '.join(map(repr, _KEYS))}, or a chat."

# Tokens that stand for something else than text in the vocabularies of these families, `[RET]` among them.
SPECIAL_TOKEN = re.compile(
    r"<\|((object_ref|box|quad|vision|im)_(start|end)|endoftext|(vision|image|video)_pad)\|>|\[RET\]"
)
SPECIAL_TOKEN_REMEDY = (
    "Remove it, or have it read as plain text: --special-tokens split in a command, processing_kwargs={'text': "
    "{'split_special_tokens': True}} in encode, split_special_tokens=True in process_inputs."
)
_SIZE_REMEDY = (
    "The size of images is one for all of a call: processing_kwargs={'image': {'size': {...}}} in encode, "
    "images_kwargs={'size': {...}} in process_inputs."
)
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
# By the type of a chat's item: what it is, and the keys that its value may have, as Qwen, transformers and OpenAI
# write them.
_CHAT_ITEMS = {
    "text": ("text", ("text",)),
    **{kind: (kind, (kind, "url", "path", "base64")) for kind in ("image", "video")},
    **{f"{kind}_url": (kind, (f"{kind}_url",)) for kind in ("image", "video")},
}

_CHAT_EXAMPLES = (
    "{'type': 'text', 'text': ...}, {'type': 'image', 'image': ...} (or 'url', 'path', 'base64') and {'type': "
    "'image_url', 'image_url': {'url': ...}}, without other keys"
)

# Pictures of pixels, opened where the Pillow that is installed can, or its plugin for the last two. Left out are EPS,
# for which Pillow runs Ghostscript; WMF and MPEG, which it does not decode; FITS and other formats of measurements; and
# those of which the endings mostly name something else, such as PCD, a cloud of points.
IMAGE_FORMATS = frozenset((
    "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FLI", "FTEX", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000",
    "MPO", "MSP", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM",
    "HEIF", "JXL",
))  # fmt: skip
# Qwen2-VL's own limit: beyond it a resized image keeps no usable short side.
MAX_ASPECT_RATIO = 200
DOWNLOAD_TIMEOUT = 30.0  # seconds
# By EXIF's orientation, 1 to 8.
_TURNS: dict[Any, Image.Transpose] = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))


class _RefusedError(ValueError):
    """Why an input cannot be used; whoever catches it says which input."""


def shown(value: Any) -> str:
    """A value as a message shows it: at most a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-37:]}"


# --- messages


def holds_inputs(value: Any) -> bool:
    """Whether a value holds inputs in an order: a list, a column, a pandas Series, a generator, an array of strings."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and value.dtype.kind in "OUT"  # of numbers it is one image
    one = isinstance(value, (str, bytes, bytearray, Mapping, set, frozenset, Image.Image, torch.Tensor))
    # A file would yield lines, a table of pandas the names of its columns.
    return isinstance(value, Iterable) and not (one or hasattr(value, "read") or hasattr(value, "columns"))


def modality_of(has_text: bool, has_image: bool, has_video: bool) -> str:
    """Name in `MODALITY_NAMES` of an input with these parts, such as "image,text"; a video counts before an image."""
    medium = "video" if has_video else "image" if has_image else ""
    return ",".join(filter(None, (medium, "text" if has_text else "")))


def text_items(messages: list[dict[str, Any]], roles: tuple[str, ...] = ROLES) -> list[dict[str, Any]]:
    """The texts in messages of these roles, each `{"type": "text", "text": ...}`, to be changed in place."""
    content = [item for message in messages if message["role"] in roles for item in message["content"]]
    return [item for item in content if item["type"] == "text"]


def media_of(messages: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The images and the videos of messages, in their order."""
    items = [item for message in messages for item in message["content"]]
    return {kind: [item[kind] for item in items if item["type"] == kind] for kind in ("image", "video")}


def modality_of_messages(messages: list[dict[str, Any]]) -> str:
    """Name in `MODALITY_NAMES`; an instruction is no part of what an input is."""
    media = media_of(messages)
    return modality_of(bool(text_items(messages, ROLES[1:])), bool(media["image"]), bool(media["video"]))


def to_messages(item: Any, prompt: str | None, where: str) -> list[dict[str, Any]]:
    """One input of `PumaProcessor.process_inputs` as chat messages: lists of typed items with loaded images.

    Raises:
        ValueError: If it, called `where`, is of an unknown kind, empty, or holds an image that cannot be read.
        FileNotFoundError: If an image's file is missing.
    """
    try:
        messages = _to_messages(item, prompt)
    except _RefusedError as error:
        raise ValueError(f"{where}: {error}") from None
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = load_rgb_image(part["image"], where)
    return messages


def _to_messages(item: Any, prompt: str | None) -> list[dict[str, Any]]:
    if isinstance(item, dict) and "role" in item:
        item = [item]
    if isinstance(item, list) and item and all(isinstance(part, dict) and "role" in part for part in item):
        messages = [{"role": _role(part), "content": _chat_content(part)} for part in item]
        if any(message["role"] == "system" for message in messages):
            prompt = None  # the chat brings its own instruction
    else:
        parts = _to_parts(item)
        prompt = parts.pop("instruction", None) or prompt
        content = [entry for kind in parts for entry in _content(kind, parts[kind])]
        messages = [{"role": "user", "content": _join_texts(content)}]
    if not any(message["content"] for message in messages if message["role"] != "system"):
        raise _RefusedError(f"it holds no text, image or video besides an instruction. {_ACCEPTED}")
    if prompt is not None and not isinstance(prompt, str):
        raise _RefusedError(f"an instruction must be a string, got {shown(prompt)}. Leave it out for none.")
    if prompt and prompt.strip():
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt.strip()}]})
    for entry in text_items(messages):
        if _HALF_CHARACTER.search(entry["text"]):
            raise _RefusedError(f"{shown(entry['text'])} holds half a character (a lone surrogate). Mend its encoding.")
    return messages


def _to_parts(item: Any) -> dict[str, Any]:
    """A string, an image or a dict as a dict with media before text and without `None` values."""
    if isinstance(item, str):
        return {"image": item} if is_image_reference(item) else {"text": item}
    if not isinstance(item, dict) or "bytes" in item:
        if item is None or isinstance(item, (list, tuple, set, int, float, bool)) or holds_inputs(item):
            raise _RefusedError(f"got {shown(item)}, which is neither text nor image. {_ACCEPTED}")
        return {"image": item}
    if unknown := set(item) - set(_KEYS):
        raise _RefusedError(f"unknown keys {shown(sorted(map(str, unknown)))}. {_ACCEPTED}")
    # Arrow's rows have all keys, most of them None.
    parts = {key: item[key] for key in _KEYS if item.get(key) is not None}
    if not set(parts) - {"instruction"}:
        raise _RefusedError(f"the dict holds no text, image or video (all values are None). {_ACCEPTED}")
    return parts


def _role(message: dict[str, Any]) -> str:
    if (role := message["role"]) not in ROLES:
        raise _RefusedError(f"unknown role {shown(role)} in a chat. Use one of {', '.join(map(repr, ROLES))}.")
    if unknown := {key for key in message if message[key] is not None} - {"role", "content"}:
        raise _RefusedError(f"unknown keys {shown(sorted(map(str, unknown)))} in a chat message. Media are content.")
    return str(role)


def _chat_content(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _RefusedError(f"a chat message's content must be a string or a list, got {type(content).__name__}.")
    items = [part for entry in content for part in _content(*_chat_item(entry))]
    if message["role"] != "system":
        return _join_texts(items)
    if any(item["type"] != "text" for item in items):
        raise _RefusedError("a system message is an instruction and holds text only. Put media into a user message.")
    return [{"type": "text", "text": item["text"].strip()} for item in items]


def _chat_item(entry: Any) -> tuple[str, Any]:
    """Kind and value of an item of a chat's content."""
    given = {key: value for key, value in entry.items() if value is not None} if isinstance(entry, dict) else {}
    kind, keys = _CHAT_ITEMS.get(str(given.pop("type", None)), ("", ()))
    key, value = next(iter(given.items()), ("", None))
    if key.endswith("_url") and isinstance(value, dict):
        is_plain = set(value) <= {"url", "detail"} and value.get("detail", "auto") == "auto"
        value = value.get("url") if is_plain else None
    if len(given) != 1 or key not in keys or value is None:
        raise _RefusedError(f"chat content must be items like {_CHAT_EXAMPLES}, got {shown(entry)}. {_SIZE_REMEDY}")
    is_bare = key == "base64" and not str(value).startswith("data:")
    return kind, f"data:;base64,{value}" if is_bare else value


def _content(kind: str, value: Any) -> list[dict[str, Any]]:
    values = value if isinstance(value, list | tuple) else [value]
    if kind == "video" and values and all(isinstance(one, Image.Image) or hasattr(one, "ndim") for one in values):
        values = [value]  # a list of pictures is one video
    for text in values if kind == "text" else ():
        if not isinstance(text, str) or not text.strip():
            raise _RefusedError(f"a text must be a non-empty string, got {shown(text)}. Leave the key or input out.")
    return [{"type": kind, kind: one} for one in values]


def _join_texts(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring texts as one, as the template renders them: a special token may span two of them."""
    joined: list[dict[str, Any]] = []
    for item in items:
        if joined and joined[-1]["type"] == item["type"] == "text":
            joined[-1]["text"] += item["text"]
        else:
            joined.append(item)
    return joined


# --- images


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image, by its ending: one of an image format that Pillow opens here."""
    Image.init()
    return Image.EXTENSION.get(os.path.splitext(name)[1].lower()) in IMAGE_FORMATS


def is_image_reference(text: str) -> bool:
    """Whether a string is an image: a data URI, an image's URL, or the path or `file://` URL of an existing one."""
    if text.startswith("data:image/"):
        return True
    if text.startswith(("http://", "https://")) and " " not in text:
        return is_image_name(re.split("[?#]", text, maxsplit=1)[0])
    return is_image_name(text) and os.path.isfile(_local(text))


def _local(text: str) -> str:
    """The path that a `file://` URL means; any other text as it is."""
    if not text.startswith("file://"):
        return text
    return url2pathname(text.removeprefix("file://").removeprefix("localhost"))


def open_image(source: Any) -> Image.Image:
    """`PIL.Image.open` of a path, a `file://` URL or a stream, for the formats in `IMAGE_FORMATS` alone."""
    Image.init()
    source = _local(source) if isinstance(source, str) else source
    return Image.open(source, formats=[kind for kind in Image.ID if kind in IMAGE_FORMATS])


def load_rgb_image(image: Any, where: str = "input") -> Image.Image:
    """Load `image` as an upright 8-bit RGB image.

    Transparent pixels are laid on white, and palette, grey and CMYK images are converted. 16-bit grey is divided by
    257 and rounded: 65,535 is white. EXIF rotation is applied to what is opened here, and to a PIL image as
    `PIL.Image.open` returned it, which is thus the same as its file. Any other PIL image is taken as it is: what has
    turned it may have left the tag.

    Args:
        image: A PIL image, a file path, an http(s), file or data URL, encoded `bytes` or `BytesIO`, an Arrow image
            (`{"bytes": ..., "path": ...}`), or an `(height, width, 3)` uint8 array or tensor.
        where: How error messages call the input.

    Returns:
        The image in mode RGB.

    Raises:
        ValueError: If the image is unreadable, empty, of an unknown type, a decompression bomb, or more than
            200 times longer than wide.
        FileNotFoundError: If a path does not exist.
    """
    try:
        with warnings.catch_warnings():
            # Between one and two times Pillow's limit it only warns; a corpus has no use for either.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = image if isinstance(image, Image.Image) else _opened(image)
            opened.load()
            rgb = _to_rgb(opened)
            turn = _turn_of(opened)
            return rgb if turn is None else rgb.transpose(turn)
    except _RefusedError as error:
        raise ValueError(f"{where}: {error}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"Pillow's limit of {Image.MAX_IMAGE_PIXELS} and may be a decompression bomb"
        remedy = "Downscale it first, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust its source."
        raise ValueError(f"{where}: {_described(image)} has more pixels than {limit}. {remedy}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: no image file at {image!r}. Check the path.") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files.
        message = f"{where}: {_described(image)} cannot be read as an image ({reason_of(error)}). "
        raise ValueError(message + "It may be cut off or of another format: replace it or leave it out.") from error


def reason_of(error: Exception) -> str:
    """What Pillow says, without the address in memory of what has no name."""
    return re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error) or type(error).__name__)


def _opened(image: Any) -> Image.Image:
    if isinstance(image, dict) and ("bytes" in image or "path" in image):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, BytesIO):
        image = image.getvalue()
    if isinstance(image, str) and image.startswith("data:"):
        image = base64.b64decode(image.partition(",")[2], validate=True)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        # Some hosts refuse Python's default user agent.
        with urlopen(Request(image, headers={"User-Agent": "puma-hf"}), timeout=DOWNLOAD_TIMEOUT) as response:
            image = response.read()
    if isinstance(image, (bytes, bytearray)):
        return open_image(BytesIO(image))
    if isinstance(image, (str, os.PathLike)):
        return open_image(image)
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else image
    is_rgb = isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3
    if not is_rgb or not array.size:
        accepted = "Pass a PIL image, a path, a URL, bytes or a uint8 array (height, width, 3)."
        raise _RefusedError(f"{_described(image)} is not an image. {accepted}")
    return Image.fromarray(array)


def _to_rgb(image: Image.Image) -> Image.Image:
    longer, shorter = max(image.size), min(image.size)
    size = f"{image.width} x {image.height} pixels"
    if not shorter:
        raise _RefusedError(f"the image is empty ({size}). Both sides must be at least 1: replace it or leave it out.")
    if longer > MAX_ASPECT_RATIO * shorter:
        times = f"{longer / shorter:.0f} times longer than wide; Qwen2-VL takes at most {MAX_ASPECT_RATIO}"
        raise _RefusedError(f"an image of {size} is {times}. Crop it or pad the short side.")
    # A PNG or PNM of 16 bits a pixel opens in mode "I" with older versions of Pillow.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int32)
        # A TIFF of 12 bits a pixel has the same mode.
        top = 4095 if getattr(image, "tag_v2", {}).get(258) == (12,) else 65535
        grey = ((values * 255 + top // 2) // top).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise _RefusedError(f"mode {image.mode!r} has no known value range. Scale it to 0-255: image.convert('RGB').")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """How to turn what a file holds, by its EXIF; Pillow has turned a TIFF when it loaded the pixels."""
    if not isinstance(image, ImageFile.ImageFile) or image.format == "TIFF":
        return None
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow cannot parse this EXIF block, so it asks for no turn
        return None


def _described(image: Any) -> str:
    if isinstance(image, (str, os.PathLike)):
        return repr(str(image)[:120])
    if isinstance(image, (bytes, bytearray)):
        return f"a bytes object of length {len(image)}"
    shape = f" of {image.dtype} {tuple(image.shape)}" if isinstance(image, (np.ndarray, torch.Tensor)) else ""
    return f"an object of type {type(image).__name__}{shape}"


# --- videos

# What Qwen2VLVideoProcessor has by itself, written out: without torchvision the class cannot be asked.
_VIDEO_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True),
    **dict.fromkeys(("do_sample_frames", "return_metadata"), False),
    **{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
    **{"max_frames": 768, "max_video_tokens": 128000, "min_frames": 4, "resample": 3, "rescale_factor": 1 / 255},
    **{"merge_size": 2, "patch_size": 14, "temporal_patch_size": 2},
    "size": {"longest_edge": 28 * 28 * 768, "shortest_edge": 28 * 28 * 128},
}
_NOT_VIDEO = ("auto_map", "processor_class", "image_processor_type")


def video_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `Qwen2VLVideoProcessor(**given).to_dict()` gives where torchvision is installed, whatever is installed.

    Where a file says nothing of videos, its settings of images are given: transformers, too, reads the
    `preprocessor_config.json` of an original Qwen2-VL as both.
    """
    found = {name: value for name, value in given.items() if value is not None and name not in _NOT_VIDEO}
    size = dict(found.get("size") or _VIDEO_SETTINGS["size"])
    for old_name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        size[edge] = found.pop(old_name, size.get(edge))
    return {**_VIDEO_SETTINGS, **found, "size": size, "video_processor_type": "Qwen2VLVideoProcessor"}


def video_part(given: Any, image_processor: Any) -> Any:
    """What reads videos, or without torchvision its settings, which a save writes again.

    transformers decides by torchvision whether a processor has a video part at all; kept as settings, a directory
    made with torchvision opens without it, and the other way round.
    """
    if given is not None and not isinstance(given, Mapping):
        return given
    settings = video_settings(given or image_processor.to_dict())
    if not is_torchvision_available():
        return settings
    from transformers import Qwen2VLVideoProcessor

    return Qwen2VLVideoProcessor(**settings)


def read_frames(video: Any, where: str) -> tuple[np.ndarray, float | None]:
    """The frames of a video, `(num_frames, height, width, channels)`, and how many a second has, where that is known.

    Args:
        video: A path, a URL, the bytes of a file, an array of frames or a list of images of one size.
        where: Name of the input, for errors: a ValueError, or an ImportError for a file without PyAV.
    """
    is_file = isinstance(video, (str, Path, bytes))
    if is_file and not is_av_available():
        raise ImportError(f"{where}: a video file needs PyAV. Run `pip install 'puma-hf[video]'`.")
    try:
        if is_file:
            source: Any = BytesIO(video) if isinstance(video, bytes) else str(video)
            load: Any = read_video_pyav if isinstance(video, bytes) else partial(load_video, backend="pyav")
            frames, about = load(source, sample_indices_fn=_all_frames)
            return np.asarray(frames), about.fps
        if hasattr(video, "shape"):
            return np.ascontiguousarray(video), None
        return np.stack([np.asarray(load_rgb_image(frame, where)) for frame in video]), None
    except Exception as error:  # PyAV has an error for each way to be broken
        name = repr(str(video)) if isinstance(video, (str, Path)) else f"given as {type(video).__name__}"
        raise ValueError(f"{where}: the video {name} cannot be read ({error}). Pass a file or its frames.") from error


def _all_frames(**_: Any) -> range:
    return range(sys.maxsize)  # some containers do not say how many they hold
