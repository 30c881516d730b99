"""What a PUMA directory's configuration and the headers of its weights say: nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from puma_hf.checkpoint import is_kept
from puma_hf.modeling.configuration_puma import config_class_of

# By the names that safetensors has for them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Tensor:
    name: str
    count: int
    dtype: torch.dtype


def read_facts(folder: Path) -> dict[str, Any]:
    """Layers, parameters and bytes before the cut and after it, and what the model was made from.

    Args:
        folder: A PUMA directory.

    Returns:
        What `hub_card.md` has names for.

    Raises:
        ValueError: If a weight file is damaged, or holds layers that the model does not have.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept, total = int(config["num_kept_layers"]), int(config["original_num_hidden_layers"])
    tensors = [tensor for path in sorted(folder.glob("*.safetensors")) for tensor in _tensors(path)]
    if unread := [tensor.name for tensor in tensors if not is_kept(tensor.name, range(kept))]:
        raise ValueError(
            f"{str(folder)!r} holds {len(unread)} tensors that a model of {kept} layers does not read (first: "
            f"{unread[0]}), so its parameters cannot be counted. Write the directory again with puma-hf prune or merge."
        )
    layer = sum(tensor.count for tensor in tensors if not is_kept(tensor.name, range(kept - 1)))
    after = sum(tensor.count for tensor in tensors)
    text = config.get("text_config", {})
    # All decoder layers are of one size, and the head has the shape of the token embedding.
    head = 0 if config.get("tie_word_embeddings") else int(text["vocab_size"]) * int(text["hidden_size"])
    before = after + (total - kept) * layer + head
    size = sum(tensor.count * tensor.dtype.itemsize for tensor in tensors)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    return {
        "backbone": config_class_of(config["model_type"]).source_name,
        "source": config.get("source_name_or_path"),
        "source_revision": config.get("source_revision"),
        "num_kept_layers": kept,
        "original_num_hidden_layers": total,
        "kept_layers": config.get("kept_layers"),
        "parameters_before": before,
        "parameters_after": after,
        "bytes_before": before * (size // after) if len(dtypes) == 1 else None,
        "bytes_after": size,
        "dtype": " and ".join(dtypes) or None,
        "embedding_dim": text.get("hidden_size"),
    }


def _tensors(path: Path) -> Iterator[_Tensor]:
    """The tensors of a safetensors file; only its header is read."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file itself cannot be iterated over
                tensor = file.get_slice(name)
                yield _Tensor(name, prod(tensor.get_shape()), _DTYPES[tensor.get_dtype()])
    except (SafetensorError, OSError, KeyError) as error:  # the last of a data type that torch does not have
        raise ValueError(
            f"{path.name!r} in {str(path.parent)!r} is no whole safetensors file ({error}). Write the directory again."
        ) from error
