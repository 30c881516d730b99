"""What of a directory goes to the Hub: the files that load, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from puma_hf.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint
from puma_hf.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FILE, LOCK_FILE, is_adapter_directory
from puma_hf.hub.card_results import RECIPE_NAMES, RESULT_NAMES
from puma_hf.hub.push_contents import content_problem, holds_secret

CARD = "README.md"

_PROCESSOR_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.json",
    }
)
_SENTENCE_TRANSFORMERS_FILES = frozenset(
    {"config_sentence_transformers.json", "modules.json", "sentence_bert_config.json"}
)
_EITHER = _PROCESSOR_FILES | _SENTENCE_TRANSFORMERS_FILES | {"LICENSE", "NOTICE", *RESULT_NAMES}
# What our own commands write beside a model, and nobody needs who loads it.
_LEFT_OUT = (
    *("results.md", "sweep.md", "sweep.png", *RECIPE_NAMES, "puma_manifest.json", LOCK_FILE),
    ".gitattributes",  # the Hub has its own
    *(".DS_Store", "Thumbs.db", "desktop.ini"),  # what macOS and Windows leave in a folder that was looked at
)
_TRAINING_ARGUMENTS = "training_args.bin"  # a pickle, which the Trainer puts into each save
_LEFT_OUT_FOLDERS = re.compile(r"checkpoint-\d+|__pycache__|\.cache")  # the last is what a download leaves
_SECRET_NAMES = (
    *(".env*", "*token*", "*secret*", "*credential*", "*password*", "*.key", "*.pem", "*.p12", "*.pfx"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", ".git", ".ssh", ".aws"),
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")


@dataclass(frozen=True)
class PushFiles:
    """The files of a directory that make it load, and what stays here.

    Args:
        directory: The directory.
        names: Files to upload, in order; the card is not among them, as it is written anew.
        left_out: Files and folders that training and evaluation left there, and that nobody needs who loads it.
        is_adapter: Whether the directory holds a LoRA adapter alone.
    """

    directory: Path
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    is_adapter: bool


def files_to_push(directory: str | Path) -> PushFiles:
    """Choose the files of a PUMA directory, or of a LoRA adapter's, that the Hub gets.

    Args:
        directory: The directory.

    Returns:
        The files; what is not needed and known to be harmless is named apart.

    Raises:
        FileNotFoundError: If it is no such directory, or lacks weights.
        ValueError: If it holds a pickle, under whatever name, something that looks like a secret, a link, or a file
            that is not known; all are named.
    """
    folder = Path(directory)
    is_adapter = is_adapter_directory(directory)
    allowed = {*_EITHER, *_weight_files(folder, is_adapter), *_code_files(folder)}
    chosen, left_out, bad = [], [], []
    for path in sorted(folder.iterdir()):
        if path.name == _TRAINING_ARGUMENTS:
            left_out.append(path.name)
        elif problem := _problem(path):
            bad.append(f"{path.name}: {problem}")
        elif path.name == CARD and path.is_file():
            continue  # it is written anew
        elif path.is_file() and path.name in allowed:
            chosen.append(path.name)
            bad += [f"{path.name}: {problem}"] if (problem := content_problem(path)) else []
        elif _is_left_out(path):
            left_out.append(path.name)
        else:
            bad.append(f"{path.name}: not part of a model, so loading does not need it")
    if bad:
        raise ValueError(
            f"{str(directory)!r} holds {len(bad)} entries that must not be published. Move them elsewhere and push "
            "again:\n- " + "\n- ".join(bad)
        )
    return PushFiles(folder, tuple(chosen), tuple(left_out), is_adapter)


def loss_files() -> dict[str, str]:
    """The losses as they lie flat beside the model's code, by file name: fine-tuning goes on from the Hub alone."""
    sources = sorted((Path(__file__).parents[1] / "losses").glob("*_puma.py"))
    return {path.name: path.read_text(encoding="utf-8").replace("from puma_hf.modeling.", "from .") for path in sources}


def is_model_file(name: str) -> bool:
    """Whether a file of a repository has a name that a push of ours gives: an older one may then be removed."""
    shard = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json", name)
    adapter = name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FILE)
    results = re.fullmatch(r"(results|sweep)-\d+\.json", name)
    return bool(shard or results) or adapter or name in _EITHER or name == "config.json" or name.endswith("_puma.py")


def _problem(path: Path) -> str | None:
    """Why an entry must not be published, whatever it is for; None if nothing speaks against it."""
    name = path.name.lower()
    if path.is_symlink():
        return "a link, which may lead out of the directory; copy what it points to"
    if path.name not in _EITHER and any(fnmatch(name, pattern) for pattern in _SECRET_NAMES):
        return "looks like a secret"
    if name.endswith(_PICKLES):
        return "a pickle, which can run code when opened"
    if not path.is_file() and not path.is_dir():
        return "neither a file nor a folder"
    if path.is_file() and holds_secret(path):
        return "holds what looks like an access token or a private key"
    return None


def _is_left_out(path: Path) -> bool:
    if path.is_file():
        return path.name in _LEFT_OUT
    holds_results = any((path / name).is_file() for name in RESULT_NAMES)
    return holds_results or _LEFT_OUT_FOLDERS.fullmatch(path.name) is not None


def _weight_files(folder: Path, is_adapter: bool) -> set[str]:
    """The names of the weights and of the configuration that tells how to read them."""
    if is_adapter:
        names = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
        optional = {BASE_FILE}
    elif (folder / INDEX_NAME).is_file():
        names = {"config.json", INDEX_NAME, *open_checkpoint(folder).weight_files.values()}
        optional = set()
    else:
        names, optional = {"config.json", SINGLE_NAME}, set()
    if absent := sorted(name for name in names if not (folder / name).is_file()):
        raise FileNotFoundError(f"{str(folder)!r} lacks {', '.join(absent)}. Write the directory again.")
    return names | optional


def _code_files(folder: Path) -> set[str]:
    """Python files that a loader runs: those named in the settings, and what they import; and copies of ours."""
    own = {path.name for path in (Path(__file__).parents[1] / "modeling").glob("*_puma.py")}
    files = [folder / f"{name}.py" for name in set(_named_modules(folder)) if (folder / f"{name}.py").is_file()]
    try:
        imported = [Path(name).name for path in files for name in get_relative_import_files(path)]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{str(folder)!r} lacks {Path(str(error.filename)).name}, which its code imports. "
            "Write the directory again."
        ) from error
    return {*own, *loss_files(), *imported, *(path.name for path in files)}


def _named_modules(folder: Path) -> Iterator[str]:
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            yield from _referred_to(folder / name)
    if (folder / "modules.json").is_file():
        try:
            modules = [str(module["type"]) for module in read_json(folder / "modules.json")]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{str(folder / 'modules.json')!r} does not list modules with their type. Write the directory again."
            ) from error
        yield from (module.partition(".")[0] for module in modules)


def _referred_to(path: Path) -> Iterator[str]:
    """The modules that `auto_map` names."""
    settings = read_json(path)
    auto_map = settings.get("auto_map") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(auto_map or {}, dict):
        raise ValueError(f"{str(path)!r} must hold names with values, and so must its auto_map. Write it again.")
    for value in (auto_map or {}).values():
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str):
                if "--" in reference:
                    raise ValueError(
                        f"{str(path)!r} runs code of another repository ({reference}), which may change or go. Write "
                        "the directory again with puma-hf prune or merge, or name the file that lies in it."
                    )
                yield reference.partition(".")[0]


def read_json(path: Path) -> Any:
    """What a JSON file of a directory holds; a ValueError names the file that is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}). Write the directory again.") from error
