"""SHA-256 fingerprints: of a teacher, so that its stored states are never taken for another's, and of a dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from puma_hf.checkpoint import SourceCheckpoint, open_checkpoint
from puma_hf.modeling import PumaModel
from puma_hf.trainer.lora import weights_sha256

_ROWS_AT_ONCE = 1000
_SETTINGS = {
    "text_config": (
        "hidden_act",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "sliding_window",
    ),
    "vision_config": ("hidden_act", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size"),
}


@contextmanager
def naming_the_teacher(source: Any) -> Iterator[None]:
    """Say of an OSError inside the block that it is about the teacher, and what one must be."""
    try:
        yield
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(
            f"The teacher {str(source)!r} cannot be opened: {error} A teacher is the folder or the Hub id of a "
            "checkpoint of the student's hidden size. Pass one (teacher=..., --teacher), or nothing for the checkpoint "
            "that was pruned."
        ) from error


def open_teacher(source: Any, *, revision: str | None = None) -> SourceCheckpoint:
    """Locate a teacher's checkpoint without reading its weights.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If its weights are not in safetensors format.
    """
    with naming_the_teacher(source):
        return open_checkpoint(source, revision=revision)


def base_tensors(model: PumaModel) -> dict[str, Tensor]:
    """Base weights under the names that they have without an adapter."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name or "trainable_tokens" in name:
            continue
        # peft wraps the layers that it adapts.
        tensors[name.replace(".base_layer.", ".").replace(".token_adapter.", ".")] = parameter.detach()
    return tensors


def settings_of(model: PumaModel, layer_types: list[str]) -> dict[str, Any]:
    """The settings that change the states without changing a weight."""
    settings: dict[str, Any] = {"layer_types": layer_types}
    if model.config.positions != "mrope":
        settings["positions"] = model.config.positions
    for part, names in _SETTINGS.items():
        config = getattr(model.config, part)
        settings[part] = {name: getattr(config, name, None) for name in names}
    return settings


def tensors_sha256(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """SHA-256 of named tensors and of settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def checkpoint_sha256(source: Any, student: PumaModel, *, revision: str | None = None) -> str | None:
    """What the states of a checkpoint's model depend on, from its files and without loading it.

    Returns:
        SHA-256, or None if not all files are on this machine.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
    """
    checkpoint = open_teacher(source, revision=revision)
    if not all((checkpoint.folder / name).is_file() for name in checkpoint.weight_files.values()):
        return None
    digest = hashlib.sha256(weights_sha256(checkpoint.folder).encode())
    # The tokenizer tells which row is that of [RET].
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        path = checkpoint.folder / file
        digest.update(path.read_bytes() if path.is_file() else b"")
    # The rest of the student is either the same or without influence.
    embedding = base_tensors(student)["language_model.embed_tokens.weight"]
    row = embedding[student.config.ret_token_id] if student.config.ret_token_id is not None else embedding[:0]
    digest.update(f"{student.dtype} {student.config.ret_token_id} {row.float().tolist()}".encode())
    digest.update(student.config.positions.removeprefix("mrope").encode())
    return digest.hexdigest()


def datasets_sha256(parts: Iterable[tuple[Dataset, str]]) -> str:
    """SHA-256 of columns of datasets, in order: of what the rows hold, not of how or where they are stored."""
    digest = hashlib.sha256()
    for dataset, column in parts:
        digest.update(f"{column} {len(dataset)}".encode())
        rows = dataset.select_columns([column]).with_format("arrow")
        for begin in range(0, len(dataset), _ROWS_AT_ONCE):
            table: Any = rows[begin : begin + _ROWS_AT_ONCE]
            for value in table.column(column).to_pylist():
                digest.update(repr(value).encode())
    return digest.hexdigest()
