from __future__ import annotations

import copy
import json
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from puma_hf import PumaModel, prune
from puma_hf.checkpoint import StoredWeights
from puma_hf.trainer import FrozenTeacher
from puma_hf.trainer.full_model import StoredModel
from puma_hf.trainer.lora import puma_model
from puma_hf.trainer.teacher import frozen_teacher
from puma_hf.trainer.teacher_base import share_image_features
from puma_hf.trainer.teacher_fingerprint import checkpoint_sha256
from puma_hf.trainer.whole_teacher import WholeTeacher
from tests.tiny import build_qwen2_vl, canonical_name, copy_checkpoint
from tests.trainer.conftest import MakeStudent

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
    loaded = frozen_teacher(full_model, puma_model(model))
    assert torch.equal(loaded.states(features), expected)  # type: ignore[attr-defined]
    # Whatever the student keeps, the teacher is the same model.
    of_first = FrozenTeacher.from_pretrained(qwen_dir, puma_model(make_student()))
    assert teacher.fingerprint() == of_first.fingerprint()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    before = model(dict(features))["pooler_output"].detach()
    for _ in range(3):
        loss = (model(dict(features))["pooler_output"] - teacher.states(features)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(teacher.states(features), expected)  # no drift
    assert (model(dict(features))["pooler_output"] - before).abs().max() > 0.1
    with pytest.raises(ValueError, match="it is the student itself"):
        frozen_teacher(tmp_path / "cut", puma_model(model))


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
    with pytest.raises(ValueError, match=r"The teacher has mrope positions and the student sequential, .* Choose a"):
        WholeTeacher(full_model, puma_model(model))
    # States that were stored for the one are not the other's.
    usual = puma_model(make_student())
    assert FrozenTeacher.from_pretrained(qwen_dir, usual).fingerprint() != teacher.fingerprint()
    assert checkpoint_sha256(qwen_dir, usual) != checkpoint_sha256(qwen_dir, puma_model(model))


def test_teacher_may_be_a_full_puma_directory(full_dir: Path, full_model: PumaModel, make_student: MakeStudent) -> None:
    model = make_student()
    features = model[0].preprocess(["a red apple"])
    teacher = FrozenTeacher.from_pretrained(full_dir, puma_model(model))
    assert torch.equal(teacher.states(features), full_states(full_model, features))


def test_no_drift_and_an_untouched_student(
    qwen_dir: Path, make_student: MakeStudent, images: list[Image.Image]
) -> None:
    model = make_student()
    backbone = puma_model(model)
    keys, layer_types = list(model.state_dict()), list(backbone.config.text_config.layer_types)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    teacher = FrozenTeacher.from_pretrained(qwen_dir, backbone)
    features = model[0].preprocess(inputs_of("mixed", images))
    start = teacher.states(features)
    assert not any(parameter.requires_grad for parameter in teacher.dropped_layers.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    first = [parameter.detach().clone() for parameter in trained]
    model.train()
    for _ in range(3):
        loss = (model(dict(features))["pooler_output"] - teacher.states(features)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(first, trained, strict=True))
    assert torch.equal(teacher.states(features), start)
    assert list(model.state_dict()) == keys
    assert backbone.config.text_config.layer_types == layer_types
    assert len(backbone.language_model.layers) == 2
    assert [p for p in model.parameters() if p.requires_grad] == trained
    assert all(p.grad is None for p in teacher.dropped_layers.parameters())


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


def test_student_without_adapter(qwen_dir: Path, full_model: PumaModel, make_student: MakeStudent) -> None:
    model = make_student(adapter=False)
    features = model[0].preprocess(["a red apple"])
    teacher = FrozenTeacher.from_pretrained(qwen_dir, puma_model(model))
    assert torch.equal(teacher.states(features), full_states(full_model, features))


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


def test_images_are_not_shared_where_that_would_be_wrong(
    make_student: MakeStudent, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
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

    def forward(input_ids: Tensor) -> None: ...

    # Older releases of transformers compute image features inside the forward pass.
    monkeypatch.setattr("transformers.Qwen2VLModel.forward", forward)
    share_image_features(backbone, features)
    assert "pixel_values" in features


def test_images_and_videos_are_shared_together(qwen_dir: Path, make_student: MakeStudent) -> None:
    model = make_student(disturbed=True)
    backbone = puma_model(model)
    config = backbone.config
    image, video, ret = [config.image_token_id] * 4, [config.video_token_id] * 8, [config.ret_token_id]
    features: dict[str, Any] = {
        "input_ids": torch.tensor([[40, *image, 41, 42, 43, 44, *ret], [*video, 41, *ret]]),
        "pixel_values": torch.randn(16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": torch.randn(32, 3 * 2 * 8 * 8),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    teacher = FrozenTeacher.from_pretrained(qwen_dir, backbone)
    expected = teacher.states(features)
    shared = dict(features)
    with count_calls(backbone.visual) as calls:
        teacher.add_states(shared)
        assert torch.equal(model(shared)["pooler_output"], model(dict(features))["pooler_output"])
        assert len(calls) == 2 + 2  # an image and a video shared, and both once more without
    assert torch.equal(shared["teacher_state"], expected)


@pytest.mark.parametrize("layout", ["nested", "published", "bare"])
def test_the_checkpoint_is_never_held_whole(
    qwen_dir: Path,
    full_model: PumaModel,
    make_student: MakeStudent,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
) -> None:
    """One of its tensors at a time is in memory, beside the dropped layers."""
    source = copy_checkpoint(qwen_dir, tmp_path / "source", layout=layout, num_shards=3, head=True)
    model = make_student()
    read = StoredWeights.__getitem__
    alive: list[weakref.ref[Tensor]] = []

    def watch(stored: StoredWeights, name: str) -> Tensor:
        assert sum(reference() is not None for reference in alive) <= 1  # the one before, until it is replaced
        tensor = read(stored, name)
        alive.append(weakref.ref(tensor))
        return tensor

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr(StoredWeights, "__getitem__", watch)
    monkeypatch.setattr(PumaModel, "from_pretrained", refuse)
    teachers: list[Any] = [make(source, puma_model(model)) for make in (FrozenTeacher.from_pretrained, frozen_teacher)]
    for teacher in teachers:
        found = dict(teacher.dropped_layers.named_parameters())
        expected = dict(full_model.language_model.layers[2:].named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_dropped_layer_that_is_damaged(qwen_dir: Path, make_student: MakeStudent, tmp_path: Path) -> None:
    source = Path(shutil.copytree(qwen_dir, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    name = next(key for key in tensors if canonical_name(key) == "language_model.layers.3.mlp.up_proj.weight")
    save_file(tensors | {name: tensors[name][1:].clone()}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"source' lacks a tensor .*another shape \(layer 3, mlp\.up_proj\.weight\)"):
        FrozenTeacher.from_pretrained(source, puma_model(make_student()))


# --- what is no teacher


def test_hidden_size_differs(make_student: MakeStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.tiny.HIDDEN_SIZE", 64)
    other = build_qwen2_vl(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has hidden_size=64 and the student 32\. .*choose the checkpoint"):
        FrozenTeacher.from_pretrained(other, puma_model(make_student()))


def test_teacher_with_other_weights(make_student: MakeStudent, tmp_path: Path) -> None:
    other = build_qwen2_vl(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"differ in \d\d tensors that both have \(first: visual\..*before any other"):
        FrozenTeacher.from_pretrained(other, puma_model(make_student()))


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
    with pytest.raises(ValueError, match=rf"differ in 1 tensors that both have \(first: .*{name}"):
        FrozenTeacher.from_pretrained(other, puma_model(make_student()))


@pytest.mark.parametrize(("depth", "missing"), [(3, 1), (2, 0)])
def test_teacher_with_too_few_layers(
    qwen_dir: Path, make_student: MakeStudent, tmp_path: Path, depth: int, missing: int
) -> None:
    prune(qwen_dir, tmp_path / "shallow", num_kept_layers=depth)
    with pytest.raises(ValueError, match=rf"keeps 2 of 4 layers, but {missing} dropped layers were given"):
        FrozenTeacher.from_pretrained(tmp_path / "shallow", puma_model(make_student()))


def test_teacher_with_fewer_layers_than_the_student(qwen_dir: Path, make_student: MakeStudent, tmp_path: Path) -> None:
    prune(qwen_dir, tmp_path / "shallow", num_kept_layers=1)
    with pytest.raises(ValueError, match=r"differ in 12 tensors that both have \(first: language_model\.layers\.1"):
        FrozenTeacher.from_pretrained(tmp_path / "shallow", puma_model(make_student()))


def test_dropped_layers_attend_like_the_student(qwen_dir: Path, full_model: PumaModel, puma_dir: Path) -> None:
    """Both halves are given one mask, which is built for the student's kind of attention."""
    student = PumaModel.from_pretrained(puma_dir, attn_implementation="eager").eval()
    teacher = FrozenTeacher.from_pretrained(qwen_dir, student)
    assert all(layer.self_attn.config._attn_implementation == "eager" for layer in teacher.dropped_layers)
    features = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    with torch.no_grad():
        expected = full_model(**features).pooler_output
    torch.testing.assert_close(teacher.states(features), expected, atol=1e-5, rtol=0)
