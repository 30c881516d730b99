"""Images of every kind against arithmetic of our own, videos where they can be read, and how a chat names them.

The other ways to write an input are tested through `process_inputs`, in test_processing_puma.py.
"""

from __future__ import annotations

import base64
import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils.import_utils import is_av_available, is_torchvision_available

from puma_hf import PumaProcessor
from puma_hf.modeling import inputs_puma
from puma_hf.modeling.inputs_puma import (
    is_image_name,
    is_image_reference,
    items_of,
    load_rgb_image,
    read_frames,
    to_messages,
)

Image.init()
BASE = Image.fromarray(np.arange(8 * 16 * 3, dtype=np.uint16).astype(np.uint8).reshape(8, 16, 3))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# --- messages


def test_a_dict_and_a_chat_become_the_same_messages() -> None:
    said: dict[str, Any] = {"text": "in green", "instruction": "Find it."}
    chat = [{"role": "system", "content": "Find it."}, {"role": "user", "content": "in green"}]
    expected = [
        {"role": "system", "content": [{"type": "text", "text": "Find it."}]},
        {"role": "user", "content": [{"type": "text", "text": "in green"}]},
    ]
    assert to_messages(said) == to_messages(chat, "ignored") == expected


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
    messages = to_messages([{"role": "user", "content": [item, {"type": "text", "text": "apple"}]}])
    (image,) = items_of(messages, "image")
    assert np.array_equal(np.asarray(load_rgb_image(image["image"])), np.asarray(BASE))
    assert [text["text"] for text in items_of(messages, "text")] == ["apple"]


# --- where an image may come from


@pytest.mark.parametrize(
    "wrap",
    [
        lambda path: Image.open(path),
        lambda path: str(path),
        lambda path: path,
        lambda path: path.as_uri().replace("file://", "file://localhost"),
        lambda path: path.read_bytes(),
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


def test_a_url_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_puma, "urlopen", lambda request, timeout: io.BytesIO(PNG))
    assert np.array_equal(np.asarray(load_rgb_image("https://a.org/picture")), np.asarray(BASE))


def test_strings_that_are_images(tmp_path: Path) -> None:
    for text in ("data:image/png;base64,AAAA", "https://example.org/a.JPG?size=3#b", "https://shop/a.TIF"):
        assert is_image_reference(text)
    for text in ("file://[a.png", "https://a.org/page.html", "https://a.org/a.jpg and more", "missing.png", "an apple"):
        assert not is_image_reference(text)
    for name in ("a.tif", "a.JFIF", "a.jp2", "a.ico", "a.mpo", "a b.webp"):
        assert not is_image_reference(str(tmp_path / name))  # only if the file exists
        (tmp_path / name).touch()
        assert is_image_reference(str(tmp_path / name))
        assert is_image_reference((tmp_path / name).as_uri())
    for name in ("a.txt", "a.pdf", "a.eps", "a.svg", "a.mp4", "png"):
        (tmp_path / name).touch()
        assert not is_image_name(name)
        assert not is_image_reference(str(tmp_path / name))


def test_postscript_under_the_name_of_an_image_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BASE.save(tmp_path / "a.png", "EPS")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("Ghostscript was run"))
    with pytest.raises(ValueError, match=r"a.png' cannot be read as an image \(cannot identify image file"):
        load_rgb_image(tmp_path / "a.png")


# --- modes

RED, WHITE = (255, 0, 0), (255, 255, 255)


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
        (Image.open(io.BytesIO(encoded(Image.new("RGB", (2, 2), RED), transparency=RED))), WHITE),
        (Image.new("LA", (2, 2), (77, 0)), WHITE),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 51)), (255, 204, 204)),  # on white
        (Image.new("1", (2, 2), 0), (0, 0, 0)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), RED),
        (Image.new("I;16", (2, 2), 100 * 257), (100, 100, 100)),
    ],
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert load_rgb_image(image).getpixel((0, 0)) == expected


@pytest.mark.parametrize("largest", [255, 256, 65_535])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
def test_grey_of_16_bits_is_scaled_by_its_own_range(kind: str, largest: int) -> None:
    values = np.array([[0, 128, 129, 32_639, 32_768, largest]], np.uint16).repeat(4, 0)
    # 128 / 257 = 0.498, 129 / 257 = 0.502, 32,639 / 257 = 127 and 32,768 / 257 = 127.502: the nearest, not the floor.
    expected = [0, 0, 1, 127, 128, {255: 1, 256: 1, 65_535: 255}[largest]]
    found = np.asarray(load_rgb_image(encoded(Image.fromarray(values), kind)))
    assert found[0].tolist() == [[value] * 3 for value in expected]


def test_rare_grey_images_are_scaled_and_laid_on_white() -> None:
    """A TIFF of 12 bits a pixel opens in the mode of 16 bits; a PNG of 16 bits may name a value that is transparent."""
    pixels = b"\xff\xf8\x00\x00"  # 4,095 and 2,048
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    twelve = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + table + bytes(4)
    sixteen = encoded(Image.fromarray(np.array([[5, 128 * 257]], np.uint16)), transparency=5)
    for content in (twelve, sixteen):
        assert np.asarray(load_rgb_image(content))[0, :, 0].tolist() == [255, 128]


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
    # What was changed in memory is taken as it is, though the tag, which is stale, is still there.
    opened: Any = Image.open(io.BytesIO(content))
    changed = opened.rotate(90, expand=True)
    assert changed.getexif().get(0x0112, orientation) == orientation
    assert np.array_equal(np.asarray(load_rgb_image(changed)), np.asarray(changed.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("entry", "size"),
    [
        (struct.pack("<HHI4s", 0x011A, 2, 4, b"300\0"), (8, 16)),  # XResolution as ASCII
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


NO_IMAGE = r"it is no PIL image, path, URL, bytes or uint8 array \(height, width, 3\)"
ARRAYS = [np.zeros(shape, np.uint8) for shape in ((4, 4), (3, 4, 4), (0, 4, 3))]
REFUSED: list[tuple[Any, str]] = [
    (Image.new("RGB", (201, 1)), r"it has 201 x 1 pixels, neither side may be 0, or more than 200 times the other"),
    (Image.new("RGB", (0, 5)), r"it has 0 x 5 pixels"),
    (Image.new("I", (2, 2)), r"mode 'I' has no known range of values: scale it to 0-255"),
    (b"no image", "cannot identify image file"),
    ("a\0.png", "embedded null byte"),
    ("data:image/png;base64,AAAA", "cannot identify"),
    *((value, NO_IMAGE) for value in (None, object(), {"path": None, "bytes": None}, torch.zeros((4, 4, 3)), *ARRAYS)),
]


@pytest.mark.parametrize(("image", "message"), REFUSED)
def test_what_cannot_be_read_is_refused(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"cell: .* cannot be read as an image \({message}.*Replace it or") as caught:
        load_rgb_image(image, "cell")
    assert "object at 0x" not in str(caught.value)


def test_files_that_are_cut_off_or_missing_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "cut.png").write_bytes(encoded(Image.fromarray(noise))[:1500])
    with pytest.raises(ValueError, match=r"^'.*cut.png' cannot be read .*truncated"):
        load_rgb_image(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError, match=r"inputs\[2\]: no image file at '.*gone.png'. Check the path"):
        load_rgb_image(str(tmp_path / "gone.png"), "inputs[2]")


# --- videos; what runs them is where torchvision and PyAV are installed (bash .ci/torchvision)

needs_av = pytest.mark.skipif(not is_av_available(), reason="needs PyAV: bash .ci/torchvision")
FRAMES = np.stack([np.full((56, 84, 3), value, np.uint8) for value in (0, 60, 120, 180, 240, 250)])


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
        frames, fps = read_frames(video)
        assert (frames.shape, fps) == (FRAMES.shape, 2)
        assert np.abs(frames.mean(axis=(1, 2, 3)) - FRAMES.mean(axis=(1, 2, 3))).max() < 5
    with pytest.raises(ValueError, match=r"the video 'missing.mp4' cannot be read \(.+\)\. Pass a file"):
        read_frames("missing.mp4")


def test_frames_are_taken_as_they_are() -> None:
    pictures = [Image.fromarray(frame) for frame in FRAMES]
    for video in (FRAMES, torch.from_numpy(FRAMES), pictures, list(FRAMES)):
        frames, fps = read_frames(video)
        assert (frames == FRAMES).all()
        assert fps is None
        assert len(items_of(to_messages({"video": video}), "video")) == 1  # a list of images is one video


def test_a_file_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_puma, "is_av_available", lambda: False)
    with pytest.raises(ImportError, match=r"a video file needs PyAV.*pip install 'puma-hf\[video\]'"):
        read_frames("clip.mp4")


@needs_av
@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision: bash .ci/torchvision")
def test_videos_are_embedded(sentence_transformer: Any, processor: PumaProcessor, tmp_path: Path) -> None:
    path = video_file(tmp_path / "clip.mp4", "mp4")
    frames, _ = read_frames(path)
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
