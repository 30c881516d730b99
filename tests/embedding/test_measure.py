from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from puma_hf.embedding.measure import DEFAULT_IMAGE_TOKENS, Measure, Rates, image_size, is_known, parts_of

CHAT = [
    {"role": "system", "content": "Find it."},
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "this"}]},
]


def png(height: int, width: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "png")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("item", "texts", "images"),
    [
        ("a red apple", ("a red apple",), ()),
        ("https://host/a.png", (), ("https://host/a.png",)),
        (b"encoded", (), (b"encoded",)),
        ({"bytes": b"encoded", "path": None}, (), ({"bytes": b"encoded", "path": None},)),
        ({"text": "red", "image": None, "instruction": "Find it."}, ("red", "Find it."), ()),
        ({"text": ["one", "two"], "image": ["a", "b"]}, ("one", "two"), ("a", "b")),
        ({"video": "v.mp4"}, (), ("v.mp4",)),
        (CHAT, ("Find it.", "this"), ("a.png",)),
        (CHAT[1], ("this",), ("a.png",)),
        ({"role": "user", "content": ["not an item", {"type": "text"}]}, (), ()),
        (
            {"role": "user", "content": [{"type": "image", "url": "a.png"}, {"type": "text", "text": "x"}]},
            ("x",),
            ("a.png",),
        ),
        (7, (), (7,)),
        (None, (), ()),
        ({"text": 3}, (), (3,)),
    ],
)
def test_the_parts_of_an_input(item: Any, texts: tuple[str, ...], images: tuple[Any, ...]) -> None:
    parts = parts_of(item)
    assert parts.texts == texts
    assert parts.images == images


def test_an_image_file_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "apple.png"
    assert parts_of(str(path)).texts == (str(path),)
    path.write_bytes(png(3, 5))
    assert parts_of(str(path)).images == (str(path),)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, Image.fromarray])
def test_the_size_of_an_image_in_memory_is_known(kind: Any) -> None:
    assert image_size(kind(np.zeros((7, 9, 3), dtype=np.uint8)), open_files=False) == (7, 9)


def test_the_size_of_an_encoded_image_is_in_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(11, 13)[:60])  # the header alone
    for image in (path, str(path), path.read_bytes(), {"bytes": path.read_bytes()}, {"bytes": None, "path": str(path)}):
        assert image_size(image, open_files=False) is None
        assert image_size(image, open_files=True) == (11, 13)


@pytest.mark.parametrize("image", [b"no image", "missing.png", "http://host/a.png", "data:image/png;base64,xx", 7, {}])
def test_what_cannot_be_opened_has_no_size(image: Any) -> None:
    assert image_size(image, open_files=True) is None


def test_a_decompression_bomb_is_measured_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert image_size(png(3, 5), open_files=True) == (3, 5)
    assert image_size(png(8, 8), open_files=True) is None


@pytest.mark.parametrize(
    "images_kwargs",
    [None, {"size": {"shortest_edge": 256, "longest_edge": 6400}}, {"size": {"longest_edge": 6400}}],
)
def test_images_count_as_the_processor_counts(processor: Any, images: list[Any], images_kwargs: Any) -> None:
    measure = Measure(processor, images_kwargs=images_kwargs)
    batch = processor.process_inputs(images, images_kwargs=images_kwargs)
    counted = [measure.tokens(parts_of(image), Rates(tokens_per_input=2.0)) - 2.0 for image in images]
    assert counted == (batch["image_grid_thw"].prod(dim=1) // 4).tolist()


def test_old_names_of_the_image_size_do_no_harm(processor: Any, images: list[Any]) -> None:
    counted = Measure(processor, images_kwargs={"min_pixels": 4, "max_pixels": 10**9}).tokens(
        parts_of(images[0]), Rates()
    )
    assert counted == Measure(processor).tokens(parts_of(images[0]), Rates())


def test_an_image_too_long_for_its_width_is_left_to_the_processor(processor: Any) -> None:
    assert Measure(processor).tokens(parts_of(Image.new("RGB", (2000, 4))), Rates()) == 1.0


def test_texts_are_counted_in_bytes_and_cut(processor: Any) -> None:
    measure = Measure(processor, max_length=50)
    rates = Rates(tokens_per_input=10.0, bytes_per_token=2.0)
    assert measure.tokens(parts_of("eight by"), rates) == 14.0
    assert measure.tokens(parts_of("ééé"), rates) == 13.0
    assert measure.tokens(parts_of("lone surrogate \ud800"), rates) == 18.0
    assert measure.tokens(parts_of("x" * 1000), rates) == 50.0
    assert measure.tokens(parts_of({"text": "four", "instruction": "four"}), rates) == 14.0


def test_an_image_of_unknown_size_counts_as_the_rates_say(processor: Any) -> None:
    measure = Measure(processor)
    assert measure.tokens(parts_of("https://host/a.png"), Rates(image_tokens=99.0)) == 99.0
    assert measure.tokens(parts_of(png(48, 32)), Rates(image_tokens=99.0)) == 99.0
    assert measure.tokens(parts_of(png(48, 32)), Rates(image_tokens=99.0), open_files=True) == 6.0


def test_rates_come_from_a_sample(processor: Any) -> None:
    items = [png(16, 16), png(64, 64), "a red apple", "abc"]
    rates = Measure(processor).rates(list(map(parts_of, items)), Rates(tokens_per_input=5.0))
    tokens = processor.tokenizer(["a red apple", "abc"])["input_ids"]
    assert rates == Rates(
        tokens_per_input=5.0,
        bytes_per_token=14 / sum(map(len, tokens)),
        image_tokens=(1 + 16) / 2,
    )


def test_the_sample_is_spread_and_small(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def size(image: Any, open_files: bool) -> tuple[int, int] | None:
        opened.extend([image] if open_files else [])
        return (16, 16) if open_files else None

    monkeypatch.setattr("puma_hf.embedding.measure.image_size", size)
    Measure(processor).rates(list(map(parts_of, [str(number).encode() for number in range(100)])), Rates())
    assert opened == [str(number).encode() for number in range(0, 100, 7)]


def test_half_a_character_in_the_sample_is_no_error(processor: Any) -> None:
    found, expected = (Measure(processor).rates([parts_of(text)], Rates()) for text in ("a red \ud800", "a red ?"))
    assert found.bytes_per_token == pytest.approx(expected.bytes_per_token, rel=0.5)


@pytest.mark.parametrize("items", [[], [None], ["https://host/a.png"]])
def test_without_a_sample_rates_stay(processor: Any, items: list[Any]) -> None:
    known = Rates(3.0, 2.5, 77.0)
    assert Measure(processor).rates(list(map(parts_of, items)), known) == known


def test_files_stay_closed_where_paths_may_be_anything(processor: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(16, 16))
    assert Measure(processor, open_files=True).rates(list(map(parts_of, [str(path)])), Rates()).image_tokens == 1.0
    assert (
        Measure(processor, open_files=False).rates(list(map(parts_of, [str(path)])), Rates()).image_tokens
        == DEFAULT_IMAGE_TOKENS
    )


def test_what_is_known_without_opening(images: list[Any]) -> None:
    assert is_known(parts_of("text"))
    assert is_known(parts_of({"text": "text", "image": images}))
    assert not is_known(parts_of({"text": "text", "image": [images[0], b"encoded"]}))
