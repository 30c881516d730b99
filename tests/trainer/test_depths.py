"""Both stages at several depths, from the settings to what is loaded of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig

from puma_hf import ElasticDepthLoss, PumaDistillationTrainer, SelfDistillationLoss, embed, prune
from puma_hf.configs import DistillConfig, TrainConfig
from puma_hf.trainer.lora_puma import BASE_FILE
from puma_hf.trainer.merge import merge_adapter
from puma_hf.trainer.stages import distill, train, training_arguments
from puma_hf.trainer.statistics_puma import TrainingStatistics
from tests.trainer.conftest import MakeArguments, MakeStudent

QUICK: dict[str, Any] = {
    "batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "lora_r": 2,
    "learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def three(qwen_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model pruned to 3 layers."""
    prune(qwen_dir, folder := tmp_path_factory.mktemp("three") / "tiny-puma-3", num_kept_layers=3)
    return folder


@pytest.fixture
def settings(three: Path, mbeir_root: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(name: str, **changes: Any) -> dict[str, Any]:
        return {
            **QUICK,
            "learning_rate": 1e-2,
            "model": three,
            "output": tmp_path / name,
            "data": mbeir_root,
            **changes,
        }

    return make


def noted(folder: Path, name: str = BASE_FILE) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def logged(folder: Path, name: str) -> list[float]:
    history = noted(folder / "checkpoint-2", "trainer_state.json")["log_history"]
    return [entry[name] for entry in history if name in entry]


def test_distil_at_several_depths_and_train_on(
    settings: Callable[..., dict[str, Any]], qwen_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"teacher": qwen_dir, "depths": "3,1", "depth_weights": "linear", "metric": "cosine"}
    adapter = distill(DistillConfig(**settings("frozen", **options)))
    cached = distill(DistillConfig(**settings("cached", **options, teacher_mode="cached")))
    assert logged(cached, "loss") == pytest.approx(logged(adapter, "loss"), rel=1e-4)
    for folder in (adapter, adapter / "checkpoint-2", cached):
        assert noted(folder)["trained_depths"] == [1, 3]
        assert noted(folder)["teacher"] == noted(adapter)["teacher"] is not None

    merge_adapter(adapter, merged := tmp_path / "merged")
    config = noted(merged, "config.json")
    assert (config["trained_depths"], config["teacher_fingerprint"]) == ([1, 3], noted(adapter)["teacher"])
    prune(merged, tmp_path / "one", num_kept_layers=1)
    at_one = AutoConfig.from_pretrained(tmp_path / "one")
    assert (at_one.trained_depths, at_one.teacher_fingerprint) == ([1], config["teacher_fingerprint"])
    # It embeds there as the trained exit does: by the adapter, merged, and cut.
    rows = ["a red apple", "two"]
    opened, trained = (
        SentenceTransformer(str(folder), trust_remote_code=True, device="cpu") for folder in (tmp_path / "one", adapter)
    )
    np.testing.assert_allclose(
        embed(trained, rows, num_kept_layers=1).embeddings, opened.encode(rows), rtol=0, atol=1e-5
    )
    # At another depth it is not in the teacher's space.
    at_two = AutoConfig.from_pretrained(merged, num_kept_layers=2)
    assert (at_two.trained_depths, at_two.teacher_fingerprint) == ([1], None)
    assert "num_kept_layers=2 is no depth that the model was trained at, which are 1, 3" in caplog.text

    # The last training decides: at one depth, it is a model of one depth.
    last = train(TrainConfig(**settings("last", model=merged)))
    assert not {"trained_depths", "teacher"} & noted(last).keys()
    merge_adapter(last, tmp_path / "final")
    assert noted(tmp_path / "final", "config.json")["trained_depths"] is None
    again: Any = SentenceTransformer(str(last), trust_remote_code=True, device="cpu")
    assert again[0].model.config.trained_depths is None  # whatever its base was trained at


@pytest.mark.parametrize(
    "options",
    [
        {"matryoshka_dims": (32, 8), "depth_weights": "last"},
        {"mini_batch_size": 2, "depth_weights": "sampled", "gradient_checkpointing": True},
        {"distillation_weight": 0.01, "teacher_mode": "cached"},
    ],
)
def test_train_at_several_depths(
    settings: Callable[..., dict[str, Any]], qwen_dir: Path, options: dict[str, Any]
) -> None:
    options = {**options, "teacher": qwen_dir} if "teacher_mode" in options else options
    config = TrainConfig(**settings("out", depths="1,2,3", **options))
    folder = train(config)
    assert noted(folder) | {"sha256": ""} == {"sha256": "", "trained_depths": [1, 2, 3]}  # no teacher's space
    assert all(np.isfinite(logged(folder, "loss")))
    assert training_arguments(config).ddp_find_unused_parameters == (options.get("depth_weights") == "sampled")
    assert logged(folder, "positive_similarity")


def test_the_log_is_of_all_depths(
    qwen_dir: Path, make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset
) -> None:
    model = make_student()
    loss = ElasticDepthLoss(model, SelfDistillationLoss(model), (1, 2))
    args = make_arguments(max_steps=1, per_device_train_batch_size=16)  # one batch of all rows
    PumaDistillationTrainer(model=model, teacher=qwen_dir, args=args, train_dataset=items)  # a stage of one depth
    config: Any = model[0].model.config
    assert config.trained_depths is None
    trainer = PumaDistillationTrainer(model=model, teacher=qwen_dir, args=args, train_dataset=items, loss=loss)
    assert config.trained_depths == [1, 2]
    features: Any = model[0].preprocess(items["item"][:])
    teacher: Any = trainer.teacher.states(dict(features))  # type: ignore[union-attr]
    with torch.no_grad():
        found = model.train()({**features, "exit_depths": (1, 2), "teacher_state": teacher})
    first, second = found["pooler_output"].chunk(2, dim=1)
    expected = (cosine_similarity(first, teacher).mean() + cosine_similarity(second, teacher).mean()) / 2
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["teacher_cosine"] == pytest.approx(expected.item(), abs=2e-4)
    # Wrapped for several devices, the model returns the depths side by side.
    statistics = TrainingStatistics(loss)
    statistics._see_states(model, (), found)
    sums: Any = statistics._sums
    assert (sums[0, -1] / sums[1, -1]).item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(statistics._seen, second)  # type: ignore[arg-type]  # of the deepest is the spread


def test_what_is_refused(settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    for depths in ("", "0,3", "3,3", "1;3", "1.5,3", "-1,3"):
        with pytest.raises(ValueError, match=r"depths='.*' must be different numbers of layers, such as 4,8,12\."):
            TrainConfig(**settings("out", depths=depths))
    with pytest.raises(ValueError, match=r"depths=\(1, 2\) must end in the model's own 3 layers\. Add that depth"):
        train(TrainConfig(**settings("out", depths="1,2")))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP shards, and so do depths\. Launch DDP"):
        train(TrainConfig(**settings("out", depths="1,3")))
