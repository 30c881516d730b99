from __future__ import annotations

import base64
import io
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

from puma_hf.modeling.image_inputs_puma import is_image_reference, load_rgb_image

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, image_format: str = "PNG", **kwargs: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **kwargs)
    return stream.getvalue()


@pytest.fixture
def picture() -> Image.Image:
    """4 x 2 pixels, all different."""
    return Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10)


def pixel(image: Image.Image) -> Any:
    rgb = load_rgb_image(image)
    assert rgb.mode == "RGB"
    return rgb.getpixel((0, 0))


# --- where an image may come from


@pytest.mark.parametrize(
    "wrap",
    [
        lambda image, path: image,
        lambda image, path: str(path),
        lambda image, path: path,
        lambda image, path: path.read_bytes(),
        lambda image, path: bytearray(path.read_bytes()),
        lambda image, path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        lambda image, path: {"bytes": path.read_bytes(), "path": None},
        lambda image, path: {"bytes": None, "path": str(path)},
        lambda image, path: np.asarray(image),
        lambda image, path: torch.from_numpy(np.array(image)),
    ],
    ids=["pil", "str", "path", "bytes", "bytearray", "data-uri", "arrow", "arrow-path", "numpy", "torch"],
)
def test_every_kind_of_input_gives_the_same_pixels(wrap: Any, picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    loaded = load_rgb_image(wrap(picture, path))
    assert loaded.mode == "RGB"
    assert np.array_equal(np.asarray(loaded), np.asarray(picture))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A local web server that holds one half transparent picture."""
    content = encoded(Image.new("RGBA", (3, 2), (255, 0, 0, 0)))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/picture.png" else 404)
            self.end_headers()
            if self.path == "/picture.png":
                self.wfile.write(content)

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
    image = load_rgb_image(f"{server}/picture.png")
    assert (image.size, image.getpixel((0, 0))) == ((3, 2), WHITE)


def test_a_url_that_fails_is_named(server: str) -> None:
    with pytest.raises(ValueError, match=r"cell 3: 'http://.*gone.png' cannot be read as an image .*404"):
        load_rgb_image(f"{server}/gone.png", "cell 3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:image/png;base64,AAAA", True),
        ("https://example.org/a.JPG?size=3", True),
        ("https://example.org/page.html", False),
        ("https://example.org/a.jpg and more", False),
        ("missing.png", False),
        ("a red apple", False),
    ],
)
def test_strings_that_are_images(text: str, expected: bool) -> None:
    assert is_image_reference(text) is expected


def test_a_path_is_an_image_only_if_the_file_exists(tmp_path: Path) -> None:
    path = tmp_path / "a.PNG"
    assert not is_image_reference(str(path))
    path.touch()
    assert is_image_reference(str(path))
    assert not is_image_reference(str(tmp_path))


# --- modes


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    if transparent:
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (2, 2), RED), RED),
        (palette(transparent=False), RED),
        (palette(transparent=True), WHITE),
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("LA", (2, 2), (77, 255)), (77, 77, 77)),
        (Image.new("LA", (2, 2), (77, 0)), WHITE),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), RED),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 51)), (255, 204, 204)),
        (Image.new("1", (2, 2), 1), WHITE),
        (Image.new("1", (2, 2), 0), BLACK),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), RED),
        (Image.new("HSV", (2, 2), (0, 255, 255)), RED),
        (Image.new("I;16", (2, 2), 65535), WHITE),
        (Image.new("I;16", (2, 2), 100 * 257), (100, 100, 100)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value[0]),
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert pixel(image) == expected


def test_a_16_bit_file_keeps_its_contrast(tmp_path: Path) -> None:
    values = np.array([[0, 128 * 257, 255 * 257]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "wide.png")
    image = load_rgb_image(tmp_path / "wide.png")
    assert [image.getpixel((x, 0)) for x in range(3)] == [BLACK, (128, 128, 128), WHITE]


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), RED), Image.new("RGB", (2, 2), WHITE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_rgb_image(tmp_path / "a.gif").getpixel((0, 0)) == RED


def test_exif_rotation_is_applied(picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    turned = load_rgb_image(encoded(picture, exif=exif))
    assert turned.size == (2, 4)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(picture), k=-1))


def test_the_callers_image_stays_as_it_is() -> None:
    image = palette(transparent=True)
    load_rgb_image(image)
    assert (image.mode, image.info) == ("P", {"transparency": 1})


# --- shapes


@pytest.mark.parametrize("size", [(1, 1), (200, 1), (1, 200), (3, 7), (7, 3)])
def test_small_images_keep_their_shape(size: tuple[int, int]) -> None:
    assert load_rgb_image(Image.new("L", size)).size == size


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (20_000, 99)])
def test_a_strip_is_refused(size: tuple[int, int]) -> None:
    message = rf"query 1: an image of {size[0]} x {size[1]} pixels is 20\d times .*at most 200. Crop it or pad"
    with pytest.raises(ValueError, match=message):
        load_rgb_image(Image.new("RGB", size), "query 1")


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_image_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"is empty \({size[0]} x {size[1]} pixels\). .*replace it or leave"):
        load_rgb_image(Image.new("RGB", size))


# --- what cannot be read


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image_format in ("PNG", "JPEG"):
        path = tmp_path / f"cut.{image_format.lower()}"
        path.write_bytes(encoded(Image.fromarray(noise), image_format)[:1500])
        with pytest.raises(ValueError, match=rf"input: '.*{path.name}' cannot be read .*cut off .*replace it"):
            load_rgb_image(path)


@pytest.mark.parametrize(
    ("content", "shown"),
    [(b"no image", "a bytes object of length 8"), (b"", "a bytes object of length 0")],
)
def test_bytes_that_are_no_image_are_refused(content: bytes, shown: str) -> None:
    message = f"{shown} cannot be read as an image .*replace it or leave it out"
    with pytest.raises(ValueError, match=message) as caught:
        load_rgb_image(content)
    assert "object at 0x" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"inputs\[2\]: no image file at '.*gone.png'. Check the path"):
        load_rgb_image(str(tmp_path / "gone.png"), "inputs[2]")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read as an image"):
        load_rgb_image(tmp_path)


def test_a_path_that_no_system_takes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"input: .* cannot be read as an image .*null byte"):
        load_rgb_image("a\0.png")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:image/png;base64,@@@", "'data:image/png;base64,@@@'... is not valid base64: encode it again"),
        ("data:image/png;base64,AAAA", "cannot be read as an image"),
    ],
)
def test_a_broken_data_uri_is_refused(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rgb_image(uri)


@pytest.mark.parametrize("limit", [50, 30], ids=["pillow-would-warn", "pillow-would-raise"])
def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    content = encoded(Image.new("RGB", (8, 8)))
    assert load_rgb_image(content).size == (8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    message = f"more pixels than Pillow's limit of {limit} and may be a decompression bomb. Downscale it first"
    with pytest.raises(ValueError, match=message):
        load_rgb_image(content)


@pytest.mark.parametrize("error", [struct.error("unpack"), IndexError("out of range"), SyntaxError("broken")])
def test_whatever_a_decoder_raises_names_the_input(
    monkeypatch: pytest.MonkeyPatch, picture: Image.Image, error: Exception
) -> None:
    def fail(self: Any) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(ValueError, match=rf"row 5: an object of type Image cannot be read .*{error}"):
        load_rgb_image(picture, "row 5")


def test_running_out_of_memory_is_not_disguised(monkeypatch: pytest.MonkeyPatch, picture: Image.Image) -> None:
    def fail(self: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(MemoryError):
        load_rgb_image(picture)


@pytest.mark.parametrize("value", [None, 5, 1.5, object(), [1, 2], {"path": None, "bytes": None}])
def test_other_objects_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"is not an image. Pass a PIL image, a path, a URL, bytes or a uint8"):
        load_rgb_image(value)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros((4, 4, 3)),
    ],
)
def test_arrays_must_be_rgb_bytes(array: Any) -> None:
    message = r"must be uint8 of shape \(height, width, 3\), got .*Convert it, for example with PIL"
    with pytest.raises(ValueError, match=message):
        load_rgb_image(array)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=rf"\(mode '{mode}'\) has no known value range. Scale it to 0-255"):
        load_rgb_image(Image.new(mode, (2, 2)))
