"""Which inputs of a batch begin with the same tokens, and whether it pays to compute those once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# A prefix is computed by itself and joined to the keys of every sequence; below so many tokens saved it does not pay.
_LEAST_SAVED = 32
# Texts that go on where others end could be split one by one; so deep it would no longer pay.
_DEEPEST_SPLIT = 16


class Group(NamedTuple):
    """Sequences that share their first tokens.

    Args:
        rows: Which sequences.
        prefix_length: How many tokens they share and compute once; 0 for none.
    """

    rows: list[int]
    prefix_length: int


def group_by_prefix(rows: Sequence[np.ndarray], head_lengths: Sequence[int]) -> list[Group]:
    """Split sequences into groups such that sharing each group's first tokens saves the most.

    Args:
        rows: Token ids of each sequence, `(sequence_length,)`, int64.
        head_lengths: How many first tokens of each may be shared; fewer than all of them, and none of an image's,
            which are equal without meaning the same.

    Returns:
        Groups that hold every sequence once.

    Example:

    ```python
    >>> import numpy as np
    >>> from puma_hf.modeling.shared_prefix_puma import group_by_prefix

    >>> instruction = list(range(20))
    >>> rows = [np.array([*instruction, 50 + number, 99]) for number in range(3)]
    >>> group_by_prefix(rows, [len(row) - 1 for row in rows])
    [Group(rows=[0, 1, 2], prefix_length=20)]
    ```
    """
    # Big-endian bytes sort as the tokens do, so sequences with a common beginning become neighbours.
    heads = [row[:length] for row, length in zip(rows, head_lengths, strict=True)]
    order = sorted(range(len(rows)), key=lambda number: heads[number].astype(">i8").tobytes())
    common = [_common_length(heads[first], heads[second]) for first, second in pairwise(order)]
    alone = Group([], 0)
    shared: list[Group] = []
    tree = _tree(order, common)
    _plan(tree, [0])
    _collect(tree, 0, [alone], shared)
    groups = ([alone] if alone.rows else []) + shared
    return [Group(sorted(rows), length) for rows, length in groups]


def _common_length(first: np.ndarray, second: np.ndarray) -> int:
    shorter = min(len(first), len(second))
    differs = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differs[0]) if len(differs) else shorter


@dataclass
class _Node:
    """Sequences that begin with the same `length` tokens.

    Args:
        length: How many.
        rows: Those that share no more with others.
        children: Those that do.
        is_group: For each group further up that the rows could join, whether they had better be one of their own.
    """

    length: int
    rows: list[int]
    children: list[_Node]
    is_group: list[bool] = field(default_factory=list)


def _tree(order: Sequence[int], common: Sequence[int], depth: int = 0) -> _Node:
    """The tree of the sorted sequences `order`, of which two neighbours have `common` tokens in common."""
    if not common or depth == _DEEPEST_SPLIT:
        return _Node(min(common, default=0), list(order), [])
    length = min(common)
    cuts = [number + 1 for number, tokens in enumerate(common) if tokens == length]
    node = _Node(length, [], [])
    for start, end in zip([0, *cuts], [*cuts, len(order)], strict=True):
        if end - start == 1:
            node.rows.append(order[start])
        else:
            node.children.append(_tree(order[start:end], common[start : end - 1], depth + 1))
    return node


def _plan(node: _Node, outer_lengths: list[int]) -> list[int]:
    """Decide where groups are.

    Returns:
        For each group further up, the most tokens saved below `node` if rows may join that one.
    """
    lengths = [*outer_lengths, node.length]
    below = [_plan(child, lengths) for child in node.children]
    saved = [len(node.rows) * length + sum(values) for length, *values in zip(lengths, *below, strict=True)]
    of_its_own = saved.pop() - node.length - _LEAST_SAVED  # the prefix itself is computed, too
    node.is_group = [of_its_own > joined for joined in saved]
    return [max(of_its_own, joined) for joined in saved]


def _collect(node: _Node, joined: int, outer: list[Group], shared: list[Group]) -> None:
    """Put the rows below `node` into the group that `_plan` chose, if they may join number `joined` of `outer`."""
    group = Group([], node.length)
    if node.is_group[joined]:
        shared.append(group)
        joined = len(outer)
    groups = [*outer, group]
    groups[joined].rows.extend(node.rows)
    for child in node.children:
        _collect(child, joined, groups, shared)


__all__ = ["Group", "group_by_prefix"]
