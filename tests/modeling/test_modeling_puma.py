from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from puma_hf import PumaModel, PumaProcessor
from tests.tiny import copy_checkpoint, layer_of, read_weights

# --- the output


def test_modality_types_are_computed_when_absent(
    model: PumaModel, processor: PumaProcessor, images: list[Image.Image]
) -> None:
    batch = processor.process_inputs(["a red apple", images[0], {"image": images[1:], "text": "two"}])
    arguments = {**batch}
    types = arguments.pop("mm_token_type_ids")
    with torch.inference_mode():
        expected = model(**batch).embeddings
        assert torch.equal(model(**arguments).embeddings, expected)
        wrong = model(**arguments, mm_token_type_ids=torch.zeros_like(types)).embeddings
    assert not torch.allclose(wrong, expected)


# --- reading


class Spy:
    """Stands in for a safetensors file, or a slice of it, and notes which tensors' values are read."""

    def __init__(self, inner: Any, read: set[str], name: str = "") -> None:
        self.inner, self.read, self.name = inner, read, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __enter__(self) -> Spy:
        self.inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)

    def get_tensor(self, name: str) -> Any:
        self.read.add(name)
        return self.inner.get_tensor(name)

    def get_slice(self, name: str) -> Any:
        return Spy(self.inner.get_slice(name), self.read, name)

    def __getitem__(self, index: Any) -> Any:
        self.read.add(self.name)
        return self.inner[index]


def test_dropped_tensors_are_never_read(qwen_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    safe_open = transformers.modeling_utils.safe_open
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", lambda *a, **k: Spy(safe_open(*a, **k), read))
    folder = copy_checkpoint(qwen_dir, tmp_path / "copy", layout="bare", head=True)
    PumaModel.from_pretrained(folder, num_kept_layers=2)
    names = set(read_weights(qwen_dir)) | {"lm_head.weight"}
    assert names - read == {name for name in names if layer_of(name) >= 2} | {"lm_head.weight"}


# --- what cannot be loaded


class PumaWithHead(PumaModel):
    """A user's own: its module is no file that a save could copy."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.head = torch.nn.Linear(config.text_config.hidden_size, 3)
        self.post_init()


PumaWithHead.__module__ = "__main__"


@pytest.mark.parametrize("model_class", [PumaModel, PumaWithHead])
def test_a_missing_tensor_is_an_error(model_class: Any, qwen_dir: Path, tmp_path: Path) -> None:
    folder = copy_checkpoint(qwen_dir, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = r"lacks 1 of the tensors .* 2 layers needs \(first: language_model.norm.weight\).*Download"
    with pytest.raises(ValueError, match=message):
        model_class.from_pretrained(folder, num_kept_layers=2)


@pytest.mark.parametrize("opens", [PumaModel, AutoModel])
def test_a_tensor_that_an_adapter_or_its_base_lacks_is_an_error(opens: Any, puma_dir: Path, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(puma_dir, base)
    model = PumaModel.from_pretrained(base)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]}))
    model.save_pretrained(adapter)

    def message(weights: Path, name: str, rows: int) -> str:
        """What opening the adapter says where a file has only so many rows of a tensor."""
        tensors = load_file(weights)
        (key,) = (key for key in tensors if key.endswith(name))
        cut = {key: tensors[key][:rows].contiguous()} if rows else {}
        save_file({k: v for k, v in tensors.items() if k != key} | cut, weights, metadata={"format": "pt"})
        with pytest.raises((ValueError, RuntimeError)) as caught:
            opens.from_pretrained(adapter, trust_remote_code=True)
        save_file(tensors, weights, metadata={"format": "pt"})
        return str(caught.value)

    needed, lora = "language_model.layers.0.mlp.up_proj.weight", "layers.1.self_attn.q_proj.lora_A.weight"
    assert f"{str(base)!r} lacks 1 of the tensors" in message(base / "model.safetensors", needed, 0)
    assert f"{str(base)!r} has 1 tensors of another shape" in message(base / "model.safetensors", needed, 8)
    for name in (lora, "embed_tokens.token_adapter.trainable_tokens_delta"):
        found = message(adapter / "adapter_model.safetensors", name, 0)
        assert found.startswith(f"1 tensors of the adapter {str(adapter)!r} were not loaded")
    # An adapter of more layers than its base has: what is too much would be left out in silence.
    PumaModel.from_pretrained(puma_dir, num_kept_layers=1).save_pretrained(base)
    with pytest.raises(ValueError, match=r"^2 tensors of the adapter .*layers\.1\.self_attn\.q_proj\.lora_A"):
        opens.from_pretrained(adapter, trust_remote_code=True)
    PumaModel.from_pretrained(puma_dir).save_pretrained(base)
    assert "ignore_mismatched_sizes" in message(adapter / "adapter_model.safetensors", lora, 2)  # transformers' own
    assert opens.from_pretrained(adapter, trust_remote_code=True)


def test_a_subclass_with_a_new_head_loads_and_saves(puma_dir: Path, tmp_path: Path) -> None:
    with_head, info = PumaWithHead.from_pretrained(puma_dir, output_loading_info=True)
    assert info["missing_keys"] == {"head.weight", "head.bias"}  # transformers reports them
    assert 0.005 < with_head.head.weight.std() < 0.05  # by initializer_range, 0.02
    assert not with_head.head.bias.any()
    with_head.save_pretrained(tmp_path / "saved")
    reloaded, info = PumaWithHead.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert all(torch.equal(value, reloaded.state_dict()[name]) for name, value in with_head.state_dict().items())
    (cut,) = PumaWithHead.from_pretrained(puma_dir, keep_layers=[1]).language_model.layers
    assert torch.equal(cut.mlp.up_proj.weight, with_head.language_model.layers[1].mlp.up_proj.weight)
    # Others open it as what it is made from, whose code lies beside it.
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_puma.PumaConfig",
        "AutoModel": "modeling_puma.PumaModel",
    }
    code = {path.name for path in puma_dir.glob("*_puma.py")}
    assert "modeling_puma.py" in code & {path.name for path in (tmp_path / "saved").glob("*_puma.py")}
    plain = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert plain.state_dict().keys() == with_head.state_dict().keys() - {"head.weight", "head.bias"}


def test_pickles_are_not_opened(puma_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(puma_dir / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    shutil.copyfile(puma_dir / "config.json", tmp_path / "config.json")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        PumaModel.from_pretrained(tmp_path)
