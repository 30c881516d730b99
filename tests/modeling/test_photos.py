"""Fast decoding of photos against exact: as many tokens, nearly the same pixels, and the same files refused."""

from __future__ import annotations

import io
import os
import signal
import struct
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from puma_hf import PumaProcessor
from puma_hf.modeling import inputs_puma
from tests.patience import PATIENCE

SIZE = {"shortest_edge": 4 * 256, "longest_edge": 64 * 256}  # at most 64 tokens of 16 x 16 pixels


def photo(width: int = 640, height: int = 480, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image | None = None, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    (image or photo()).save(stream, kind, **options)
    return stream.getvalue()


def segments(data: bytes) -> list[bytes]:
    """The segments of a JPEG's header, then all that follows: the last scan."""
    start, found = 2, []
    while not found or found[-1][1] != 0xDA:
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        found.append(data[start:end])
        start = end
    return [*found, data[start:]]


def lying(width: int, height: int) -> bytes:
    """A JPEG of 640 x 480 pixels whose header says another size."""
    frame = [part[:5] + struct.pack(">HH", height, width) + part[9:] if part[1] == 0xC0 else part for part in SEGMENTS]
    return b"\xff\xd8" + b"".join(frame)


def arithmetic() -> bytes:
    """An arithmetic-coded JPEG, of bits that are all 0, which Pillow reads and does not write."""
    parts = [b"\xff\xc9" + part[2:] if part[1] == 0xC0 else part for part in SEGMENTS[:-1] if part[1] != 0xC4]
    return b"\xff\xd8" + b"".join(parts) + bytes(64) + b"\xff\xd9"


def turned(orientation: int, image: Image.Image | None = None, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return jpeg(image, kind, exif=exif)


def with_thumbnail() -> bytes:
    """EXIF with a second directory, which points at another JPEG behind it."""
    inner = jpeg(photo(160, 120, seed=1))
    entries = struct.pack(">HHIIHHII", 0x0201, 4, 1, 44, 0x0202, 4, 1, len(inner))
    return jpeg(exif=b"Exif\x00\x00" + b"MM\x00\x2a" + struct.pack(">IHIH", 8, 0, 14, 2) + entries + bytes(4) + inner)


SEGMENTS = segments(jpeg())
WHOLE = jpeg()
READ: dict[str, bytes] = {
    "baseline": WHOLE,
    "progressive": jpeg(progressive=True),
    "arithmetic": arithmetic(),
    "CMYK with Adobe's marker": jpeg(photo().convert("CMYK")),
    "grey": jpeg(photo().convert("L")),
    "ICC profile": jpeg(icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
    "thumbnail": with_thumbnail(),
    "MPO": jpeg(kind="MPO", save_all=True, append_images=[photo(seed=1)]),
    "30,000 wide": jpeg(photo(30_000, 200)),
    "less than in the file": lying(480, 400),
    "more than in the file": lying(1280, 960),
    "PNG": jpeg(photo(1280, 960), "PNG"),
    "PNG with alpha": jpeg(photo(1280, 960).convert("RGBA"), "PNG"),
    "TIFF, turned": turned(6, photo(1280, 960), "TIFF"),
    **{f"orientation {number}": turned(number) for number in range(1, 9)},
}
REFUSED = {
    "cut in the middle": WHOLE[: len(WHOLE) // 2],
    "progressive, cut": jpeg(progressive=True)[: len(WHOLE) // 3],
    "a bomb": lying(65_000, 65_000),
    "no pixels": lying(0, 480),
    "too long": jpeg(photo(30_000, 100)),
}


def pixels(processor: PumaProcessor, data: Any, decode: str, **size: int) -> tuple[torch.Tensor, list[int]]:
    options = {"size": {**SIZE, **size}, "decode": decode}
    batch = processor.process_inputs([{"image": data}], images_kwargs=options)
    return batch["pixel_values"], batch["image_grid_thw"].tolist()


@pytest.mark.parametrize("name", READ)
def test_fast_and_exact_read_nearly_the_same(name: str, processor: PumaProcessor) -> None:
    (fast, grid), (exact, same) = (pixels(processor, READ[name], decode) for decode in ("fast", "exact"))
    assert grid == same
    # Of standard deviations, which are about 70 of 255 levels: one level, where two pictures differ by more than 50.
    assert (fast - exact).abs().mean() < 0.015
    # Or fast would have read all pixels, too. The strip keeps more tokens than the limit, in a size of its own.
    assert torch.equal(fast, exact) == (name == "30,000 wide")


@pytest.mark.parametrize("name", REFUSED)
def test_fast_and_exact_refuse_the_same(name: str, processor: PumaProcessor) -> None:
    for decode in ("fast", "exact"):
        with pytest.raises(ValueError, match=r"inputs\[0\]: an object of type bytes cannot be read as an image"):
            pixels(processor, REFUSED[name], decode)


def test_the_same_tokens_at_every_size(processor: PumaProcessor) -> None:
    for seed in range(24):
        width, height = np.random.default_rng(seed).integers(40, 800, 2).tolist()
        data, least = jpeg(photo(width, height)), 256 * (4, 64)[seed % 2]  # or both limits are one
        ways = ("fast", "exact")
        (fast, grid), (exact, same) = (pixels(processor, data, decode, shortest_edge=least) for decode in ways)
        assert grid == same, (width, height)
        assert (fast - exact).abs().mean() < 0.02, (width, height)


def test_what_is_small_or_opened_is_decoded_whole(processor: PumaProcessor, monkeypatch: Any) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(inputs_puma.Image.Image, "draft", lambda *args: asked.append(args))
    small = jpeg(photo(200, 150))
    assert torch.equal(*(pixels(processor, small, decode)[0] for decode in ("fast", "exact")))
    pixels(processor, Image.open(io.BytesIO(WHOLE)), "fast")
    assert asked == []
    monkeypatch.setattr(inputs_puma.Image, "MAX_IMAGE_PIXELS", 99)  # a limit for files, not for what is in memory
    for image in (photo(), np.asarray(photo())):
        pixels(processor, image, "fast")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_can_read_images(processor: PumaProcessor) -> None:
    """OpenMP's threads are not in a fork: what gave them work there would wait for them forever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.cat([torch.ones(2**18)] * 4)  # they start here
        expected = pixels(processor, WHOLE, "fast")[0].numpy()
        child = os.fork()
        if not child:
            signal.alarm(PATIENCE)
            os._exit(0 if np.array_equal(pixels(processor, WHOLE, "fast")[0].numpy(), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)
