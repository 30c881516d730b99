from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from puma_hf import PumaModel, PumaProcessor
from puma_hf.modeling import PumaModelOutput
from puma_hf.modeling.modeling_puma import last_token_state
from tests.tiny import copy_checkpoint, layer_of, read_weights


@pytest.fixture(scope="module")
def make_batch(puma_dir: Path, images: list[Image.Image]) -> Callable[..., dict[str, Any]]:
    def make(padding_side: str = "right") -> dict[str, Any]:
        processor = PumaProcessor.from_pretrained(puma_dir)
        processor.tokenizer.padding_side = padding_side
        inputs = [
            "a red apple",
            {"image": images[0]},
            {"image": images[1:], "text": "on a table, two of them", "instruction": "Find it."},
        ]
        return {**processor.process_inputs(inputs)}

    return make


def forward_arguments(batch: dict[str, Any]) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    return {name: batch[name] for name in names}


@torch.inference_mode()
def embed(model: PumaModel, batch: dict[str, Any], **kwargs: Any) -> PumaModelOutput:
    output: PumaModelOutput = model(**forward_arguments(batch), **kwargs)
    return output


# --- equality with the original


# --- the output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_unit_vectors_in_float32(
    puma_dir: Path, make_batch: Callable[..., dict[str, Any]], dtype: torch.dtype
) -> None:
    model = PumaModel.from_pretrained(puma_dir, dtype=dtype).eval()
    output = embed(model, make_batch())
    assert output.embeddings.dtype == torch.float32
    assert output.pooler_output.dtype == dtype
    assert output.embeddings.shape == output.pooler_output.shape == (3, 32)
    torch.testing.assert_close(output.embeddings.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-6)


def test_modality_types_are_computed_when_absent(model: PumaModel, make_batch: Callable[..., dict[str, Any]]) -> None:
    arguments = forward_arguments(make_batch())
    types = arguments.pop("mm_token_type_ids")
    assert types.sum() > 0
    with torch.inference_mode():
        assert torch.equal(model(**arguments).embeddings, embed(model, make_batch()).embeddings)
        wrong = model(**arguments, mm_token_type_ids=torch.zeros_like(types)).embeddings
    assert not torch.allclose(wrong, embed(model, make_batch()).embeddings)


def test_no_key_value_cache_is_kept(
    model: PumaModel, make_batch: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    decoder = type(model.language_model)
    forward = decoder.forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        seen.append((kwargs.get("use_cache"), result.past_key_values))
        return result

    monkeypatch.setattr(decoder, "forward", spy)
    embed(model, make_batch())
    assert seen == [(False, None)]


def test_gradients_reach_every_part(puma_dir: Path, make_batch: Callable[..., dict[str, Any]]) -> None:
    model = PumaModel.from_pretrained(puma_dir).train()
    output = model(**forward_arguments(make_batch()))
    # The sum of squares of a unit vector is constant: weigh the coordinates.
    (output.embeddings * torch.arange(32.0)).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == set()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for name, parameter in model.named_parameters()
        if not name.endswith(("k_proj.bias", "qkv.bias"))  # a key bias shifts all scores alike
    )


# --- last_token_state


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [2.0, 5.0]),
        ([[1, 1, 1], [1, 1, 1]], [2.0, 5.0]),
        ([[1, 0, 0], [1, 1, 0]], [0.0, 4.0]),
        ([[0, 0, 1], [0, 1, 1]], [2.0, 5.0]),
        ([[0, 1, 0], [1, 1, 0]], [1.0, 4.0]),
    ],
)
def test_last_token_state(mask: list[list[int]] | None, expected: list[float]) -> None:
    states = torch.arange(6.0).reshape(2, 3, 1)
    attention_mask = None if mask is None else torch.tensor(mask)
    assert last_token_state(states, attention_mask).squeeze(-1).tolist() == expected
    if attention_mask is not None:
        assert last_token_state(states, attention_mask.bool()).squeeze(-1).tolist() == expected


# --- reading


class SpyFile:
    """Stands in for a safetensors file and notes which tensors' values are read."""

    def __init__(self, file: Any, read: set[str]) -> None:
        self.file, self.read = file, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> SpyFile:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def get_tensor(self, name: str) -> Any:
        self.read.add(name)
        return self.file.get_tensor(name)

    def get_slice(self, name: str) -> Any:
        return SpySlice(self.file.get_slice(name), name, self.read)


class SpySlice:
    def __init__(self, part: Any, name: str, read: set[str]) -> None:
        self.part, self.name, self.read = part, name, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __getitem__(self, index: Any) -> Any:
        self.read.add(self.name)
        return self.part[index]


@pytest.fixture
def tensors_read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    read: set[str] = set()
    safe_open = transformers.modeling_utils.safe_open
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", lambda *a, **k: SpyFile(safe_open(*a, **k), read))
    return read


def test_dropped_tensors_are_never_read(qwen_dir: Path, tmp_path: Path, tensors_read: set[str]) -> None:
    folder = copy_checkpoint(qwen_dir, tmp_path / "copy", layout="bare", head=True)
    PumaModel.from_pretrained(folder, num_kept_layers=2)
    names = set(read_weights(qwen_dir)) | {"lm_head.weight"}
    assert names - tensors_read == {name for name in names if layer_of(name) >= 2} | {"lm_head.weight"}


# --- saving


def test_saving_is_stable_and_reloads(
    qwen_dir: Path, tmp_path: Path, make_batch: Callable[..., dict[str, Any]]
) -> None:
    model = PumaModel.from_pretrained(qwen_dir, num_kept_layers=3).eval()
    expected = embed(model, make_batch()).embeddings
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        model, info = PumaModel.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] | info["unexpected_keys"]
        assert torch.equal(embed(model.eval(), make_batch()).embeddings, expected)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("first", "second")
    )
    assert first == second
    assert set(load_file(tmp_path / "first" / "model.safetensors")) == set(model.state_dict())
    assert {"config.json", "modeling_puma.py", "configuration_puma.py"} <= set(first)


# --- what cannot be loaded


def damaged(qwen_dir: Path, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    copy_checkpoint(qwen_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class PumaWithHead(PumaModel):
    """A user's own: its module is no file that a save could copy."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.head = torch.nn.Linear(config.text_config.hidden_size, 3)
        self.post_init()


PumaWithHead.__module__ = "__main__"


@pytest.mark.parametrize("model_class", [PumaModel, PumaWithHead])
def test_a_missing_tensor_is_an_error(model_class: Any, qwen_dir: Path, tmp_path: Path) -> None:
    folder = damaged(qwen_dir, tmp_path / "copy", lambda tensors: tensors.pop("model.norm.weight"))
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
        with pytest.raises(ValueError, match="tensors") as caught:
            opens.from_pretrained(adapter, trust_remote_code=True)
        save_file(tensors, weights, metadata={"format": "pt"})
        return str(caught.value)

    needed, lora = "language_model.layers.0.mlp.up_proj.weight", "layers.1.self_attn.q_proj.lora_A.weight"
    assert f"{str(base)!r} lacks 1 of the tensors" in message(base / "model.safetensors", needed, 0)
    assert f"{str(base)!r} has 1 tensors of another shape" in message(base / "model.safetensors", needed, 8)
    for name, rows in ((lora, 0), (lora, 2), ("embed_tokens.token_adapter.trainable_tokens_delta", 0)):
        found = message(adapter / "adapter_model.safetensors", name, rows)
        assert found.startswith(f"1 tensors of the adapter {str(adapter)!r} were not loaded")
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


def test_a_missing_tensor_of_a_dropped_layer_is_none(qwen_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    folder = damaged(qwen_dir, tmp_path / "copy", lambda tensors: tensors.pop(name))
    assert PumaModel.from_pretrained(folder, num_kept_layers=3).config.num_kept_layers == 3
    with pytest.raises(ValueError, match=r"4 layers needs .*language_model.layers.3.mlp.up_proj.weight"):
        PumaModel.from_pretrained(folder)


def test_a_tensor_of_another_shape_is_an_error(qwen_dir: Path, tmp_path: Path) -> None:
    folder = damaged(qwen_dir, tmp_path / "copy", lambda tensors: tensors.update({"model.norm.weight": torch.ones(8)}))
    message = r"1 tensors of another shape .*language_model.norm.weight, \(8,\) instead of \(32,\).*Download"
    with pytest.raises(ValueError, match=message):
        PumaModel.from_pretrained(folder, num_kept_layers=2)
    assert PumaModel.from_pretrained(folder, num_kept_layers=2, ignore_mismatched_sizes=True)


def test_pickles_are_not_opened(puma_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(puma_dir / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    shutil.copyfile(puma_dir / "config.json", tmp_path / "config.json")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        PumaModel.from_pretrained(tmp_path)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
@pytest.mark.parametrize("loader", [PumaModel, AutoModel])
def test_flash_attention_names_its_extra(puma_dir: Path, loader: Any) -> None:
    with pytest.raises(ImportError, match=r"'flash_attention_2' (.|\n)*pip install 'puma-hf\[flash-attn\]'.*sdpa"):
        loader.from_pretrained(puma_dir, attn_implementation="flash_attention_2")
