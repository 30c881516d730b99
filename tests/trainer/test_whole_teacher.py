from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf import PumaModel, prune
from puma_hf.opening import plain_forward
from puma_hf.pruning import place_ret_token
from puma_hf.trainer.lora import puma_model
from puma_hf.trainer.teacher import frozen_teacher
from puma_hf.trainer.whole_teacher import WholeTeacher
from tests.tiny import build_qwen2_vl, tiny_tokenizer
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


@pytest.mark.parametrize("extra_tokens", [(), ("[RET]",)])
def test_a_checkpoint_teaches_what_it_says_itself(
    make_student: MakeStudent, tmp_path: Path, extra_tokens: tuple[str, ...]
) -> None:
    """Also with a [RET] that it was trained with: to the model with all its layers its states have a cosine of 1."""
    source = build_qwen2_vl(tmp_path / "source", seed=1, extra_tokens=extra_tokens)
    prune(source, tmp_path / "whole", num_kept_layers=4)
    model = make_student()
    whole = WholeTeacher(PumaModel.from_pretrained(tmp_path / "whole"), puma_model(model))
    teacher: Any = frozen_teacher(source, puma_model(model))
    features = model[0].preprocess(["a red apple", "Find an image.", "b", "a"])
    assert torch.equal(teacher.states(features), whole.states(features))
    assert teacher.fingerprint() == whole.fingerprint()


def test_a_row_is_added_where_there_is_none(qwen_dir: Path) -> None:
    original, tokenizer = PumaModel.from_pretrained(qwen_dir), tiny_tokenizer()
    rows = len(original.get_input_embeddings().weight)
    tokenizer.add_tokens([f"<{number}>" for number in range(rows - len(tokenizer))])
    place_ret_token(original, tokenizer)
    weight = original.get_input_embeddings().weight
    assert len(weight) == rows + 1
    assert original.config.ret_token_id == rows
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
