"""The small files that make a PUMA directory a SentenceTransformer: its module, settings and prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils.hub import cached_file

if TYPE_CHECKING:
    # Never run, but read by transformers, which copies and downloads what a processor's code imports: wherever this
    # file is, the module is beside it, and every save has it.
    from .sentence_transformers_puma import PumaTransformer  # noqa: F401

MODULE_FILE = "sentence_transformers_puma.py"
SETTINGS_FILE = "config_sentence_transformers.json"
_PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def read_sentence_transformers_settings(source: Any, **options: Any) -> dict[str, Any] | None:
    """Prompts and other settings that a directory or Hub repository has for SentenceTransformer, or `None`.

    Args:
        source: Folder or Hub id.
        options: Those of `from_pretrained`.
    """
    place = {name: options[name] for name in _PLACE if options.get(name) is not None}
    missing_is_none = dict.fromkeys(("missing_entries", "connection_errors", "gated_repo"), False)
    quiet = {f"_raise_exceptions_for_{name}": value for name, value in missing_is_none.items()}
    path = cached_file(source, SETTINGS_FILE, **place, **quiet)
    return None if path is None else dict(json.loads(Path(path).read_text(encoding="utf-8")))


def write_sentence_transformers_files(
    folder: Path,
    prompts: Mapping[str, str] | None,
    *,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = True,
) -> None:
    """Write what `SentenceTransformer(folder, trust_remote_code=True)` needs beside transformers' files.

    Without these files SentenceTransformer opens a directory too, but averages all tokens instead of reading
    `[RET]`: every saved processor therefore brings them along.

    Args:
        folder: The directory.
        prompts: Named instructions for `encode(prompt_name=...)`; with `None` those of `settings`.
        settings: What the directory that the processor came from has in `config_sentence_transformers.json`. Without
            prompts and settings that file is not written.
        overwrite: Whether to replace files that are there already.

    Raises:
        FileNotFoundError: If the code of the module is not beside this file.
    """
    module_file = Path(__file__).with_name(MODULE_FILE)
    if not module_file.is_file():
        raise FileNotFoundError(
            f"{module_file} is missing, without which SentenceTransformer does not open {folder}. Copy it there from "
            "the model's repository, or load the processor with puma_hf.PumaProcessor."
        )
    output = {"method": "forward", "method_output_name": "embeddings"}
    kinds = ("text", "image", "image+text", "video", "video+text")
    packages = {"sentence_transformers": "sentence-transformers", "transformers": "transformers"}
    files = {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": f"{module_file.stem}.PumaTransformer"}],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {
                **dict.fromkeys(kinds, output),
                "message": {**output, "format": "structured"},
            },
            "module_output_name": "sentence_embedding",
            "unpad_inputs": False,
        },
        SETTINGS_FILE: {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            **(settings or {}),
            "__version__": {name: _version(package) for name, package in {**packages, "pytorch": "torch"}.items()},
            **({} if prompts is None else {"prompts": dict(prompts)}),
        },
    }
    if prompts is None and settings is None:
        del files[SETTINGS_FILE]
    for name, content in files.items():
        if overwrite or not (folder / name).exists():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
    for source in (module_file, *map(Path, get_relative_import_files(module_file))):
        if overwrite or not (folder / source.name).exists():
            shutil.copyfile(source, folder / source.name)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
