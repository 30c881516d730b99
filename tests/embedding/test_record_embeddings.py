"""Embeddings of records, and what is left of them when something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from puma_hf.configs import EmbedConfig
from puma_hf.embedding import record_embeddings
from puma_hf.embedding.record_embeddings import embed_records, embedding_dim
from puma_hf.embedding.records import Record
from puma_hf.embedding.results import BrokenInput, EmbedResult
from puma_hf.embedding.shards import ShardInfo
from puma_hf.embedding.unfinished import UnfinishedShard

INFO = ShardInfo(
    settings="s", shard=0, first_row=0, num_items=6, num_rows=0, num_errors=0, on_error="raise", input_hash="i"
)
TEXTS = ["a red apple", "a table", "on a red table", "apple", "a red table on an apple", "red"]
BROKEN = 2


def records(broken: bool = True) -> list[Record]:
    """Six, of which one may be broken: it is the shortest, so it comes last."""
    texts: list[str | None] = [*TEXTS]
    if broken:
        texts[BROKEN] = None
    return [Record(row + 10, f"r{row}", text) for row, text in enumerate(texts)]


@pytest.fixture
def unfinished(tmp_path: Path) -> UnfinishedShard:
    return UnfinishedShard(tmp_path, INFO, [f"{row:032x}" for row in range(6)])


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The texts that were embedded."""
    seen: list[Any] = []
    iterate = record_embeddings.iterate_embeddings

    def counting(model: Any, inputs: Any, **options: Any) -> Any:
        seen.extend(item.get("text") for item in inputs)
        return iterate(model, inputs, **options)

    monkeypatch.setattr(record_embeddings, "iterate_embeddings", counting)
    return seen


def config(**values: Any) -> EmbedConfig:
    return EmbedConfig(**{"data": "d", "model": "m", "output": "o", "max_batch_tokens": 1, **values})


def check(model: SentenceTransformer, result: EmbedResult, places: list[int]) -> None:
    assert result.indices.tolist() == places
    np.testing.assert_allclose(result.embeddings, model.encode([TEXTS[place] for place in places]), atol=1e-5)


def test_what_was_done_before_a_broken_record_is_not_done_again(
    sentence_transformer: SentenceTransformer, unfinished: UnfinishedShard, given: list[Any]
) -> None:
    with pytest.raises(ValueError, match=r"^Input 'r2' \(row 12\) cannot be embedded: .* Mend it and run the same"):
        embed_records(sentence_transformer, records(), config(), unfinished=unfinished)
    assert unfinished.load(32)[0].tolist() == [0, 1, 3, 4, 5]
    given.clear()
    with tqdm(total=6) as progress:
        check(
            sentence_transformer,
            embed_records(sentence_transformer, records(False), config(), progress, unfinished),
            [*range(6)],
        )
        assert (progress.n, progress.total) == (1, 1)
    assert given == [TEXTS[BROKEN]]


@pytest.mark.parametrize("on_error", ["skip", "zero"])
def test_what_was_done_serves_a_run_that_passes_over(
    sentence_transformer: SentenceTransformer, unfinished: UnfinishedShard, given: list[Any], on_error: str
) -> None:
    with pytest.raises(ValueError, match="r2"):
        embed_records(sentence_transformer, records(), config(), unfinished=unfinished)
    given.clear()
    with tqdm(total=6) as progress:
        result = embed_records(sentence_transformer, records(), config(on_error=on_error), progress, unfinished)
        assert (progress.n, progress.total) == (1, 1)
    assert given == [None]
    ((index, message),) = [(error.index, error.message) for error in result.errors]
    assert index == BROKEN
    assert not message.startswith("inputs[")
    if on_error == "zero":
        assert not result.embeddings[BROKEN].any()
        result = EmbedResult(np.delete(result.embeddings, BROKEN, 0), np.delete(result.indices, BROKEN))
    check(sentence_transformer, result, [0, 1, 3, 4, 5])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_whatever_ends_the_run_keeps_what_is_done(
    sentence_transformer: SentenceTransformer,
    unfinished: UnfinishedShard,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    iterate = record_embeddings.iterate_embeddings

    def ending(*args: Any, **options: Any) -> Iterator[Any]:
        for number, rows in enumerate(iterate(*args, **options)):
            if number == 3:
                raise error
            yield rows

    with monkeypatch.context() as patch:
        patch.setattr(record_embeddings, "iterate_embeddings", ending)
        with pytest.raises(type(error)):
            embed_records(sentence_transformer, records(False), config(), unfinished=unfinished)
    assert len(unfinished.load(32)[0]) == 3
    result = embed_records(sentence_transformer, records(False), config(), unfinished=unfinished)
    check(sentence_transformer, result, [*range(6)])


def test_an_embedding_that_is_not_finite_is_an_error_and_not_kept(
    sentence_transformer: SentenceTransformer, unfinished: UnfinishedShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate = record_embeddings.iterate_embeddings

    def spoilt(*args: Any, **options: Any) -> Iterator[Any]:
        for indices, rows in iterate(*args, **options):
            yield indices, rows * np.nan if indices.tolist() == [1] else rows

    monkeypatch.setattr(record_embeddings, "iterate_embeddings", spoilt)
    message = r"The embeddings of 1 of 6 inputs have NaN or infinity, first \['r1'\]\. Look at these inputs, or load"
    with pytest.raises(ValueError, match=message):
        embed_records(sentence_transformer, records(False), config(), unfinished=unfinished)
    assert unfinished.load(32)[0].tolist() == [0, 2, 3, 4, 5]


def test_without_a_place_to_keep_them(sentence_transformer: SentenceTransformer) -> None:
    result = embed_records(sentence_transformer, records(), config(on_error="skip", truncate_dim=8))
    assert result.embeddings.shape == (5, 8)
    assert [type(error) for error in result.errors] == [BrokenInput]
    assert embedding_dim(sentence_transformer, config(truncate_dim=8)) == 8
    assert embedding_dim(sentence_transformer, config()) == 32
    with pytest.raises(ValueError, match="r2"):
        embed_records(sentence_transformer, records(), config())
