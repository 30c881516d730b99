from __future__ import annotations

import io
import pickle
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from puma_hf.embedding import prepare
from puma_hf.embedding.prepare import Chunk, Guess, plan, prepared

GUESS = Guess(pixels_per_token=28 * 28, limits=(28 * 28, 280 * 280))


def picture(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


# --- the plan


@pytest.mark.parametrize(
    ("item", "tokens"),
    [
        ("a" * 40, 10),
        ({"text": "a" * 40, "instruction": "b" * 8, "image": None}, 12),
        (picture(56, 28), 2),
        (png(picture(56, 56)), 4),
        ({"bytes": png(picture(56, 56)), "path": None}, 4),
        ({"image": [picture(56, 56), picture(28, 28)], "text": "a" * 4}, 6),
        # What parts are called counts, too.
        ([{"role": "user", "content": [{"type": "image", "image": picture(28, 56)}, {"text": "aaaa"}]}], 5.25),
        ([{"role": "user", "content": "a" * 8}], 3),
        (np.zeros((56, 28, 3), np.uint8), 2),
        (picture(1000, 1000), 100),  # scaled down
        (picture(1, 1), 1),  # and up
        (b"no image", 100),
        ("https://example.org/a.png", 100),  # nothing is downloaded
        (7, 100),
        ("half a character \ud800", 4.5),
    ],
)
def test_a_guess_needs_no_decoding_and_is_never_an_error(item: Any, tokens: float) -> None:
    assert GUESS.tokens(item) - GUESS.tokens("") == pytest.approx(tokens)


def test_a_guess_looks_at_files_unless_inputs_are_loaded_by_the_user(tmp_path: Path) -> None:
    picture(56, 56).save(tmp_path / "a.png")
    item = {"image": str(tmp_path / "a.png")}
    assert GUESS.tokens(item) - GUESS.tokens("") == 4
    loaded = Guess(28 * 28, (28 * 28, 280 * 280), has_loader=True)
    assert [loaded.tokens(one) - GUESS.tokens("") for one in (item, "s3://a.png")] == [100, 100]


def test_the_longest_of_a_window_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "WINDOW", 4)
    texts = ["a" * (40 * size) for size in (1, 4, 2, 3, 9, 1)]
    chunks = list(plan(iter(texts), GUESS, 100, sort=True, padded=False))
    assert [chunk.indices for chunk in chunks] == [(1, 3), (2, 0), (4,), (5,)]
    assert all(chunk.inputs == tuple(texts[index] for index in chunk.indices) for chunk in chunks)
    in_order = plan(texts, GUESS, 100, sort=False, padded=False)
    assert [index for chunk in in_order for index in chunk.indices] == list(range(6))


def test_where_inputs_are_padded_each_costs_as_much_as_the_longest() -> None:
    texts = ["a" * 404, "a", "a"]  # of 109, 8 and 8 tokens
    for padded, cuts in ((False, [(0, 1, 2)]), (True, [(0,), (1, 2)])):
        chunks = plan(texts, GUESS, 130, sort=True, padded=padded)
        assert [chunk.indices for chunk in chunks] == cuts
    assert list(plan([], GUESS, 18, sort=True, padded=False)) == []


IMAGE = picture(40, 30)


@pytest.mark.parametrize("item", [bytes(3600), IMAGE, np.asarray(IMAGE), {"image": [IMAGE], "text": "a"}], ids=type)
def test_a_window_of_a_stream_holds_few_large_images(monkeypatch: pytest.MonkeyPatch, item: Any) -> None:
    monkeypatch.setattr(prepare, "_HELD_BYTES", 10_000)
    stream = repeat(item, 20)
    chunks = plan(stream, GUESS, 1, sort=True, padded=False)
    assert len({next(chunks).indices for _ in range(3)}) == 3
    assert len([*stream]) == 20 - 3


# --- the work


def packer(inputs: list[Any]) -> dict[str, Any]:
    """Stands for a real one: no 'bad' is packed, and 'worse' together with others."""
    for place, item in enumerate(inputs):
        if item == "bad" or (item == "worse" and len(inputs) > 1):
            raise ValueError(f"inputs[{place}]: it is {item}")
    return {"packed": list(inputs)}


def work(*chunks: Chunk, num_workers: int = 0) -> list[Any]:
    return list(prepared(chunks, packer, None, num_workers=num_workers, pin_memory=False))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_broken_is_named_and_stops_nothing_else(num_workers: int) -> None:
    first, second = work(Chunk((4, 0, 7), ("a", "bad", "b")), Chunk((3,), ("bad",)), num_workers=num_workers)
    assert (first.indices, first.batch) == ([4, 7], {"packed": ["a", "b"]})
    assert [(one.index, one.message) for one in first.broken] == [(0, "inputs[0]: it is bad")]
    assert (second.indices, second.batch) == ([], None)
    assert second.broken[0].message == "inputs[3]: it is bad"


def test_an_error_that_is_no_inputs_own_is_raised() -> None:
    with pytest.raises(ValueError, match="it is worse"):
        work(Chunk((0, 1), ("a", "worse")))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_chunks_come_in_order_and_are_read_a_little_ahead(num_workers: int) -> None:
    chunks = iter([Chunk((number,), ("a",)) for number in range(100)])
    found = prepared(chunks, packer, None, num_workers=num_workers, pin_memory=False)
    assert [next(found).indices for _ in range(10)] == [[number] for number in range(10)]
    assert len([*chunks]) >= 90 - 2 * num_workers
    found.close()


def test_what_cannot_be_sent_to_a_worker_is_broken_there_alone() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    unreadable = Image.open(io.BytesIO(png(noise)[:5000]))  # its header is whole
    items = ("a", unreadable, lambda: 0)
    chunk = pickle.loads(pickle.dumps(Chunk((5, 6, 7), items)))
    (found,) = work(chunk)
    assert found.indices == [5]
    assert [one.index for one in found.broken] == [6, 7]
