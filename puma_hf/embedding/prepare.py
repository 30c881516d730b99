"""From many inputs to batches for the model, ahead of it: planned, loaded, decoded and tokenised in worker processes.

The plan needs no more than a guess of how many tokens an input has. What the guess misses is cut by the model's own
packer, so a wrong one costs a little speed and no more.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from puma_hf.modeling.inputs_puma import is_image_reference, open_image

WINDOW = 4096  # inputs that are sorted together
_HELD_BYTES = 256 * 2**20  # of images that a window of a stream keeps in memory
_PREFETCHED = 2  # chunks that each worker prepares ahead
# English prose. Another script, or another tokenizer, may be off by a factor of three: the packer then cuts a chunk.
_BYTES_PER_TOKEN = 4.0
_TOKENS_PER_INPUT = 8.0  # of the template, besides what all inputs share
_UNKNOWN_PIXELS = 640 * 480  # of an image that has to be downloaded, or loaded by the user
_TOKENIZERS = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True, order=True)
class BrokenInput:
    """An input that has no embedding."""

    index: int  # its position in the inputs
    message: str  # what is wrong with it


@dataclass(frozen=True)
class Unreadable:
    """Stands for an input that cannot be read."""

    reason: str


# --- the plan


@dataclass(frozen=True)
class Guess:
    """Guesses the tokens of inputs, without decoding their images."""

    pixels_per_token: float
    limits: tuple[float, float]  # fewest and most pixels of an image; others are scaled
    # With a loader of the user's own an input says nothing of what it will be: each counts as an image.
    has_loader: bool = False

    def tokens(self, item: Any, is_text: bool = False) -> float:
        """About how many tokens an input has, as `PumaProcessor.process_inputs` reads it; never an error."""
        if self.has_loader:
            return self._image(None)
        if item is None:
            return 0.0
        if isinstance(item, str) and (is_text or not is_image_reference(item)):
            return len(item.encode(errors="replace")) / _BYTES_PER_TOKEN
        if isinstance(item, list | tuple):
            return sum(map(self.tokens, item))
        if isinstance(item, Mapping) and not {"bytes", "path"} & item.keys():
            # A text may be what a file is called: nobody looks at the disk for it.
            return sum(self.tokens(part, name in ("text", "instruction", "content")) for name, part in item.items())
        return self._image(item)

    def _image(self, image: Any) -> float:
        pixels: float = _UNKNOWN_PIXELS
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, Image.Image):
            pixels = image.height * image.width
        elif isinstance(image, np.ndarray | torch.Tensor):  # of a video all frames
            pixels = float(np.prod(image.shape)) / 3
        elif isinstance(image, str | bytes):
            file = io.BytesIO(image) if isinstance(image, bytes) else image
            with suppress(Exception), open_image(file) as opened:  # the processor will say what is wrong with it
                pixels = opened.height * opened.width
        least, most = self.limits
        return min(max(pixels, least), most) / self.pixels_per_token


@dataclass(frozen=True)
class Chunk:
    """Inputs that are prepared and embedded together, and their positions in the corpus."""

    indices: tuple[int, ...]
    inputs: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without fail: in a thread of `DataLoader` an error would be lost, and it would wait forever."""
        return _unpickled, (self.indices, [_pickled(item) for item in self.inputs])


def _pickled(item: Any) -> bytes:
    try:
        return pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # such as of an image that PIL has opened but not read, and cannot
        what = f"cannot be sent to a worker process ({type(error).__name__}: {error}). If it is whole, pass a path or "
        return pickle.dumps(Unreadable(what + "bytes in its place, or num_workers=0."))


def _unpickled(indices: tuple[int, ...], inputs: Sequence[bytes]) -> Chunk:
    return Chunk(indices, tuple(map(pickle.loads, inputs)))


def plan(inputs: Iterable[Any], guess: Guess, max_tokens: int, *, sort: bool, padded: bool) -> Iterator[Chunk]:
    """Cut inputs into chunks of about `max_tokens`, the longest of a window first; one that is longer is alone.

    One window is in memory at a time, whatever the length of the corpus. The plan depends on the inputs alone, so that
    the same call gives the same bits.

    Args:
        inputs: The corpus; read once, in order.
        guess: Guesses tokens.
        max_tokens: Tokens of a chunk.
        sort: Whether to sort inside a window; otherwise chunks are consecutive.
        padded: Whether every input of a chunk costs as much as its longest.
    """
    stream, start = iter(inputs), 0
    is_list = isinstance(inputs, list | tuple)  # which holds its inputs anyway
    while True:
        items, held = [], 0
        for item in islice(stream, WINDOW):
            items.append(item)
            held += 0 if is_list else _held_bytes(item)
            if held >= _HELD_BYTES:  # a window of large images is shorter
                break
        if not items:
            return
        sizes = [_TOKENS_PER_INPUT + guess.tokens(item) for item in items]
        # The longest first: what does not fit into memory fails at the start, not after hours.
        order = sorted(range(len(items)), key=lambda place: -sizes[place]) if sort else [*range(len(items))]
        first, total, longest = 0, 0.0, 0.0
        # The end counts as an input that fits nowhere.
        for end, size in enumerate([*(sizes[place] for place in order), math.inf]):
            total, longest = total + size, max(longest, size)
            if end > first and (longest * (end + 1 - first) if padded else total) > max_tokens:
                places = order[first:end]
                yield Chunk(tuple(start + place for place in places), tuple(items[place] for place in places))
                first, total, longest = end, size, size
        start += len(items)


def _held_bytes(item: Any) -> int:
    if isinstance(item, Image.Image):
        return 3 * item.height * item.width
    if isinstance(item, bytes | np.ndarray):
        return len(item) if isinstance(item, bytes) else item.nbytes
    parts = item.values() if isinstance(item, Mapping) else item
    return sum(map(_held_bytes, parts)) if isinstance(item, Mapping | list | tuple) else 0


# --- the work


class Prepared(NamedTuple):
    """What became of a chunk; `DataLoader` makes lists of tuples in it, and pins what it finds there."""

    indices: Sequence[int]  # its good inputs
    batch: Any  # what the packer made of them; None if there are none
    broken: Sequence[BrokenInput]  # those that cannot be embedded, by index


@dataclass(frozen=True)
class _Preparer(Dataset[Prepared]):
    """Makes what the model takes of chunks. It goes to the worker processes, so it holds no weights."""

    packer: Any
    load: Callable[[Any], Any] | None

    def __getitem__(self, chunk: Chunk) -> Prepared:
        """Prepare a chunk. No input of it is an error: `Prepared.broken` names those that are broken."""
        broken: dict[int, str] = {}
        items: dict[int, Any] = {}
        for index, item in zip(chunk.indices, chunk.inputs, strict=True):
            try:
                items[index] = item if self.load is None or isinstance(item, Unreadable) else self.load(item)
            except MemoryError:
                raise
            except Exception as error:  # the loader is the user's: whatever it raises is about this input
                items[index] = Unreadable(f"load failed with {type(error).__name__}: {error}")
            if isinstance(items[index], Unreadable):
                broken[index] = f"inputs[{index}]: {items.pop(index).reason}"
        batch = self._packed(items, broken)
        errors = [BrokenInput(*one) for one in sorted(broken.items())]
        return Prepared([index for index in items if index not in broken], batch, errors)

    def _packed(self, items: Mapping[int, Any], broken: dict[int, str]) -> Any:
        if not items:
            return None
        try:
            return self.packer([*items.values()])
        except MemoryError:
            raise
        except Exception as error:
            if len(items) == 1:
                (index,) = items
                # The processor's message, with the input's own index: it was tried alone.
                is_ours = isinstance(error, ValueError | FileNotFoundError | ImportError)
                text = str(error) if is_ours else f"{type(error).__name__}: {error}"
                broken[index] = f"inputs[{index}]: {text.removeprefix('inputs[0]: ')}"
                return None
            # One by one, to find out which: once more the work of this chunk, and of no other.
            good = {index: item for index, item in items.items() if self._packed({index: item}, broken) is not None}
            if len(good) == len(items):
                raise  # each is good by itself: not the fault of an input
            return self._packed(good, broken)


def prepared(
    chunks: Iterable[Chunk], packer: Any, load: Callable[[Any], Any] | None, *, num_workers: int, pin_memory: bool
) -> Generator[Prepared, None, None]:
    """Prepare chunks ahead, in order; only those on their way are in memory. A RuntimeError if a worker dies.

    Args:
        chunks: The plan; read as far ahead as the workers get.
        packer: A `Packer`.
        load: The user's own loader.
        num_workers: Worker processes; 0 prepares each chunk when it is asked for.
        pin_memory: Whether batches come in pinned memory.
    """
    loader: DataLoader[Prepared] = DataLoader(
        _Preparer(packer, load),
        sampler=chunks,
        batch_size=None,  # what the sampler yields is a batch
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=_PREFETCHED if num_workers else None,
        generator=torch.Generator(),  # by default a seed is drawn from the user's own random numbers
    )
    # Tokenizers' own threads do not survive a fork; each worker warns unless told before.
    is_told = not num_workers or _TOKENIZERS in os.environ
    if not is_told:
        os.environ[_TOKENIZERS] = "false"
    try:
        batches = iter(loader)  # the workers start here
    finally:
        if not is_told:
            del os.environ[_TOKENIZERS]
    yield from batches
