from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, Features, List, Value

from puma_hf.data import load_mbeir
from puma_hf.data.sampler import DistinctPositivesBatchSampler
from puma_hf.data.twins import TwinBatchSampler, target_modalities, twin_keys

EMOJI = Path(__file__).parents[2] / "demo" / "emoji"
STRING = Value("string")


def make(twins: Sequence[Hashable], batch_size: int = 4, **kwargs: Any) -> TwinBatchSampler:
    dataset = Dataset.from_dict({"anchor": [str(row) for row in range(len(twins))]})
    settings = {"batch_size": batch_size, "drop_last": False, "seed": 0, **kwargs}
    return TwinBatchSampler(dataset, twins, **settings)


def rows_of(sampler: TwinBatchSampler) -> list[int]:
    return [row for batch in sampler for row in batch]


def make_rows(*rows: tuple[Any, ...]) -> Dataset:
    """Rows of (anchor, positive) or (anchor, positive, ids); a cell is text, or (text, image)."""

    def cell(value: Any) -> dict[str, str | None]:
        return dict(zip(("text", "image"), value if isinstance(value, tuple) else (value, None), strict=True))

    columns: dict[str, list[Any]] = {
        "anchor": [{**cell(row[0]), "instruction": f"wording {n}"} for n, row in enumerate(rows)],
        "positive": [cell(row[1]) for row in rows],
    }
    anchor = {"text": STRING, "image": STRING, "instruction": STRING}
    features: dict[str, Any] = {"anchor": anchor, "positive": {"text": STRING, "image": STRING}}
    if len(rows[0]) > 2:
        columns["positives"], features["positives"] = [row[2] for row in rows], List(STRING)
    return Dataset.from_dict(columns, features=Features(features))


# --- the sampler


@pytest.mark.parametrize("drop_last", [False, True])
def test_whole_groups_come_together(drop_last: bool) -> None:
    twins = [number // 3 for number in range(60)]
    modalities = [number % 3 for number in range(60)]
    batches = list(make(twins, 6, modalities=modalities, drop_last=drop_last))
    assert sorted(row for batch in batches for row in batch) == list(range(60))
    for batch in batches:
        assert sorted(Counter(twins[row] for row in batch).values()) == [3, 3]
    plain = torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(6)
    assert max(Counter(twins[row] for row in batch.tolist()).most_common(1)[0][1] for batch in plain) < 3


def test_one_row_of_each_modality_and_none_that_share_an_answer() -> None:
    generator = random.Random(0)
    twins = [generator.choice([None, *range(50)]) for _ in range(600)]
    modalities = [generator.choice("abc") for _ in range(600)]
    positives = [[f"d{generator.randrange(400)}" for _ in range(2)] for _ in range(600)]
    sampler = make(twins, 16, modalities=modalities, positives=positives)
    batches = list(sampler)
    for batch in batches:
        asked = [(twins[row], modalities[row]) for row in batch if twins[row] is not None]
        assert len(asked) == len(set(asked))
        answers = [answer for row in batch for answer in set(positives[row])]
        assert len(answers) == len(set(answers))
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows)) > 560
    assert len(batches) <= len(sampler) == 38


def test_without_modalities_all_rows_of_a_group_differ() -> None:
    sampler = make(["one"] * 4 + ["other"] * 4)
    assert sorted(sorted(batch) for batch in sampler) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_rows_of_one_modality_are_spread() -> None:
    """One group of four rows in the same modality: one row in each batch, others fill up."""
    twins = ["group"] * 4 + [None] * 12
    batches = list(make(twins, modalities=["text"] * 16))
    assert [sum(row < 4 for row in batch) for batch in batches] == [1] * 4
    assert sorted(row for batch in batches for row in batch) == list(range(16))


def test_at_most_so_many_rows_of_a_group() -> None:
    twins = [number // 4 for number in range(32)]
    batches = list(make(twins, 8, max_twins=2))
    assert sorted(row for batch in batches for row in batch) == list(range(32))
    for batch in batches:
        assert set(Counter(twins[row] for row in batch).values()) == {2}


def test_a_group_larger_than_a_batch_comes_whole_over_the_epoch() -> None:
    assert sorted(rows_of(make(["same"] * 10, 4))) == list(range(10))


@pytest.mark.parametrize("batch_size", [4, 5])
def test_rows_without_twins_fill_up_and_else_a_group_is_cut(batch_size: int) -> None:
    # Groups of three alone cannot fill batches of four or five.
    twins = [number // 3 for number in range(60)]
    batches = list(make(twins, batch_size, drop_last=True))
    assert {len(batch) for batch in batches} == {batch_size}
    assert len(batches) == 60 // batch_size
    twins = [number // 3 for number in range(45)] + [None] * 15
    batches = list(make(twins, 4))
    assert sorted(row for batch in batches for row in batch) == list(range(60))
    whole = [batch for batch in batches if any(count == 3 for count in Counter(twins[r] for r in batch).values())]
    assert len(whole) >= 12  # of 15


def test_a_key_that_comes_once_is_no_group() -> None:
    assert make(["a", "b", "b", None]).twins == [None, "b", "b", None]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    twins = [number // 3 for number in range(60)]
    sampler = make(twins)
    first = list(sampler)
    assert list(sampler) == first == list(make(twins, generator=torch.Generator().manual_seed(9)))
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert list(make(twins, seed=1)) == second


def test_no_twins_at_all_is_the_sampler_of_distinct_positives() -> None:
    generator = random.Random(0)
    positives = [[f"d{generator.randrange(20)}"] for _ in range(40)]
    batches = list(make([None] * 40, positives=positives))
    answers = [[positives[row][0] for row in batch] for batch in batches]
    assert all(len(batch) == len(set(batch)) for batch in answers)
    assert isinstance(make([None]), DistinctPositivesBatchSampler)


def test_a_group_of_all_rows_with_one_answer_is_no_endless_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks, rather than seconds: they must grow with the rows, not with their square."""
    looks = []
    ids = TwinBatchSampler._ids

    def counted(sampler: TwinBatchSampler, unit: tuple[int, ...]) -> set[Hashable]:
        looks.append(unit)
        return ids(sampler, unit)

    monkeypatch.setattr(TwinBatchSampler, "_ids", counted)
    counts = []
    for rows in (500, 1000):
        looks.clear()
        list(make(["same"] * rows, 4, positives=[["x"]] * rows))
        counts.append(len(looks))
    assert counts[1] < 2.5 * counts[0]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"twins has 1 rows and the dataset 2\. Pass one per row"):
        TwinBatchSampler(Dataset.from_dict({"anchor": ["a", "b"]}), ["x"], batch_size=1, drop_last=False)
    with pytest.raises(ValueError, match=r"modalities has 1 rows and the dataset 2"):
        make([1, 1], modalities=["text"])
    with pytest.raises(ValueError, match=r"positives has 1 rows and the dataset 2"):
        make([1, 1], positives=[["x"]])
    with pytest.raises(ValueError, match=r"max_twins is 0, must be 1 or more"):
        make([1, 1], max_twins=0)


@pytest.mark.parametrize("drop_last", [False, True])
def test_several_devices_share_no_answer_and_no_group_and_units_stay_whole(drop_last: bool) -> None:
    twins = [number // 3 for number in range(120)]
    positives = [[f"d{number % 70}"] for number in range(120)]
    settings = {"modalities": [n % 3 for n in range(120)], "positives": positives, "drop_last": drop_last}
    sampler = make(twins, 6, num_devices=2, **settings)
    steps = list(zip(*(BatchSamplerShard(sampler, 2, rank, even_batches=False) for rank in range(2)), strict=True))
    assert 8 <= len(steps) <= len(sampler) // 2 == 10
    for step in steps:
        assert [len(batch) for batch in step] == [6, 6]
        rows = step[0] + step[1]
        assert len({positives[row][0] for row in rows}) == 12
        assert not {twins[row] for row in step[0]} & {twins[row] for row in step[1]}


def test_few_twins_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="puma_hf.data.twins"):
        make([0, 0] + [None] * 38, modalities=["text", "image"] + ["text"] * 38)  # 5 %
        assert not caplog.records
        make([0, 0] + [None] * 48, modalities=["text", "image"] + ["text"] * 48)
        make([0] * 10, modalities=["text"] * 10)  # in the same modality they do not count
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "4.0 % of the 50 rows have a twin of another target modality",
        "0.0 % of the 10 rows have a twin of another target modality",
    ]
    assert "leave the twins out" in caplog.text


# --- the keys


def test_target_modalities_are_those_of_the_positives() -> None:
    rows = make_rows(("a", "b"), ("a", (None, "1.png")), ("a", ("b", "1.png")))
    assert target_modalities(rows) == ["text", "image", "image,text"]
    sampler = TwinBatchSampler(rows, ["k"] * 3, batch_size=3, drop_last=False)
    assert sampler.modalities == ["text", "image", "image,text"]
    assert sorted(rows_of(sampler)) == [0, 1, 2]
    # Two of one modality never meet in a batch.
    rows = make_rows(("a", "b"), ("a", "c"))
    assert [len(b) for b in TwinBatchSampler(rows, ["k"] * 2, batch_size=2, drop_last=False)] == [1]


@pytest.mark.parametrize(
    ("one", "other", "twins"),
    [
        (("who?", "an answer"), ("who?", ("caption", "1.png")), True),  # WebQA, tasks 1 and 2
        ((("what?", "1.png"), "passage"), (("what?", "1.png"), ("title", "2.png")), True),  # OVEN, tasks 6 and 8
        (("a dog", (None, "1.png")), ((None, "1.png"), "a dog"), True),  # MSCOCO, tasks 0 and 3
        (("Red  Shoe", (None, "1.png")), ("other", "red shoe"), True),  # case and spacing aside
        (("a", ("news", "1.png")), ("b", (None, "1.png")), True),
        ((("what?", "1.png"), "x"), (("what?", "2.png"), "y"), False),  # the same question about other images
        ((("bigger", "1.png"), (None, "2.png")), ((None, "1.png"), "y"), False),  # a source is no target
        (("a", ("caption", "1.png")), ("b", ("caption", "2.png")), False),  # captions repeat
    ],
)
def test_what_makes_twins(one: Any, other: Any, twins: bool) -> None:
    keys = twin_keys(make_rows(one, other, ("else", "something")))
    assert keys[2] is None
    assert (keys[0] is not None and keys[0] == keys[1]) is twins
    assert twins or keys == [None] * 3


def test_twins_share_through_others_and_through_ids() -> None:
    chain = make_rows(("a", "b"), ("b", (None, "1.png")), ((None, "1.png"), "c"), ("x", "y"))
    assert len(set(twin_keys(chain)[:3])) == 1
    assert twin_keys(chain)[3] is None
    ids = make_rows(("a", "b", ["1", "2"]), ("c", "d", ["2", "3"]), ("e", "f", ["3"]), ("g", "h", ["4"]))
    assert twin_keys(ids)[0] is not None
    assert [key == twin_keys(ids)[0] for key in twin_keys(ids)] == [True, True, True, False]
    assert twin_keys(ids.remove_columns("positives")) == [None] * 4


def test_large_groups_fall_apart() -> None:
    rows = make_rows(*((f"query {number // 2}", "a common text") for number in range(10)))
    assert len(set(twin_keys(rows, max_group=10))) == 1
    keys = twin_keys(rows, max_group=9)
    assert [keys.index(key) // 2 for key in keys] == [number // 2 for number in range(10)]
    assert len(set(keys)) == 5
    assert twin_keys(make_rows(*[("query", "text")] * 4), max_group=3) == [None] * 4
    with pytest.raises(ValueError, match=r"max_group is 1, must be 2 or more"):
        twin_keys(rows, max_group=1)


def test_other_rows_have_no_keys() -> None:
    with pytest.raises(ValueError, match=r"column 'anchor' is Value\('string'\), must be structs .*keys of your own"):
        twin_keys(Dataset.from_dict({"anchor": ["a"], "positive": ["b"]}))
    with pytest.raises(ValueError, match=r"column 'positive' is None"):
        twin_keys(make_rows(("a", "b")).remove_columns("positive"))


# --- the demo


def test_the_keys_of_the_demo_are_its_concepts() -> None:
    rows = load_mbeir(EMOJI, with_ids=True)
    keys, modalities = twin_keys(rows), target_modalities(rows)
    lines = (EMOJI / "concepts.tsv").read_text(encoding="utf-8").splitlines()[1:]
    concept_of = {name.casefold(): emoji for emoji, name, *_ in (line.split("\t") for line in lines)}
    found: dict[Any, set[str]] = defaultdict(set)
    asked: dict[Any, set[str]] = defaultdict(set)
    for key, positive, modality in zip(keys, rows["positive"], modalities, strict=True):
        found[key].add(Path(positive["image"]).stem if positive["image"] else concept_of[positive["text"].casefold()])
        asked[key].add(modality)
    assert {len(concepts) for concepts in found.values()} == {1}
    assert len(found) == len(set.union(*found.values())) == 1933
    assert Counter(map(len, asked.values())) == {3: 1851, 2: 82}

    batches = list(TwinBatchSampler(rows, keys, rows["positives"], batch_size=32, drop_last=True, seed=0))
    assert len(batches) == len(rows) // 32
    counts = [Counter(keys[row] for row in batch) for batch in batches]
    assert sum(n for count in counts for n in count.values() if n > 1) > 0.85 * len(rows)
