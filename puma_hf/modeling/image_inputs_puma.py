"""Turn what users hand over as an image into an upright 8-bit RGB PIL image, or say why it cannot be one."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import warnings
from typing import Any
from urllib.request import Request, url2pathname, urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile

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
# Files of 16 bits a pixel that Pillow, or an older one, opens in mode "I".
_WIDE_GREY = ("PNG", "PPM")
_TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image, by its ending: one of an image format that Pillow opens here."""
    Image.init()
    return Image.EXTENSION.get(os.path.splitext(name)[1].lower()) in IMAGE_FORMATS


def open_image(source: Any) -> Image.Image:
    """`PIL.Image.open` for the formats in `IMAGE_FORMATS` alone.

    Args:
        source: A path, a `file://` URL or a stream.
    """
    Image.init()
    source = _local(source) if isinstance(source, str) else source
    return Image.open(source, formats=[kind for kind in Image.ID if kind in IMAGE_FORMATS])


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
    source = _source_of(image, where)
    try:
        with warnings.catch_warnings():
            # Between one and two times Pillow's limit it only warns; a corpus has no use for either.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = source if isinstance(source, Image.Image) else open_image(_download(source))
            opened.load()
            rgb = _to_rgb(opened, where)
            if (turn := _turn_of(opened)) is not None:
                rgb = rgb.transpose(turn)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{where}: {_describe(image)} has more pixels than Pillow's limit of {Image.MAX_IMAGE_PIXELS} "
            "and may be a decompression bomb. Downscale it first, or raise PIL.Image.MAX_IMAGE_PIXELS if you "
            "trust its source."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: no image file at {image!r}. Check the path.") from error
    except (MemoryError, _RefusedImageError):
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files.
        raise ValueError(
            f"{where}: {_describe(image)} cannot be read as an image ({reason_of(error)}). "
            "It may be cut off or of another format: replace it or leave it out."
        ) from error
    return _check_shape(rgb, where)


class _RefusedImageError(ValueError):
    """Pillow has decoded it, but it has no pixels, or no colours."""


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """How to turn what a file holds, by its EXIF; Pillow has turned a TIFF when it loaded the pixels."""
    if not isinstance(image, ImageFile.ImageFile) or image.format == "TIFF":
        return None
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow cannot parse this EXIF block, so it asks for no turn
        return None


def reason_of(error: Exception) -> str:
    """What Pillow says, without the address in memory of what has no name."""
    return re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error))


def _source_of(image: Any, where: str) -> Any:
    """What Pillow opens (a path, a URL or a byte stream), or an image that already is one."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, dict) and ("bytes" in image or "path" in image):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, io.BytesIO):
        image = image.getvalue()
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
        raise _RefusedImageError(
            f"{where}: the image is empty ({image.width} x {image.height} pixels). Both sides must be at "
            "least 1: replace it or leave it out."
        )
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _WIDE_GREY):
        values = np.asarray(image).astype(np.int32)
        # A TIFF of 12 bits a pixel has the same mode.
        top = 4095 if getattr(image, "tag_v2", {}).get(258) == (12,) else 65535
        grey = ((values * 255 + top // 2) // top).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise _RefusedImageError(
            f"{where}: an image of {'32-bit integers' if image.mode == 'I' else 'floating-point numbers'} (mode "
            f"{image.mode!r}) has no known value range. Scale it to 0-255 and convert it with image.convert('RGB')."
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
