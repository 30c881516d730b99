"""The small files that make a PUMA directory a SentenceTransformer: its module, settings and prompts."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

logger = logging.getLogger(__name__)

MODULE_FILE = "sentence_transformers_puma.py"


def write_sentence_transformers_files(
    folder: Path, prompts: Mapping[str, str] | None, *, overwrite: bool = True
) -> None:
    """Write what `SentenceTransformer(folder, trust_remote_code=True)` needs beside transformers' files.

    Without these files SentenceTransformer opens a directory too, but averages all tokens instead of reading
    `[RET]`: every saved processor therefore brings them along.

    Args:
        folder: The directory.
        prompts: Named instructions for `encode(prompt_name=...)`; with `None` their file is not written.
        overwrite: Whether to replace files that are there already.
    """
    module_file = Path(__file__).with_name(MODULE_FILE)
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
            "prompts": dict(prompts or {}),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    if prompts is None:
        del files["config_sentence_transformers.json"]
    for name, content in files.items():
        if overwrite or not (folder / name).exists():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
    if module_file.is_file():
        for source in (module_file, *map(Path, get_relative_import_files(module_file))):
            if overwrite or not (folder / source.name).exists():
                shutil.copyfile(source, folder / source.name)
    if not (folder / MODULE_FILE).exists():
        # AutoProcessor fetches only what it imports. modules.json makes SentenceTransformer say that a file is
        # missing, where without it the model would open with mean pooling, which is silently wrong.
        logger.warning(
            "%s lacks %s, which SentenceTransformer needs. Copy it from the model's repository, or save with "
            "SentenceTransformer(...).save_pretrained instead.",
            folder,
            MODULE_FILE,
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
