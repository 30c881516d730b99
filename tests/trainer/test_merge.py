from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from puma_hf.checkpoint import open_sentence_transformer
from puma_hf.trainer import merge_adapter
from puma_hf.trainer.lora_puma import (
    BASE_FILE,
    DECODER_LINEARS,
    add_lora,
    puma_model,
    save_base_fingerprint,
    weights_sha256,
)
from tests.trainer.conftest import MakeStudent


@pytest.fixture
def base(puma_dir: Path, tmp_path: Path) -> Path:
    """A copy of the pruned model that a test may spoil."""
    return Path(shutil.copytree(puma_dir, tmp_path / "base"))


@pytest.fixture
def adapter(base: Path, make_student: MakeStudent, tmp_path: Path) -> Path:
    model = make_student(base, disturbed=True)
    model.save_pretrained(str(tmp_path / "adapter"))
    save_base_fingerprint(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def change_weights(file: Path, **changes: float) -> None:
    """Add a number to some tensors of a file."""
    tensors = load_file(file)
    for name, value in changes.items():
        full_name = next(key for key in tensors if name in key)
        tensors[full_name] = tensors[full_name] + value
    save_file(tensors, file, metadata={"format": "pt"})


def test_merged_directory_is_complete(adapter: Path, base: Path, tmp_path: Path) -> None:
    merge_adapter(adapter, tmp_path / "merged")
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    for name in ("config_sentence_transformers.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes(), name
    rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
    note = f"\n\n## Training\n\n- A LoRA adapter of rank {rank} was trained and merged into the weights."
    assert (tmp_path / "merged" / "README.md").read_text().replace(note, "") == (base / "README.md").read_text()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["source_name_or_path"] == "tiny-qwen2-vl"
    assert config["num_kept_layers"] == 2


def test_base_that_moved(adapter: Path, base: Path, tmp_path: Path) -> None:
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"base '.*base' is no PUMA directory\. .*--base"):
        merge_adapter(adapter, tmp_path / "merged")
    assert merge_adapter(adapter, tmp_path / "merged", base=tmp_path / "elsewhere") < 1e-6


def test_a_base_named_from_another_directory(
    base: Path, make_student: MakeStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_student(Path("base"), disturbed=True)
    model.save_pretrained("runs/adapter")
    expected = model.eval().encode("a red apple")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    opened = SentenceTransformer("../runs/adapter", trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(opened.encode("a red apple"), expected, atol=1e-6)
    # As older versions wrote it: found from the adapter's place, which transformers does not look at.
    file = tmp_path / "runs" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "base"}))
    assert merge_adapter("../runs/adapter", "merged") < 1e-6
    message = rf"model='\.\./runs/adapter' is an adapter whose base '{re.escape(str(base))}'.* puma-hf merge \(--base\)"
    with pytest.raises(FileNotFoundError, match=message):
        open_sentence_transformer("../runs/adapter", device="cpu")


def test_dora_is_not_blamed_on_the_base(make_student: MakeStudent, base: Path, tmp_path: Path) -> None:
    model = make_student(base, adapter=False)
    add_lora(model, LoraConfig(r=4, use_dora=True, target_modules=DECODER_LINEARS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = model.eval().encode("a red apple")
    model.save_pretrained(str(tmp_path / "dora"))
    with pytest.raises(ValueError, match=r"^14 tensors of the adapter .* if it is a DoRA, .* run puma-hf merge"):
        SentenceTransformer(str(tmp_path / "dora"), trust_remote_code=True, device="cpu")
    assert merge_adapter(tmp_path / "dora", tmp_path / "merged") < 1e-5
    merged = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(merged.encode("a red apple"), expected, atol=1e-5)


def test_base_that_changed_after_training(adapter: Path, base: Path, tmp_path: Path) -> None:
    before = weights_sha256(base)
    change_weights(base / "model.safetensors", norm=1e-6)
    after = weights_sha256(base)
    assert before != after
    message = rf"was not trained on the weights in '.*base' \(SHA-256 {after[:12]} instead of {before[:12]}\)"
    with pytest.raises(ValueError, match=message):
        merge_adapter(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_adapter_without_fingerprint(adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (adapter / BASE_FILE).unlink()
    with caplog.at_level(logging.WARNING, logger="puma_hf"):
        merge_adapter(adapter, tmp_path / "merged")
    assert "has no puma_base.json: whether it was trained on" in caplog.text
    file = adapter / "adapter_model.safetensors"
    wider = {name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in load_file(file).items()}
    save_file(wider, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit .*size mismatch.*Name its base"):
        merge_adapter(adapter, tmp_path / "again")


def test_nothing_to_fingerprint(make_student: MakeStudent, tmp_path: Path) -> None:
    save_base_fingerprint(make_student(adapter=False), tmp_path)
    model = make_student()
    puma_model(model).name_or_path = "org/on-the-hub"
    save_base_fingerprint(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_adapter(adapter: Path, tmp_path: Path) -> None:
    change_weights(adapter / "adapter_model.safetensors", lora_B=float("nan"))
    with pytest.raises(ValueError, match=r"moved embeddings by up to nan, more than 0\.0001"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapter_that_lacks_a_tensor(adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    dropped = sorted(tensors)[-1]
    del tensors[dropped]
    save_file(tensors, file, metadata={"format": "pt"})
    with (
        pytest.warns(UserWarning, match="missing adapter keys"),
        pytest.raises(ValueError, match=rf"does not fit .*: 1 tensors, first: {dropped}\."),
    ):
        merge_adapter(adapter, tmp_path / "merged")


@pytest.mark.parametrize("part", ["language_model.layers.0.mlp.up_proj.weight", "visual.merger.mlp.2.weight"])
def test_merge_that_goes_wrong(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """For all inputs, or for images alone."""
    right = LoraModel.merge_and_unload

    def wrong(model: LoraModel) -> torch.nn.Module:
        merged = right(model)
        with torch.no_grad():
            merged.get_parameter(part).mul_(-1)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    with pytest.raises(ValueError, match=r"moved embeddings by up to \d\.\d+e[-+]0[012], more than 0\.0001"):
        merge_adapter(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_base_on_the_hub(adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str) -> str:
        asked.append(repo_id)
        if repo_id != "org/puma":
            raise LocalEntryNotFoundError("Cannot find it.\nTry online.")
        return str(base)

    monkeypatch.setattr("puma_hf.trainer.merge.snapshot_download", download)
    assert merge_adapter(adapter, tmp_path / "merged", base="org/puma") < 1e-6
    with pytest.raises(LocalEntryNotFoundError, match="Cannot find it"):
        merge_adapter(adapter, tmp_path / "again", base="org/other")
    # A path is never looked for on the Hub.
    for path in ("nowhere/at/all", "../gone"):
        with pytest.raises(FileNotFoundError, match=rf"{path}' is no PUMA directory\. Name it"):
            merge_adapter(adapter, tmp_path / "again", base=path)
    assert asked == ["org/puma", "org/other"]


def test_output_in_use(adapter: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"'.*merged' is not empty\..*--overwrite"):
        merge_adapter(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "note.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match=r"merged' holds files, but no PUMA model"):
        merge_adapter(adapter, tmp_path / "merged", overwrite=True)
    (tmp_path / "merged" / "config.json").write_text('{"model_type": "puma"}')
    merge_adapter(adapter, tmp_path / "merged", overwrite=True)
    assert not (tmp_path / "merged" / "note.txt").exists()
    for folder in (base, tmp_path, adapter):
        with pytest.raises(ValueError, match=r"is, or holds, the (source|adapter) itself"):
            merge_adapter(adapter, folder, overwrite=True)
    assert (base / "model.safetensors").is_file()
    assert (adapter / "adapter_model.safetensors").is_file()
