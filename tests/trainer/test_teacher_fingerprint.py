from __future__ import annotations

import shutil
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image

from puma_hf import PumaModel
from puma_hf.trainer import FrozenTeacher
from puma_hf.trainer.lora import puma_model
from puma_hf.trainer.teacher_fingerprint import base_tensors, checkpoint_sha256, datasets_sha256, tensors_sha256
from puma_hf.trainer.whole_teacher import WholeTeacher
from tests.tiny import tiny_tokenizer
from tests.trainer.conftest import MakeStudent


def test_base_tensors_have_the_names_and_values_of_the_pruned_model(puma_dir: Path, make_student: MakeStudent) -> None:
    pruned = dict(PumaModel.from_pretrained(puma_dir).named_parameters())
    found = base_tensors(puma_model(make_student(disturbed=True)))
    assert found.keys() == pruned.keys()
    assert all(torch.equal(found[name], pruned[name]) for name in found)


def test_one_copy_and_the_whole_model_are_one_teacher(
    qwen_dir: Path, full_dir: Path, make_student: MakeStudent
) -> None:
    student = puma_model(make_student())
    one_copy = FrozenTeacher.from_pretrained(qwen_dir, student)
    fingerprint = one_copy.fingerprint()
    assert fingerprint == WholeTeacher(PumaModel.from_pretrained(full_dir), student).fingerprint()
    # What the adapter learns does not count, a dropped layer does.
    assert (
        FrozenTeacher.from_pretrained(qwen_dir, puma_model(make_student(disturbed=True))).fingerprint() == fingerprint
    )
    with torch.no_grad():
        one_copy.dropped_layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert one_copy.fingerprint() != fingerprint


def test_names_types_shapes_and_settings_count() -> None:
    tensor = torch.arange(4.0)
    prints = [
        tensors_sha256({"a": tensor}, {}),
        tensors_sha256({"b": tensor}, {}),
        tensors_sha256({"a": tensor.reshape(2, 2)}, {}),
        tensors_sha256({"a": tensor.bfloat16()}, {}),
        tensors_sha256({"a": tensor}, {"eps": 1e-6}),
        tensors_sha256({"a": tensor + 1e-6}, {}),
    ]
    assert len(set(prints)) == len(prints)
    assert tensors_sha256({"a": tensor, "b": tensor}, {}) == tensors_sha256({"b": tensor, "a": tensor}, {})


def test_checkpoint_files(qwen_dir: Path, full_dir: Path, make_student: MakeStudent, tmp_path: Path) -> None:
    student = puma_model(make_student())
    fingerprint = checkpoint_sha256(qwen_dir, student)
    assert fingerprint == checkpoint_sha256(shutil.copytree(qwen_dir, tmp_path / "copy"), student)
    assert fingerprint != checkpoint_sha256(full_dir, student)
    tiny_tokenizer(("[RET]",)).save_pretrained(tmp_path / "copy")
    assert fingerprint != checkpoint_sha256(tmp_path / "copy", student)
    with torch.no_grad():
        base_tensors(student)["language_model.embed_tokens.weight"][student.config.ret_token_id] += 1
    assert fingerprint != checkpoint_sha256(qwen_dir, student)


def test_dataset_content_counts_and_storage_does_not(tmp_path: Path, images: list[Image.Image]) -> None:
    rows = Dataset.from_dict({"item": [{"text": "a", "image": None}, {"text": "b", "image": "x.png"}]})
    fingerprint = datasets_sha256([(rows, "item")])
    rows.save_to_disk(tmp_path / "rows")
    assert datasets_sha256([(Dataset.load_from_disk(tmp_path / "rows"), "item")]) == fingerprint
    assert datasets_sha256([(rows.add_column("other", [1, 2]), "item")]) == fingerprint
    others = [
        datasets_sha256([(rows.select([1, 0]), "item")]),
        datasets_sha256([(rows.select([0]), "item")]),
        datasets_sha256([(rows.rename_column("item", "anchor"), "anchor")]),
        datasets_sha256([(rows, "item"), (rows, "item")]),
    ]
    assert len({fingerprint, *others}) == 5
    first, second = (Dataset.from_dict({"image": [image]}) for image in images[:2])
    assert datasets_sha256([(first, "image")]) != datasets_sha256([(second, "image")])
