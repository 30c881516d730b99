"""The ways to quantise and compile that docs/speed.md names, on the tiny model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import TorchAoConfig

from puma_hf import embed


@pytest.fixture
def inputs(images: list[Image.Image]) -> list[Any]:
    return ["a red apple on a table", {"image": images[0]}, {"image": images[1], "text": "a table"}, "a"]


def vectors(model: SentenceTransformer, inputs: list[Any]) -> np.ndarray[Any, Any]:
    return embed(model, inputs, prompt="Represent the given input.", num_workers=0).embeddings


def int8_weights(model: Any) -> list[str]:
    return [name for name, weight in model[0].model.named_parameters() if type(weight.data).__name__ == "Int8Tensor"]


def test_int8_at_load_is_int8_afterwards(
    puma_dir: Path, sentence_transformer: SentenceTransformer, inputs: list[Any]
) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    settings = quantization.Int8DynamicActivationInt8WeightConfig()
    kwargs: Any = {"model_kwargs": {"quantization_config": TorchAoConfig(settings)}}
    loaded = SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu", **kwargs)
    changed = copy.deepcopy(sentence_transformer)
    quantization.quantize_(changed[0].model, settings)
    assert int8_weights(loaded) == int8_weights(changed)
    assert {name.partition(".")[0] for name in int8_weights(loaded)} == {"language_model", "visual"}
    quantised, whole = vectors(loaded, inputs), vectors(sentence_transformer, inputs)
    np.testing.assert_array_equal(quantised, vectors(changed, inputs))
    cosines = (quantised * whole).sum(axis=1)
    assert 0.99 < cosines.min() < cosines.max() < 1 - 1e-7
    np.testing.assert_allclose(loaded.encode(inputs, prompt="Represent the given input."), quantised, atol=1e-5)


def test_compiled_mlps_are_the_same_and_are_used(sentence_transformer: SentenceTransformer, inputs: list[Any]) -> None:
    changed: Any = copy.deepcopy(sentence_transformer)
    calls = []

    def compiler(graph: Any, example_inputs: Any) -> Any:
        calls.append(len(example_inputs))
        return graph.forward

    for part in (*changed[0].model.language_model.layers, *changed[0].model.visual.blocks):
        part.mlp.compile(dynamic=True, backend=compiler)
    np.testing.assert_allclose(vectors(changed, inputs), vectors(sentence_transformer, inputs), atol=1e-6)
    assert len(calls) == 2  # once for all decoder layers, once for all vision blocks
    assert list(changed.state_dict()) == list(sentence_transformer.state_dict())
