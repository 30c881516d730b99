from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from puma_hf.modeling import shared_prefix_puma
from puma_hf.modeling.shared_prefix_puma import Group, group_by_prefix

INSTRUCTION = list(range(100, 140))


def rows_of(*rows: list[int]) -> list[np.ndarray]:
    return [np.array(row, dtype=np.int64) for row in rows]


def group(rows: list[np.ndarray], heads: list[int] | None = None) -> list[Group]:
    return group_by_prefix(rows, [len(row) - 1 for row in rows] if heads is None else heads)


def saved(groups: list[Group]) -> int:
    """Tokens that need not be computed, less what each shared prefix costs in tokens."""
    least = shared_prefix_puma._LEAST_SAVED
    return sum((len(rows) - 1) * length - least for rows, length in groups if length)


def check(groups: list[Group], rows: list[np.ndarray], heads: list[int]) -> None:
    """Every sequence once, and what a group shares is the same in all of them and may be shared."""
    assert sorted(row for group in groups for row in group.rows) == list(range(len(rows)))
    assert all(group.rows == sorted(group.rows) for group in groups)
    assert sum(not group.prefix_length for group in groups) <= 1
    for members, length in groups:
        assert not length or len(members) > 1
        for row in members:
            assert length <= heads[row] or not length
            assert (rows[row][:length] == rows[members[0]][:length]).all()


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, *others = items
    for partition in partitions(others):
        yield [[first], *partition]
        for number in range(len(partition)):
            yield [*partition[:number], [first, *partition[number]], *partition[number + 1 :]]


def most_saved(rows: list[np.ndarray], heads: list[int], least: int) -> int:
    """Of all ways to split the sequences into groups, each sharing all that its members have in common."""

    def of(members: list[int]) -> int:
        shared = [rows[row][: heads[row]].tolist() for row in members]
        length = next(
            (i for i, tokens in enumerate(zip(*shared, strict=False)) if len(set(tokens)) > 1), min(map(len, shared))
        )
        return max(0, (len(members) - 1) * length - least)

    return max(sum(map(of, partition)) for partition in partitions(list(range(len(rows)))))


@pytest.mark.parametrize("seed", range(40))
def test_saves_what_brute_force_would(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(seed)
    least = int(generator.integers(0, 6))
    monkeypatch.setattr(shared_prefix_puma, "_LEAST_SAVED", least)
    # Few tokens and copies of other rows' beginnings: common prefixes of every length.
    rows: list[np.ndarray] = []
    for _ in range(7):
        start = (
            rows[generator.integers(len(rows))][: generator.integers(0, 9)] if rows else np.array([], dtype=np.int64)
        )
        rows.append(np.concatenate([start, generator.integers(0, 3, generator.integers(1, 9))]))
    heads = [int(generator.integers(0, len(row))) for row in rows]
    groups = group(rows, heads)
    check(groups, rows, heads)
    assert saved(groups) == most_saved(rows, heads, least)


def test_one_instruction() -> None:
    rows = rows_of(*([*INSTRUCTION, number, 99] for number in range(3)))
    assert group(rows) == [Group([0, 1, 2], 40)]


def test_two_instructions_and_a_row_of_its_own() -> None:
    first, second = INSTRUCTION, list(range(200, 250))
    rows = rows_of([*first, 1, 99], [*second, 1, 99], [7, 8, 99], [*first, 2, 99], [*second, 2, 3, 99])
    assert group(rows) == [Group([2], 0), Group([0, 3], 40), Group([1, 4], 50)]


def test_equal_rows_keep_their_last_token() -> None:
    rows = rows_of(*[[*INSTRUCTION, 99]] * 4)
    assert group(rows) == [Group([0, 1, 2, 3], 40)]


def test_what_may_not_be_shared_is_not() -> None:
    rows = rows_of(*[[*INSTRUCTION, 5, 5, 5, 99]] * 2)
    assert group(rows, [35, 40]) == [Group([0, 1], 35)]
    assert group(rows, [0, 40]) == [Group([0, 1], 0)]


@pytest.mark.parametrize(("length", "shared"), [(32, False), (33, True)])
def test_a_short_prefix_does_not_pay(length: int, shared: bool) -> None:
    rows = rows_of(*([*range(100, 100 + length), number, 99] for number in range(2)))
    assert [group.prefix_length for group in group(rows)] == [length if shared else 0]


@pytest.mark.parametrize("rows", [[], [[99]], [[99], [99]], [[1, 2, 3, 99]]])
def test_nothing_to_share(rows: list[list[int]]) -> None:
    expected = [Group(list(range(len(rows))), 0)] if rows else []
    assert group(rows_of(*rows)) == expected


def test_many_tokens_sort_as_numbers() -> None:
    """Ids of more than one byte: neighbours in the order of bytes must be neighbours as numbers."""
    rows = rows_of(*([*INSTRUCTION, token, 99] for token in (70_000, 3, 256, 255, 65_536, 3)))
    assert group(rows) == [Group([0, 1, 2, 3, 4, 5], 40)]


NUM_ROWS = 4096
MANY = {
    "one instruction": [[*INSTRUCTION, number % 7, number, 99] for number in range(NUM_ROWS)],
    "nothing in common": [[number, *INSTRUCTION, 99] for number in range(NUM_ROWS)],
    "equal": [[*INSTRUCTION, 99]] * NUM_ROWS,
    "each goes on where another ends": [[*range(number + 1), 99] for number in range(0, NUM_ROWS // 2)],
    "each parts one token later": [[*[5] * number, 6, 7, 99] for number in range(NUM_ROWS // 2)],
}


@pytest.mark.parametrize("kind", MANY)
def test_many_rows_are_planned_fast(kind: str) -> None:
    rows = rows_of(*MANY[kind])
    started = time.process_time()
    groups = group(rows)
    # About 0.03 s for short rows; quadratic time would be minutes.
    assert time.process_time() - started < 20.0
    check(groups, rows, [len(row) - 1 for row in rows])
    if kind != "nothing in common":
        assert saved(groups) > 15 * len(rows)
