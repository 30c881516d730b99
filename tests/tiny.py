"""Tiny checkpoints of each backbone with tokenizer and image processor, in each of the layouts found in the wild."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

_NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in _NAMES)
NUM_LAYERS = 4
HIDDEN_SIZE = 32
# Rows of the embedding beyond the vocabulary, as in the published checkpoints.
PADDING_ROWS = 8

# Prefixes of the text tower and the vision tower in each layout.
LAYOUTS = {
    "nested": ("model.language_model.", "model.visual."),
    "published": ("model.", "visual."),
    "bare": ("language_model.", "visual."),
}


def tiny_tokenizer(extra_tokens: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: every text is encodable, most characters are one token or more."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a red apple on a table"] * 10, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=512
    )
    fast.add_tokens(list(extra_tokens))
    return fast


# By model_type: configuration, whole model, vision tower, what is special in the text tower.
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        {"embed_dim": 32, "hidden_size": HIDDEN_SIZE, "patch_size": 8, "mlp_ratio": 2},
        {"mrope_section": [1, 1, 2]},
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        # The first block sees windows of 2 x 2 image tokens, the second all of them.
        {
            "hidden_size": 32,
            "out_hidden_size": HIDDEN_SIZE,
            "intermediate_size": 64,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        {"mrope_section": [1, 1, 2]},
    ),
    "qwen3_vl": (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        # DeepStack adds to the states after three of the four decoder layers.
        {
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": HIDDEN_SIZE,
            "intermediate_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    ),
    "qwen3_5": (
        Qwen3_5Config,
        Qwen3_5ForConditionalGeneration,
        {
            "hidden_size": 32,
            "out_hidden_size": HIDDEN_SIZE,
            "intermediate_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 16,
        },
        # Of a head's 32 dimensions a quarter is turned. Three layers of four have linear attention, with other heads.
        {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25},
    ),
}
# What else the text towers of some families are told.
_TEXT = {
    "qwen3_vl": {"head_dim": 8},
    "qwen3_5": {
        "head_dim": 32,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}


def tiny_config(
    tokenizer: PreTrainedTokenizerFast, *, family: str = "qwen2_vl", num_layers: int = NUM_LAYERS, **changes: Any
) -> Any:
    token_id = tokenizer.convert_tokens_to_ids
    config_class, _, vision, rope = FAMILIES[family]
    text = {
        "vocab_size": changes.pop("vocab_size", len(tokenizer) + PADDING_ROWS),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # The sections are half of a head's 8 dimensions, split over time, height and width.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope},
        "bos_token_id": None,
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }
    text |= _TEXT.get(family, {})
    return config_class(
        text_config=text,
        vision_config={"depth": 2, "num_heads": 2, **vision},
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=changes.pop("tie_word_embeddings", True),
        **changes,
    )


def build_checkpoint(
    folder: Path,
    family: str,
    *,
    extra_tokens: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a complete original checkpoint with random weights into `folder`."""
    tokenizer = tiny_tokenizer(extra_tokens)
    torch.manual_seed(seed)
    model = FAMILIES[family][1](tiny_config(tokenizer, family=family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # no bias stays 0, no norm weight 1
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    patch = FAMILIES[family][2]["patch_size"]
    size = {"shortest_edge": 4 * patch * patch, "longest_edge": 256 * 256}
    Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=size).save_pretrained(folder)
    return folder


def build_qwen2_vl(folder: Path, **options: Any) -> Path:
    """`build_checkpoint` of the family that most tests use."""
    return build_checkpoint(folder, "qwen2_vl", **options)


def canonical_name(name: str) -> str:
    """`language_model.*` and `visual.*`, as the model's own classes call them."""
    for text, vision in (LAYOUTS["nested"], LAYOUTS["published"]):
        if name.startswith(vision):
            return "visual." + name.removeprefix(vision)
        if name.startswith(text):
            return "language_model." + name.removeprefix(text)
    return name


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint under their canonical names."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {canonical_name(name): tensor for name, tensor in tensors.items()}


def copy_checkpoint(
    source: Path, target: Path, *, layout: str = "published", num_shards: int = 1, head: bool = False
) -> Path:
    """The same checkpoint with the tensor names of `layout`, in `num_shards` files ordered by layer."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = dict(sorted(read_weights(source).items(), key=lambda item: layer_of(item[0])))
    if head:
        tensors["lm_head.weight"] = tensors["language_model.embed_tokens.weight"].clone()
        tensors["mtp.layers.1.mlp.up_proj.weight"] = torch.zeros(1)  # as in Qwen3.5's
    text, vision = LAYOUTS[layout]
    named = {
        name.replace("language_model.", text, 1).replace("visual.", vision, 1): tensor
        for name, tensor in tensors.items()
    }
    if num_shards == 1:
        save_file(named, target / "model.safetensors", metadata={"format": "pt"})
        return target
    names = list(named)
    per_shard = -(-len(names) // num_shards)
    weight_map = {}
    for number in range(num_shards):
        file_name = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[number * per_shard : (number + 1) * per_shard]
        save_file({name: named[name] for name in part}, target / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def layer_of(name: str) -> int:
    """Number of a tensor's decoder layer; -1 for all else."""
    parts = name.split(".")
    return int(parts[2]) if name.startswith("language_model.layers.") else -1
