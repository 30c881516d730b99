"""What a folder that was made from another dataset says of itself: where its images are, and what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puma_hf.data.mbeir_problems import MBEIRFormatError

NANO_FILE = "nano.json"  # beside query/, cand_pool/ and qrels/
IMPORT_FILE = "import.json"

_BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class Origin:
    """What such a folder says of itself.

    Args:
        path: The JSON file that says it.
        image_root: Folder of its images.
        settings: What it was made with.
        content_hash: SHA-256 of what it holds, or None.
        files: SHA-256 of each of its files, by its path in the folder.
    """

    path: Path
    image_root: Path
    settings: Mapping[str, Any]
    content_hash: str | None
    files: Mapping[str, str]


def read_origin(folder: Path) -> Origin | None:
    """What a nano or imported folder says of itself.

    Args:
        folder: A folder in M-BEIR's layout.

    Returns:
        What it says, or None if it is a plain folder.

    Raises:
        MBEIRFormatError: If the file cannot be read.
    """
    path = next((folder / name for name in (NANO_FILE, IMPORT_FILE) if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        values = json.loads(path.read_bytes())
        # A relative image root counts from the folder, so that both can move together.
        image_root = folder.resolve() / values["image_root"]
        return Origin(path, image_root.resolve(), values["settings"], values["content_hash"], values["files"])
    except (ValueError, TypeError, KeyError) as error:
        raise MBEIRFormatError(
            f"{path} does not say what the folder holds ({type(error).__name__}: {error}); remove the folder and "
            "build it anew",
            "broken JSON",
        ) from error


def write_origin(path: Path, image_root: str, settings: Mapping[str, Any], *, content_hash: str | None = None) -> None:
    """Write what a folder says of itself; its other files must be there.

    Args:
        path: `nano.json` or `import.json` in the folder.
        image_root: Folder of its images, absolute or relative to the folder.
        settings: What it was made with.
        content_hash: SHA-256 of what it holds, or None.
    """
    # Only a content hash needs them, and an imported pool has gigabytes.
    files = [] if content_hash is None else [file for file in path.parent.rglob("*") if file.is_file()]
    values = {
        "image_root": image_root,
        "settings": dict(settings),
        "content_hash": content_hash,
        "files": {file.relative_to(path.parent).as_posix(): file_hash(file) for file in sorted(files)},
    }
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def verified_content_hash(origin: Origin) -> str | None:
    """The content hash, if the files are still those that it was made of.

    Args:
        origin: What the folder says of itself.

    Returns:
        The hash, or None if the folder has none.

    Raises:
        MBEIRFormatError: If a file was changed or is gone.
    """
    if origin.content_hash is not None:
        for name, expected in origin.files.items():
            file = origin.path.parent / name
            if not file.is_file() or file_hash(file) != expected:
                raise MBEIRFormatError(
                    f"{file} was changed or removed after {origin.path} was written, so its content_hash does not "
                    "hold; remove the folder and build it anew",
                    "changed file",
                )
    return origin.content_hash


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def text_hash(parts: Iterable[object]) -> str:
    """SHA-256 of a sequence of values, as hexadecimal digits; values with another split are another hash."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()
