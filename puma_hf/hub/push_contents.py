"""What is inside a file that is to be published: an access token, or something other than its name says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

# Access tokens of the Hub, GitHub, GitLab, AWS, Google, Slack, OpenAI and Anthropic, and private keys.
_SECRET = re.compile(
    rb"(?<![A-Za-z0-9])(?:(?:hf_|api_org_)[A-Za-z0-9]{30,}|gh[opsur]_[A-Za-z0-9]{36}|github_pat_\w{50,}|glpat-[\w-]{20}"
    rb"|AKIA[A-Z0-9]{16}(?![A-Za-z0-9])|AIza[\w-]{35}|xox[abprs]-[A-Za-z0-9-]{20,}|sk-(?:proj-|ant-)[\w-]{32,})"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY"
)
# How a pickle begins, and the archives that one may lie in: torch.save writes a zip.
_PACKED = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x93NUMPY")
_BLOCK = 1 << 20
_OVERLAP = 256  # a secret may lie across two blocks
# Of a stray, which is refused anyway, not more than this is read.
_MAX_BYTES = 64 << 20


def holds_secret(path: Path) -> bool:
    """Whether the first 64 MiB of a file hold what looks like an access token or a private key.

    Of a safetensors file the header is searched, not the numbers.

    Example:

    ```python
    >>> from puma_hf.hub.push_contents import holds_secret

    >>> holds_secret(Path("puma-k4-mac/README.md"))  # doctest: +SKIP
    False
    ```
    """
    with path.open("rb") as file:
        left = _MAX_BYTES
        if path.suffix == ".safetensors":
            left = min(left, int.from_bytes(file.read(8), "little"))
        tail = b""
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            if _SECRET.search(tail + block):
                return True
            tail, left = block[-_OVERLAP:], left - len(block)
    return False


def content_problem(path: Path) -> str | None:
    """Why a file is not what its name says; None if it is.

    Args:
        path: A file that a push chose by its name: weights in safetensors, or text.

    Returns:
        The reason: a pickle or an archive under another name, cut off weights, JSON that is none, binary data.
    """
    with path.open("rb") as file:
        start = file.read(8)
    # The length of a safetensors header may begin with the same bytes as a pickle.
    damage = _damage(path) if path.suffix == ".safetensors" else None
    if _PACKED.match(start) and (damage is not None or path.suffix != ".safetensors"):
        return "a pickle or an archive under another name, which can run code when opened"
    if path.suffix == ".safetensors":
        return damage
    try:
        text = path.read_bytes().decode()
        if path.suffix == ".json":
            json.loads(text)
    except UnicodeDecodeError:
        return "no text, as its name says; it may be a pickle or an archive under another name"
    except ValueError as error:
        return f"no JSON, as its name says ({error})"
    return "no text, as its name says; it holds null bytes" if "\0" in text else None


def _damage(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt"):
            return None  # the header fits the size of the file: nothing lies behind or between the tensors
    except (SafetensorError, OSError) as error:
        return f"no whole safetensors file ({error})"
