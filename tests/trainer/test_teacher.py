"""Which teacher is chosen, and what all of them have in common."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf import (
    JointDistillationLoss,
    MultimodalMACLoss,
    PumaDistillationTrainer,
    PumaModel,
    add_lora,
    lora_config,
    prune,
)
from puma_hf.trainer import FrozenTeacher, merge_adapter
from puma_hf.trainer.cached_teacher import CachedTeacher
from puma_hf.trainer.lora import puma_model
from puma_hf.trainer.teacher_fingerprint import base_tensors
from puma_hf.trainer.whole_teacher import WholeTeacher
from tests.tiny import build_qwen2_vl
from tests.trainer.conftest import MakeArguments, MakeStudent

MODES = ("frozen", "cached")


@pytest.fixture
def make_trainer(qwen_dir: Path, make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset) -> Any:
    def make(mode: str = "frozen", *, args: dict[str, Any] | None = None, **changes: Any) -> PumaDistillationTrainer:
        arguments: dict[str, Any] = {
            "model": changes.pop("model", None) or make_student(),
            "teacher": qwen_dir,
            "teacher_mode": mode,
            "args": make_arguments(**(args or {})),
            "train_dataset": items,
        }
        return PumaDistillationTrainer(**{**arguments, **changes})

    return make


@pytest.fixture
def other_dir(tmp_path: Path) -> Path:
    """Another model of the same size, complete."""
    prune(build_qwen2_vl(tmp_path / "source", seed=1), tmp_path / "other", num_kept_layers=4)
    return tmp_path / "other"


@pytest.mark.parametrize(("mode", "kind"), list(zip(MODES, (FrozenTeacher, CachedTeacher), strict=True)))
def test_the_mode_decides(make_trainer: Any, mode: str, kind: type) -> None:
    assert type(make_trainer(mode).teacher) is kind


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_pruned_model_as_an_object_shares_its_weights(full_dir: Path, make_trainer: Any, wrapped: bool) -> None:
    full: Any = PumaModel.from_pretrained(full_dir)
    if wrapped:
        full = SentenceTransformer(str(full_dir), trust_remote_code=True, device="cpu")
    trainer = make_trainer(teacher=full)
    assert type(trainer.teacher) is FrozenTeacher
    layers = (puma_model(full) if wrapped else full).language_model.layers
    assert list(trainer.teacher.dropped_layers) == list(layers[2:])


@pytest.mark.parametrize("difference", ["weights", "attention", "depth", "dtype"])
def test_another_model_is_held_whole(make_trainer: Any, full_dir: Path, other_dir: Path, difference: str) -> None:
    if difference == "weights":
        other = PumaModel.from_pretrained(other_dir)
    elif difference == "attention":
        other = PumaModel.from_pretrained(full_dir, attn_implementation="eager")
    elif difference == "dtype":
        other = PumaModel.from_pretrained(full_dir, dtype=torch.bfloat16)
    else:
        other = PumaModel.from_pretrained(full_dir, num_kept_layers=3)
    trainer = make_trainer(teacher=other)
    assert type(trainer.teacher) is WholeTeacher
    assert trainer.teacher.model is other
    trainer.train()
    assert all(p.grad is None for p in other.parameters())


def mebibytes(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20:.1f} MiB"


def test_another_checkpoint_is_held_whole_with_a_warning(
    make_trainer: Any, other_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "puma_hf"):
        trainer = make_trainer(teacher=other_dir)
    (record,) = (r for r in caplog.records if r.name == "puma_hf.trainer.teacher")
    other = PumaModel.from_pretrained(other_dir)
    student = puma_model(trainer.model)
    shared = [n for n, p in student.named_parameters() if ".lora_" not in n and "trainable_tokens" not in n]
    theirs = dict(other.named_parameters())
    different = [
        name
        for name in (n.replace(".base_layer.", ".").replace(".token_adapter.", ".") for n in shared)
        if not torch.equal(theirs[name], base_tensors(student)[name])
    ]
    message = record.getMessage()
    assert f"{str(other_dir)!r}, is held whole beside the student and takes {mebibytes(other)} more" in message
    assert f"in {len(different)} tensors (first: {different[0]})" in message
    assert "teacher_mode='cached' avoids that" in message
    assert type(trainer.teacher) is WholeTeacher
    probe = trainer.model[0].preprocess(trainer.train_dataset["item"][:6])
    expected = WholeTeacher(other, student).states(probe)
    assert torch.equal(trainer.teacher.states(probe), expected)
    trainer.train()
    assert torch.equal(trainer.teacher.states(probe), expected)
    # An original checkpoint has no [RET] yet, and gets the row that pruning gives it.
    original = make_trainer(teacher=tmp_path / "source")
    assert torch.equal(original.teacher.states(probe), expected)


def test_what_shares_its_weights_gives_no_warning(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer()
    assert not [r for r in caplog.records if r.name == "puma_hf.trainer.teacher"]


def test_a_checkpoint_of_another_depth_is_held_whole(
    make_trainer: Any, qwen_dir: Path, puma_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prune(qwen_dir, tmp_path / "three", num_kept_layers=3)
    assert type(make_trainer(teacher=tmp_path / "three").teacher) is WholeTeacher
    assert "it has 3 layers, and the student was cut from 4" in caplog.text
    with pytest.raises(ValueError, match=r"has 2 layers and the student's weights: it is the student itself\. Pass"):
        make_trainer(teacher=puma_dir)


@pytest.fixture
def make_merged(make_trainer: Any, tmp_path: Path) -> Any:
    """Builds the student after a first stage, its adapter merged, with an adapter for the second."""

    def make() -> SentenceTransformer:
        trainer = make_trainer(args={"save_strategy": "steps", "save_steps": 4})
        trainer.train()
        merge_adapter(tmp_path / "run" / "checkpoint-4", tmp_path / "merged")
        model = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu")
        add_lora(model, lora_config(r=4))
        return model

    return make


def test_joint_training_of_a_merged_student_with_the_original_as_teacher(
    make_trainer: Any,
    make_merged: Any,
    qwen_dir: Path,
    full_dir: Path,
    items: Dataset,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_merged()
    pairs = items.rename_column("item", "anchor").add_column("positive", items["item"][::-1])
    trainer = make_trainer(
        model=model,
        teacher=qwen_dir,
        train_dataset=pairs,
        loss=JointDistillationLoss(model, MultimodalMACLoss(model), distillation_weight=0.01),
        args={"max_steps": 4, "per_device_train_batch_size": 8},
    )
    # The adapter of stage 1 was in every layer that is kept, and only there.
    assert "tensors (first: language_model.layers.0." in caplog.text
    assert type(trainer.teacher) is WholeTeacher
    probe = model[0].preprocess(items["item"][:4])
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    with torch.no_grad():
        full = PumaModel.from_pretrained(full_dir).eval()
        expected = full(**{name: probe.get(name) for name in names}).pooler_output
    assert torch.equal(trainer.teacher.states(probe), expected)
    student = model(model[0].preprocess(items["item"][:4]))["pooler_output"]
    features = [probe | {"teacher_state": expected}] * 2
    distance = (student - expected).square().sum(dim=1).mean()
    torch.testing.assert_close(trainer.loss(features)["distillation"], 0.01 * distance)
    trainer.train()
    assert torch.equal(trainer.teacher.states(probe), expected)
    log = [entry for entry in trainer.state.log_history if "distillation" in entry]
    assert [entry["distillation"] > 0 for entry in log] == [True] * 4
    assert log[-1]["contrastive"] < log[0]["contrastive"]


def test_a_student_with_trained_base_weights(make_trainer: Any, make_merged: Any, make_student: MakeStudent) -> None:
    """They are its own if the teacher is held whole."""
    merged = make_merged()
    puma_model(merged).language_model.norm.weight.requires_grad_(True)
    assert not make_trainer(model=merged).teacher.shares_base_weights
    student = make_student()
    puma_model(student).language_model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 base weights are trainable \(first: language_model\.norm\.weight\)"):
        make_trainer(model=student)


def test_another_checkpoint_may_be_asked_once(make_trainer: Any, other_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer("cached", teacher=other_dir)
    model = trainer.model
    features = dict(model[0].preprocess(["apple 4"]))
    whole = WholeTeacher(PumaModel.from_pretrained(other_dir), puma_model(model))
    features = dict(model[0].preprocess(trainer.train_dataset["item"][4:5]))
    trainer.teacher.add_states(features)
    torch.testing.assert_close(features["teacher_state"], whole.states(features), atol=1e-5, rtol=0)
    trainer.train()
    # An original checkpoint has no [RET] yet; a cache of the same weights is the same.
    make_trainer("cached", teacher=tmp_path / "source")


def test_a_teacher_is_taken_as_it_is(qwen_dir: Path, make_trainer: Any, make_student: MakeStudent) -> None:
    model = make_student()
    teacher = FrozenTeacher.from_pretrained(qwen_dir, puma_model(model))
    assert make_trainer(model=model, teacher=teacher).teacher is teacher
    cached = make_trainer("cached", model=model, teacher=teacher).teacher
    assert type(cached) is CachedTeacher
    assert make_trainer(model=model, teacher=cached).teacher is cached


# --- what is refused


def test_arguments_that_do_not_fit(make_trainer: Any, make_student: MakeStudent) -> None:
    with pytest.raises(ValueError, match=r"teacher_mode='ema' must be one of 'frozen', 'cached'"):
        make_trainer("ema")
    with pytest.raises(ValueError, match=r"'one_pass' is gone, as that teacher moved .* Take 'frozen', the full model"):
        make_trainer("one_pass")
    with pytest.raises(ValueError, match=r"teacher_cache='here' is where .* but teacher_mode is 'frozen'\. Choose"):
        make_trainer(teacher_cache="here")
    with pytest.raises(ValueError, match=r"teacher is a int, but it must be a path, a Hub id, a PumaModel.*or nothing"):
        make_trainer(teacher=3)
    model = make_student()
    cached = make_trainer("cached", model=model).teacher
    with pytest.raises(ValueError, match=r"a CachedTeacher is no RunningTeacher, .* Pass the checkpoint"):
        make_trainer("cached", model=model, teacher=cached)
    with pytest.raises(ValueError, match="The teacher is the student itself"):
        make_trainer(model=model, teacher=model)


def test_a_quantised_student_shares_its_base_with_nobody(
    make_trainer: Any, make_student: MakeStudent, caplog: pytest.LogCaptureFixture
) -> None:
    student = make_student()
    puma_model(student).is_quantized = True  # as transformers marks one
    assert type(make_trainer("frozen", model=student).teacher) is WholeTeacher
    assert "the student's base is held in 4 bits and the teacher is not. teacher_mode='cached'" in caplog.text


@pytest.mark.parametrize("mode", MODES)
def test_a_teacher_that_is_nowhere(make_trainer: Any, tmp_path: Path, mode: str) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"The teacher 'nowhere' cannot be opened: .* the folder or the Hub id of a .*Pass one.*pruned\.",
    ):
        make_trainer(mode, teacher="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"The teacher '.*empty' cannot be opened: .* has no config\.json"):
        make_trainer(mode, teacher=tmp_path / "empty")


def test_a_teacher_on_a_hub_that_cannot_be_reached(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"The teacher 'org/nowhere' cannot be opened: .*Pass one \(teacher=.*"):
        make_trainer(teacher="org/nowhere")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("as_object", [False, True])
def test_hidden_size_differs(
    make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, as_object: bool
) -> None:
    monkeypatch.setattr("tests.tiny.HIDDEN_SIZE", 64)
    teacher: Any = build_qwen2_vl(tmp_path / "wide")
    if as_object:
        teacher = PumaModel.from_pretrained(teacher)
    with pytest.raises(ValueError, match=r"has hidden_size=64 and the student 32\. .*another of the student's"):
        make_trainer(mode, teacher=teacher)


# --- what all teachers have in common


@pytest.mark.parametrize("mode", [*MODES, "whole"])
def test_no_teacher_is_optimised_saved_or_kept_by_the_loss(
    make_trainer: Any, other_dir: Path, tmp_path: Path, images: list[Image.Image], mode: str
) -> None:
    changes = {"teacher": PumaModel.from_pretrained(other_dir)} if mode == "whole" else {}
    trainer = make_trainer(
        "frozen" if mode == "whole" else mode, args={"save_strategy": "steps", "save_steps": 4}, **changes
    )
    model = trainer.model
    keys = list(model.state_dict())
    parameters = {id(p) for p in model.parameters()}
    trainer.train()
    assert {id(p) for p in trainer.loss.parameters()} == parameters
    assert {id(p) for p in model.parameters()} == parameters
    assert list(model.state_dict()) == keys
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in model.parameters() if p.requires_grad}
    trained = {name for name, p in model.named_parameters() if p.grad is not None or p.requires_grad}
    assert trained
    assert all(".lora_" in name or "trainable_tokens" in name for name in trained)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    from safetensors import safe_open

    with safe_open(checkpoint / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert all("lora_" in name or "trainable_tokens" in name for name in names)
    assert not any("layers.2." in name or "layers.3." in name for name in names)
    assert not list(checkpoint.glob("model*.safetensors"))


@pytest.mark.parametrize("mode", MODES)
def test_what_leaves_training_is_the_pruned_model(
    make_trainer: Any, puma_dir: Path, tmp_path: Path, images: list[Image.Image], mode: str
) -> None:
    trainer = make_trainer(mode, args={"save_strategy": "steps", "save_steps": 4})
    inputs = ["a red apple", {"image": images[0]}, {"image": images[1], "text": "on a table"}]
    untrained = trainer.model.encode(inputs)
    trainer.train()
    expected = trainer.model.encode(inputs)
    assert np.abs(expected - untrained).max() > 1e-3
    merge_adapter(tmp_path / "run" / "checkpoint-4", tmp_path / "merged")
    merged = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(merged.encode(inputs), expected, atol=1e-5, rtol=0)
    assert len(puma_model(merged).language_model.layers) == 2
    # Pruning to the same depth once more, saving and opening that changes nothing either.
    prune(tmp_path / "merged", tmp_path / "again", num_kept_layers=2)
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(again.encode(inputs), expected, atol=1e-5, rtol=0)


def test_no_drift_after_fifty_steps(make_trainer: Any, items: Dataset) -> None:
    trainer = make_trainer(args={"max_steps": 50, "logging_steps": 50})
    model = trainer.model
    probe = model[0].preprocess(items["item"][:6])
    start = trainer.teacher.states(probe)
    untrained = model(dict(probe))["pooler_output"]
    trainer.train()
    assert trainer.state.global_step == 50
    assert (model(dict(probe))["pooler_output"] - untrained).abs().max() > 0.1
    assert (trainer.teacher.states(probe) - start).abs().max().item() == 0.0


@pytest.mark.parametrize("train_ret_token", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_only_the_adapter_gets_gradients(
    make_trainer: Any, make_student: MakeStudent, mode: str, train_ret_token: bool
) -> None:
    model = make_student(train_ret_token=train_ret_token, disturbed=True)
    trainer = make_trainer(mode, model=model)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    trainer.compute_loss(model, batch).backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("lora_A" in name for name in names)
    assert all(".lora_" in name or "trainable_tokens" in name for name in names)
    assert any("trainable_tokens" in name for name in names) is train_ret_token
    deep = getattr(trainer.teacher, "dropped_layers", torch.nn.ModuleList())
    assert all(p.grad is None for p in deep.parameters())
