"""Pictures that an index holds itself, named by their content: two of one name are no problem, equal ones are one."""

from __future__ import annotations

import io
from hashlib import blake2b
from pathlib import Path

from puma_hf.files import write_whole
from puma_hf.modeling.image_inputs_puma import open_image

IMAGES = "images"  # folder of them


def keep_picture(folder: Path, content: bytes) -> str:
    """Write a picture below an index, if it is not there yet.

    Args:
        folder: The index.
        content: The bytes of the picture's file.

    Returns:
        Its path below the index.

    Raises:
        OSError: If it is no picture, or the disk is full.
    """
    with open_image(io.BytesIO(content)) as opened:
        kind = (opened.format or "image").lower()
    name = f"{IMAGES}/{blake2b(content, digest_size=16).hexdigest()}.{kind}"
    path = folder / name
    if not path.is_file() or path.stat().st_size != len(content):  # cut off when the machine lost power
        write_whole(path, content, sync=False)
    return name
