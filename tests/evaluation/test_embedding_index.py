from __future__ import annotations

import math
import random

import torch

from puma_hf.evaluation.embedding_index import EmbeddingIndex


def shard_name(rng: random.Random) -> str:
    return f"{rng.getrandbits(128):032x}.safetensors"


def test_it_finds_what_a_dictionary_finds_in_whatever_order_shards_come() -> None:
    rng = random.Random(0)
    shards = {shard_name(rng): rng.sample(range(-300, 300), rng.randint(1, 40)) for _ in range(60)}
    expected: dict[int, tuple[str, int]] = {}
    for name in sorted(shards, reverse=True):  # the lowest name is written last, and stays
        expected |= {key: (name, place) for place, key in enumerate(shards[name])}
    wanted = torch.arange(-310, 310)
    for seed in range(4):
        index, names = EmbeddingIndex(), list(shards)
        random.Random(seed).shuffle(names)
        for name in names:
            index.add(name, torch.tensor(shards[name]))
        found, places = index.find(wanted)
        for key, shard, place in zip(wanted.tolist(), found.tolist(), places.tolist(), strict=True):
            if key in expected:
                assert (index.name(shard), place) == expected[key]
            else:
                assert (shard, place) == (-1, -1)


def test_few_runs_however_many_shards() -> None:
    rng, index = random.Random(1), EmbeddingIndex()
    for number in range(500):
        index.add(shard_name(rng), torch.arange(number * 10, number * 10 + 10))
        assert len(index._runs) <= math.log2(10 * number + 10) + 1
    assert len(index) == 5000
    assert bool((index.find(torch.arange(5000))[0] >= 0).all())


def test_nothing_is_found_in_an_empty_index() -> None:
    shards, places = EmbeddingIndex().find(torch.tensor([1, 2]))
    assert shards.tolist() == places.tolist() == [-1, -1]
