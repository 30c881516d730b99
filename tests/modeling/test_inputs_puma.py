"""Images of every kind against arithmetic of our own, videos where they can be read, and how a chat names them.

The other ways to write an input are tested through `process_inputs`, in test_processing_puma.py.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers.utils.import_utils import is_av_available, is_torchvision_available

from puma_hf import PumaProcessor
from puma_hf.modeling import MODALITY_IDS, MODALITY_NAMES, inputs_puma
from puma_hf.modeling.inputs_puma import (
    IMAGE_FORMATS,
    is_image_name,
    is_image_reference,
    load_rgb_image,
    media_of,
    modality_of,
    modality_of_messages,
    read_frames,
    text_items,
    to_messages,
    video_settings,
)

Image.init()
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)
BASE = Image.fromarray(np.arange(8 * 16 * 3, dtype=np.uint16).astype(np.uint8).reshape(8, 16, 3))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# --- messages


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ((True, False, False), "text"),
        ((False, True, False), "image"),
        ((True, True, False), "image,text"),
        ((False, False, True), "video"),
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
    assert modality_of_messages(expected) == "text"  # the instruction is no part of it
    assert [item["text"] for item in text_items(expected)] == ["Find it.", "in green"]


PNG = encoded(BASE)
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image", "image": io.BytesIO(PNG), "text": None},
        {"type": "image", "url": URI},
        {"type": "image", "base64": base64.b64encode(PNG).decode()},
        {"type": "image", "base64": URI},
        {"type": "image_url", "image_url": URI},
        {"type": "image_url", "image_url": {"url": URI, "detail": "auto"}},
    ],
)
def test_how_a_chat_names_an_image(item: dict[str, Any]) -> None:
    messages = to_messages([{"role": "user", "content": [item, {"type": "text", "text": "apple"}]}], None, "x")
    (image,) = media_of(messages)["image"]
    assert np.array_equal(np.asarray(image), np.asarray(BASE))
    assert modality_of_messages(messages) == "image,text"


# --- where an image may come from


@pytest.mark.parametrize(
    "wrap",
    [
        lambda path: Image.open(path),
        lambda path: str(path),
        lambda path: path,
        lambda path: path.as_uri(),
        lambda path: path.as_uri().replace("file://", "file://localhost"),
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: URI,
        lambda path: {"bytes": path.read_bytes(), "path": None},
        lambda path: {"bytes": None, "path": str(path)},
        lambda path: np.asarray(BASE),
        lambda path: torch.from_numpy(np.array(BASE)),
    ],
)
def test_every_kind_of_input_gives_the_same_pixels(wrap: Any, tmp_path: Path) -> None:
    path = tmp_path / "picture.jfif"  # the content counts, not the name
    path.write_bytes(PNG)
    loaded = load_rgb_image(wrap(path))
    assert loaded.mode == "RGB"
    assert np.array_equal(np.asarray(loaded), np.asarray(BASE))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A local web server that holds one picture."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/picture.png" else 404)
            self.end_headers()
            self.wfile.write(PNG if self.path == "/picture.png" else b"")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_a_url_is_read_like_a_file(server: str) -> None:
    assert np.array_equal(np.asarray(load_rgb_image(f"{server}/picture.png")), np.asarray(BASE))
    with pytest.raises(ValueError, match=r"cell 3: 'http://.*gone.png' cannot be read as an image .*404"):
        load_rgb_image(f"{server}/gone.png", "cell 3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:image/png;base64,AAAA", True),
        ("https://example.org/a.JPG?size=3#b", True),
        ("https://shop/a.TIF", True),
        ("http://[a.png", True),
        ("file://[a.png", False),
        ("https://example.org/page.html", False),
        ("https://example.org/a.jpg and more", False),
        ("missing.png", False),
        ("a red apple", False),
    ],
)
def test_strings_that_are_images(text: str, expected: bool) -> None:
    assert is_image_reference(text) is expected


@pytest.mark.parametrize("name", ["a.tif", "a.JFIF", "a.jp2", "a.ico", "a.mpo", "a b.webp"])
def test_a_path_is_an_image_only_if_the_file_exists(name: str, tmp_path: Path) -> None:
    assert not is_image_reference(str(tmp_path / name))
    (tmp_path / name).touch()
    assert is_image_reference(str(tmp_path / name))
    assert is_image_reference((tmp_path / name).as_uri())
    assert not is_image_reference(str(tmp_path))


@pytest.mark.parametrize("name", ["a.txt", "a.pdf", "a.eps", "a.svg", "a.mp4", "a.h5", "png", ".png"])
def test_other_names_are_none(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert not is_image_name(name)
    assert not is_image_reference(str(tmp_path / name))


def test_postscript_under_the_name_of_an_image_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BASE.save(tmp_path / "a.png", "EPS")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("Ghostscript was run"))
    with pytest.raises(ValueError, match=r"a.png' cannot be read as an image \(cannot identify image file"):
        load_rgb_image(tmp_path / "a.png")


# --- every format and mode that the Pillow installed here writes

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "I;16", "I;16B", "I", "F")


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
    try:
        content = encoded(drawn(mode), kind, **options)
        Image.open(io.BytesIO(content)).load()
    except (OSError, ValueError, KeyError, TypeError, SystemError):  # not a mode of this format
        return None
    return content


@pytest.mark.parametrize("kind", sorted({*Image.SAVE} & IMAGE_FORMATS))
def test_every_mode_of_a_format_is_read(kind: str) -> None:
    compared = 0
    for mode in MODES:
        for options in ({}, {"transparency": 7 if mode in ("1", "L", "P") else (5, 10, 15)}):
            content = written(mode, kind, **options)
            if content is None:
                continue
            decoded = Image.open(io.BytesIO(content))
            decoded.load()
            has_no_range = decoded.mode == "F" or (decoded.mode == "I" and kind not in ("PNG", "PPM"))
            if has_no_range or (decoded.mode == "P" and decoded.palette is None):  # Pillow loses an ICNS's palette
                with pytest.raises(ValueError, match=r"no known value range|cannot be read as an image \(.+\)"):
                    load_rgb_image(content)
                continue
            assert np.array_equal(np.asarray(load_rgb_image(content)), reference(decoded)), (mode, options)
            compared += 1
    assert compared


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    if transparent:
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (palette(transparent=False), RED),
        (palette(transparent=True), WHITE),
        (Image.new("LA", (2, 2), (77, 0)), WHITE),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 51)), (255, 204, 204)),
        (Image.new("1", (2, 2), 0), BLACK),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), RED),
        (Image.new("HSV", (2, 2), (0, 255, 255)), RED),
        (Image.new("I;16", (2, 2), 65535), WHITE),
        (Image.new("I;16", (2, 2), 100 * 257), (100, 100, 100)),
    ],
)
def test_every_mode_in_memory_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    before = (image.mode, dict(image.info))
    rgb = load_rgb_image(image)
    assert (rgb.mode, rgb.getpixel((0, 0))) == ("RGB", expected)
    assert (image.mode, image.info) == before


@pytest.mark.parametrize("largest", [255, 256, 65_535])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_grey_of_16_bits_is_scaled_by_its_own_range(kind: str, largest: int) -> None:
    values = np.array([[0, 128, 129, 32_639, 32_768, largest]], np.uint16).repeat(4, 0)
    # 128 / 257 = 0.498, 129 / 257 = 0.502, 32,639 / 257 = 127 and 32,768 / 257 = 127.502: the nearest, not the floor.
    expected = [0, 0, 1, 127, 128, {255: 1, 256: 1, 65_535: 255}[largest]]
    found = np.asarray(load_rgb_image(encoded(Image.fromarray(values), kind)))
    assert found[0].tolist() == [[value] * 3 for value in expected]


def test_grey_of_12_bits_is_scaled_by_its_own_range() -> None:
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF1, 0x00])  # 0, 2048, 4095, 256
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<I", 14) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    # 255 * 2048 / 4095 = 127.53; 255 * 256 / 4095 = 15.94
    assert np.asarray(load_rgb_image(content))[0, :, 0].tolist() == [0, 128, 255, 16]


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (2, 2), RED), Image.new("RGB", (2, 2), WHITE)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_rgb_image(content).getpixel((0, 0)) == RED


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
    "opened": lambda content: Image.open(io.BytesIO(content)),
    "sent to a worker": lambda content: pickle.loads(pickle.dumps(Image.open(io.BytesIO(content)))),
    "read before": lambda content: load_rgb_image(content),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_turns_files_whichever_way_they_come(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    upright = np.asarray(load_rgb_image(encoded(BASE, kind, exif=exif, lossless=True)))
    exif[0x0112] = orientation
    content = encoded(BASE, kind, exif=exif, lossless=True)
    for name, way in WAYS.items():
        assert np.array_equal(np.asarray(load_rgb_image(way(content))), TURNS[orientation](upright)), name


@pytest.mark.parametrize("change", [lambda image: image.rotate(90, expand=True), Image.Image.copy])
def test_an_image_changed_in_memory_is_taken_as_it_is(change: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    changed = change(Image.open(io.BytesIO(encoded(BASE, exif=exif))))
    assert changed.getexif()[0x0112] == 6  # the tag that is stale
    assert np.array_equal(np.asarray(load_rgb_image(changed)), np.asarray(changed))


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
    orientation = struct.pack("<HHII", 0x0112, 3, 1, 6)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(sorted((entry or b"", orientation))) + bytes(16)
    content = encoded(BASE, kind, exif=exif if entry else b"Exif\0\0neither II nor MM")
    assert load_rgb_image(content).size == size


# --- what is refused


NO_IMAGE = r"is not an image. Pass a PIL image, a path, a URL, bytes or a uint8"
NOT_RGB = r"an object of type (ndarray|Tensor) of .* is not an image\. Pass .* a uint8 array \(height, width, 3\)"
REFUSED: list[tuple[Any, str]] = [
    (Image.new("RGB", (201, 1)), r"cell: an image of 201 x 1 pixels is 201 times .*at most 200. Crop it or pad"),
    (Image.new("RGB", (99, 20_000)), "is 202 times longer"),
    (Image.new("RGB", (0, 5)), r"is empty \(0 x 5 pixels\). .*replace it or leave"),
    (Image.new("I", (2, 2)), r"mode 'I' has no known value range. Scale it to 0-255"),
    (Image.new("F", (2, 2)), r"mode 'F' has no known value range"),
    (b"no image", "a bytes object of length 8 cannot be read as an image .*replace it or leave it out"),
    (b"", "a bytes object of length 0 cannot be read"),
    ("a\0.png", r"cell: .* cannot be read as an image .*null byte"),
    ("data:image/png;base64,@@@", "cannot be read as an image"),
    ("data:image/png;base64,AAAA", "cannot be read as an image"),
    *((value, NO_IMAGE) for value in (None, 5, object(), [1, 2], {"path": None, "bytes": None})),
    *((np.zeros(shape, np.uint8), NOT_RGB) for shape in ((4, 4), (3, 4, 4), (4, 4, 4), (0, 4, 3))),
    (torch.zeros((4, 4, 3)), NOT_RGB),
]


@pytest.mark.parametrize(("image", "message"), REFUSED)
def test_what_cannot_be_read_is_refused(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_rgb_image(image, "cell")
    assert "object at 0x" not in str(caught.value)


def test_files_that_are_cut_off_or_missing_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG"):
        path = tmp_path / f"cut.{kind.lower()}"
        path.write_bytes(encoded(Image.fromarray(noise), kind)[:1500])
        with pytest.raises(ValueError, match=rf"input: '.*{path.name}' cannot be read .*cut off .*replace it"):
            load_rgb_image(path)
    with pytest.raises(FileNotFoundError, match=r"inputs\[2\]: no image file at '.*gone.png'. Check the path"):
        load_rgb_image(str(tmp_path / "gone.png"), "inputs[2]")


@pytest.mark.parametrize("limit", [50, 30], ids=["pillow-would-warn", "pillow-would-raise"])
def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    content = encoded(Image.new("RGB", (8, 8)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    message = f"more pixels than Pillow's limit of {limit} and may be a decompression bomb. Downscale it first"
    with pytest.raises(ValueError, match=message):
        load_rgb_image(content)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (struct.error("unpack"), ValueError, "row 5: an object of type Image cannot be read .*unpack"),
        (SyntaxError("broken"), ValueError, "row 5: an object of type Image cannot be read .*broken"),
        (MemoryError(), MemoryError, "^$"),  # not disguised
    ],
)
def test_whatever_a_decoder_raises_names_the_input(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: Any, message: str
) -> None:
    def fail(self: Any) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(expected, match=message):
        load_rgb_image(BASE, "row 5")


# --- videos; what runs them is where torchvision and PyAV are installed (bash .ci/torchvision)

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision: bash .ci/torchvision")
needs_av = pytest.mark.skipif(not is_av_available(), reason="needs PyAV: bash .ci/torchvision")
FRAMES = np.stack([np.full((56, 84, 3), value, np.uint8) for value in (0, 60, 120, 180, 240, 250)])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"patch_size": 14, "size": {"shortest_edge": 100352, "longest_edge": 602112}}),
        (
            {"min_pixels": 56, "max_pixels": 78, "patch_size": 8, "image_processor_type": "I", "processor_class": "P"},
            {"patch_size": 8, "size": {"shortest_edge": 56, "longest_edge": 78}},
        ),
        ({"size": {"shortest_edge": 5, "longest_edge": 7}, "fps": 2, "num_frames": None}, {"fps": 2}),
    ],
)
def test_video_settings_are_complete(given: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = video_settings(given)
    assert {**settings, **expected} == settings
    assert settings.keys() == video_settings({}).keys() | expected.keys()
    if is_torchvision_available():
        from transformers import Qwen2VLVideoProcessor

        assert json.loads(Qwen2VLVideoProcessor(**given).to_json_string()) | given == settings | given


def video_file(path: Path, container: str) -> Path:
    av: Any = pytest.importorskip("av", reason="needs PyAV: bash .ci/torchvision")
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream("mpeg4" if container == "mp4" else "libvpx", rate=2)
        stream.height, stream.width, stream.pix_fmt = *FRAMES.shape[1:3], "yuv420p"
        for frame in FRAMES:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return path


@pytest.mark.parametrize("container", ["mp4", "webm"])  # WebM does not say how many frames there are
@needs_av
def test_all_frames_of_a_file_are_read(tmp_path: Path, container: str) -> None:
    path = video_file(tmp_path / "clip", container)
    for video in (path, str(path), path.read_bytes()):
        frames, fps = read_frames(video, "it")
        assert (frames.shape, fps) == (FRAMES.shape, 2)
        assert np.abs(frames.mean(axis=(1, 2, 3)) - FRAMES.mean(axis=(1, 2, 3))).max() < 5


def test_frames_are_taken_as_they_are() -> None:
    pictures = [Image.fromarray(frame) for frame in FRAMES]
    for video in (FRAMES, torch.from_numpy(FRAMES), pictures, list(FRAMES)):
        frames, fps = read_frames(video, "it")
        assert (frames == FRAMES).all()
        assert fps is None
        messages = to_messages({"video": video}, None, "it")  # a list of pictures is one video
        assert len(media_of(messages)["video"]) == 1


@pytest.mark.parametrize("video", [b"no video", "missing.mp4", [Image.new("RGB", (4, 4)), Image.new("RGB", (5, 5))]])
@needs_av
def test_what_is_no_video_is_named(video: Any) -> None:
    name = "'missing.mp4'" if isinstance(video, str) else f"given as {type(video).__name__}"
    with pytest.raises(ValueError, match=rf"inputs\[2\]: the video {name} cannot be read \(.+\)\. Pass a file"):
        read_frames(video, "inputs[2]")


def test_a_file_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_puma, "is_av_available", lambda: False)
    with pytest.raises(ImportError, match=r"inputs\[2\]: a video file needs PyAV.*pip install 'puma-hf\[video\]'"):
        read_frames("clip.mp4", "inputs[2]")


@needs_av
@needs_torchvision
def test_videos_are_embedded(
    sentence_transformer: SentenceTransformer, processor: PumaProcessor, tmp_path: Path
) -> None:
    path = video_file(tmp_path / "clip.mp4", "mp4")
    frames, _ = read_frames(path, "it")
    ways = [path, str(path), path.read_bytes(), frames, [Image.fromarray(frame) for frame in frames]]
    batch = processor.process_inputs([{"video": str(path)}, {"video": frames[:4], "text": "a red apple"}, "text"])
    # 6 and 4 frames, two of them a patch
    assert batch["video_grid_thw"][:, 0].tolist() == [3, 2]
    assert batch["num_videos_per_sample"].tolist() == [1, 1, 0]
    assert batch["modality_ids"].tolist() == [3, 4, 0]
    for text in ({}, {"text": "a red apple"}):
        vectors = sentence_transformer.encode([{"video": video, **text} for video in ways])
        np.testing.assert_allclose(vectors, vectors[:1].repeat(len(ways), axis=0), rtol=0, atol=1e-5)
        other = sentence_transformer.encode({"video": frames[::-1], **text})
        assert np.abs(other - vectors[0]).max() > 1e-4
    processor.video_processor.do_sample_frames, processor.video_processor.num_frames = True, 2
    assert processor.process_inputs([{"video": path}])["video_grid_thw"][:, 0].tolist() == [1]
