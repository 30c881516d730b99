from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from puma_hf.data.mbeir import Candidate, Query
from puma_hf.embedding.store import EmbeddingStore
from puma_hf.evaluation.encoding import (
    ContentKeys,
    Embedder,
    Item,
    plan_shards,
    record_id,
    settings_of_encode,
)
from tests.evaluation.fake_encoder import FakeEncoder


def text(number: int, content: str | None = None) -> Candidate:
    return Candidate(f"1:{number}", content or f"text {number}", None)


def items(count: int, prompt: str = "", first: int = 0) -> list[Item]:
    return [Item(number, text(number), prompt) for number in range(first, first + count)]


# --- keys


def test_a_key_is_of_the_content_alone(tmp_path: Path) -> None:
    keys = ContentKeys(tmp_path)
    key = keys.key(text(1, "a"), "")
    assert 0 <= key < 2**63
    assert keys.key(text(2, "a"), "") == key  # whatever its id
    assert keys.key(Query("2:5", "a", None, (), (), 1), "") == key
    others = [keys.key(text(1, "b"), ""), keys.key(text(1, "a"), "find it"), keys.key(text(1, "a"), " ")]
    assert len({key, *others}) == 4
    # What is one string is not two, however they are joined.
    assert keys.key(text(1, 'b"'), "a") != keys.key(text(1, "b"), 'a"')


def test_a_key_knows_the_image(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"12")
        os.utime(tmp_path / folder / "a.png", ns=(10**18, 10**18))

    def key(folder: str) -> int:
        path = os.path.realpath(tmp_path / folder / "a.png")
        return ContentKeys(tmp_path / folder).key(Candidate("1:1", None, path), "")

    before = key("here")
    assert key("there") == before  # a moved dataset keeps its embeddings
    os.utime(tmp_path / "here" / "a.png", ns=(10**18, 10**18 + 1))
    assert key("here") != before
    os.utime(tmp_path / "here" / "a.png", ns=(10**18, 10**18))
    assert key("here") == before
    (tmp_path / "here" / "a.png").write_bytes(b"123")
    os.utime(tmp_path / "here" / "a.png", ns=(10**18, 10**18))
    assert key("here") != before


# --- shards


def test_a_shard_has_one_prompt_and_one_modality() -> None:
    picture = Candidate("1:9", None, "a.png")
    mixed = [*items(3), Item(100, picture, ""), *items(2, "find", first=10), Item(101, picture, ""), *items(2, first=3)]
    shards = plan_shards(mixed, 2)
    assert [[item.key for item in shard] for shard in shards] == [[0, 1], [2, 3], [4], [100, 101], [10, 11]]
    assert all(len({(item.prompt, item.record.modality) for item in shard}) == 1 for shard in shards)


def test_a_key_is_planned_once() -> None:
    twice = [*items(3), Item(1, text(77, "text 1"), ""), *items(3)]
    assert [[item.key for item in shard] for shard in plan_shards(twice)] == [[0, 1, 2]]
    assert plan_shards([]) == []
    with pytest.raises(ValueError, match="shard_size is 0, must be 1 or more"):
        plan_shards(twice, 0)


# --- embedding


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "cache", {"model": "fake"})


def test_what_is_there_is_not_embedded_again(
    cache: EmbeddingStore, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "puma_hf.evaluation.encoding")
    first, second = FakeEncoder(), FakeEncoder()
    shards = plan_shards(items(10), 4)
    Embedder(first, cache, batch_size=4).embed(shards[:2])
    assert "8 inputs to embed: 0 already are, 8 to do" in caplog.text
    assert "8/8" in capsys.readouterr().err
    Embedder(second, cache, show_progress_bar=False).embed(shards)
    assert "10 inputs to embed: 8 already are, 2 to do" in caplog.text
    assert capsys.readouterr().err == ""
    assert [inputs for inputs, *_ in second.calls] == [["text 8", "text 9"]]
    expected = [FakeEncoder.embed(f"text {number}", "") for number in range(10)]
    assert cache.rows(torch.arange(10)).tolist() == expected


def test_only_what_a_shard_lacks_is_embedded(cache: EmbeddingStore) -> None:
    cache.add(torch.tensor([1, 3]), torch.tensor([FakeEncoder.embed(f"text {n}", "") for n in (1, 3)]))
    model = FakeEncoder()
    Embedder(model, cache, show_progress_bar=False).embed(plan_shards(items(4)))
    assert [inputs for inputs, *_ in model.calls] == [["text 0", "text 2"]]


def test_a_call_has_some_batches(cache: EmbeddingStore) -> None:
    model = FakeEncoder()
    options = {"normalize_embeddings": True}
    Embedder(model, cache, batch_size=2, show_progress_bar=False, encode_kwargs=options).embed([items(40, "find")])
    assert [len(inputs) for inputs, *_ in model.calls] == [16, 16, 8]
    assert {prompt for _, prompt, _ in model.calls} == {"find"}
    assert model.calls[0][2] == {"batch_size": 2, "show_progress_bar": False, "normalize_embeddings": True}


def encoder_of(rows: Any) -> FakeEncoder:
    class Fixed(FakeEncoder):
        def encode(self, inputs: list[Any], prompt: str | None = None, **kwargs: Any) -> Any:
            return rows[len(self.calls)] if isinstance(rows, list) else rows

    return Fixed()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((2, 3)), r"encode returned \(2, 3\) for 3 inputs of modality 'text', expected \(3, embedding_dim\)"),
        (np.zeros(3), r"encode returned \(3,\) for 3 inputs"),
        (
            np.array([[1.0], [np.nan], [np.inf]]),
            r"embeddings of 2 of 3 inputs of modality 'text' are not finite as torch\.float32, first \['1:1', '1:2'\]; "
            "look at these inputs",
        ),
    ],
)
def test_wrong_embeddings_are_refused_and_not_stored(cache: EmbeddingStore, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Embedder(encoder_of(rows), cache, show_progress_bar=False).embed([items(3)])
    assert len(cache) == 0


def test_embeddings_too_large_for_float16(tmp_path: Path) -> None:
    cache = EmbeddingStore(tmp_path / "cache", {}, dtype=torch.float16)
    message = r"not finite as torch\.float16, first \['1:0'\]; they are too large for float16: choose embedding_dtype="
    with pytest.raises(ValueError, match=message):
        Embedder(encoder_of(np.array([[1e6, 0.0]])), cache, show_progress_bar=False).embed([items(1)])


def test_another_size_than_before(cache: EmbeddingStore) -> None:
    Embedder(encoder_of(np.ones((2, 3))), cache, show_progress_bar=False).embed([items(2)])
    message = r"encode returned \(2, 4\) for 2 inputs of modality 'text', expected \(2, 3\): the same embedding_dim"
    with pytest.raises(ValueError, match=message):
        Embedder(encoder_of(np.ones((2, 4))), cache, show_progress_bar=False).embed([items(2, first=5)])


def test_what_encode_depends_on() -> None:
    given = {"batch_size": 4, "device": "cpu", "pool": object(), "truncate_dim": 8, "normalize_embeddings": True}
    assert settings_of_encode(given) == {"truncate_dim": 8, "normalize_embeddings": True}
    assert settings_of_encode(None) == settings_of_encode({"show_progress_bar": True}) == {}
    assert settings_of_encode({"dtype": torch.float16}) == {"dtype": "torch.float16"}


@pytest.mark.parametrize("name", ["precision", "prompt", "prompt_name", "output_value"])
def test_arguments_that_cannot_be_passed_on(name: str) -> None:
    with pytest.raises(ValueError, match=rf"encode_kwargs has \['{name}'\]: each task's instruction is the prompt"):
        settings_of_encode({name: "int8", "batch_size": 3})


def test_record_ids() -> None:
    assert record_id(text(3)) == "1:3"
    assert record_id(Query("2:5", "a", None, (), (), 1)) == "2:5"
