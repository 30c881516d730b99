from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf import PumaDistillationTrainer, SelfDistillationLoss
from puma_hf.trainer import FrozenTeacher, merge_adapter
from puma_hf.trainer.full_model import StoredModel
from puma_hf.trainer.lora import BASE_FILE, puma_model
from tests.trainer.conftest import MakeArguments, MakeStudent


def trained_parameters(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def two_columns(items: Dataset) -> Dataset:
    return items.rename_column("item", "anchor").add_column("positive", items["item"][::-1])


@pytest.mark.parametrize(("columns", "metric"), [(1, "mse"), (2, "cosine")])
def test_loss_falls(
    qwen_dir: Path,
    make_student: MakeStudent,
    make_arguments: MakeArguments,
    items: Dataset,
    columns: int,
    metric: Any,
) -> None:
    model = make_student()
    trainer = PumaDistillationTrainer(
        model=model,
        teacher=qwen_dir,
        args=make_arguments(max_steps=16, per_device_train_batch_size=8),
        train_dataset=items if columns == 1 else two_columns(items),
        loss=SelfDistillationLoss(model, metric),
    )
    probe = model[0].preprocess(["a red apple", *(cell for cell in items["item"][:3])])
    teacher_before = trainer.teacher.states(probe)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = trained_parameters(model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 16
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert torch.equal(trainer.teacher.states(probe), teacher_before)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert all(not torch.equal(p, start[name]) for name, p in trained_parameters(model).items())


def test_only_the_adapter_is_optimised_and_saved(
    qwen_dir: Path, make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset, tmp_path: Path
) -> None:
    model = make_student()
    trainer = PumaDistillationTrainer(
        model=model,
        teacher=qwen_dir,
        args=make_arguments(max_steps=1, save_strategy="steps", save_steps=1),
        train_dataset=items,
    )
    assert isinstance(trainer.loss, SelfDistillationLoss)
    trainer.train()
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in model.parameters() if p.requires_grad}
    dropped = {id(p) for p in trainer.teacher.dropped_layers.parameters()}
    assert dropped
    assert dropped.isdisjoint(id(p) for p in [*model.parameters(), *trainer.loss.parameters()])
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert not (checkpoint / "model.safetensors").exists()
    assert (checkpoint / BASE_FILE).is_file()


def test_vision_tower_runs_once_a_column(
    qwen_dir: Path, make_student: MakeStudent, make_arguments: MakeArguments, images: list[Image.Image]
) -> None:
    model = make_student()
    trainer = PumaDistillationTrainer(
        model=model,
        teacher=FrozenTeacher.from_pretrained(qwen_dir, puma_model(model)),
        args=make_arguments(),
        train_dataset=Dataset.from_dict({"anchor": ["a"], "positive": ["b"]}),
    )
    batch = {"return_loss": True}
    for column in ("anchor", "positive"):
        features = model[0].preprocess([{"image": image} for image in images])
        batch |= {f"{column}_{name}": value for name, value in features.items()}
    calls = []
    puma_model(model).visual.register_forward_hook(lambda *_: calls.append(1))
    trainer.compute_loss(model, batch).backward()
    assert len(calls) == 2


def test_states_are_in_the_features_and_labels_stay_free(
    qwen_dir: Path, make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset
) -> None:
    model = make_student()
    trainer = PumaDistillationTrainer(
        model=model, teacher=qwen_dir, args=make_arguments(), train_dataset=two_columns(items)
    )
    labels = torch.tensor([1, 0])
    batch: dict[str, Any] = {"label": labels}
    texts = {"anchor": ["red", "an apple"], "positive": ["a table", "green"]}
    for column, inputs in texts.items():
        batch |= {f"{column}_{name}": value for name, value in model[0].preprocess(inputs).items()}
    features, found = trainer.collect_features(batch)
    assert found is labels
    teacher = [trainer.teacher.states(model[0].preprocess(inputs)) for inputs in texts.values()]
    for column, states in zip(features, teacher, strict=True):
        assert column["teacher_state"].shape == (2, 32)
        assert torch.equal(column["teacher_state"], states)
    loss = trainer.loss(features, found)
    student = [model(model[0].preprocess(inputs))["pooler_output"] for inputs in texts.values()]
    expected = (torch.stack(student) - torch.stack(teacher)).square().sum(dim=2).mean()
    torch.testing.assert_close(loss, expected)


def test_resumed_run_ends_where_an_uninterrupted_one_does(
    qwen_dir: Path, make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset, tmp_path: Path
) -> None:
    def trainer(folder: str) -> PumaDistillationTrainer:
        return PumaDistillationTrainer(
            model=make_student(dropout=0.1),
            teacher=qwen_dir,
            # Six steps of four rows are one epoch and a half.
            args=make_arguments(output_dir=str(tmp_path / folder), max_steps=6, save_strategy="steps", save_steps=3),
            train_dataset=items,
        )

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    start = trained_parameters(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    expected = trained_parameters(whole.model)
    for name, parameter in trained_parameters(resumed.model).items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=0)
        assert not torch.equal(parameter, start[name])


def test_checkpoints_load_and_merge(
    qwen_dir: Path,
    make_student: MakeStudent,
    make_arguments: MakeArguments,
    items: Dataset,
    images: list[Image.Image],
    tmp_path: Path,
) -> None:
    model = make_student()
    args = make_arguments(save_strategy="steps", save_steps=4)
    trainer = PumaDistillationTrainer(model=model, teacher=qwen_dir, args=args, train_dataset=items)
    inputs = ["a red apple", {"image": images[0]}, {"image": images[1], "text": "on a table"}]
    untrained = model.encode(inputs)
    trainer.train()
    expected = model.encode(inputs)
    assert np.abs(expected - untrained).max() > 1e-3
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    loaded = SentenceTransformer(checkpoint, trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(loaded.encode(inputs), expected, atol=1e-6, rtol=0)
    merge_adapter(checkpoint, tmp_path / "merged")
    merged = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(merged.encode(inputs), expected, atol=1e-5, rtol=0)


def test_evaluation_loss(
    qwen_dir: Path, make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset
) -> None:
    trainer = PumaDistillationTrainer(
        model=make_student(),
        teacher=qwen_dir,
        args=make_arguments(per_device_eval_batch_size=16),
        train_dataset=items,
        eval_dataset=items,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


# --- what is refused


def test_trainable_base_weights(
    qwen_dir: Path, make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset
) -> None:
    with pytest.raises(ValueError, match=r"\d+ base weights are trainable \(first: visual\..*add_lora"):
        PumaDistillationTrainer(
            model=make_student(adapter=False), teacher=qwen_dir, args=make_arguments(), train_dataset=items
        )
    model = make_student()
    puma_model(model).language_model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 base weights are trainable \(first: language_model\.norm\.weight\)"):
        PumaDistillationTrainer(model=model, teacher=qwen_dir, args=make_arguments(), train_dataset=items)


def test_default_teacher(
    qwen_dir: Path,
    make_student: MakeStudent,
    make_arguments: MakeArguments,
    items: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_student()
    arguments = {"model": model, "args": make_arguments(), "train_dataset": items}
    with pytest.raises(ValueError, match=r"from a local folder named 'tiny-qwen2-vl', which is not here\. .*--teacher"):
        PumaDistillationTrainer(**arguments)
    monkeypatch.chdir(qwen_dir.parent)
    assert len(PumaDistillationTrainer(**arguments).teacher.dropped_layers) == 2
    puma_model(model).config.source_name_or_path = None
    with pytest.raises(
        ValueError, match=r"does not name the checkpoint it was pruned from\. Pass teacher=.* \(--teacher\)"
    ):
        PumaDistillationTrainer(**arguments)


def test_default_teacher_from_the_hub_has_the_revision_that_was_pruned(
    qwen_dir: Path,
    make_student: MakeStudent,
    make_arguments: MakeArguments,
    items: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_student()
    puma_model(model).config.source_name_or_path = "org/model"
    puma_model(model).config.source_revision = "0123abc"
    asked = {}

    def load(source: str, student: Any, **options: Any) -> StoredModel:
        asked.update(source=source, **options)
        return StoredModel(qwen_dir, student)

    monkeypatch.setattr("puma_hf.trainer.teacher.StoredModel", load)
    trainer = PumaDistillationTrainer(model=model, args=make_arguments(), train_dataset=items)
    assert len(trainer.teacher.dropped_layers) == 2
    assert asked == {"source": "org/model", "revision": "0123abc"}
    PumaDistillationTrainer(
        model=model, teacher="org/other", teacher_revision="v2", args=make_arguments(), train_dataset=items
    )
    assert asked == {"source": "org/other", "revision": "v2"}
