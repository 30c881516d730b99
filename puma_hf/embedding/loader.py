"""Prepare planned batches ahead of the device: load, decode, tokenise and pack, in worker processes or in this one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from puma_hf.embedding.batches import AIM, Batch, Unsendable, cut
from puma_hf.embedding.features import take
from puma_hf.embedding.measure import Measure, Rates, is_known, parts_of
from puma_hf.embedding.results import BrokenInput

PREFETCHED = 2  # batches that each worker prepares ahead
_FIRST_INPUT = re.compile(r"^inputs\[0\]")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of an object, another one in every run
_TOKENIZERS = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class Part:
    """Inputs that are ready for the model.

    Args:
        indices: Their positions in the corpus.
        batch: What the packer made of them.
    """

    indices: tuple[int, ...]
    batch: Any


@dataclass(frozen=True)
class Prepared:
    """What became of one planned batch.

    Args:
        parts: Its inputs, cut once more where they turned out larger than planned.
        broken: Those that cannot be embedded, by index.
    """

    parts: tuple[Part, ...]
    broken: tuple[BrokenInput, ...]

    def pin_memory(self) -> Prepared:
        """The same in pinned memory; `DataLoader` calls it."""
        return Prepared(tuple(Part(part.indices, _pin(part.batch)) for part in self.parts), self.broken)


@dataclass(frozen=True)
class Preparer(Dataset[Prepared]):
    """Makes what the model takes of planned batches. It goes to the worker processes, so it holds no weights.

    Args:
        packer: A `Packer`.
        measure: Guesses tokens, here with the images at hand.
        max_tokens: The budget of a batch.
        load: The user's own loader.
        sort: Whether a batch that is cut by what its images turned out to be is sorted before.
    """

    packer: Any
    measure: Measure
    max_tokens: int
    load: Callable[[Any], Any] | None = None
    sort: bool = True

    def __getitem__(self, batch: Batch) -> Prepared:
        """Prepare a batch. No input of it is an error: `Prepared.broken` names those that are broken."""
        broken: list[BrokenInput] = []
        items = list(self._loaded(batch, broken))
        parts: list[Part] = []
        for group in self._cut_again(items, batch.rates):
            parts += self._packed(group, broken)
        return Prepared(tuple(parts), tuple(sorted(broken)))

    def _loaded(self, batch: Batch, broken: list[BrokenInput]) -> Iterator[tuple[int, Any]]:
        for index, item in zip(batch.indices, batch.inputs, strict=True):
            if isinstance(item, Unsendable):
                message = f"inputs[{index}]: cannot be sent to a worker process ({item.reason}). If it is whole, pass "
                broken.append(BrokenInput(index, message + "a path or bytes in its place, or num_workers=0."))
                continue
            try:
                yield index, item if self.load is None else self.load(item)
            except MemoryError:
                raise
            except Exception as error:  # the loader is the user's: whatever it raises is about this input
                broken.append(BrokenInput(index, f"inputs[{index}]: load failed with {_described(error)}"))

    def _cut_again(self, items: list[tuple[int, Any]], rates: Rates) -> Iterator[list[tuple[int, Any]]]:
        """Cut by the sizes of images that were not known to the plan."""
        parts = [parts_of(item) for _, item in items]
        if self.load is None and all(map(is_known, parts)):
            yield items
            return
        sizes = [self.measure.tokens(one, rates, open_files=True) for one in parts]
        order = sorted(range(len(items)), key=lambda place: -sizes[place]) if self.sort else range(len(items))
        for run in cut([sizes[place] for place in order], AIM * self.max_tokens, not self.packer.packing):
            yield [items[place] for place in order[run]]

    def _packed(self, items: list[tuple[int, Any]], broken: list[BrokenInput]) -> list[Part]:
        if not items:
            return []
        try:
            features = self.packer.process([item for _, item in items])
            return self._parts(tuple(index for index, _ in items), features)
        except MemoryError:
            raise
        except Exception as error:
            if len(items) == 1:
                broken.append(BrokenInput(items[0][0], _message(error, items[0][0])))
                return []
            good = [item for item in items if self._is_good(item, broken)]
            if len(good) == len(items):
                raise  # each is good by itself: not the fault of an input
            return self._packed(good, broken)

    def _parts(self, indices: tuple[int, ...], features: dict[str, Any]) -> list[Part]:
        """Pack features; in halves, again and again, what turns out larger than the budget."""
        batch = self.packer.pack(features)
        if num_tokens(batch) <= self.max_tokens or len(indices) == 1:
            return [Part(indices, batch)]
        half = len(indices) // 2
        ends = ((0, half), (half, len(indices)))
        return [part for start, end in ends for part in self._parts(indices[start:end], take(features, start, end))]

    def _is_good(self, item: tuple[int, Any], broken: list[BrokenInput]) -> bool:
        failed: list[BrokenInput] = []
        self._packed([item], failed)
        broken += failed
        return not failed


def num_tokens(batch: Any) -> int:
    """Tokens that the decoder computes of a batch, padding among them if there is any."""
    return int(batch["input_ids"].numel() if isinstance(batch, dict) else batch.num_tokens)


def iterate_prepared(
    batches: Iterable[Batch], preparer: Preparer, *, num_workers: int, pin_memory: bool
) -> Generator[Prepared, None, None]:
    """Prepare batches ahead, in order; only those on their way are in memory.

    Args:
        batches: The plan; read as far ahead as the workers get.
        preparer: Prepares a batch.
        num_workers: Worker processes; 0 prepares each batch when it is asked for.
        pin_memory: Whether batches come in pinned memory.

    Raises:
        RuntimeError: If a worker process dies.
    """
    loader: DataLoader[Prepared] = DataLoader(
        preparer,
        sampler=batches,
        batch_size=None,  # what the sampler yields is a batch
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCHED if num_workers else None,
        generator=torch.Generator(),  # by default a seed is drawn from the user's own random numbers
    )
    with _one_thread_each(num_workers):
        prepared = iter(loader)  # the workers start here
    yield from prepared


@contextmanager
def _one_thread_each(num_workers: int) -> Iterator[None]:
    """Tokenizers' own threads do not survive a fork; it warns unless told before."""
    if not num_workers or _TOKENIZERS in os.environ:
        yield
        return
    os.environ[_TOKENIZERS] = "false"
    try:
        yield
    finally:
        del os.environ[_TOKENIZERS]


def _as_it_is(prepared: Any) -> Any:
    return prepared


def _pin(batch: Any) -> Any:
    if not isinstance(batch, dict):
        return batch.pin_memory()
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _message(error: Exception, index: int) -> str:
    """The processor's message, with the input's own index: it was tried alone."""
    text = str(error) if isinstance(error, ValueError | FileNotFoundError | ImportError) else _described(error)
    text = _ADDRESS.sub("", text)
    return _FIRST_INPUT.sub(f"inputs[{index}]", text) if _FIRST_INPUT.match(text) else f"inputs[{index}]: {text}"


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
