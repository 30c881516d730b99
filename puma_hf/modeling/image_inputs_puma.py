"""Turn what users hand over as an image into an upright 8-bit RGB PIL image, or say why it cannot be one."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import warnings
from typing import Any
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps

IMAGE_FILE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp")
# Qwen2-VL's own limit: beyond it a resized image keeps no usable short side.
MAX_ASPECT_RATIO = 200
DOWNLOAD_TIMEOUT = 30.0  # seconds


def is_image_reference(text: str) -> bool:
    """Whether a string is an image to sentence-transformers: data URI, image URL, existing image file."""
    if text.startswith("data:image/"):
        return True
    if text.startswith(("http://", "https://")) and " " not in text:
        return urlparse(text).path.lower().endswith(IMAGE_FILE_SUFFIXES)
    return text.lower().endswith(IMAGE_FILE_SUFFIXES) and os.path.isfile(text)


def load_rgb_image(image: Any, where: str = "input") -> Image.Image:
    """Load `image` as an upright 8-bit RGB image.

    Transparent pixels are laid on white, EXIF rotation is applied, 16-bit values are scaled down to 8 bits,
    and palette, grey and CMYK images are converted.

    Args:
        image: A PIL image, a file path, an http(s) URL, a data URI, encoded `bytes`, an Arrow image
            (`{"bytes": ..., "path": ...}`), or an `(height, width, 3)` uint8 array or tensor.
        where: How error messages call the input.

    Returns:
        The image in mode RGB.

    Raises:
        ValueError: If the image is unreadable, empty, of an unknown type, a decompression bomb, or more than
            200 times longer than wide.
        FileNotFoundError: If a path does not exist.
    """
    source = _source_of(image, where)
    try:
        with warnings.catch_warnings():
            # Between one and two times Pillow's limit it only warns; a corpus has no use for either.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = source if isinstance(source, Image.Image) else Image.open(_download(source))
            opened.load()
            upright = ImageOps.exif_transpose(opened)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{where}: {_describe(image)} has more pixels than Pillow's limit of {Image.MAX_IMAGE_PIXELS} "
            "and may be a decompression bomb. Downscale it first, or raise PIL.Image.MAX_IMAGE_PIXELS if you "
            "trust its source."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: no image file at {image!r}. Check the path.") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files.
        raise ValueError(
            f"{where}: {_describe(image)} cannot be read as an image ({reason_of(error)}). "
            "It may be cut off or of another format: replace it or leave it out."
        ) from error
    return _check_shape(_to_rgb(upright, where), where)


def reason_of(error: Exception) -> str:
    """What Pillow says, without the address in memory of what has no name."""
    return re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error))


def _source_of(image: Any, where: str) -> Any:
    """What Pillow opens (a path, a URL or a byte stream), or an image that already is one."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, dict) and ("bytes" in image or "path" in image):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, (bytes, bytearray)):
        return io.BytesIO(image)
    if isinstance(image, str) and image.startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(image.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise ValueError(
                f"{where}: the data URI {image[:40]!r}... is not valid base64: encode it again."
            ) from error
    if isinstance(image, (str, os.PathLike)):
        return image
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3 and image.size:
            return Image.fromarray(image)
        raise ValueError(
            f"{where}: an image array must be uint8 of shape (height, width, 3), got {image.dtype} of shape "
            f"{image.shape}. Convert it, for example with PIL.Image.fromarray."
        )
    raise ValueError(
        f"{where}: {_describe(image)} is not an image. Pass a PIL image, a path, a URL, bytes or a uint8 array."
    )


def _download(source: Any) -> Any:
    if not (isinstance(source, str) and source.startswith(("http://", "https://"))):
        return source
    # Some hosts refuse Python's default user agent.
    request = Request(source, headers={"User-Agent": "puma-hf"})
    with urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
        return io.BytesIO(response.read())


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(
            f"{where}: the image is empty ({image.width} x {image.height} pixels). Both sides must be at "
            "least 1: replace it or leave it out."
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        # Wide greyscale files hold 16 bits a pixel; Pillow's own conversion would clip them at 255.
        return Image.fromarray(
            np.clip(values // 257 if values.max() > 255 else values, 0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.mode == "F":
        raise ValueError(
            f"{where}: a floating-point image (mode 'F') has no known value range. Scale it to 0-255 and "
            "convert it with image.convert('RGB')."
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_shape(image: Image.Image, where: str) -> Image.Image:
    longer, shorter = max(image.size), min(image.size)
    if longer > MAX_ASPECT_RATIO * shorter:
        raise ValueError(
            f"{where}: an image of {image.width} x {image.height} pixels is {longer / shorter:.0f} times "
            f"longer than wide; Qwen2-VL takes at most {MAX_ASPECT_RATIO}. Crop it or pad the short side."
        )
    return image


def _describe(image: Any) -> str:
    if isinstance(image, (str, os.PathLike)):
        return repr(str(image)[:120])
    if isinstance(image, (bytes, bytearray)):
        return f"a bytes object of length {len(image)}"
    return f"an object of type {type(image).__name__}"
