from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from puma_hf.data.mbeir import Candidate, Query
from puma_hf.embedding.store import EmbeddingStore
from puma_hf.evaluation.encoding import embed_into, settings_of_encode
from tests.evaluation.fake_encoder import FakeEncoder


def texts(count: int, prompt: str = "", first: int = 0) -> list[Any]:
    return [(Candidate(f"1:{number}", f"text {number}"), prompt) for number in range(first, first + count)]


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "store", {"model": "fake"})


def embed(store: EmbeddingStore, model: Any, pairs: list[Any], **options: Any) -> torch.Tensor:
    options = {"root": store.folder.parent, "total": len(pairs), "show_progress_bar": False, **options}
    return embed_into(store, model, pairs, **options)


def test_a_key_is_of_the_content_alone(store: EmbeddingStore, tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"12")
        os.utime(tmp_path / folder / "a.png", ns=(10**18, 10**18))

    def key(folder: str) -> int:
        picture = Candidate("1:1", None, os.path.realpath(tmp_path / folder / "a.png"))
        return int(embed(store, FakeEncoder(), [(picture, "")], root=tmp_path / folder))

    before = key("here")
    assert key("there") == before  # a moved dataset keeps its embeddings
    os.utime(tmp_path / "here" / "a.png", ns=(10**18, 10**18 + 1))
    assert key("here") != before
    one, same, other = Candidate("1:1", "a"), Query("2:5", "a"), Query("2:5", "b")
    keys = embed(store, FakeEncoder(), [(one, ""), (same, ""), (one, "find"), (other, "")]).tolist()
    assert keys[0] == keys[1]  # whatever its id
    assert len(set(keys)) == 3


def test_a_call_has_one_prompt_and_one_modality(store: EmbeddingStore) -> None:
    pictures = [(Candidate(f"1:{number}", None, f"{number}.png"), "") for number in (8, 9)]
    pairs = [*texts(3), pictures[0], *texts(2, "find", first=10), pictures[1], *texts(2, first=3), *texts(3)]
    model = FakeEncoder()
    keys = embed(store, model, pairs, shard_size=2, batch_size=7, normalize_embeddings=True)
    calls = [(len(inputs), prompt) for inputs, prompt, _ in model.calls]
    assert calls == [(2, ""), (2, ""), (1, ""), (2, ""), (2, "find")]
    assert all(len({isinstance(one, str) for one in inputs}) == 1 for inputs, *_ in model.calls)
    options = {"batch_size": 7, "show_progress_bar": False, "normalize_embeddings": True}
    assert all(kwargs == options for *_, kwargs in model.calls)
    expected = [FakeEncoder.embed(one.model_input, prompt) for one, prompt in pairs]
    assert store.rows(keys).tolist() == expected


def encoder_of(rows: Any) -> FakeEncoder:
    class Fixed(FakeEncoder):
        def encode(self, inputs: list[Any], prompt: str | None = None, **kwargs: Any) -> Any:
            return rows

    return Fixed()


SHAPE = r"encode returned \(2, 3\) for 3 inputs of modality 'text', expected \(3, emb"
NAN = r"2 of 3 inputs have NaN or infinity, first \['1:1', '1:2'\]. Look at these inputs"
LARGE = r"NaN or infinity as torch\.float16; .* store float32 or bfloat16"


@pytest.mark.parametrize(
    ("rows", "dtype", "message"),
    [
        (np.zeros((2, 3)), torch.float32, SHAPE),
        (np.array([[1.0], [np.nan], [np.inf]]), torch.float32, NAN),
        (np.array([[1e6]] * 3), torch.float16, LARGE),
    ],
)
def test_wrong_embeddings_are_not_stored(tmp_path: Path, rows: Any, dtype: torch.dtype, message: str) -> None:
    store = EmbeddingStore(tmp_path / "store", {}, dtype=dtype, file_format="safetensors")
    with pytest.raises(ValueError, match=message):
        embed(store, encoder_of(rows), texts(3))
    store.refresh()
    assert len(store) == 0


@pytest.mark.parametrize("options", [{}, {"truncate_dim": 8, "batch_size": 2}])
def test_a_puma_embeds_as_by_encode(
    sentence_transformer: Any, images: list[Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    images[0].save(tmp_path / "a.png")
    picture = Candidate("1:9", None, str(tmp_path / "a.png"))
    pairs = [*texts(3, "find it"), (picture, ""), (picture, "describe"), (Candidate("1:5", "a.png"), "")]
    store = EmbeddingStore(tmp_path / "store", {"model": "puma"})
    rows = store.rows(embed(store, sentence_transformer, pairs, **options))
    for row, (record, prompt) in zip(rows, pairs, strict=True):
        wanted = {"normalize_embeddings": True, **options}
        (expected,) = sentence_transformer.encode([record.model_input], prompt=prompt, **wanted)
        np.testing.assert_allclose(row, expected, atol=1e-5)
    with pytest.raises(
        (ValueError, FileNotFoundError), match=r"'9:7'(?! \(row).* no image file at '.*gone\.png'\. Check the path"
    ):
        embed(store, sentence_transformer, [(Query("9:7", None, str(tmp_path / "gone.png")), "")], **options)


def test_an_input_that_cannot_be_read_is_named(store: EmbeddingStore) -> None:
    class Picky(FakeEncoder):
        def encode(self, inputs: list[Any], prompt: str | None = None, **kwargs: Any) -> Any:
            if "text 2" in inputs:
                raise ValueError(f"inputs[{inputs.index('text 2')}]: it cannot be read")
            return super().encode(inputs, prompt, **kwargs)

    with pytest.raises(ValueError, match=r"^candidate '1:2': it cannot be read"):
        embed(store, Picky(), texts(4))


def test_what_encode_depends_on() -> None:
    given = {"batch_size": 4, "device": "cpu", "pool": object(), "truncate_dim": 8, "normalize_embeddings": True}
    assert settings_of_encode(given) == {"truncate_dim": 8, "normalize_embeddings": True}
    assert settings_of_encode(None) == settings_of_encode({"show_progress_bar": True}) == {}
    with pytest.raises(
        ValueError, match=r"encode_kwargs has \['precision', 'prompt'\]: each task's instruction is the"
    ):
        settings_of_encode({"prompt": "find", "precision": "int8", "batch_size": 3})
