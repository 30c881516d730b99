from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf import PumaModel, prune
from puma_hf.flops import plain_forward
from puma_hf.trainer.lora import puma_model
from puma_hf.trainer.whole_teacher import WholeTeacher, place_ret_row
from tests.tiny import build_qwen2_vl
from tests.trainer.conftest import MakeStudent


@pytest.fixture
def other_dir(tmp_path: Path) -> Path:
    """Another model of 6 layers, complete."""
    source = build_qwen2_vl(tmp_path / "source", seed=1, num_layers=6)
    prune(source, tmp_path / "other", num_kept_layers=6)
    return tmp_path / "other"


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
    assert not teacher.shares_base_weights


def test_it_answers_in_evaluation_mode(other_dir: Path, make_student: MakeStudent) -> None:
    model = make_student()
    other = PumaModel.from_pretrained(other_dir)
    teacher = WholeTeacher(other, puma_model(model))
    features = model[0].preprocess(["a red apple"])
    expected = teacher.states(features)
    for layer in other.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    other.train()
    assert torch.equal(teacher.states(features), expected)


def test_the_ret_row_is_that_of_pruning(qwen_dir: Path, full_dir: Path) -> None:
    full = PumaModel.from_pretrained(full_dir)
    original = PumaModel.from_pretrained(qwen_dir)
    place_ret_row(original, full.config.ret_token_id)
    assert original.config.ret_token_id == full.config.ret_token_id
    row = full.config.ret_token_id
    expected, found = (model.get_input_embeddings().weight for model in (full, original))
    assert torch.equal(found[row], expected[row])
    place_ret_row(original, 3)  # there already
    assert original.config.ret_token_id == row


def test_a_row_is_added_where_there_is_none(qwen_dir: Path) -> None:
    original = PumaModel.from_pretrained(qwen_dir)
    rows = len(original.get_input_embeddings().weight)
    place_ret_row(original, rows)
    weight = original.get_input_embeddings().weight
    assert len(weight) == rows + 1
    torch.testing.assert_close(weight[rows], weight[:rows].mean(dim=0))


def test_errors(qwen_dir: Path, other_dir: Path, make_student: MakeStudent, tmp_path: Path) -> None:
    student = puma_model(make_student())
    with pytest.raises(ValueError, match=r"The teacher is the student itself\. Pass the model that was pruned"):
        WholeTeacher(student, student)
    with pytest.raises(
        ValueError, match=r"has ret_token_id=None and the student \d+, but .* puma_hf\.prune with num_kept"
    ):
        WholeTeacher(PumaModel.from_pretrained(qwen_dir), student)
    other = PumaModel.from_pretrained(other_dir)
    other.config.image_token_id += 1
    with pytest.raises(
        ValueError, match=r"has image_token_id=\d+ and the student \d+, .*Choose a teacher with the same"
    ):
        WholeTeacher(other, student)


def test_hidden_size_differs(make_student: MakeStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.tiny.HIDDEN_SIZE", 64)
    prune(build_qwen2_vl(tmp_path / "source"), tmp_path / "wide", num_kept_layers=4)
    wide = PumaModel.from_pretrained(tmp_path / "wide")
    with pytest.raises(
        ValueError, match=r"PumaModel has hidden_size=64 and the student 32\. .*another of the student's"
    ):
        WholeTeacher(wide, puma_model(make_student()))
