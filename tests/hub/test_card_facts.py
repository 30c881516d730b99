from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from puma_hf import prune
from puma_hf.hub.card_facts import read_facts
from tests.tiny import build_qwen2_vl


@pytest.fixture
def folder(puma_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(puma_dir, tmp_path / "puma"))


@pytest.mark.parametrize(("tied", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_what_pruning_counted(tmp_path: Path, tied: bool, dtype: str) -> None:
    original = build_qwen2_vl(tmp_path / "original", tie_word_embeddings=tied, dtype=getattr(torch, dtype))
    report = prune(original, tmp_path / "puma", num_kept_layers=1)
    facts = read_facts(tmp_path / "puma")
    assert (facts["parameters_after"], facts["parameters_before"]) == (
        report.parameters_after,
        report.parameters_before,
    )
    assert (facts["bytes_after"], facts["bytes_before"]) == (report.bytes_after, report.bytes_before)
    assert facts["dtype"] == dtype


def test_two_data_types_say_nothing_about_dropped_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "language_model.norm.weight"
    save_file({**tensors, name: tensors[name].bfloat16()}, file)
    facts = read_facts(folder)
    assert (facts["dtype"], facts["bytes_before"]) == ("bfloat16 and float32", None)


@pytest.mark.parametrize("dtype", ["float64", "float16", "float8_e4m3fn", "int8"])
def test_other_data_types(folder: Path, dtype: str) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    facts = read_facts(folder)
    assert facts["dtype"] == dtype
    assert facts["bytes_after"] == sum(tensor.nbytes for tensor in tensors.values())
    assert facts["parameters_after"] == sum(tensor.numel() for tensor in tensors.values())


def test_a_file_that_was_cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        read_facts(folder)


def test_layers_that_the_model_does_not_have_are_not_counted(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), "language_model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}, file)
    with pytest.raises(
        ValueError, match=r"holds 1 tensors that a model of 2 layers does not read \(first: .*layers\.2"
    ):
        read_facts(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"\x02" + bytes(7) + b"[]", b"\x09" + bytes(7) + b'{"a": {}}'])
def test_damaged_weights_are_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"'model\.safetensors' in '.*puma' is no whole safetensors file"):
        read_facts(folder)
