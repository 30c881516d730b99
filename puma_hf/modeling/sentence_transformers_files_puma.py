"""The small files that make a PUMA directory a SentenceTransformer: its module, settings and prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MODULE_FILE = "sentence_transformers_puma.py"


def write_sentence_transformers_files(folder: Path, prompts: Mapping[str, str], *, overwrite: bool = True) -> None:
    """Write what `SentenceTransformer(folder, trust_remote_code=True)` needs beside transformers' files.

    Without these files SentenceTransformer opens a directory too, but averages all tokens instead of reading
    `[RET]`: every saved processor therefore brings them along.

    Args:
        folder: The directory.
        prompts: Named instructions for `encode(prompt_name=...)`.
        overwrite: Whether to replace files that are there already.
    """
    module_file = Path(__file__).with_name(MODULE_FILE)
    if not module_file.is_file():
        return  # remote code that AutoProcessor fetched: only the files that it imports are at hand
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
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "__version__": {name: _version(package) for name, package in {**packages, "pytorch": "torch"}.items()},
            "prompts": dict(prompts),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        if overwrite or not (folder / name).exists():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
    if overwrite or not (folder / MODULE_FILE).exists():
        shutil.copyfile(module_file, folder / MODULE_FILE)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
