from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn

from puma_hf import PumaDistillationTrainer, PumaModel
from puma_hf.trainer import FrozenTeacher
from puma_hf.trainer.lora import puma_model
from puma_hf.trainer.one_pass_teacher import OnePassTeacher
from puma_hf.trainer.teacher import one_pass_teacher
from tests.tiny import build_qwen2_vl
from tests.trainer.conftest import MakeArguments, MakeStudent


def inputs_of(images: list[Image.Image]) -> list[Any]:
    return ["apple", {"image": images[1]}, {"image": images[0], "text": "red", "instruction": "Find."}]


def student_and_teacher(teacher: OnePassTeacher, model: Any, features: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with teacher.watching():
        output = model(dict(features))
    return output["pooler_output"], output["teacher_state"]


@pytest.fixture
def make_teacher(qwen_dir: Path) -> Any:
    def make(model: Any) -> OnePassTeacher:
        teacher = one_pass_teacher(qwen_dir, model)
        assert isinstance(teacher, OnePassTeacher)
        return teacher

    return make


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_untrained_adapter_gives_the_frozen_teachers_states(
    qwen_dir: Path, make_student: MakeStudent, make_teacher: Any, images: list[Image.Image], side: str
) -> None:
    model = make_student()
    model.tokenizer.padding_side = side
    features = model[0].preprocess(inputs_of(images))
    _, state = student_and_teacher(make_teacher(model), model, features)
    assert torch.equal(state, FrozenTeacher.from_pretrained(qwen_dir, puma_model(model)).states(features))
    assert not state.requires_grad


def test_it_moves_with_the_student(
    qwen_dir: Path, full_model: PumaModel, make_student: MakeStudent, make_teacher: Any, images: list[Image.Image]
) -> None:
    model = make_student(disturbed=True)
    features = model[0].preprocess(inputs_of(images))
    _, state = student_and_teacher(make_teacher(model), model, features)
    frozen = FrozenTeacher.from_pretrained(qwen_dir, puma_model(model)).states(features)
    assert (state - frozen).abs().max() > 0.1
    # By hand: the student's own layers, adapter and all, in the place of the full model's first ones.
    backbone = puma_model(model)
    kept = backbone.language_model.layers
    by_hand = PumaModel(full_model.config).eval()
    by_hand.load_state_dict(full_model.state_dict())
    by_hand.language_model.layers = nn.ModuleList([*kept, *by_hand.language_model.layers[2:]])
    by_hand.language_model.embed_tokens = backbone.language_model.embed_tokens
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    with torch.no_grad():
        expected = by_hand(**{name: features.get(name) for name in names}).pooler_output
    torch.testing.assert_close(state, expected, atol=1e-6, rtol=0)


def test_student_and_gradients_are_untouched(
    make_student: MakeStudent, make_teacher: Any, images: list[Image.Image]
) -> None:
    model = make_student(disturbed=True)
    backbone = puma_model(model)
    features = model[0].preprocess(inputs_of(images))
    keys, layer_types = list(model.state_dict()), list(backbone.config.text_config.layer_types)
    alone = model(dict(features))["pooler_output"]
    alone.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    teacher = make_teacher(model)
    student, state = student_and_teacher(teacher, model, features)
    assert torch.equal(student, alone)
    (student.square().sum() + state.sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(p.grad is None for p in teacher.dropped_layers.parameters())
    assert list(model.state_dict()) == keys
    assert backbone.config.text_config.layer_types == layer_types
    assert len(backbone.language_model.layers) == 2
    assert teacher._state is teacher._kept_output is None


def test_nothing_is_added_outside(make_student: MakeStudent, make_teacher: Any) -> None:
    model = make_student()
    teacher = make_teacher(model)
    features = model[0].preprocess(["a red apple"])
    with pytest.raises(RuntimeError, match="on purpose"), teacher.watching():
        raise RuntimeError("on purpose")
    assert "teacher_state" not in model(dict(features))
    hooks = [h for module in model.modules() for h in (module._forward_hooks, module._forward_pre_hooks)]
    assert not any(hooks)
    before = dict(features)
    teacher.add_states(features)
    assert features.keys() == before.keys()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_the_dropped_layers_once(
    make_student: MakeStudent, make_teacher: Any, images: list[Image.Image], reentrant: bool
) -> None:
    model = make_student(disturbed=True)
    model.train()
    features = model[0].preprocess(inputs_of(images))
    teacher = make_teacher(model)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        student, state = student_and_teacher(teacher, model, features)
        (student - state).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    backbone = puma_model(model)
    # transformers 5.23 renamed it.
    name = "activation" if hasattr(backbone, "activation_checkpointing_enable") else "gradient"
    getattr(backbone, f"{name}_checkpointing_enable")({"use_reentrant": reentrant})
    calls: dict[str, int] = {"kept": 0, "dropped": 0}

    def count(kind: str) -> Any:
        def hook(*_: Any) -> None:
            calls[kind] += 1

        return hook

    backbone.language_model.layers[-1].self_attn.register_forward_pre_hook(count("kept"))
    teacher.dropped_layers[0].self_attn.register_forward_pre_hook(count("dropped"))
    found = gradients()
    assert calls == {"kept": 2, "dropped": 1}
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


def test_base_weights_need_not_be_the_original_ones(
    make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset, tmp_path: Path
) -> None:
    other = build_qwen2_vl(tmp_path / "other", seed=1)
    model = make_student()
    puma_model(model).language_model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)
    trainer = PumaDistillationTrainer(
        model=model, teacher=other, teacher_mode="one_pass", args=make_arguments(), train_dataset=items
    )
    assert isinstance(trainer.teacher, OnePassTeacher)
    trainer.train()


def test_training_and_evaluation(
    qwen_dir: Path, make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset
) -> None:
    trainer = PumaDistillationTrainer(
        model=make_student(),
        teacher=qwen_dir,
        teacher_mode="one_pass",
        args=make_arguments(max_steps=16, per_device_train_batch_size=8),
        train_dataset=items,
        eval_dataset=items,
    )
    assert isinstance(trainer.teacher, OnePassTeacher)
    deep = [p.clone() for p in trainer.teacher.dropped_layers.parameters()]
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert trainer.evaluate()["eval_loss"] < before
    assert all(map(torch.equal, deep, trainer.teacher.dropped_layers.parameters()))


def test_autocast_is_the_students(
    qwen_dir: Path, make_student: MakeStudent, make_teacher: Any, images: list[Image.Image]
) -> None:
    model = make_student()
    features = model[0].preprocess(inputs_of(images))
    teacher = make_teacher(model)
    seen: list[torch.dtype] = []
    teacher.dropped_layers[-1].mlp.up_proj.register_forward_hook(lambda m, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student_and_teacher(teacher, model, features)
    assert seen == [torch.bfloat16]


def test_modes(make_student: MakeStudent, make_teacher: Any, images: list[Image.Image]) -> None:
    model = make_student(dropout=0.0)
    teacher = make_teacher(model)
    features = model[0].preprocess(inputs_of(images))
    for layer in teacher.dropped_layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    _, state = student_and_teacher(teacher, model, features)
    model.eval()
    assert torch.equal(student_and_teacher(teacher, model, features)[1], state)  # no dropout in the teacher
    assert not any(module.training for module in teacher.dropped_layers.modules())


def test_too_few_layers(make_student: MakeStudent, make_teacher: Any) -> None:
    model = make_student()
    teacher = make_teacher(model)
    with pytest.raises(ValueError, match=r"keeps 2 of 4 layers, but 1 dropped layers were given\. Load the teacher"):
        OnePassTeacher(model, teacher.dropped_layers[:1])
