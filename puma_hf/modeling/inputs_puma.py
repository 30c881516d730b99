"""What an input is: a string, an image, a dict or a chat, as chat messages with upright RGB images; and videos."""

from __future__ import annotations

import base64
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
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
# A JPEG is decoded to at least so many times the size that is kept of it. Closer, pixels would differ more from those
# of a whole decoding; further, a photo of 12 megapixels costs twice the time (benchmarks/photos.py). Averaging blocks
# costs little and blurs more, so it leaves more.
DECODED_GAP, AVERAGED_GAP = 1.75, 3.0
DOWNLOAD_TIMEOUT = 30.0  # seconds
# By EXIF's orientation.
_TURNS: dict[Any, Image.Transpose] = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))


# --- messages


def modality_of(has_text: bool, has_image: bool, has_video: bool) -> str:
    """Name in `MODALITY_NAMES` of an input with these parts, such as "image,text"; a video counts before an image."""
    medium = "video" if has_video else "image" if has_image else ""
    return ",".join(filter(None, (medium, "text" if has_text else "")))


def items_of(messages: list[dict[str, Any]], kind: str, roles: tuple[str, ...] = ROLES) -> list[dict[str, Any]]:
    """The texts, images or videos in messages of these roles, each `{"type": kind, kind: ...}`, to change in place."""
    content = [item for message in messages if message["role"] in roles for item in message["content"]]
    return [item for item in content if item["type"] == kind]


def to_messages(item: Any, prompt: str | None = None) -> list[dict[str, Any]]:
    """One input of `PumaProcessor.process_inputs` as chat messages: lists of typed items, with images as they came.

    Raises:
        ValueError: If it is of an unknown kind, or empty.
    """
    if isinstance(item, dict) and "role" in item:
        item = [item]
    if isinstance(item, list) and item and all(isinstance(part, dict) and "role" in part for part in item):
        messages = [_chat_message(part) for part in item]
        if any(message["role"] == "system" for message in messages):
            prompt = None  # the chat brings its own instruction
    else:
        if isinstance(item, list | tuple):  # within a dict several images are one input, here they may be meant as many
            raise ValueError(f"got {item!r:.80}, which is neither text nor image. {_ACCEPTED}")
        if not isinstance(item, dict) or "bytes" in item:
            item = {"text" if isinstance(item, str) and not is_image_reference(item) else "image": item}
        if unknown := set(item) - set(_KEYS):
            raise ValueError(f"unknown keys {sorted(map(str, unknown))!r:.80}. {_ACCEPTED}")
        # Arrow's rows have all keys, most of them None.
        parts = {key: item[key] for key in _KEYS if item.get(key) is not None}
        prompt = parts.pop("instruction", None) or prompt
        content = [entry for kind, value in parts.items() for entry in _content(kind, value)]
        messages = [{"role": "user", "content": _join_texts(content)}]
    if not any(message["content"] for message in messages if message["role"] != "system"):
        raise ValueError(f"it holds no text, image or video besides an instruction. {_ACCEPTED}")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"an instruction must be a string, got {prompt!r:.80}. Leave it out for none.")
    if prompt and prompt.strip():
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt}]})
    return messages


def _chat_message(message: dict[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in message.items() if value is not None}
    role, content = given.pop("role", None), given.pop("content", None)
    if role not in ROLES or given or not isinstance(content, str | list):
        form = f"{{'role': one of {', '.join(map(repr, ROLES))}, 'content': a string or a list}} without other keys"
        raise ValueError(f"a chat message must be {form}, got {message!r:.80}. Images and videos are content.")
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    items = [part for entry in content for part in _content(*_chat_item(entry))]
    if role == "system":
        if any(item["type"] != "text" for item in items):
            raise ValueError("a system message is an instruction and holds text only. Put media into a user message.")
        return {"role": role, "content": items}
    return {"role": role, "content": _join_texts(items)}


def _chat_item(entry: Any) -> tuple[str, Any]:
    """Kind and value of an item of a chat's content."""
    given = {key: value for key, value in entry.items() if value is not None} if isinstance(entry, dict) else {}
    kind, keys = _CHAT_ITEMS.get(str(given.pop("type", None)), ("", ()))
    key, value = next(iter(given.items()), ("", None))
    if key.endswith("_url") and isinstance(value, dict):
        is_plain = set(value) <= {"url", "detail"} and value.get("detail", "auto") == "auto"
        value = value.get("url") if is_plain else None
    if len(given) != 1 or key not in keys or value is None:
        # Some write the size of one image here; it is one for all of a call, and to ignore it would be no better.
        sizes = "Sizes go into processing_kwargs={'image': {'size': {...}}} in encode, images_kwargs in process_inputs."
        raise ValueError(f"chat content must be items like {_CHAT_EXAMPLES}, got {entry!r:.80}. {sizes}")
    is_bare = key == "base64" and not str(value).startswith("data:")
    return kind, f"data:;base64,{value}" if is_bare else value


def _content(kind: str, value: Any) -> list[dict[str, Any]]:
    values = value if isinstance(value, list | tuple) else [value]
    if kind == "video" and values and all(isinstance(one, Image.Image) or hasattr(one, "ndim") for one in values):
        values = [value]  # a list of images is one video
    for text in values if kind == "text" else ():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a text must be a non-empty string, got {text!r:.80}. Leave the key or input out.")
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


def load_rgb_image(
    image: Any, where: str = "", kept_size: Callable[[int, int], tuple[int, int]] | None = None
) -> Image.Image:
    """Load `image` as an upright 8-bit RGB image.

    Transparent pixels are laid on white, and palette, grey and CMYK images are converted. 16-bit grey is divided by
    257 and rounded: 65,535 is white. EXIF rotation is applied to what is opened here, and to a PIL image as
    `PIL.Image.open` returned it, which is thus the same as its file. Any other PIL image is taken as it is: what has
    turned it may have left the tag.

    Args:
        image: A PIL image, a file path, an http(s), file or data URL, encoded `bytes` or `BytesIO`, an Arrow image
            (`{"bytes": ..., "path": ...}`), or an `(height, width, 3)` uint8 array or tensor.
        where: How error messages call the input.
        kept_size: From width and height of an image to those that the model keeps. A much larger image comes in that
            size: a JPEG is decoded no larger than is needed for it, which libjpeg does by leaving out frequencies, and
            any other is averaged in blocks first. All other images are the same with it as without.

    Returns:
        The image in mode RGB.

    Raises:
        ValueError: If the image is unreadable, empty, of an unknown type, a decompression bomb, or more than
            200 times longer than wide.
        FileNotFoundError: If a path does not exist.
    """
    prefix = f"{where}: " if where else ""
    try:
        opened = image if isinstance(image, Image.Image) else _opened(image)
        _check_size(opened)
        kept = opened.size if kept_size is None else kept_size(*opened.size)
        width, height = (math.ceil(DECODED_GAP * side) for side in kept)
        is_large = min(opened.width // width, opened.height // height) >= 2
        drafted = None
        if is_large and opened is not image:  # what a user has opened keeps its size
            drafted = opened.draft(None, (width, height))
        opened.load()
        rgb = _to_rgb(opened)
        if is_large:
            box = None if drafted is None else drafted[1]  # without the part of a block that rounds a side up
            if drafted is None and kept_size is not None:  # before Pillow 12 a TIFF is turned as it is loaded
                kept = kept_size(*rgb.size)
            rgb = rgb.resize(kept, Image.Resampling.BICUBIC, box=box, reducing_gap=AVERAGED_GAP)
        turn = _turn_of(opened)
        return rgb if turn is None else rgb.transpose(turn)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{prefix}no image file at {image!r}. Check the path.") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files.
        is_name = isinstance(image, str | os.PathLike)
        name = repr(str(image)[:120]) if is_name else f"an object of type {type(image).__name__}"
        message = f"{prefix}{name} cannot be read as an image ({reason_of(error)}). Replace it or leave it out."
        raise ValueError(message) from error


def decoded_by_torchvision(image: Any, device: Any) -> Any:
    """The pixels of a JPEG that is stored upright, uint8 `(3, height, width)` on `device`; None of any other image.

    Raises:
        ImportError: If torchvision is not installed.
    """
    if not is_torchvision_available():
        raise ImportError("decode='torchvision' needs torchvision. Run `pip install 'puma-hf[video]'`.")
    read = import_module("torchvision.io")  # what stands in an import statement has to be installed where this travels
    # Whatever is wrong with an image, Pillow says it better; and CMYK is read by it alone.
    with suppress(Exception):
        opened: Any = None if isinstance(image, Image.Image) else _opened(image)
        if opened.format == "JPEG" and opened.mode in ("RGB", "L") and _turn_of(opened) is None:
            _check_size(opened)
            opened.fp.seek(0)
            data = np.frombuffer(opened.fp.read(), np.uint8).copy()
            if data[-2:].tobytes() == b"\xff\xd9":  # a GPU decodes what is cut off, too
                return read.decode_jpeg(torch.from_numpy(data), mode=read.ImageReadMode.RGB, device=device)
    return None


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
    if isinstance(image, bytes | bytearray):
        return open_image(BytesIO(image))
    if isinstance(image, str | os.PathLike):
        return open_image(image)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise ValueError("it is no PIL image, path, URL, bytes or uint8 array (height, width, 3)")
    return Image.fromarray(array)


def _check_size(image: Image.Image) -> None:
    size, is_file = image.size, isinstance(image, ImageFile.ImageFile)  # else its pixels are in memory already
    longer, shorter, most = max(size), min(size), Image.MAX_IMAGE_PIXELS if is_file else None
    if not shorter or longer > MAX_ASPECT_RATIO * shorter:
        limit = f"neither side may be 0, or more than {MAX_ASPECT_RATIO} times the other"
        raise ValueError(f"it has {size[0]} x {size[1]} pixels, {limit}")
    # Up to twice its limit Pillow only warns of a decompression bomb; a corpus has no use for either.
    if most is not None and longer * shorter > most:
        raise ValueError(f"it has {size[0]} x {size[1]} pixels, more than PIL.Image.MAX_IMAGE_PIXELS, {most}")


def _to_rgb(image: Image.Image) -> Image.Image:
    _check_size(image)  # some formats tell their size only when they are decoded
    # A PNG or PNM of 16 bits a pixel opens in mode "I" with older versions of Pillow.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int32)
        # A TIFF of 12 bits a pixel has the same mode.
        top = 4095 if getattr(image, "tag_v2", {}).get(258) == (12,) else 65535
        grey = ((values * 255 + top // 2) // top).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode!r} has no known range of values: scale it to 0-255 and convert it to RGB")
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


# --- videos


def video_part(given: Any, image_processor: Any) -> Any:
    """What reads videos, or without torchvision its settings, which a save writes again.

    transformers decides by torchvision whether a processor has a video part at all; kept as settings, a directory
    made with torchvision opens without it, and the other way round. Where a file says nothing of videos, its settings
    of images are given, as transformers does with the `preprocessor_config.json` of an original Qwen2-VL.
    """
    if given is not None and not isinstance(given, Mapping):
        return given
    not_video = ("auto_map", "processor_class", "image_processor_type")
    settings = {name: value for name, value in (given or image_processor.to_dict()).items() if name not in not_video}
    settings["video_processor_type"] = "Qwen2VLVideoProcessor"
    if not is_torchvision_available():
        return settings
    from transformers import Qwen2VLVideoProcessor

    return Qwen2VLVideoProcessor(**{name: value for name, value in settings.items() if value is not None})


def read_frames(video: Any) -> tuple[np.ndarray, float | None]:
    """The frames of a video, `(num_frames, height, width, channels)`, and how many a second has, where that is known.

    A video is a path, a URL, the bytes of a file, an array of frames or a list of images of one size.

    Raises:
        ValueError: If it cannot be read.
        ImportError: If it is a file, and PyAV is not installed.
    """
    is_file = isinstance(video, str | Path | bytes)
    if is_file and not is_av_available():
        raise ImportError("a video file needs PyAV. Run `pip install 'puma-hf[video]'`.")
    try:
        if is_file:
            source: Any = BytesIO(video) if isinstance(video, bytes) else str(video)
            load: Any = read_video_pyav if isinstance(video, bytes) else partial(load_video, backend="pyav")
            # All frames: some containers do not say how many they hold.
            frames, about = load(source, sample_indices_fn=lambda **_: range(sys.maxsize))
            return np.asarray(frames), about.fps
        if hasattr(video, "shape"):
            return np.ascontiguousarray(video), None
        return np.stack([np.asarray(load_rgb_image(frame)) for frame in video]), None
    except Exception as error:  # PyAV has an error for each way to be broken
        name = repr(str(video)) if isinstance(video, str | Path) else f"given as {type(video).__name__}"
        raise ValueError(f"the video {name} cannot be read ({error}). Pass a file or its frames.") from error
