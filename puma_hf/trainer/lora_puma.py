"""The PUMA LoRA recipe: the adapter, its four-bit base, and gradient checkpointing that spares the vision tower."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import BitsAndBytesConfig, PreTrainedModel

from puma_hf.losses.cached_mac_puma import find_puma_model

# All linear layers of every family's decoder. Unlike peft's "all-linear" this leaves vision tower and merger be, and of
# Qwen3.5's linear attention the two gates with a number for each head (in_proj_a, in_proj_b): an adapter is larger.
DECODER_LINEARS = (
    r".*language_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_qkv|in_proj_z|out_proj)|mlp\.(gate|up|down)_proj)"
)
# Beside an adapter: hashes of the weights that it was trained on, and of its teacher. `puma_hf.files` says the same.
BASE_FILE = "puma_base.json"
# transformers 5.23 renamed arguments and methods of checkpointing, and warns of the old names.
PREFIX = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"


def lora_config(
    *, r: int = 64, alpha: int | None = None, dropout: float = 0.05, ret_token_id: int | None = None
) -> LoraConfig:
    """LoRA on every linear layer of the kept decoder layers; vision tower and merger stay as they are.

    Args:
        r: Rank. LamRA takes 64 for the stage on text pairs and 128 for M-BEIR.
        alpha: Scale, by default twice the rank, as in LamRA.
        dropout: Dropout before the adapter.
        ret_token_id: Also train the embedding row of this token, `model.config.ret_token_id`.

    Example:
        >>> lora_config(r=8).lora_alpha
        16

    Source: PUMA, ACM MM 2025, arXiv 2507.08064 trains with LoRA; the numbers are LamRA's, arXiv 2412.01720.
    """
    return LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=DECODER_LINEARS,
        trainable_token_indices=None if ret_token_id is None else {"embed_tokens": [ret_token_id]},
    )


def puma_model(model: SentenceTransformer) -> Any:
    """The `PumaModel` inside a SentenceTransformer, or a ValueError."""
    if (puma := find_puma_model(model)) is None:
        raise ValueError(f"A {type(model[0]).__name__} holds no model that puma-hf prune has cut.")
    return puma


def add_lora(model: SentenceTransformer, config: LoraConfig) -> None:
    """Give a PUMA `SentenceTransformer` a fresh adapter in float32 and freeze everything else.

    Raises:
        ValueError: If the model is no PUMA model, or already has an adapter: merge that first.
    """
    backbone = puma_model(model)
    model.add_adapter(config)  # which freezes the rest
    base = Path(str(backbone.name_or_path))
    if base.is_dir():  # a relative path would be looked for wherever the adapter is opened
        backbone.peft_config["default"].base_model_name_or_path = str(base.resolve())
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            # In the bfloat16 of published checkpoints, most updates of the optimizer would round to nothing.
            parameter.data = parameter.data.float()


def quantization_config() -> BitsAndBytesConfig:
    """QLoRA: how `from_pretrained` holds the decoder in 4-bit NormalFloat, computing in bfloat16; needs bitsandbytes.

    Vision tower, merger, token embedding and norms are not quantised. `merge_adapter` always merges into the base as it
    is on disk, not quantised: its embeddings differ from those seen in training by the quantisation error. Measure the
    merged model. A frozen teacher is then held whole beside the student, with a warning; a cached one is not held.

    Source: QLoRA, Dettmers et al., NeurIPS 2023, arXiv 2305.14314. Neither PUMA nor LamRA trains this way.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["visual"],  # as with LoRA, vision tower and merger stay as they are
    )


# --- the base that an adapter belongs to


def save_base_fingerprint(model: SentenceTransformer, folder: str | Path) -> None:
    """Note beside a saved adapter which weights it belongs to, which `merge_adapter` checks, its teacher and depths.

    Nothing is written if there is no adapter; nothing of the weights if they were not loaded from a directory.
    """
    backbone, noted = find_puma_model(model), {}
    if getattr(backbone, "_hf_peft_config_loaded", False):
        if Path(str(backbone.name_or_path)).is_dir():
            noted["sha256"] = weights_sha256(backbone.name_or_path)
        for name, value in (("teacher", "teacher_fingerprint"), ("trained_depths", "trained_depths")):
            if given := getattr(backbone.config, value, None):
                noted[name] = given
    if noted:
        Path(folder, BASE_FILE).write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of the safetensors files of a directory, names included."""
    files = sorted(Path(folder).resolve().glob("*.safetensors"))
    return _files_sha256(tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=4)
def _files_sha256(files: tuple[tuple[str, int, int], ...]) -> str:
    # Size and time of change are there for the cache: every checkpoint of a run asks for the same files.
    digest = hashlib.sha256()
    for name, _, _ in files:
        with Path(name).open("rb") as file:
            digest.update(Path(name).name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# --- gradient checkpointing


def checkpoint_decoder(model: Any, **options: Any) -> None:
    """Enable the checkpointing of a `PumaModel`, in its decoder layers alone.

    `transformers` makes the outputs of every embedding require gradients once a model has an adapter, that of the image
    patches too. The frozen vision tower is then computed twice and propagated through to its first layer, for gradients
    that nobody wants: 41 % more time. Checkpointing that is not reentrant needs none of these hooks, and the gradients
    of the adapter stay the same. A vision tower with trainable weights stays checkpointed.
    """
    # The reentrant kind, which is torch's default, needs the hooks: without them no gradient would reach an adapter.
    name = f"{PREFIX}_checkpointing_kwargs"
    options[name] = {**(options.get(name) or {}), "use_reentrant": False}
    getattr(model, f"{PREFIX}_checkpointing_enable")(**options)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.disable_input_require_grads()
    if not any(parameter.requires_grad for parameter in model.visual.parameters()):
        for part in model.visual.modules():
            if hasattr(part, "gradient_checkpointing"):
                part.gradient_checkpointing = False
