"""Files of every format and mode that the Pillow installed here writes, against arithmetic of our own."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from puma_hf.modeling.image_inputs_puma import IMAGE_FORMATS, is_image_name, is_image_reference, load_rgb_image

Image.init()
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "I;16", "I;16B", "I", "F")
BASE = Image.fromarray(np.arange(8 * 16 * 3, dtype=np.uint16).astype(np.uint8).reshape(8, 16, 3))


def drawn(mode: str) -> Image.Image:
    """16 x 16 pixels of many values; the last band, which may be transparency, has all from 0 to 255."""
    ramp = np.arange(256).reshape(16, 16)
    if mode == "1":
        return Image.fromarray(ramp > 99)
    if mode in ("I", "F"):
        return Image.fromarray((ramp * 100).astype(np.int32 if mode == "I" else np.float32))
    if mode.startswith("I;16"):
        wide = (ramp * 250 + 77).astype(">u2" if mode.endswith("B") else "<u2")
        return Image.frombytes(mode, (16, 16), wide.tobytes())
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.stack([*(ramp.T // 16 * (band + 5) for band in range(bands - 1)), ramp], -1)
    if mode[0] == "P":
        pixels[..., 0] %= 16
    image = Image.frombytes(mode, (16, 16), pixels.astype(np.uint8).tobytes())
    if mode[0] == "P":
        image.putpalette([value * 5 for value in range(48)])
    return image


def on_white(colours: Any, alpha: Any) -> Any:
    """`colours * alpha + white * (1 - alpha)`, rounded to the nearest."""
    alpha = np.asarray(alpha, np.int64)[..., None]
    return (2 * (colours.astype(np.int64) * alpha + 255 * (255 - alpha)) + 255) // 510


def reference(image: Any) -> Any:
    """The colours `(height, width, 3)` of what Pillow has decoded."""
    values = np.asarray(image).astype(np.int64)
    clear = image.info.get("transparency")
    if image.mode in ("P", "PA"):
        palette = np.frombuffer(image.palette.palette, np.uint8).reshape(-1, len(image.palette.mode))
        colours = palette[values if image.mode == "P" else values[..., 0]][..., :3]
        return on_white(colours, values[..., 1] if image.mode == "PA" else np.where(values == clear, 0, 255))
    if image.mode == "CMYK":
        return np.rint((255 - values[..., :3]) * (255 - values[..., 3:]) / 255)
    if image.mode in ("RGB", "RGBX"):
        return on_white(values[..., :3], np.where((values[..., :3] == clear).all(-1), 0, 255))
    if image.mode == "RGBA":
        return on_white(values[..., :3], values[..., 3])
    if image.mode == "LA":
        return on_white(values[..., :1].repeat(3, -1), values[..., 1])
    grey = {"1": values * 255, "L": values}.get(image.mode, np.floor(values / 257 + 0.5).astype(np.int64))
    return on_white(grey[..., None].repeat(3, -1), np.where(values == clear, 0, 255))


def written(mode: str, kind: str, **options: Any) -> bytes | None:
    stream = io.BytesIO()
    try:
        drawn(mode).save(stream, kind, **options)
        Image.open(stream).load()
    except (OSError, ValueError, KeyError, TypeError, SystemError):  # not a mode of this format
        return None
    return stream.getvalue()


@pytest.mark.parametrize("kind", sorted({*Image.SAVE} & IMAGE_FORMATS))
def test_every_file_that_pillow_writes_has_the_colours_of_the_reference(kind: str) -> None:
    clear: dict[str, Any] = {"P": 3, "L": 77, "RGB": (45, 54, 250), "I;16": 77}
    options: list[dict[str, Any]] = [{}, {"bitmap_format": "bmp"}] if kind == "ICO" else [{}]
    files = {(mode, str(option)): written(mode, kind, **option) for mode in MODES for option in options}
    if kind in ("PNG", "GIF"):
        files |= {(mode, "transparency"): written(mode, kind, transparency=value) for mode, value in clear.items()}
    compared = 0
    for name, content in files.items():
        if content is None:
            continue
        decoded = Image.open(io.BytesIO(content))
        decoded.load()
        has_no_range = decoded.mode == "F" or (decoded.mode == "I" and kind != "PPM")
        if has_no_range or (decoded.mode == "P" and decoded.palette is None):  # Pillow loses the palette of an ICNS
            with pytest.raises(ValueError, match=r"no known value range|cannot be read"):
                load_rgb_image(content)
            continue
        assert np.array_equal(np.asarray(load_rgb_image(content)), reference(decoded)), name
        compared += 1
    assert compared


@pytest.mark.parametrize("largest", [255, 256, 65_535])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_grey_of_16_bits_is_scaled_by_its_own_range(kind: str, largest: int) -> None:
    values = np.array([[0, 128, 129, 32_639, 32_768, largest]], np.uint16).repeat(4, 0)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, kind)
    # 128 / 257 = 0.498, 129 / 257 = 0.502, 32,639 / 257 = 127 and 32,768 / 257 = 127.502: the nearest, not the floor.
    expected = [0, 0, 1, 127, 128, {255: 1, 256: 1, 65_535: 255}[largest]]
    assert np.asarray(load_rgb_image(stream))[0].tolist() == [[value] * 3 for value in expected]


def test_grey_of_12_bits_is_scaled_by_its_own_range() -> None:
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF1, 0x00])  # 0, 2048, 4095, 256
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<I", 14) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    # 255 * 2048 / 4095 = 127.53; 255 * 256 / 4095 = 15.94
    assert np.asarray(load_rgb_image(content))[0, :, 0].tolist() == [0, 128, 255, 16]


# --- EXIF

TURNS: dict[int, Any] = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: np.rot90,
}
WAYS: dict[str, Any] = {
    "bytes": lambda content: content,
    "BytesIO": io.BytesIO,
    "opened": lambda content: Image.open(io.BytesIO(content)),
    "sent to a worker": lambda content: pickle.loads(pickle.dumps(Image.open(io.BytesIO(content)))),
    "read before": lambda content: load_rgb_image(content),
}


def tagged(kind: str, exif: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    BASE.save(stream, kind, exif=exif, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_turns_files_whichever_way_they_come(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    upright = np.asarray(load_rgb_image(tagged(kind, exif, lossless=True)))
    exif[0x0112] = orientation
    content = tagged(kind, exif, lossless=True)
    for name, way in WAYS.items():
        assert np.array_equal(np.asarray(load_rgb_image(way(content))), TURNS[orientation](upright)), name


@pytest.mark.parametrize(
    "change", [lambda image: image.rotate(90, expand=True), Image.Image.copy], ids=["turn", "copy"]
)
def test_an_image_changed_in_memory_is_taken_as_it_is(change: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    changed = change(Image.open(io.BytesIO(tagged("PNG", exif))))
    assert changed.getexif()[0x0112] == 6  # the tag that is stale
    assert np.array_equal(np.asarray(load_rgb_image(changed)), np.asarray(changed))


ORIENTATION = struct.pack("<HHII", 0x0112, 3, 1, 6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("entry", "size"),
    [
        (struct.pack("<HHI4s", 0x011A, 2, 4, b"300\0"), (8, 16)),  # XResolution as ASCII
        (struct.pack("<HHII", 0x0132, 5, 1, 0), (8, 16)),  # DateTime as RATIONAL
        (None, (16, 8)),  # no EXIF at all, but called so
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_exif_is_no_reason_to_refuse_an_image(kind: str, entry: bytes | None, size: tuple[int, int]) -> None:
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(sorted((entry or b"", ORIENTATION))) + bytes(16)
    assert load_rgb_image(tagged(kind, exif if entry else b"Exif\0\0neither II nor MM")).size == size


# --- names and formats


@pytest.mark.parametrize("name", ["a.tif", "a.JFIF", "a.jp2", "a.ppm", "a.ico", "a.mpo", "a b.webp", "a.pcx"])
def test_a_string_that_names_an_image_is_one(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert not is_image_reference(str(path))
    Image.new("RGB", (4, 4), (255, 0, 0)).save(path, "PNG")
    for reference_ in (str(path), path.as_uri(), path.as_uri().replace("file://", "file://localhost")):
        assert is_image_reference(reference_)
        assert load_rgb_image(reference_).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["a.txt", "a.pdf", "a.eps", "a.svg", "a.mp4", "a.h5", "png", ".png"])
def test_other_names_are_none(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert not is_image_name(name)
    assert not is_image_reference(str(tmp_path / name))


@pytest.mark.parametrize(
    "text", ["http://[a.png", "file://[a.png", "https://shop/a.png?size=3#b", "https://shop/a.TIF"]
)
def test_addresses_are_judged_by_their_path(text: str) -> None:
    assert is_image_reference(text) is text.startswith("http")


def test_postscript_under_the_name_of_an_image_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BASE.save(tmp_path / "a.png", "EPS")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("Ghostscript was run"))
    with pytest.raises(ValueError, match=r"a.png' cannot be read as an image \(cannot identify image file"):
        load_rgb_image(tmp_path / "a.png")
