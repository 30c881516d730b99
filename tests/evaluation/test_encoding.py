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
from puma_hf.evaluation.encoding import Embedder, Pair, encode_named, iterate_rows, settings_of_encode
from tests.evaluation.fake_encoder import FakeEncoder


def text(number: int, content: str | None = None) -> Candidate:
    return Candidate(f"1:{number}", content or f"text {number}", None)


def pairs(numbers: Any, prompt: str = "") -> list[Pair]:
    return [(text(number), prompt) for number in numbers]


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "store", {"model": "fake"})


def embedder(model: Any, store: EmbeddingStore, **options: Any) -> Embedder:
    return Embedder(model, store, "images", **{"show_progress_bar": False, **options})


# --- keys


def test_a_key_is_of_the_content_alone(store: EmbeddingStore) -> None:
    key = embedder(None, store).key
    first = key(text(1, "a"), "")
    assert key(text(2, "a"), "") == first  # whatever its id
    assert key(Query("2:5", "a", None), "") == first
    others = [key(text(1, "b"), ""), key(text(1, "a"), "find it"), key(text(1, "a"), " ")]
    assert len({first, *others}) == 4
    # What is one string is not two, however they are joined.
    assert key(text(1, 'b"'), "a") != key(text(1, "b"), 'a"')


def test_a_key_knows_the_image(tmp_path: Path, store: EmbeddingStore) -> None:
    def key(folder: str, content: bytes, time: int) -> int:
        path = tmp_path / folder / "a.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(10**18, 10**18 + time))
        return Embedder(FakeEncoder(), store, tmp_path / folder).key(Candidate("1:1", None, os.path.realpath(path)), "")

    assert key("here", b"12", 0) == key("there", b"12", 0)  # a moved dataset keeps its embeddings
    assert len({key("here", b"12", 0), key("here", b"12", 1), key("here", b"123", 0)}) == 3


# --- embedding


def test_what_is_there_is_not_embedded_again(
    store: EmbeddingStore, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "puma_hf.evaluation.encoding")
    first, second = FakeEncoder(), FakeEncoder()
    embedder(first, store, shard_size=4, show_progress_bar=True).keys(pairs(range(8)))
    assert "8 inputs to embed: 0 already are, 8 to do" in caplog.text
    assert "8/8" in capsys.readouterr().err
    assert store.num_shards == 2
    keys = embedder(second, store).keys(pairs([9, *range(10), 9]))
    assert "12 inputs to embed: 10 already are, 2 to do" in caplog.text
    assert capsys.readouterr().err == ""
    assert [inputs for inputs, *_ in second.calls] == [["text 9", "text 8"]]
    expected = [FakeEncoder.embed(f"text {number}", "") for number in (9, *range(10), 9)]
    assert store.rows(keys).tolist() == expected


def test_a_window_of_a_pool_is_in_memory(store: EmbeddingStore) -> None:
    read = 0

    class Counting(FakeEncoder):
        def encode(self, *args: Any, **options: Any) -> Any:
            assert read - len(store) <= 16
            return super().encode(*args, **options)

    def pool() -> Any:
        nonlocal read
        for pair in pairs(range(60)):
            read += 1
            yield pair

    assert len(embedder(Counting(), store, shard_size=2).keys(pool())) == len(store) == 60
    assert len(embedder(FakeEncoder(), store).keys([])) == 0


def test_a_call_has_some_batches_of_one_prompt_and_one_modality() -> None:
    model = FakeEncoder()
    picture = Candidate("1:9", None, "a.png")
    mixed = [*pairs(range(40), "find"), (picture, "find"), *pairs(range(3)), (picture, "")]
    options: dict[str, Any] = {"normalize_embeddings": True}
    found = list(iterate_rows(model, mixed, batch_size=2, encode_kwargs=options))
    assert [(len(inputs), prompt) for inputs, prompt, _ in model.calls] == [
        *[(16, "find"), (16, "find"), (8, "find")],
        *[(1, "find"), (3, ""), (1, "")],
    ]
    assert model.calls[0][2] == {"batch_size": 2, "show_progress_bar": False, "normalize_embeddings": True}
    for places, rows in found:
        expected = [FakeEncoder.embed(mixed[place][0].model_input, mixed[place][1]) for place in places]
        assert rows.tolist() == expected
    assert sorted(place for places, _ in found for place in places) == list(range(45))


@pytest.mark.parametrize("encode_kwargs", [None, {"truncate_dim": 8}, {"normalize_embeddings": True}])
def test_a_puma_embeds_as_by_encode(
    sentence_transformer: Any, images: list[Any], tmp_path: Path, encode_kwargs: dict[str, Any] | None
) -> None:
    images[0].save(tmp_path / "a.png")
    picture = Candidate("1:9", None, str(tmp_path / "a.png"))
    mixed = [*pairs(range(3), "find it"), (picture, ""), (picture, "describe"), (text(5, "a.png"), "")]
    rows = torch.cat(
        [
            torch.cat([torch.tensor(p)[:, None].float(), r], 1)
            for p, r in iterate_rows(sentence_transformer, mixed, encode_kwargs=encode_kwargs)
        ]
    )
    rows = rows[rows[:, 0].argsort(), 1:]
    options = {**(encode_kwargs or {}), "normalize_embeddings": True}
    for row, (record, prompt) in zip(rows, mixed, strict=True):
        expected = sentence_transformer.encode([record.model_input], prompt=prompt, **options)
        np.testing.assert_allclose(row, expected[0], atol=1e-5)


def test_a_record_that_cannot_be_read_is_named(sentence_transformer: Any, tmp_path: Path) -> None:
    gone = [*pairs(range(2)), (Query("9:7", None, str(tmp_path / "gone.png")), "find")]
    with pytest.raises(ValueError, match=r"^query '9:7': no image file at '.*gone\.png'"):
        list(iterate_rows(sentence_transformer, gone))
    records = [record for record, _ in gone]
    inputs = [record.model_input for record in records]
    with pytest.raises(FileNotFoundError, match=r"^query '9:7': no image file at '.*gone\.png'"):
        encode_named(sentence_transformer.encode, inputs, records)


def encoder_of(*rows: Any) -> FakeEncoder:
    class Fixed(FakeEncoder):
        def encode(self, inputs: list[Any], prompt: str | None = None, **kwargs: Any) -> Any:
            self.calls.append((inputs, str(prompt), kwargs))
            return rows[len(self.calls) - 1]

    return Fixed()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([np.zeros((2, 3))], r"encode returned \(2, 3\) for 3 inputs of modality 'text', expected \(3, 3\)"),
        ([np.zeros(3)], r"encode returned \(3,\) for 3 inputs .* expected \(3, embedding_dim\)"),
        ([np.array([[1.0], [np.nan], [np.inf]])], r"of 2 of 3 inputs are not finite, first \['1:1', '1:2'\]; look at"),
        ([np.zeros((3, 3)), np.zeros((2, 4))], r"encode returned \(2, 4\) .*, expected \(2, 3\), the same for every"),
    ],
)
def test_wrong_embeddings_are_refused_and_not_stored(store: EmbeddingStore, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedder(encoder_of(*rows), store).keys([*pairs(range(3)), *pairs(range(2), "find")])
    assert len(store) == 0


def test_embeddings_too_large_for_float16(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, {}, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"NaN or infinity as torch\.float16"):
        embedder(encoder_of(np.array([[1e6, 0.0]])), store).keys(pairs([1]))


# --- arguments


def test_what_encode_depends_on() -> None:
    given = {"batch_size": 4, "device": "cpu", "pool": object(), "truncate_dim": 8, "normalize_embeddings": True}
    assert settings_of_encode(given) == {"truncate_dim": 8, "normalize_embeddings": True}
    assert settings_of_encode(None) == settings_of_encode({"show_progress_bar": True}) == {}
    assert settings_of_encode({"dtype": torch.float16}) == {"dtype": "torch.float16"}


@pytest.mark.parametrize("name", ["precision", "prompt", "prompt_name", "output_value"])
def test_arguments_that_cannot_be_passed_on(name: str) -> None:
    with pytest.raises(ValueError, match=rf"encode_kwargs has \['{name}'\]: each task's instruction is the prompt"):
        settings_of_encode({name: "int8", "batch_size": 3})
    with pytest.raises(ValueError, match="shard_size is 0, must be 1 or more"):
        Embedder(FakeEncoder(), None, "", shard_size=0)  # type: ignore[arg-type]
