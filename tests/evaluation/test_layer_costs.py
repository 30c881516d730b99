from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf.evaluation.layer_costs import flops_by_depth, layer_costs
from puma_hf.flops import count_flops, count_parameters
from tests.evaluation.layer_models import pruned_to_every_depth


@pytest.fixture(scope="module")
def models(qwen_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[SentenceTransformer]:
    return pruned_to_every_depth(qwen_dir, tmp_path_factory.mktemp("depths"))


def test_operations_equal_those_of_each_pruned_model(
    models: list[SentenceTransformer], images: list[Image.Image]
) -> None:
    items: list[Any] = ["a red apple", {"image": images[0]}, {"image": images[1], "text": "red"}]
    for item in items:
        features = models[-1].preprocess([item])
        assert flops_by_depth(models[-1], features) == tuple(count_flops(model, item) for model in models)


def test_costs_equal_those_of_each_pruned_model(models: list[SentenceTransformer]) -> None:
    costs = layer_costs(models[-1])
    assert costs.parameters == tuple(count_parameters(model) for model in models)
    assert costs.bytes == tuple(4 * number for number in costs.parameters)
    # 256 visual tokens are 16 x 16, of 2 x 2 patches of 8 x 8 pixels each.
    assert (costs.text_tokens, costs.image_tokens) == (64, 256)
    image = {"image": Image.new("RGB", (256, 256))}
    assert costs.flops_image == tuple(count_flops(model, image) for model in models)
    assert costs.flops_text[0] < costs.flops_text[1] < costs.flops_text[3]
    # A text has nothing but layers: 64 tokens through each.
    assert costs.flops_text[3] == 4 * costs.flops_text[0]


def test_an_image_that_the_model_may_not_see_whole_is_told(models: list[SentenceTransformer]) -> None:
    processor: Any = models[-1][0].processor.image_processor  # type: ignore[union-attr]
    size = processor.size
    processor.size = type(size)(shortest_edge=256, longest_edge=128 * 128)
    try:
        assert layer_costs(models[-1]).image_tokens == 64
    finally:
        processor.size = size


def test_half_precision_halves_the_bytes(models: list[SentenceTransformer], puma_dir: Path) -> None:
    model = SentenceTransformer(
        str(puma_dir), trust_remote_code=True, device="cpu", model_kwargs={"dtype": torch.bfloat16}
    )
    costs = layer_costs(model)
    assert len(costs.bytes) == 2
    assert costs.bytes == tuple(2 * count_parameters(pruned) for pruned in models[:2])
