"""Operations of a cached step at the true shapes of Qwen2-VL-7B, k = 12, images of 256 visual tokens with text.

A quarter of the vision tower's layers and of the decoder's, which have the same shares of the step as all of them.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import nn

from puma_hf import PumaModel
from puma_hf.losses import CachedMultimodalMACLoss, MultimodalMACLoss
from tests.full_size import VISION_CONFIG, StepFlops, build_model, count_step, image_item, sentence_transformer

# With less, sentence-transformers' mixin would cut the positions, whose first axis is not the batch, in two.
BATCH = 3


@pytest.fixture(scope="module")
def student() -> PumaModel:
    return build_model(12 // 4, depth=VISION_CONFIG["depth"] // 4).train()


@pytest.fixture(scope="module")
def model(student: PumaModel) -> SentenceTransformer:
    return sentence_transformer(student).train()


@pytest.fixture(scope="module")
def kept(model: SentenceTransformer, student: PumaModel) -> StepFlops:
    return step(student, CachedMultimodalMACLoss(model, mini_batch_size=BATCH))


def step(student: PumaModel, loss: nn.Module) -> StepFlops:
    columns: list[dict[str, Any]] = [image_item(student, BATCH) for _ in range(2)]
    # The meta device has no autocast to switch off.
    with mock.patch("torch.autocast", return_value=nullcontext()):
        return count_step(lambda: loss(columns, None))


def test_kept_image_features_save_a_sixth_of_a_cached_step(
    model: SentenceTransformer, student: PumaModel, kept: StepFlops
) -> None:
    stock = step(student, CachedMultipleNegativesRankingLoss(model, mini_batch_size=BATCH))
    assert kept.total <= 0.83 * stock.total
    # A quarter of 1.49 TFLOP of an image's vision tower, in the first pass alone and nowhere in the second.
    vision, second = kept.of("visual")
    assert vision / (2 * BATCH) == pytest.approx(1.49e12 / 4, rel=0.06)
    assert second == 0
    assert stock.total - kept.total == pytest.approx(vision, rel=1e-3)


def test_without_keeping_the_tower_runs_twice_forward_and_never_backward(
    model: SentenceTransformer, student: PumaModel, kept: StepFlops
) -> None:
    recomputed = step(student, CachedMultimodalMACLoss(model, mini_batch_size=BATCH, keep_image_features=False))
    vision, _ = kept.of("visual")
    assert recomputed.of("visual") == (vision, vision)
    assert recomputed.total - kept.total == vision


def test_caching_adds_one_forward_pass_of_the_language_model(
    model: SentenceTransformer, student: PumaModel, kept: StepFlops
) -> None:
    plain = step(student, MultimodalMACLoss(model))
    assert kept.total - plain.total == pytest.approx(plain.of("language_model")[0], rel=1e-3)
