from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

from puma_hf.losses.cached_multimodal_mac import CachedMultimodalMACLoss
from puma_hf.losses.joint import JointDistillationLoss
from puma_hf.losses.multimodal_mac import MultimodalMACLoss
from puma_hf.trainer.config import TrainConfig
from puma_hf.trainer.objectives import training_loss


def config(**values: Any) -> TrainConfig:
    return TrainConfig(model="m", output="o", data="d", **values)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({}, MultimodalMACLoss),
        ({"loss": "mac-split"}, MultimodalMACLoss),
        ({"loss": "infonce"}, MultimodalMACLoss),
        ({"mini_batch_size": 4}, CachedMultimodalMACLoss),
        ({"mini_batch_num_tokens": 64}, CachedMultimodalMACLoss),
        ({"loss": "infonce", "mini_batch_size": 4}, CachedMultimodalMACLoss),
        ({"matryoshka_dims": [16, 8]}, MatryoshkaLoss),
        ({"distillation_weight": 0.5}, JointDistillationLoss),
        ({"loss": "infonce", "distillation_weight": 0.5}, JointDistillationLoss),
        ({"matryoshka_dims": [16, 8], "distillation_weight": 0.5}, MatryoshkaLoss),
    ],
)
def test_the_loss_is_of_the_kind_that_was_asked_for(
    sentence_transformer: SentenceTransformer, values: dict[str, Any], kind: type
) -> None:
    assert type(training_loss(sentence_transformer, config(**values))) is kind


def test_settings_reach_the_loss(sentence_transformer: SentenceTransformer) -> None:
    values = {"temperature": 0.1, "hard_temperature": 0.07, "schedule": "linear", "grouping": "query"}
    values |= {"schedule_end": 0.7}
    values |= {"loss": "mac-split", "split_weight": 0.3, "false_negative_margin": 0.2, "mini_batch_num_tokens": 64}
    settings = training_loss(sentence_transformer, config(**values)).get_config_dict()  # type: ignore[operator]
    assert settings["temperature"] == 0.1
    assert settings["hard_temperature"] == 0.07
    assert (settings["schedule"], settings["schedule_end"]) == ("linear", 0.7)
    assert settings["grouping"] == "query"
    assert settings["objective"] == "split"
    assert settings["split_weight"] == 0.3
    assert settings["false_negative_margin"] == 0.2
    assert settings["mini_batch_num_tokens"] == 64


def test_infonce_takes_the_temperature(sentence_transformer: SentenceTransformer) -> None:
    values = {"temperature": 0.1, "hard_temperature": 0.01, "schedule": "cosine", "false_negative_margin": 0.2}
    loss: Any = training_loss(sentence_transformer, config(loss="infonce", **values))
    assert loss.temperature == loss.current_hard_temperature == 0.1
    settings = loss.get_config_dict()
    assert (settings["hard_temperature"], settings["schedule"], settings["objective"]) == (0.1, "constant", "mac")
    assert settings["false_negative_margin"] == 0.2


@pytest.mark.parametrize("cache", [{}, {"mini_batch_size": 2}])
def test_infonce_is_the_ranking_loss_where_nothing_is_copied(
    sentence_transformer: SentenceTransformer, cache: dict[str, Any]
) -> None:
    model = sentence_transformer.eval()
    image = Image.new("RGB", (56, 56), "red")
    rows: list[list[Any]] = [["a", "b", "c"], ["red", image, "blue"]]
    copies: list[list[Any]] = [["a", "b", "c"], ["red", "red", "blue"]]

    def value(loss: Any, columns: list[list[Any]]) -> float:
        return float(loss([model.preprocess(column) for column in columns], None).detach())

    infonce = training_loss(model, config(loss="infonce", temperature=0.1, **cache))
    ranking = MultipleNegativesRankingLoss(model, scale=10.0)
    assert value(infonce, rows) == pytest.approx(value(ranking, rows), rel=1e-5)
    assert value(infonce, copies) < value(ranking, copies) - 1e-3  # a copy of the positive is no negative


@pytest.mark.parametrize("loss", ["mac", "infonce"])
@pytest.mark.parametrize(("num_devices", "wanted", "expected"), [(1, True, False), (2, True, True), (2, False, False)])
def test_candidates_are_gathered_where_there_are_others(
    sentence_transformer: SentenceTransformer, loss: str, num_devices: int, wanted: bool, expected: bool
) -> None:
    settings = config(loss=loss, gather_across_devices=wanted)
    built: Any = training_loss(sentence_transformer, settings, num_devices=num_devices)
    assert built.gather_across_devices is expected


def test_sizes_beyond_the_embedding(sentence_transformer: SentenceTransformer) -> None:
    loss: Any = training_loss(sentence_transformer, config(matryoshka_dims=[8, 32]))
    assert list(loss.matryoshka_dims) == [32, 8]
    joint: Any = training_loss(sentence_transformer, config(matryoshka_dims=[8], distillation_weight=0.5))
    assert type(joint.loss) is JointDistillationLoss
    with pytest.raises(ValueError, match=r"matryoshka_dims=\[64\] must not exceed the embedding's 32 dimensions"):
        training_loss(sentence_transformer, config(matryoshka_dims=[64]))
