"""An export as an ONNX graph: from the tokens of texts to their embeddings, for programs without PyTorch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoTokenizer

from puma_hf.modeling.modeling_puma import last_token_state

ONNX_NAME = "model.onnx"
_NEEDED = ("onnx", "onnxruntime", "onnxscript")
# Largest difference of a number of a unit vector; float32 on another runtime differs by 1e-7.
_BOUND = 1e-4


class _TextEmbedder(nn.Module):
    """The decoder of a stock model, its positions, and what makes an embedding of its states."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # The same in time, height and width: a text has no others.
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0).expand(3, -1, -1)
        states = self.decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return nn.functional.normalize(last_token_state(states, attention_mask), dim=-1)


def check_onnx_is_installed() -> None:
    """Raise ImportError if a package is missing that `write_onnx` needs."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ImportError(
            f"format 'onnx' needs {', '.join(missing)}, not installed here: pip install 'puma-hf[onnx]', or choose "
            "format 'stock'."
        )


def write_onnx(folder: Path) -> int:
    """Put an ONNX graph in the place of a stock export's weights, and compare the two on texts of other lengths.

    The graph takes `input_ids` and `attention_mask`, int64 `(batch_size, sequence_length)`, padded on either side, and
    gives `sentence_embedding`, float32 `(batch_size, embedding_dim)`. It has no vision tower.

    Args:
        folder: What `puma_hf.export.export` writes in the format "stock".

    Returns:
        Bytes of the graph.

    Raises:
        RuntimeError: If onnxruntime computes other embeddings than PyTorch.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    embedder = _TextEmbedder(model.model.language_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        program: Any = torch.onnx.export(
            embedder,
            tuple(_batch(tokenizer, ["a red apple", "a"])),
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
            dynamic_shapes=({0: "batch", 1: "sequence"}, {0: "batch", 1: "sequence"}),
            dynamo=True,
            verbose=False,
        )
    program.save(folder / ONNX_NAME, external_data=True)
    _compare(embedder, folder / ONNX_NAME, _batch(tokenizer, ["two green pears on a table", "a", "an apple"]))
    for name in ("*.safetensors*", "*preprocessor_config.json"):
        for path in folder.glob(name):
            path.unlink()
    return sum(path.stat().st_size for path in folder.glob(f"{ONNX_NAME}*"))


def _batch(tokenizer: Any, texts: list[str]) -> list[Tensor]:
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    encoded = tokenizer(prompts, padding=True, return_tensors="pt")
    return [encoded["input_ids"], encoded["attention_mask"]]


def _compare(embedder: nn.Module, path: Path, batch: list[Tensor]) -> None:
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), batch, strict=True)}
    with torch.inference_mode():
        difference = float((torch.from_numpy(session.run(None, inputs)[0]) - embedder(*batch)).abs().max())
    if not difference <= _BOUND:
        raise RuntimeError(
            f"The ONNX graph gives other embeddings than PyTorch: they differ by {difference:.1e}, at most {_BOUND} is "
            "right. Try other releases of torch, onnxscript and onnxruntime, or choose format 'stock'."
        )
