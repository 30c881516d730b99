"""Ids by content, so that equal things are known as one: right answers of a batch, duplicates, candidates."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain

from puma_hf.data.images import ContentHashes
from puma_hf.data.pair_rows import Cell, Pair


class PairIds:
    """Ids of the sides of pairs: equal for equal content, within these pairs.

    Texts are equal if they differ in case and blanks at most, images if their files are copies of each other.

    Args:
        pairs: The pairs.

    Example:

    ```python
    >>> from puma_hf.data.pair_ids import PairIds
    >>> from puma_hf.data.pair_rows import Cell, Pair

    >>> pair = Pair("line 2", Cell("a shoe", None), Cell("A  shoe", None))
    >>> ids = PairIds([pair])
    >>> ids.of(pair.anchor) == ids.of(pair.positive)
    True
    ```
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        pairs = list(pairs)
        self._images = ContentHashes()
        for pair in pairs:
            for cell in (pair.anchor, pair.positive, *pair.negatives):
                if cell.image is not None:
                    self._images.add(cell.image)
        positives: dict[str, dict[str, None]] = defaultdict(dict)
        for pair in pairs:
            positives[self.of(pair.anchor)][self.of(pair.positive)] = None
        self._positives = {anchor: list(ids) for anchor, ids in positives.items()}
        counts = Counter(chain.from_iterable(self._positives.values()))
        self._telling = {
            anchor: [one for one in ids if counts[one] > 1] or ids[:1] for anchor, ids in self._positives.items()
        }

    def of(self, cell: Cell) -> str:
        """The id of what a cell holds."""
        text = "" if cell.text is None else " ".join(cell.text.casefold().split())
        image = "" if cell.image is None else self._images[cell.image]
        # Neither holds a NUL byte that could make two of them look alike: texts are split, paths have none.
        return hashlib.blake2b(f"{text}\0{image}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def image(self, path: str) -> str:
        """The name of what an image file holds; see `ContentHashes`."""
        return self._images[path]

    def positives(self, anchor: Cell) -> list[str]:
        """The ids of all right answers of an anchor, in the order of the pairs."""
        return self._positives[self.of(anchor)]

    def telling_positives(self, pair: Pair) -> list[str]:
        """The positive's id, and as many of the anchor's others as tell which rows must be kept apart.

        Two rows have one of these in common exactly if their anchors have a right answer in common. Of the answers
        that no other anchor has, one stands for all: an anchor with a thousand answers has a thousand rows, which
        would take a million ids.
        """
        return list(dict.fromkeys([self.of(pair.positive), *self._telling[self.of(pair.anchor)]]))
