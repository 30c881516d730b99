from __future__ import annotations

import io
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from PIL import Image

from puma_hf.embedding.batches import Batch
from puma_hf.embedding.loader import Part, Prepared, Preparer, _one_thread_each, iterate_prepared, num_tokens
from puma_hf.embedding.measure import Measure, Rates
from puma_hf.embedding.results import BrokenInput


@pytest.fixture
def packer(sentence_transformer: Any) -> Any:
    return sentence_transformer[0].packer()


@pytest.fixture
def preparer(packer: Any) -> Callable[..., Preparer]:
    def make(max_tokens: int = 10_000, **options: Any) -> Preparer:
        measure = Measure(packer.processor, open_files="load" not in options)
        return Preparer(**{"packer": packer, "measure": measure, "max_tokens": max_tokens, **options})

    return make


def batch_of(*inputs: Any, first: int = 0, rates: Rates = Rates()) -> Batch:  # noqa: B008 - frozen
    return Batch(tuple(range(first, first + len(inputs))), inputs, rates)


def indices(prepared: Prepared) -> list[tuple[int, ...]]:
    return [part.indices for part in prepared.parts]


def png(height: int, width: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "png")
    return stream.getvalue()


def same(found: Any, expected: Any) -> bool:
    pairs = zip(found.parts, expected.parts, strict=True)
    return all(torch.equal(one.input_ids, other.input_ids) and one.rows == other.rows for one, other in pairs)


# --- one batch


def test_a_batch_is_what_the_packer_makes_of_it(preparer: Any, packer: Any, images: list[Any]) -> None:
    inputs = ["a red apple", images[0], {"image": images[1], "text": "green"}]
    prepared = preparer()[batch_of(*inputs, first=7)]
    assert indices(prepared) == [(7, 8, 9)]
    assert prepared.broken == ()
    assert same(prepared.parts[0].batch, packer(inputs))


def test_one_input_may_exceed_the_budget(preparer: Any) -> None:
    prepared = preparer(max_tokens=10)[batch_of("x" * 100, "y" * 100)]
    assert indices(prepared) == [(0,), (1,)]
    assert all(num_tokens(part.batch) > 10 for part in prepared.parts)


def test_without_packing_a_batch_is_the_processors_features(preparer: Any, packer: Any, images: list[Any]) -> None:
    inputs = ["a", images[2], images[0], "b" * 40]
    padded = preparer(max_tokens=200, packer=replace(packer, layout=None))
    prepared = padded[batch_of(*inputs)]
    assert indices(prepared) == [(0, 1), (2, 3)]
    assert [part.batch["modality_ids"].tolist() for part in prepared.parts] == [[0, 1], [1, 0]]
    assert num_tokens(prepared.parts[0].batch) == prepared.parts[0].batch["input_ids"].numel()


# --- broken inputs


def test_exactly_the_broken_inputs_are_named(preparer: Any, packer: Any, images: list[Any]) -> None:
    inputs = ["a", b"no image", images[0], {"image": "missing.png"}, "", "b <|image_pad|>", 7, "c"]
    prepared = preparer()[batch_of(*inputs, first=100)]
    assert [broken.index for broken in prepared.broken] == [101, 103, 104, 105, 106]
    messages = [broken.message for broken in prepared.broken]
    assert messages[0] == (
        "inputs[101]: a bytes object of length 8 cannot be read as an image (cannot identify image file). "
        "It may be cut off or of another format: replace it or leave it out."
    )
    assert messages[1] == "inputs[103]: no image file at 'missing.png'. Check the path."
    assert messages[2].startswith("inputs[104]: a text must be a non-empty string, got ''.")
    assert messages[3].startswith("inputs[105]: the text contains the special token '<|image_pad|>'")
    assert messages[4].startswith("inputs[106]: got 7, which is neither text nor image.")
    assert sorted(index for part in prepared.parts for index in part.indices) == [100, 102, 107]
    assert sum(part.batch.num_inputs for part in prepared.parts) == 3


def test_a_batch_may_be_broken_as_a_whole(preparer: Any) -> None:
    prepared = preparer()[batch_of("", " ")]
    assert prepared.parts == ()
    assert [broken.index for broken in prepared.broken] == [0, 1]


def test_an_error_of_another_kind_is_named(preparer: Any, monkeypatch: pytest.MonkeyPatch, packer: Any) -> None:
    def process(self: Any, inputs: list[Any]) -> Any:
        raise KeyError("gone")

    monkeypatch.setattr(type(packer), "process", process)
    assert preparer()[batch_of("a", first=3)].broken == (BrokenInput(3, "inputs[3]: KeyError: 'gone'"),)


def test_what_no_single_input_is_to_blame_for_is_raised(
    preparer: Any, packer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(packer).process

    def process(self: Any, inputs: list[Any]) -> Any:
        if len(inputs) > 1:
            raise RuntimeError("not together")
        return real(self, inputs)

    monkeypatch.setattr(type(packer), "process", process)
    with pytest.raises(RuntimeError, match="not together"):
        preparer()[batch_of("a", "b")]


@pytest.mark.parametrize("where", ["load", "process"])
def test_running_out_of_memory_is_no_fault_of_an_input(
    preparer: Any, packer: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(type(packer), "process", fail)
    with pytest.raises(MemoryError):
        preparer(**({"load": fail} if where == "load" else {}))[batch_of("a", "b")]


# --- the user's own loader


def test_the_loader_is_called_once_on_every_input(preparer: Any, packer: Any) -> None:
    store = {"s3://a": png(240, 240), "s3://b": png(32, 32)}
    asked: list[str] = []

    def load(name: str) -> bytes:
        asked.append(name)
        return store[name]

    prepared = preparer(load=load)[batch_of("s3://b", "s3://a", "s3://c", first=5)]
    assert asked == ["s3://b", "s3://a", "s3://c"]
    assert prepared.broken == (BrokenInput(7, "inputs[7]: load failed with KeyError: 's3://c'"),)
    assert indices(prepared) == [(6, 5)]
    assert same(prepared.parts[0].batch, packer([store["s3://a"], store["s3://b"]]))


# --- ahead of the device


@dataclass(frozen=True)
class Pinned:
    """Stands for a packed batch."""

    is_pinned: bool = False

    def pin_memory(self) -> Pinned:
        return Pinned(True)


def test_every_part_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    features = {"input_ids": torch.tensor([1]), "modality": "message"}
    pinned = Prepared((Part((0,), Pinned()), Part((1,), features)), (BrokenInput(2, "b"),)).pin_memory()
    assert pinned.parts[0] == Part((0,), Pinned(True))
    assert pinned.parts[1].batch == {"input_ids": torch.tensor([2]), "modality": "message"}
    assert pinned.broken == (BrokenInput(2, "b"),)


def prepare(batches: Any, preparer: Preparer, num_workers: int) -> list[Prepared]:
    return list(iterate_prepared(batches, preparer, num_workers=num_workers, pin_memory=False))


def test_what_cannot_go_to_a_worker_is_broken_there(preparer: Any, images: list[Any]) -> None:
    """`DataLoader` alone would wait for it forever."""
    cut_off = Image.open(io.BytesIO(png(64, 64)[:-40]))  # pickling reads what PIL has only opened
    batches = [batch_of("a", images[0]), batch_of("b", cut_off, images[1], {"image": threading.Lock()}, first=2)]
    prepared = prepare(batches, preparer(), 1)
    assert [[*part.indices] for one in prepared for part in one.parts] == [[0, 1], [2, 4]]
    assert prepared[0].broken == ()
    first, second = prepared[1].broken
    assert first.message.startswith("inputs[3]: cannot be sent to a worker process (")
    assert second == BrokenInput(
        5,
        "inputs[5]: cannot be sent to a worker process (TypeError: cannot pickle '_thread.lock' object). If it is "
        "whole, pass a path or bytes in its place, or num_workers=0.",
    )


def test_only_batches_on_their_way_are_asked_for(preparer: Any) -> None:
    asked = 0

    def batches() -> Iterator[Batch]:
        nonlocal asked
        for number in range(50):
            asked += 1
            yield batch_of("a", first=number)

    prepared = iterate_prepared(batches(), preparer(), num_workers=2, pin_memory=False)
    next(prepared)
    assert asked == 5  # two for each worker, and one for that which has come
    prepared.close()
    assert not multiprocessing.active_children()


def test_nothing_else_changes(preparer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    state = torch.get_rng_state()
    prepare([batch_of("a")], preparer(), 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert "TOKENIZERS_PARALLELISM" not in os.environ


@pytest.mark.parametrize(("given", "inside"), [(None, "false"), ("true", "true")])
def test_tokenizers_are_told_before_a_fork(monkeypatch: pytest.MonkeyPatch, given: str | None, inside: str) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    if given:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", given)
    with _one_thread_each(2):
        assert os.environ["TOKENIZERS_PARALLELISM"] == inside
    assert os.environ.get("TOKENIZERS_PARALLELISM") == given
    with _one_thread_each(0):
        assert os.environ.get("TOKENIZERS_PARALLELISM") == given


def test_a_worker_that_dies_is_an_error(preparer: Any) -> None:
    def load(item: Any) -> Any:
        os._exit(3)

    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        prepare([batch_of("a")], preparer(load=load), 1)
