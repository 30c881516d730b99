from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import TrainerState

from puma_hf import merge_adapter
from puma_hf.data import MBEIR
from puma_hf.data.sampler import DistinctPositivesBatchSampler
from puma_hf.losses import MultimodalMACLoss
from puma_hf.trainer.lora import BASE_FILE
from puma_hf.trainer.stages import DISTILL_SETTINGS, TRAIN_SETTINGS, StageSettings, distill, train

QUICK: dict[str, Any] = {"batch_size": 4, "max_steps": 3, "logging_steps": 1, "lora_r": 2}


def state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def logged(checkpoint: Path, name: str) -> list[float]:
    return [entry[name] for entry in state_of(checkpoint).log_history if name in entry]


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0 must be at least 1"),
        ({"lora_r": 0}, r"lora_r=0 must be at least 1"),
        ({"logging_steps": 0}, r"logging_steps=0 must be at least 1"),
        ({"max_steps": 0}, r"max_steps=0 must be at least 1, or -1 for whole epochs"),
        ({"max_steps": -2}, r"max_steps=-2 must be at least 1"),
        ({"num_train_epochs": 0}, r"num_train_epochs=0 must be above 0"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0 must be above 0\. LamRA takes"),
        ({"warmup": 1.0}, r"warmup=1\.0 is a fraction .* \[0, 1\)"),
        ({"warmup": -0.1}, r"warmup=-0\.1 is a fraction"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0 must be in \[0, 1\)"),
        ({"dataloader_num_workers": -1}, r"dataloader_num_workers=-1 must be 0"),
        ({"save_steps": -1}, r"save_steps=-1 must be 0 \(no checkpoints\) or more"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageSettings(**settings)


def test_settings_of_the_two_stages() -> None:
    first, second = DISTILL_SETTINGS, TRAIN_SETTINGS
    assert (first.lora_r, first.learning_rate, first.train_ret_token) == (64, 2e-4, True)
    assert (second.lora_r, second.learning_rate, second.train_ret_token) == (128, 1e-4, False)


def test_both_stages_one_after_the_other(qwen_dir: Path, puma_dir: Path, mbeir_root: Path, tmp_path: Path) -> None:
    settings = StageSettings(**QUICK, learning_rate=1e-2, save_steps=3, train_ret_token=True)
    saved = distill(puma_dir, tmp_path / "first", data=mbeir_root, teacher=qwen_dir, metric="cosine", settings=settings)
    assert saved == tmp_path / "first"
    assert state_of(saved / "checkpoint-3").global_step == 3
    assert (saved / BASE_FILE).is_file()
    assert all(0 < loss < 2 for loss in logged(saved / "checkpoint-3", "loss"))  # a cosine distance
    assert sum("token_adapter" in name for name in adapter_tensors(saved)) == 1
    trained = SentenceTransformer(str(saved), trust_remote_code=True, device="cpu").encode(["a red apple"])
    assert merge_adapter(saved, tmp_path / "merged") < 1e-5
    merged = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(merged.encode(["a red apple"]), trained, atol=1e-5, rtol=0)

    settings = StageSettings(**QUICK, save_steps=3)
    saved = train(
        tmp_path / "merged",
        tmp_path / "second",
        data=mbeir_root,
        hard_temperature=0.02,
        schedule="linear",
        num_negatives=1,
        settings=settings,
    )
    assert logged(saved / "checkpoint-3", "hard_temperature") == pytest.approx([0.05, 0.04, 0.03])
    assert not any("token_adapter" in name for name in adapter_tensors(saved))
    assert merge_adapter(saved, tmp_path / "final") < 1e-5


def test_infonce_has_one_temperature(puma_dir: Path, mbeir_root: Path, tmp_path: Path) -> None:
    settings = StageSettings(**QUICK, save_steps=3)
    saved = train(puma_dir, tmp_path / "out", data=mbeir_root, loss="infonce", settings=settings)
    assert not logged(saved / "checkpoint-3", "temperature")
    # MAC-Loss at equal temperatures is the same loss.
    mac = train(puma_dir, tmp_path / "mac", data=mbeir_root, hard_temperature=0.05, settings=settings)
    assert logged(mac / "checkpoint-3", "loss") == pytest.approx(logged(saved / "checkpoint-3", "loss"), abs=1e-4)


def test_runs_repeat_with_their_seed(puma_dir: Path, mbeir_root: Path, tmp_path: Path) -> None:
    def run(name: str, seed: int) -> dict[str, torch.Tensor]:
        torch.seed()  # what happened before does not count
        settings = StageSettings(**QUICK, seed=seed)
        return adapter_tensors(train(puma_dir, tmp_path / name, data=mbeir_root, settings=settings))

    first, again, other = run("first", 0), run("again", 0), run("other", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_rows_of_a_batch_share_no_answer(
    puma_dir: Path, mbeir_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[frozenset[str]]] = []
    iterate = DistinctPositivesBatchSampler.__iter__

    def record(self: DistinctPositivesBatchSampler) -> Iterator[list[int]]:
        for batch in iterate(self):
            batches.append([self.positives[row] for row in batch])
            yield batch

    monkeypatch.setattr(DistinctPositivesBatchSampler, "__iter__", record)
    settings = StageSettings(**{**QUICK, "max_steps": -1, "batch_size": 8})
    train(puma_dir, tmp_path / "out", data=mbeir_root, settings=settings)
    assert len(batches) == 4  # 8 tasks of 4 queries
    rows = [row for batch in batches for row in batch]
    assert set(rows) == {
        frozenset(query.positives)
        for task in MBEIR(mbeir_root).tasks("train")
        for query in MBEIR(mbeir_root).queries(task, "train")
    }
    assert len(frozenset.union(*rows)) < sum(map(len, rows))  # some rows do share one
    assert all(len(frozenset.union(*batch)) == sum(map(len, batch)) for batch in batches)


def test_resume_continues_the_count(
    puma_dir: Path,
    mbeir_root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {**QUICK, "save_steps": 2}
    whole = train(puma_dir, tmp_path / "whole", data=mbeir_root, settings=StageSettings(**{**settings, "max_steps": 4}))
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    # As after a crash: the last checkpoint and what was saved at the end are not there.
    expected = adapter_tensors(whole)
    (whole / "checkpoint-4").rename(tmp_path / "gone")
    (whole / "adapter_model.safetensors").unlink()
    caplog.set_level(logging.INFO, logger="puma_hf")
    steps: list[int] = []
    forward = MultimodalMACLoss.forward

    def count(self: MultimodalMACLoss, columns: Any, labels: Any = None) -> torch.Tensor:
        steps.append(1)
        return forward(self, columns, labels)

    monkeypatch.setattr(MultimodalMACLoss, "forward", count)
    train(puma_dir, whole, data=mbeir_root, settings=StageSettings(**{**settings, "max_steps": 4}), resume=True)
    assert len(steps) == 2  # the two that were missing
    assert state_of(whole / "checkpoint-4").global_step == 4
    assert len(logged(whole / "checkpoint-4", "loss")) == 4
    assert "starting from the beginning" not in caplog.text
    for name, tensor in adapter_tensors(whole).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)

    train(puma_dir, tmp_path / "new", data=mbeir_root, settings=StageSettings(**QUICK), resume=True)
    assert "starting from the beginning" in caplog.text
    bare = StageSettings(**QUICK, save_steps=0)
    train(puma_dir, tmp_path / "bare", data=mbeir_root, settings=bare)
    with pytest.raises(FileNotFoundError, match=r"bare' holds no checkpoint to continue from: .*--overwrite"):
        train(puma_dir, tmp_path / "bare", data=mbeir_root, settings=bare, resume=True)


def test_overwrite_forgets_an_earlier_run(puma_dir: Path, mbeir_root: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stale = output / "checkpoint-500"
    stale.mkdir(parents=True)
    (stale / "trainer_state.json").write_text(json.dumps({"global_step": 500}))
    (output / "checkpoint-notes").mkdir()
    with pytest.raises(FileExistsError, match=r"'.*out' is not empty\. Continue .*--resume.*--overwrite"):
        train(puma_dir, output, data=mbeir_root)
    settings = StageSettings(**QUICK, save_steps=3)
    train(puma_dir, output, data=mbeir_root, settings=settings, overwrite=True)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-notes"]


@pytest.mark.parametrize("resume", [False, True])
def test_output_that_is_the_model(puma_dir: Path, mbeir_root: Path, tmp_path: Path, resume: bool) -> None:
    for folder in (puma_dir, puma_dir.parent):
        with pytest.raises(ValueError, match=r"is, or holds, the model itself"):
            train(puma_dir, folder, data=mbeir_root, overwrite=True, resume=resume)
        with pytest.raises(ValueError, match=r"is, or holds, the model itself"):
            distill(puma_dir, folder, data=mbeir_root, overwrite=True, resume=resume)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"'.*file' is a file\. Choose a directory"):
        train(puma_dir, tmp_path / "file", data=mbeir_root, overwrite=True, resume=resume)


@pytest.mark.parametrize("max_steps", [-1, 5])
def test_dataset_smaller_than_a_batch(puma_dir: Path, mbeir_root: Path, tmp_path: Path, max_steps: int) -> None:
    settings = StageSettings(batch_size=33, max_steps=max_steps)
    with pytest.raises(ValueError, match=r"The 32 rows fill no batch of 33, so nothing was trained.*--batch-size"):
        train(puma_dir, tmp_path / "out", data=mbeir_root, settings=settings)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "triplet"}, r"loss='triplet' is unknown\. Choose 'mac' or 'infonce'"),
        ({"temperature": 0.0, "loss": "infonce"}, r"temperature is 0\.0, but .* positive and finite"),
        ({"hard_temperature": -1.0}, r"hard_temperature is -1\.0"),
        ({"schedule": "sudden"}, r"schedule is 'sudden', but it must be one of"),
        ({"num_negatives": -1}, r"num_negatives is -1"),
    ],
)
def test_bad_options(puma_dir: Path, mbeir_root: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(puma_dir, tmp_path / "out", data=mbeir_root, settings=StageSettings(**QUICK), **options)


def test_unknown_metric(puma_dir: Path, mbeir_root: Path, tmp_path: Path, qwen_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"metric is 'l1', but it must be one of"):
        distill(puma_dir, tmp_path / "out", data=mbeir_root, teacher=qwen_dir, metric="l1")  # type: ignore[arg-type]


def test_adapter_is_no_model_to_train(puma_dir: Path, mbeir_root: Path, tmp_path: Path) -> None:
    adapter = train(puma_dir, tmp_path / "adapter", data=mbeir_root, settings=StageSettings(**QUICK))
    with pytest.raises(ValueError, match=r"is an adapter\. Merge it first \(puma-hf merge\)"):
        train(adapter, tmp_path / "out", data=mbeir_root)


def test_only_puma_directories_are_trained(qwen_dir: Path, mbeir_root: Path, tmp_path: Path) -> None:
    for name in (qwen_dir, tmp_path / "absent", "org/name"):
        with pytest.raises(ValueError, match=r"is no PUMA directory\. Make one .* puma-hf prune"):
            train(name, tmp_path / "out", data=mbeir_root)


def test_teacher_that_is_not_here(puma_dir: Path, mbeir_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"local folder named 'tiny-qwen2-vl', which is not here"):
        distill(puma_dir, tmp_path / "out", data=mbeir_root)
