"""What a PUMA directory's configuration and the headers of its weights say: nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from puma_hf.checkpoint import is_kept
from puma_hf.modeling.configuration_puma import config_class_of

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class _Tensor:
    name: str
    count: int
    num_bytes: int
    dtype: str


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
    if unread := [tensor.name for tensor in tensors if not is_kept(tensor.name, kept)]:
        raise ValueError(
            f"{str(folder)!r} holds {len(unread)} tensors that a model of {kept} layers does not read (first: "
            f"{unread[0]}), so its parameters cannot be counted. Write the directory again with puma-hf prune or merge."
        )
    layer = sum(tensor.count for tensor in tensors if not is_kept(tensor.name, kept - 1))
    after = sum(tensor.count for tensor in tensors)
    text = config.get("text_config", {})
    # All decoder layers are of one size, and the head has the shape of the token embedding.
    head = 0 if config.get("tie_word_embeddings") else int(text["vocab_size"]) * int(text["hidden_size"])
    before = after + (total - kept) * layer + head
    size = sum(tensor.num_bytes for tensor in tensors)
    dtypes = sorted({tensor.dtype for tensor in tensors})
    return {
        "backbone": config_class_of(config["model_type"]).source_name,
        "source": config.get("source_name_or_path"),
        "source_revision": config.get("source_revision"),
        "num_kept_layers": kept,
        "original_num_hidden_layers": total,
        "parameters_before": before,
        "parameters_after": after,
        "bytes_before": before * (size // after) if len(dtypes) == 1 else None,
        "bytes_after": size,
        "dtype": " and ".join(dtypes) or None,
        "embedding_dim": text.get("hidden_size"),
    }


def _tensors(path: Path) -> Iterator[_Tensor]:
    """The tensors of a safetensors file, from its header."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError(f"a header of {length:,} bytes is longer than the file")
            header = json.loads(file.read(length))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, entry in entries:
            start, end = entry["data_offsets"]
            dtype = _DTYPES.get(entry["dtype"], str(entry["dtype"]))
            yield _Tensor(name, prod(entry["shape"]), end - start, dtype)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path.name!r} in {str(path.parent)!r} is no whole safetensors file ({error}). Write the directory again."
        ) from error
