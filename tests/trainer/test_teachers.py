"""Which teacher is chosen, and what all of them have in common."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from puma_hf import (
    PumaDistillationTrainer,
    PumaModel,
    prune,
)
from puma_hf.checkpoint import plain_forward
from puma_hf.fingerprint import space_fingerprint
from puma_hf.trainer import FrozenTeacher
from puma_hf.trainer.lora_puma import puma_model
from puma_hf.trainer.teachers import (
    EmbeddingTeacher,
    StoredModel,
    WholeTeacher,
    find_teacher,
    share_image_features,
)
from tests.tiny import build_qwen2_vl, canonical_name
from tests.trainer.conftest import MakeArguments, MakeStudent

KINDS = ("text", "image", "mixed")


def inputs_of(kind: str, images: list[Image.Image]) -> list[Any]:
    return {
        "text": ["a red apple", "an apple on a table, and nothing else at all"],
        "image": [{"image": images[0]}, {"image": images[2]}],
        "mixed": ["apple", {"image": images[1]}, {"image": images[0], "text": "red", "instruction": "Find."}],
    }[kind]


def full_states(full_model: PumaModel, features: dict[str, Any]) -> Tensor:
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    with torch.no_grad():
        states: Tensor = full_model(**{name: features.get(name) for name in names}).pooler_output
    return states


@contextmanager
def count_calls(module: nn.Module) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_the_full_models(
    qwen_dir: Path,
    full_model: PumaModel,
    make_student: MakeStudent,
    images: list[Image.Image],
    kind: str,
    side: str,
) -> None:
    model = make_student(disturbed=True)
    model.tokenizer.padding_side = side
    teacher = FrozenTeacher.from_pretrained(qwen_dir, puma_model(model))
    features = model[0].preprocess(inputs_of(kind, images))
    states = teacher.states(features)
    assert torch.equal(states, full_states(full_model, features))
    assert not states.requires_grad
    student = model(dict(features))["pooler_output"]
    assert (student - states).abs().max() > 0.1


@pytest.mark.parametrize("layers", [[0, 3], [1, 2]])
def test_a_student_of_a_list_of_layers(
    qwen_dir: Path,
    full_dir: Path,
    full_model: PumaModel,
    make_student: MakeStudent,
    tmp_path: Path,
    images: list[Image.Image],
    layers: list[int],
) -> None:
    prune(qwen_dir, tmp_path / "cut", keep_layers=layers)
    model = make_student(tmp_path / "cut", disturbed=True)
    features = model[0].preprocess(inputs_of("mixed", images))
    expected = full_states(full_model, features)
    for source in (qwen_dir, full_dir):
        teacher = FrozenTeacher.from_pretrained(source, puma_model(model))
        assert len(teacher.dropped_layers) == 2
        assert torch.equal(teacher.states(features), expected)
    loaded = find_teacher(full_model, puma_model(model))
    assert torch.equal(loaded.states(features), expected)  # type: ignore[attr-defined]
    # Whatever the adapter has learned, the teacher is the same, and so is what its states are stored under.
    fresh = FrozenTeacher.from_pretrained(qwen_dir, puma_model(make_student(tmp_path / "cut")))
    assert teacher.fingerprint() == fresh.fingerprint()
    assert teacher.fingerprint() != FrozenTeacher.from_pretrained(qwen_dir, puma_model(make_student())).fingerprint()
    with pytest.raises(ValueError, match="it is the student itself"):
        find_teacher(tmp_path / "cut", puma_model(model))


def test_the_teacher_counts_positions_as_the_student_does(
    qwen_dir: Path, full_model: PumaModel, make_student: MakeStudent, tmp_path: Path, images: list[Image.Image]
) -> None:
    prune(qwen_dir, tmp_path / "cut", num_kept_layers=2, reading="puma-released")
    prune(qwen_dir, tmp_path / "full", num_kept_layers=4, reading="puma-released")
    model = make_student(tmp_path / "cut")
    features = model[0].preprocess(inputs_of("mixed", images))
    whole = PumaModel.from_pretrained(tmp_path / "full").eval()
    expected = full_states(whole, features)
    teacher = FrozenTeacher.from_pretrained(qwen_dir, puma_model(model))
    assert torch.equal(teacher.states(features), expected)
    loaded = StoredModel(qwen_dir, puma_model(model)).load().eval()
    assert torch.equal(full_states(loaded, features), expected)
    assert (full_states(full_model, features) - expected).abs().max() > 1e-3  # which has M-RoPE
    with pytest.raises(ValueError, match=r"The teacher has positions=mrope and the student sequential, whose"):
        WholeTeacher(full_model, puma_model(model))
    # States that were stored for the one are not the other's.
    usual = puma_model(make_student())
    assert FrozenTeacher.from_pretrained(qwen_dir, usual).fingerprint() != teacher.fingerprint()


def modes(module: nn.Module) -> dict[str, bool]:
    return {name: child.training for name, child in module.named_modules()}


def test_modes_are_restored(qwen_dir: Path, make_student: MakeStudent) -> None:
    model = make_student(dropout=0.5)
    teacher = FrozenTeacher.from_pretrained(qwen_dir, puma_model(model))
    features = model[0].preprocess(["a red apple"])
    for layer in puma_model(model).language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    puma_model(model).visual.eval()
    before = modes(model)
    states = teacher.states(features)
    assert modes(model) == before
    assert len(set(before.values())) == 2
    model.eval()
    assert torch.equal(teacher.states(features), states)  # no dropout in the teacher
    assert not any(modes(model).values())


def test_student_is_restored_after_an_error(qwen_dir: Path, make_student: MakeStudent) -> None:
    model = make_student(disturbed=True)
    backbone = puma_model(model)
    teacher = FrozenTeacher.from_pretrained(qwen_dir, backbone)
    features = model[0].preprocess(["a red apple"])
    expected = model(dict(features))["pooler_output"]
    states = teacher.states(features)
    model.train()
    # Too few positions: fails inside the forward pass.
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        teacher.states({**features, "position_ids": torch.zeros(3, 1, 1, 1, 1, dtype=torch.long)})
    assert len(backbone.language_model.layers) == 2
    assert len(backbone.config.text_config.layer_types) == 2
    assert all(modes(model).values())
    assert torch.equal(model(dict(features))["pooler_output"], expected)
    assert torch.equal(teacher.states(features), states)


def test_dropped_layers_with_sliding_attention(qwen_dir: Path, tmp_path: Path, make_student: MakeStudent) -> None:
    source = Path(shutil.copytree(qwen_dir, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config["text_config"] |= {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
        "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
    }
    (source / "config.json").write_text(json.dumps(config))
    prune(source, tmp_path / "full", num_kept_layers=4)
    prune(source, tmp_path / "pruned", num_kept_layers=2)
    model = make_student(tmp_path / "pruned")
    features = model[0].preprocess(["a red apple on a table"])
    teacher = FrozenTeacher.from_pretrained(source, puma_model(model))
    full = PumaModel.from_pretrained(tmp_path / "full").eval()
    assert torch.equal(teacher.states(features), full_states(full, features))
    assert not puma_model(model).language_model.has_sliding_layers


# --- one run of the vision tower


def gradients(model: SentenceTransformer, features: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(features)["pooler_output"].square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["image", "mixed"])
def test_shared_image_features_change_nothing(
    qwen_dir: Path, make_student: MakeStudent, images: list[Image.Image], kind: str
) -> None:
    model = make_student(disturbed=True)
    backbone = puma_model(model)
    teacher = FrozenTeacher.from_pretrained(qwen_dir, backbone)
    features = model[0].preprocess(inputs_of(kind, images))
    shared = copy.copy(features)
    with count_calls(backbone.visual) as calls:
        share_image_features(backbone, shared)
        assert "pixel_values" not in shared
        assert torch.equal(teacher.states(shared), teacher.states(features))
        assert len(calls) == 2  # once shared, once for the pass without
    student = model(dict(features))["pooler_output"]
    assert torch.equal(model(dict(shared))["pooler_output"], student)
    alone, together = gradients(model, dict(features)), gradients(model, dict(shared))
    assert alone.keys() == together.keys()
    assert all(".lora_" in name or "trainable_tokens" in name for name in alone)
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    assert max(gradient.abs().max() for gradient in alone.values()) > 0


def test_images_are_not_shared_where_that_would_be_wrong(make_student: MakeStudent, images: list[Image.Image]) -> None:
    model = make_student()
    backbone = puma_model(model)
    text = model[0].preprocess(["a red apple"])
    expected = dict(text)
    share_image_features(backbone, text)
    assert text.keys() == expected.keys()

    features = model[0].preprocess([{"image": images[0]}])
    backbone.visual.merger.requires_grad_(True)
    share_image_features(backbone, features)
    assert "pixel_values" in features
    backbone.visual.merger.requires_grad_(False)


# --- what is no teacher


@pytest.mark.parametrize(
    "name",
    ["language_model.norm.weight", "visual.merger.ln_q.weight", "layers.1.mlp.up_proj", "embed_tokens"],
)
def test_every_shared_tensor_counts(qwen_dir: Path, make_student: MakeStudent, tmp_path: Path, name: str) -> None:
    other = Path(shutil.copytree(qwen_dir, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    full_name = next(key for key in tensors if name in canonical_name(key))
    tensors[full_name][0] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"^1 of the student's weights differ in .*, first .*{name}"):
        FrozenTeacher.from_pretrained(other, puma_model(make_student()))


@pytest.mark.parametrize(("depth", "missing"), [(3, 1), (2, 0)])
def test_teacher_with_too_few_layers(
    qwen_dir: Path, make_student: MakeStudent, tmp_path: Path, depth: int, missing: int
) -> None:
    prune(qwen_dir, tmp_path / "shallow", num_kept_layers=depth)
    with pytest.raises(ValueError, match=rf"keeps 2 of 4 layers, and {missing} more were given"):
        FrozenTeacher.from_pretrained(tmp_path / "shallow", puma_model(make_student()))


def test_states_are_its_own(other_dir: Path, make_student: MakeStudent, images: list[Image.Image]) -> None:
    model = make_student(disturbed=True)
    other = SentenceTransformer(str(other_dir), trust_remote_code=True, device="cpu")
    teacher = WholeTeacher(puma_model(other), puma_model(model))
    inputs = ["a red apple", {"image": images[0], "text": "red"}]
    with plain_forward(other), torch.no_grad():
        expected = other(other[0].preprocess(inputs))["pooler_output"]
    features = dict(model[0].preprocess(inputs))
    before = set(features)
    teacher.add_states(features)
    assert torch.equal(features["teacher_state"], expected)
    assert set(features) == before | {"teacher_state"}  # the student's images are its own to encode
    assert not features["teacher_state"].requires_grad
    assert not any(p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize("extra_tokens", [(), ("[RET]",)])
def test_a_checkpoint_teaches_what_it_says_itself(
    make_student: MakeStudent, tmp_path: Path, extra_tokens: tuple[str, ...]
) -> None:
    """Also with a [RET] that it was trained with: to the model with all its layers its states have a cosine of 1."""
    source = build_qwen2_vl(tmp_path / "source", seed=1, extra_tokens=extra_tokens)
    prune(source, tmp_path / "whole", num_kept_layers=4)
    model = make_student()
    whole = WholeTeacher(PumaModel.from_pretrained(tmp_path / "whole"), puma_model(model))
    teacher: Any = find_teacher(source, puma_model(model))
    features = model[0].preprocess(["a red apple", "Find an image.", "b", "a"])
    assert torch.equal(teacher.states(features), whole.states(features))
    assert teacher.fingerprint() == find_teacher(source, puma_model(model)).fingerprint()


def test_errors(qwen_dir: Path, other_dir: Path, make_student: MakeStudent, tmp_path: Path) -> None:
    student = puma_model(make_student())
    with pytest.raises(ValueError, match=r"has ret_token_id=None and the student \d+, whose"):
        WholeTeacher(PumaModel.from_pretrained(qwen_dir), student)
    other = PumaModel.from_pretrained(other_dir)
    other.config.image_token_id += 1
    with pytest.raises(ValueError, match=r"has image_token_id=\d+ and the student \d+, whose"):
        WholeTeacher(other, student)


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


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_is_held_whole(make_trainer: Any, full_dir: Path, wrapped: bool) -> None:
    given: Any = PumaModel.from_pretrained(full_dir, dtype=torch.bfloat16)
    other = given
    if wrapped:
        given = SentenceTransformer(str(full_dir), trust_remote_code=True, device="cpu")
        other = puma_model(given)
    trainer = make_trainer(teacher=given)
    assert type(trainer.teacher) is WholeTeacher
    assert trainer.teacher.model is other
    trainer.train()
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("kind", ["frozen", "whole", "embedding"])
def test_whose_space_it_is(
    make_student: MakeStudent, qwen_dir: Path, full_dir: Path, other_dir: Path, kind: str
) -> None:
    """That of a model which has its weights, in another data type and under other names; whatever the adapter is."""
    student = make_student(disturbed=True)
    source = SentenceTransformer(str(other_dir), trust_remote_code=True, device="cpu")
    given: Any = {"frozen": qwen_dir, "whole": other_dir, "embedding": EmbeddingTeacher(source)}[kind]
    teacher = find_teacher(given, puma_model(student))
    assert type(teacher).__name__.lower() == f"{kind}teacher"
    folder = full_dir if kind == "frozen" else other_dir
    loading: Any = {"trust_remote_code": True, "device": "cpu", "model_kwargs": {"dtype": torch.bfloat16}}
    model = SentenceTransformer(str(folder), **loading)
    assert teacher.space(student) == space_fingerprint(model)
    model[0].processor.chat_template = "So: " + model[0].processor.chat_template
    assert teacher.space(student) != space_fingerprint(model)  # the same weights that read otherwise
    assert space_fingerprint(student) not in (teacher.space(student), space_fingerprint(make_student()))


def test_another_checkpoint_is_held_whole_with_a_warning(
    make_trainer: Any, other_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "puma_hf"):
        trainer = make_trainer(teacher=other_dir)
    (record,) = (r for r in caplog.records if r.name == "puma_hf.trainer.teachers")
    other, student = PumaModel.from_pretrained(other_dir), puma_model(trainer.model)
    size = sum(weight.numel() * weight.element_size() for weight in other.parameters()) / 2**20
    message = record.getMessage()
    assert f"{str(other_dir)!r}, is held whole beside the student and takes {size:.1f} MiB more" in message
    assert re.search(r"its weights are not the student's in \d\d tensors \(first: visual\.", message)
    assert type(trainer.teacher) is WholeTeacher
    probe = trainer.model[0].preprocess(trainer.train_dataset["item"][:6])
    expected = WholeTeacher(other, student).states(probe)
    assert torch.equal(trainer.teacher.states(probe), expected)
    trainer.train()
    assert torch.equal(trainer.teacher.states(probe), expected)
    # An original checkpoint has no [RET] yet, and gets the row that pruning gives it.
    original = make_trainer(teacher=tmp_path / "source")
    assert torch.equal(original.teacher.states(probe), expected)


def test_a_checkpoint_of_another_depth_is_held_whole(
    make_trainer: Any, qwen_dir: Path, puma_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prune(qwen_dir, tmp_path / "three", num_kept_layers=3)
    assert type(make_trainer(teacher=tmp_path / "three").teacher) is WholeTeacher
    assert "it has 3 layers, and the student was cut from 4" in caplog.text
    with pytest.raises(ValueError, match=r"has the student's weights: it is the student itself"):
        make_trainer(teacher=puma_dir)
    file = tmp_path / "three" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"has another vocabulary: '.*' is \d+, not \d+\. Take one of"):
        make_trainer(teacher=tmp_path / "three")


# --- what is refused


@pytest.mark.parametrize(("mode", "as_object"), [("frozen", True), ("cached", False)])
def test_hidden_size_differs(
    make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, as_object: bool
) -> None:
    monkeypatch.setattr("tests.tiny.HIDDEN_SIZE", 64)
    teacher: Any = build_qwen2_vl(tmp_path / "wide")
    if as_object:
        teacher = PumaModel.from_pretrained(teacher)
    with pytest.raises(ValueError, match=r"has hidden_size=64 and the student 32"):
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
    names = load_file(checkpoint / "adapter_model.safetensors").keys()
    assert all("lora_" in name or "trainable_tokens" in name for name in names)
    assert not any("layers.2." in name or "layers.3." in name for name in names)
    assert not list(checkpoint.glob("model*.safetensors"))


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


# --- what is refused


def test_arguments_that_do_not_fit(make_trainer: Any, make_student: MakeStudent) -> None:
    with pytest.raises(FileNotFoundError, match=r"'nowhere' is neither a folder nor a Hub id"):
        make_trainer(teacher="nowhere")
    with pytest.raises(ValueError, match=r"teacher_mode='ema' must be one of 'frozen', 'cached'"):
        make_trainer("ema")
    with pytest.raises(ValueError, match=r"teacher_mode='one_pass' must be one of 'frozen', 'cached'"):
        make_trainer("one_pass")
    model = make_student()
    puma_model(model).language_model.norm.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"shares trained weights \(language_model\.norm\.weight and others\): take add_lora"
    ):
        make_trainer(model=model)


def test_a_quantised_student_shares_its_base_with_nobody(
    make_trainer: Any, make_student: MakeStudent, caplog: pytest.LogCaptureFixture
) -> None:
    student = make_student()
    puma_model(student).is_quantized = True  # as transformers marks one
    assert type(make_trainer("frozen", model=student).teacher) is WholeTeacher
    assert "the student's base is held in 4 bits and the teacher is not." in caplog.text
