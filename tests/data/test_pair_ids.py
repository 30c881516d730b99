from __future__ import annotations

import random
from pathlib import Path

import pytest

from puma_hf.data.pair_ids import PairIds
from puma_hf.data.pair_rows import Cell, Pair
from tests.data.photos import make_photos


def test_equal_content_has_equal_ids(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "photos")
    a, copy, b = (str(folder / name) for name in ("a.png", "copy of a.png", "deep/b.png"))
    cells = [Cell(None, a), Cell(None, copy), Cell(None, b), Cell("x", a), Cell("x", None), Cell(" X ", None)]
    ids = PairIds([Pair("", cell, cell) for cell in cells])
    numbers = [ids.of(cell) for cell in cells]
    assert numbers[0] == numbers[1]
    assert numbers[4] == numbers[5]
    assert len(set(numbers)) == 4
    assert ids.image(a) == ids.image(copy) != ids.image(b)


def test_a_text_is_no_image_of_that_name() -> None:
    text, image = Cell("a.png", None), Cell(None, "a.png")
    ids = PairIds([Pair("", text, image)])
    assert ids.of(text) != ids.of(image)


def test_positives_of_all_pairs_of_an_anchor() -> None:
    red, dark, other = Cell("red", None), Cell("dark", None), Cell("other", None)
    ids = PairIds([Pair("", red, dark), Pair("", other, dark), Pair("", Cell("RED", None), other), Pair("", red, dark)])
    assert ids.positives(red) == [ids.of(dark), ids.of(other)]
    assert ids.positives(other) == [ids.of(dark)]


def test_negatives_have_ids(tmp_path: Path) -> None:
    image = str(make_photos(tmp_path / "photos") / "a.png")
    pair = Pair("", Cell("a", None), Cell("b", None), (Cell(None, image),))
    assert PairIds([pair]).of(pair.negatives[0])


@pytest.mark.parametrize("seed", range(5))
def test_telling_positives_keep_the_same_rows_apart_as_all(seed: int) -> None:
    draw = random.Random(seed)
    sides = [(f"anchor {draw.randrange(12)}", f"positive {draw.randrange(25)}") for _ in range(40)]
    pairs = [Pair("", Cell(anchor, None), Cell(positive, None)) for anchor, positive in sides]
    ids = PairIds(pairs)
    for one in pairs:
        telling = ids.telling_positives(one)
        assert telling[0] == ids.of(one.positive)
        assert set(telling) <= set(ids.positives(one.anchor))
        for other in pairs:
            together = set(ids.positives(one.anchor)) & set(ids.positives(other.anchor))
            assert bool(set(telling) & set(ids.telling_positives(other))) == bool(together)


def test_an_anchor_of_many_pairs_does_not_name_all_its_positives_in_each() -> None:
    pairs = [Pair("", Cell("a shoe", None), Cell(f"shoe {number}", None)) for number in range(100)]
    ids = PairIds([*pairs, Pair("", Cell("a boot", None), Cell("shoe 7", None))])
    assert {len(ids.telling_positives(pair)) for pair in pairs} == {1, 2}
    assert all(ids.of(Cell("shoe 7", None)) in ids.telling_positives(pair) for pair in pairs)
