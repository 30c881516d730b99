from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import nn

from puma_hf.embedding.device import Runner

INPUTS = ["a red apple", "b", "in green"]


def run(runner: Runner, packer: Any, batches: list[tuple[int, ...]]) -> list[Any]:
    arrived = []
    for indices in batches:
        arrived += runner.put(indices, packer([INPUTS[index] for index in indices]))
    return arrived + runner.take()


def test_rows_come_with_their_indices(sentence_transformer: Any) -> None:
    arrived = run(Runner(sentence_transformer), sentence_transformer[0].packer(), [(2, 0), (1,)])
    assert [indices for indices, _ in arrived] == [(2, 0), (1,)]
    rows = torch.cat([rows for _, rows in arrived])
    np.testing.assert_allclose(rows, sentence_transformer.encode([INPUTS[2], INPUTS[0], INPUTS[1]]), atol=1e-5)
    assert rows.dtype == torch.float32
    assert not any(rows.is_inference() for _, rows in arrived)


def test_features_that_cannot_be_packed_are_run_too(sentence_transformer: Any) -> None:
    features = sentence_transformer[0].packer().process(INPUTS)
    ((_, rows),) = Runner(sentence_transformer).put((0, 1, 2), features)
    np.testing.assert_allclose(rows, sentence_transformer.encode(INPUTS), atol=1e-5)


def test_truncated_rows_have_unit_length(sentence_transformer: Any) -> None:
    ((_, rows),) = Runner(sentence_transformer, 8).put((0, 1, 2), sentence_transformer[0].packer()(INPUTS))
    expected = sentence_transformer.encode(INPUTS, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(rows, expected, atol=1e-5)


class Half(nn.Module):
    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {**features, "sentence_embedding": features["sentence_embedding"] / 2}


@pytest.mark.parametrize(("modules", "length"), [([Half()], 0.5), ([Half(), Normalize()], 1.0)])
def test_further_modules_of_the_model_are_run(sentence_transformer: Any, modules: list[Any], length: float) -> None:
    model = SentenceTransformer(modules=[sentence_transformer[0], *modules], device="cpu")
    ((_, rows),) = Runner(model.eval()).put((0, 1, 2), model[0].packer()(INPUTS))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), length, atol=1e-5)


def test_out_of_memory_says_what_to_lower(sentence_transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def embed_batch(batch: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(sentence_transformer[0], "embed_batch", embed_batch)
    batch = sentence_transformer[0].packer()(INPUTS)
    with pytest.raises(torch.OutOfMemoryError, match="no memory") as error:
        Runner(sentence_transformer).put((0, 1, 2), batch)
    assert error.value.__notes__ == [f"This batch has {batch.num_tokens} tokens: lower max_batch_tokens."]


class LateEvent:
    """A CUDA event that has not happened before someone waits for it."""

    def __init__(self, rows: torch.Tensor, host: torch.Tensor) -> None:
        self.rows, self.host = rows, host

    def synchronize(self) -> None:
        self.host.copy_(self.rows)


def test_rows_are_read_only_when_they_have_arrived(sentence_transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's order of events, acted out on the CPU."""

    def copy_back(rows: torch.Tensor) -> Any:
        host = torch.full_like(rows, float("nan"))
        return host, LateEvent(rows, host)

    monkeypatch.setattr("puma_hf.embedding.device._copy_back", copy_back)
    packer, runner = sentence_transformer[0].packer(), Runner(sentence_transformer)
    monkeypatch.setattr("puma_hf.embedding.device._to_device", lambda batch, device: batch)
    runner._device = torch.device("cuda")
    batches = [packer([text]) for text in INPUTS]
    assert runner.put((0,), batches[0]) == []
    assert runner.put((1,), batches[1]) == []
    ((indices, first),) = runner.put((2,), batches[2])
    assert indices == (0,)
    rest = runner.take()
    assert [indices for indices, _ in rest] == [(1,), (2,)]
    rows = torch.cat([first, *(rows for _, rows in rest)])
    np.testing.assert_allclose(rows, sentence_transformer.encode(INPUTS), atol=1e-5)
    assert runner.take() == []
