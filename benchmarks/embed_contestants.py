"""Ways of embedding that `embed.py` compares: the same weights, inputs and processor, another loop around them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from embed_models import Models
from embed_workloads import Workload
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from puma_hf import embed
from puma_hf.modeling.fast_path_puma import FastPath
from puma_hf.modeling.modeling_puma import last_token_state

Run = Callable[[], Tensor]
Contestant = Callable[[Workload], Run]

FULL, PLAIN, ENCODE, EMBED = "sentence-transformers, all layers", "sentence-transformers", "encode", "embed"
SMALL_BATCH_SIZE = 8  # pads less than sentence-transformers' own 32
PLAIN_SMALL = f"{PLAIN}, batches of {SMALL_BATCH_SIZE}"
LAMRA, VLM2VEC = "in LamRA's manner", "in VLM2Vec's manner"
LOOP_BATCH_SIZE = 16


def contestants(models: Models, kept: int, *, batch_size: int, max_batch_tokens: int | None) -> dict[str, Contestant]:
    """All ways by name.

    Args:
        models: The weights.
        kept: Decoder layers of the pruned model.
        batch_size: Of `encode`, with and without the fast path; without it also 8.
        max_batch_tokens: Of `embed`; `None` for its own.
    """
    pruned, device = models.at(kept), models.device
    full = models.at(models.num_layers)
    return {
        FULL: partial(_encode, full, batch_size, None),
        PLAIN: partial(_encode, pruned, batch_size, None),
        PLAIN_SMALL: partial(_encode, pruned, SMALL_BATCH_SIZE, None),
        ENCODE: partial(_encode, pruned, batch_size, FastPath()),
        EMBED: partial(_embed, pruned, max_batch_tokens),
        LAMRA: partial(_lamra_loop, pruned, device),
        VLM2VEC: partial(_vlm2vec_loop, pruned, models.with_head(kept), device),
    }


def left_out() -> str:
    """Who does not take part, and why."""
    name = "colpali-engine's BiQwen2 is left out"
    if importlib.util.find_spec("colpali_engine") is None:
        return (
            f"{name}: the package is not installed. Release 0.3.18 needs peft < 0.21 and torchvision, and so does not "
            "install beside puma-hf's own versions."
        )
    return f"{name}: it pads and pools in ways of its own, and nobody has held its vectors against these."


def one_by_one(model: SentenceTransformer, workload: Workload, indices: list[int]) -> Tensor:
    """What every way has to give: the plain forward pass on one input at a time, where there is nothing to pad."""
    module: Any = model[0]
    process = module.packer(workload.prompt).process
    rows = []
    with torch.inference_mode():
        for index in indices:
            features = _to(process([workload.inputs[index]]), model.device)
            rows.append(_plain_forward(module, features).cpu())
    return torch.cat(rows)


@contextmanager
def fast_path(model: SentenceTransformer, setting: FastPath | None) -> Iterator[Any]:
    """The input module with these savings; `None` is the plain forward pass."""
    module: Any = model[0]
    before, module.fast_path = module.fast_path, setting
    try:
        yield module
    finally:
        module.fast_path = before


def _encode(model: SentenceTransformer, batch_size: int, setting: FastPath | None, workload: Workload) -> Run:
    def run() -> Tensor:
        with fast_path(model, setting):
            return model.encode(
                workload.inputs,
                prompt=workload.prompt,
                batch_size=batch_size,
                convert_to_tensor=True,
                show_progress_bar=False,
            ).cpu()

    return run


def _embed(model: SentenceTransformer, max_batch_tokens: int | None, workload: Workload) -> Run:
    def run() -> Tensor:
        with fast_path(model, FastPath()):
            result = embed(
                model,
                workload.inputs,
                prompt=workload.prompt,
                max_batch_tokens=max_batch_tokens,
                show_progress_bar=False,
            )
        return torch.as_tensor(result.embeddings)

    return run


def _lamra_loop(model: SentenceTransformer, device: str, workload: Workload) -> Run:
    """Batches of 16 as they come, padded, through the plain forward pass."""
    module: Any = model[0]
    process = module.packer(workload.prompt).process

    @torch.inference_mode()
    def run() -> Tensor:
        batches = _batches(workload.inputs, process, device)
        return torch.cat([_plain_forward(module, _to(features, device)).cpu() for features in batches])

    return run


def _vlm2vec_loop(model: SentenceTransformer, causal: Any, device: str, workload: Workload) -> Run:
    """One call of the processor for each input, all hidden states, and the language-model head on every token."""
    module: Any = model[0]
    process = module.packer(workload.prompt).process
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")

    def collate(items: list[Any]) -> dict[str, Any]:
        rows = [process([item]) for item in items]
        features: dict[str, Any] = {}
        for name in names:
            values = [row[name] for row in rows if name in row]
            if name in names[:3]:  # zeros everywhere: what is padded is masked
                features[name] = pad_sequence([value[0] for value in values], batch_first=True)
            elif values:
                features[name] = torch.cat(values)
        return features

    @torch.inference_mode()
    def run() -> Tensor:
        vectors = []
        for features in _batches(workload.inputs, collate, device):
            features = _to(features, device)
            states = causal(**features, output_hidden_states=True, return_dict=True).hidden_states[-1]
            vectors.append(normalize(last_token_state(states, features["attention_mask"]).float(), dim=-1).cpu())
        return torch.cat(vectors)

    return run


def ready_batches(model: SentenceTransformer, workload: Workload) -> Run:
    """The fast path on what is processed and packed before the clock starts."""
    with fast_path(model, FastPath()) as module:
        batch = module.packer(workload.prompt)(workload.inputs)

    @torch.inference_mode()
    def run() -> Tensor:
        with fast_path(model, FastPath()):
            vectors: Tensor = module.embed_batch(batch)["sentence_embedding"]
        return vectors.cpu()

    return run


def _batches(inputs: list[Any], collate: Any, device: str) -> Any:
    """Consecutive batches; with a GPU workers prepare them ahead, as both projects' loops let them."""
    workers = 4 if device == "cuda" else 0
    return DataLoader(inputs, batch_size=LOOP_BATCH_SIZE, collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]


def _plain_forward(module: Any, features: dict[str, Any]) -> Tensor:
    before, module.fast_path = module.fast_path, None
    try:
        embeddings: Tensor = module(dict(features))["sentence_embedding"]
    finally:
        module.fast_path = before
    return embeddings


def _to(features: dict[str, Any], device: Any) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in features.items()}
