"""What a model is, and what an input is: fingerprints that change when an embedding may, and with nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from puma_hf.files import is_hub_id
from puma_hf.losses.cached_mac_puma import find_puma_model

# Where a checkpoint was loaded from, by which version, what taught it, at which depths: embeddings do not depend on it.
_NOT_COMPARED: tuple[str, ...] = ("name_or_path", "transformers_version", "__version__", "auto_map", "_commit_hash")
_NOT_COMPARED += ("teacher_fingerprint", "trained_depths")
_TOKENIZER_SETTINGS = ("chat_template", "model_max_length", "padding_side", "truncation_side")
# Packages of code that changes while its version does not: that of a checkpoint, and ours, of which it is a copy.
_CODE_OF_MODELS = ("transformers_modules.", "puma_hf.")
# Pruning adds a row for `[RET]`, and of a generative model's head nothing is left.
_OF_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
_MODEL_SETTINGS = ("max_seq_length", "truncate_dim", "prompts", "default_prompt_name")


def model_fingerprint(model: Any) -> str | None:
    """SHA-256 of what a model's embeddings depend on, from the model itself: a moved directory keeps it.

    It covers the weights and their data types; the settings of every module, of the configuration, the processor, its
    chat template and tokenizer; the code that came with the checkpoint; and `max_seq_length`, `truncate_dim` and the
    prompts. All weights go through the CPU, which takes seconds: embeddings of another model would cost hours.

    Args:
        model: A `SentenceTransformer`, or any `torch.nn.Module`. Of anything else its attribute `fingerprint` is
            taken, if it has one.

    Returns:
        64 hexadecimal digits, or the attribute; None if there is neither.

    Example:
        >>> first, second = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> model_fingerprint(first) == model_fingerprint(second)
        False
        >>> _ = second.load_state_dict(first.state_dict())
        >>> model_fingerprint(first) == model_fingerprint(second)
        True
    """
    if not isinstance(model, nn.Module):
        own = getattr(model, "fingerprint", None)
        return None if own is None else str(own)
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    # How much of a LoRA adapter is added, if at all, is in none of its tensors.
    lora = {
        name: [module.scaling, module.active_adapters, module.disable_adapters]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    return tensors_sha256(tensors, {**model_settings(model), "lora": lora})


def space_fingerprint(model: Any, weights: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 of the vector space that a `SentenceTransformer` embeds into, which a model distilled towards it shares.

    It covers `weights`, by default the model's own, and what tokens it makes of a sentence with an instruction. Unlike
    `model_fingerprint` it is that of a source and of its copy of all layers, in float32 and in bfloat16: tensors are
    rounded to bfloat16, their names do not count, and the rows of the vocabulary are left out.
    """
    digests = []
    for name, tensor in (dict(model.named_parameters()) if weights is None else weights).items():
        if not name.endswith(_OF_VOCABULARY):
            digest = hashlib.sha256()
            _update(digest, "", tensor.detach().to(torch.bfloat16))
            digests.append(digest.hexdigest())
    chat: Any = [{"role": "user", "content": [{"type": "text", "text": "a red apple"}]}]
    probe = chat if model.supports("message") else "a red apple"  # some embedders take nothing but chats
    tokens = model.preprocess([probe], prompt="Find a picture.").get("input_ids", torch.empty(0))
    return hashlib.sha256(json.dumps([sorted(digests), tokens.tolist()]).encode()).hexdigest()


def exit_fingerprint(model: Any, depth: int) -> str | None:
    """`space_fingerprint` over the weights that embed after a trained depth: of copies cut above it the same.

    None if this depth, or that of the model, is no trained one, or it is no PUMA model.
    """
    trained = noted(model, "trained_depths") or ()
    if not {depth, noted(model, "num_kept_layers")} <= {*trained}:
        return None
    deeper = {id(weight) for weight in find_puma_model(model).language_model.layers[depth:].parameters()}
    shared = {name: weight for name, weight in model.named_parameters() if id(weight) not in deeper}
    return space_fingerprint(model, shared)


def exit_fingerprints(model: Any) -> dict[str, str | None]:
    """By trained depth, `exit_fingerprint`: what an index notes of the depths that its vectors may be compared with."""
    trained = noted(model, "trained_depths") or ()
    return {str(depth): exit_fingerprint(model, depth) for depth in trained}


def noted(model: Any, name: str) -> Any:
    """What the configuration of a PUMA model has under a name, such as `num_kept_layers`; None of any other model."""
    return getattr(getattr(find_puma_model(model), "config", None), name, None)


def model_settings(model: nn.Module) -> dict[str, Any]:
    """All of `model_fingerprint` but the weights: what decides how a `SentenceTransformer` sees an input."""
    settings = {name: getattr(model, name, None) for name in _MODEL_SETTINGS}
    return settings | {"modules": {name: _module_settings(module) for name, module in model.named_children()}}


def _module_settings(module: nn.Module) -> dict[str, Any]:
    processor: Any = getattr(module, "processor", None)
    tokenizer: Any = getattr(processor, "tokenizer", None) or getattr(module, "tokenizer", None)
    parts = {
        "settings": getattr(module, "get_config_dict", None),
        "config": getattr(getattr(getattr(module, "model", module), "config", None), "to_dict", None),
        "processor": getattr(processor, "to_dict", None),
    }
    settings = {name: make() for name, make in parts.items() if callable(make)}
    settings |= {"class": type(module).__name__, "chat_template": getattr(processor, "chat_template", None)}
    if tokenizer is not None:
        settings["tokenizer"] = {name: getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS}
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        vocabulary = json.loads(backend.to_str()) if hasattr(backend, "to_str") else tokenizer.get_vocab()
        # Every call with padding or truncation leaves its settings here.
        settings["vocabulary"] = {**vocabulary, "padding": None, "truncation": None}
    return settings | {"code": _code([*module.modules(), processor, tokenizer])}


def _code(parts: Iterable[Any]) -> list[str]:
    # SHA-256 of each file of a model's own code, with those that they import from beside them.
    todo = {type(part).__module__ for part in parts}
    digests: dict[str, str] = {}
    while todo:
        name = todo.pop()
        place = getattr(sys.modules.get(name), "__file__", None)
        if name in digests or place is None or not name.startswith(_CODE_OF_MODELS):
            continue
        digests[name] = hashlib.sha256(Path(place).read_bytes()).hexdigest()
        used = {str(getattr(value, "__module__", "")) for value in vars(sys.modules[name]).values()}
        todo |= {other for other in used if other.rpartition(".")[0] == name.rpartition(".")[0]}
    return sorted({*digests.values()})


def tensors_sha256(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """SHA-256 of named tensors, in whatever order, and of the settings that they are used with."""

    def compared(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if not name.endswith(_NOT_COMPARED)}

    plain = json.loads(json.dumps(settings, default=str), object_hook=compared)
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        _update(digest, name, tensor)
    return digest.hexdigest()


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    if hasattr(tensor, "__tensor_flatten__"):  # made of others, as torchao's quantised weights are
        parts, settings = tensor.__tensor_flatten__()
        digest.update(repr(settings).encode())
        for part in parts:
            _update(digest, f"{name}.{part}", getattr(tensor, part))
    else:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def model_name(model: Any) -> str:
    """What a result calls a model: its Hub id, or the name of its directory without the path to it; else its class."""
    for module in model.modules() if isinstance(model, nn.Module) else [model]:
        if name := getattr(getattr(module, "config", None), "name_or_path", None):
            return short_name(name)
    return type(model).__name__


def short_name(name: str | Path) -> str:
    """The last part of a path, which says nothing of this machine; a Hub id stays as it is."""
    is_known_id = is_hub_id(str(name)) and not Path(name).exists()
    return str(name) if is_known_id else Path(name).resolve().name


def content_key(*content: Any) -> int:
    """A key of 63 bits for what a model sees of an input, from values that JSON can hold.

    Example:
        >>> content_key("a red apple", None) == content_key("a red apple", None) != content_key("a green one", None)
        True
    """
    # Of ten million inputs two have the same key by chance once in 200,000 times; and an index of keys is an array.
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def image_content(image: str | bytes | None, root: str) -> list[Any] | None:
    """What an image is known by: its path below a folder, its size and its time of change; bytes by their hash.

    Args:
        image: Path or content of a file.
        root: The folder, as `os.path.realpath` gives it; images keep their names when it is moved.
    """
    if image is None:
        return None
    if isinstance(image, bytes):
        return [hashlib.blake2b(image, digest_size=16).hexdigest()]
    # To read every file would take the disk a second time. If another content has all three, `touch` tells it.
    name = image.removeprefix(root + os.sep)
    try:
        status = os.stat(image)
    except (OSError, ValueError):  # it is missing, or no name of a file
        return [name]
    return [name, status.st_size, status.st_mtime_ns]
