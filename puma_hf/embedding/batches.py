"""Plan batches: inputs sorted by length inside windows, cut at a budget of tokens."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from puma_hf.embedding.measure import Measure, Rates, parts_of

WINDOW = 4096  # inputs that are sorted together
# Of a budget: guesses miss by some percent, and what misses the budget is cut in two.
AIM = 0.9
_HELD_BYTES = 256 * 2**20  # of images that a window of a stream keeps in memory


@dataclass(frozen=True)
class Unsendable:
    """Stands for an input that cannot go to a worker process.

    Args:
        reason: Why.
    """

    reason: str


@dataclass(frozen=True)
class Batch:
    """Inputs to be embedded together.

    Args:
        indices: Their positions in the corpus.
        inputs: The inputs.
        rates: How their tokens were guessed.
    """

    indices: tuple[int, ...]
    inputs: tuple[Any, ...]
    rates: Rates

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without fail: in a thread of `DataLoader` an error would be lost, and it would wait forever."""
        try:
            inputs = pickle.dumps(self.inputs, pickle.HIGHEST_PROTOCOL)
        except Exception:  # such as of an image that PIL has opened but not read, and cannot
            inputs = pickle.dumps(tuple(map(_sendable, self.inputs)), pickle.HIGHEST_PROTOCOL)
        return _unpickled, (self.indices, inputs, self.rates)


def _sendable(item: Any) -> Any:
    try:
        pickle.dumps(item)
    except Exception as error:
        return Unsendable(f"{type(error).__name__}: {error}")
    return item


def _unpickled(indices: tuple[int, ...], inputs: bytes, rates: Rates) -> Batch:
    return Batch(indices, pickle.loads(inputs), rates)


def cut(sizes: Sequence[float], max_tokens: float, padded: bool = False) -> list[slice]:
    """Consecutive runs whose tokens fit into a budget; one that alone exceeds it is a run of its own.

    Args:
        sizes: Tokens of each input.
        max_tokens: The budget of a batch.
        padded: Whether every input of a batch costs as much as its longest.

    Example:

    ```python
    >>> from puma_hf.embedding.batches import cut

    >>> cut([9, 4, 3, 3, 1], max_tokens=8)
    [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)]
    ```
    """
    runs, start, total, longest = [], 0, 0.0, 0.0
    for end, size in enumerate(sizes):
        total, longest = total + size, max(longest, size)
        cost = longest * (end + 1 - start) if padded else total
        if cost > max_tokens and end > start:
            runs.append(slice(start, end))
            start, total, longest = end, size, size
    if start < len(sizes):
        runs.append(slice(start, len(sizes)))
    return runs


def plan_batches(
    inputs: Iterable[Any],
    measure: Measure,
    rates: Rates,
    max_tokens: int,
    *,
    sort: bool = True,
    padded: bool = False,
    window: int = WINDOW,
) -> Iterator[Batch]:
    """Cut inputs into batches of almost `max_tokens` guessed tokens, the longest of a window first.

    One window is in memory at a time, whatever the length of the corpus. The plan depends on the inputs alone.

    Args:
        inputs: The corpus; read once, in order.
        measure: Guesses tokens.
        rates: Rates to begin with; each window takes its own from a sample.
        max_tokens: The budget of a batch.
        sort: Whether to sort inside a window; otherwise batches are consecutive.
        padded: Whether every input of a batch costs as much as its longest.
        window: Inputs of a window.
    """
    for start, items in _windows(inputs, window):
        parts = [parts_of(item) for item in items]
        rates = measure.rates(parts, rates)
        sizes = [measure.tokens(one, rates) for one in parts]
        order = sorted(range(len(items)), key=lambda place: -sizes[place]) if sort else range(len(items))
        for run in cut([sizes[place] for place in order], AIM * max_tokens, padded):
            places = order[run]
            yield Batch(tuple(start + place for place in places), tuple(items[place] for place in places), rates)


def _windows(inputs: Iterable[Any], window: int) -> Iterator[tuple[int, list[Any]]]:
    """Consecutive inputs with the position of the first; fewer of a stream whose images are large."""
    stream, start = iter(inputs), 0
    # A list holds its inputs anyway.
    limit = None if isinstance(inputs, list | tuple) else _HELD_BYTES
    while items := list(_up_to(islice(stream, window), limit)):
        yield start, items
        start += len(items)


def _up_to(items: Iterator[Any], limit: int | None) -> Iterator[Any]:
    held = 0
    for item in items:
        yield item
        held += _held_bytes(item) if limit is not None else 0
        if limit is not None and held >= limit:
            return


def _held_bytes(item: Any) -> int:
    if isinstance(item, bytes | bytearray):
        return len(item)
    if isinstance(item, Image.Image):
        return item.height * item.width * len(item.getbands())
    if isinstance(item, np.ndarray):
        return item.nbytes
    if isinstance(item, dict):
        return sum(map(_held_bytes, item.values()))
    return sum(map(_held_bytes, item)) if isinstance(item, list | tuple) else 0
