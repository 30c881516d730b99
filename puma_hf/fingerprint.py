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

# Where a checkpoint was loaded from, and by which version: the embeddings do not depend on it.
_NOT_COMPARED = ("name_or_path", "transformers_version", "__version__", "auto_map", "_commit_hash")
_TOKENIZER_SETTINGS = ("chat_template", "model_max_length", "padding_side", "truncation_side")
# Packages of code that changes while its version does not: that of a checkpoint, and ours, of which it is a copy.
_CODE_OF_MODELS = ("transformers_modules.", "puma_hf.")
_MODEL_SETTINGS = ("max_seq_length", "truncate_dim", "prompts", "default_prompt_name")


def model_fingerprint(model: Any) -> str | None:
    """SHA-256 of what a model's embeddings depend on, from the model itself: a moved directory keeps it.

    It covers the weights and their data types; the settings of every module, of the configuration, the chat template,
    the tokenizer and the image processor; the code that came with the checkpoint; and `max_seq_length`,
    `truncate_dim` and the prompts.

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
    # All weights go through the CPU, which takes seconds: embeddings of another model would cost hours, and be wrong.
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    # How much of a LoRA adapter is added, if at all, is in none of its tensors.
    lora = {
        name: [module.scaling, module.active_adapters, module.disable_adapters]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    return tensors_sha256(tensors, {**model_settings(model), **({"lora": lora} if lora else {})})


def model_settings(model: nn.Module) -> dict[str, Any]:
    """All of `model_fingerprint` but the weights: what decides how a `SentenceTransformer` sees an input."""
    modules = {
        name: {"class": type(module).__name__, **_module_settings(module)} for name, module in model.named_children()
    }
    return {**{name: _get(model, name) for name in _MODEL_SETTINGS}, "class": type(model).__name__, "modules": modules}


def tensors_sha256(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """SHA-256 of named tensors, in whatever order, and of the settings that they are used with."""
    digest = hashlib.sha256(_as_json(settings).encode())
    for name, tensor in sorted(tensors.items()):
        _update(digest, name, tensor)
    return digest.hexdigest()


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


def model_name(model: Any) -> str:
    """What a result calls a model: its Hub id, or the name of its directory without the path to it; else its class."""
    places: list[Any] = [_get(model, "config"), model]
    if isinstance(model, nn.Module):
        places += [_get(_get(child, "model"), "config") for child in model.children()]
        places += [_get(child, "config") for child in model.children()]
    for place in places:
        name = _get(place, "_name_or_path") or _get(place, "name_or_path")
        if isinstance(name, str) and name:
            return short_name(name)
    return type(model).__name__


def short_name(name: str | Path) -> str:
    """The last part of a path; a Hub id stays as it is.

    Example:
        >>> short_name("/home/me/puma-k14/"), short_name("org/puma-k14")
        ('puma-k14', 'org/puma-k14')
    """
    path = Path(name)
    is_hub_id = isinstance(name, str) and name.count("/") <= 1 and not path.exists()
    if is_hub_id and not path.is_absolute() and path.parts and path.parts[0] not in (".", "..", "~"):
        return str(name)
    return path.resolve().name


def _module_settings(module: nn.Module) -> dict[str, Any]:
    processor = _get(module, "processor")
    tokenizer = _get(processor, "tokenizer") or _get(module, "tokenizer")
    # Without torchvision a PUMA processor's video part is its settings, a dict.
    parts = {
        "settings": _get(module, "get_config_dict"),
        "config": _get(_get(module, "model"), "config") or _get(module, "config"),
        "image_processor": _get(processor, "image_processor"),
        "video_processor": _get(processor, "video_processor"),
    }
    # What is not there has no entry: fingerprints that stand in results and indexes must stay what they are.
    settings: dict[str, Any] = {name: _settings_of(part) for name, part in parts.items() if part is not None}
    settings["chat_template"] = _get(processor, "chat_template")
    settings["max_seq_length"] = _get(module, "max_seq_length")
    if tokenizer is not None:
        settings["tokenizer"] = {name: _get(tokenizer, name) for name in _TOKENIZER_SETTINGS}
        settings["vocabulary"] = _vocabulary(tokenizer)
    settings["code"] = _code([*module.modules(), processor, tokenizer])
    return settings


def _settings_of(part: Any) -> Any:
    if isinstance(part, dict):
        return part
    to_dict = _get(part, "to_dict") or part
    return to_dict() if callable(to_dict) else str(part)


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


def _vocabulary(tokenizer: Any) -> str:
    # SHA-256 of how text becomes tokens.
    backend = _get(tokenizer, "backend_tokenizer") or tokenizer
    if callable(to_str := _get(backend, "to_str")):
        content = json.loads(to_str())
        # Every call with padding or truncation leaves its settings here.
        content = {name: value for name, value in content.items() if name not in ("padding", "truncation")}
    else:
        content = tokenizer.get_vocab() if callable(_get(tokenizer, "get_vocab")) else str(tokenizer)
    return hashlib.sha256(_as_json(content).encode()).hexdigest()


def _get(owner: Any, name: str) -> Any:
    # An attribute, or None where there is none: some properties of wrapped models raise.
    try:
        return getattr(owner, name, None)
    except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError):
        return None


def _as_json(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not str(key).endswith(_NOT_COMPARED)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    if hasattr(tensor, "__tensor_flatten__"):  # made of others, as torchao's quantised weights are
        parts, settings = tensor.__tensor_flatten__()
        digest.update(repr(settings).encode())
        for part in parts:
            _update(digest, f"{name}.{part}", getattr(tensor, part))
    elif tensor.layout is not torch.strided or tensor.is_quantized:
        digest.update(repr(tensor).encode())
    else:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
