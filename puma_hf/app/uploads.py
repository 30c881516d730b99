"""Which files a query may name: pictures that were uploaded, and nothing else of the server or of the network."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_MOST_BYTES = 1 << 30  # that uploads take together; each is gone within the hour and a quarter
_BYTES_OF_A_FILE = 1 << 16  # that a file counts for at least, so that small ones are no way around


def is_full(uploads: Path) -> bool:
    """Whether what was uploaded takes so much of the disk that nobody may upload more for now."""
    left = _MOST_BYTES
    for folder, _, names in os.walk(uploads):
        for name in names:
            try:
                left -= max(os.stat(os.path.join(folder, name)).st_size, _BYTES_OF_A_FILE)
            except OSError:  # it was deleted meanwhile
                continue
            if left <= 0:
                return True
    return False


def only_uploads(page: Any, picture: Any, others: Iterable[Any], uploads: Path) -> None:
    """Bind the fields of a page to the files that were uploaded to it.

    Gradio lets the value of any field be a file by its path. It copies that file to where it serves files from, and it
    asks whether the file was uploaded only of a page that its own server has launched. It fetches the file of an
    address, too, and it opens a picture before the page could say what is wrong with it.

    Args:
        page: Gradio's blocks.
        picture: The field of a picture.
        others: The other fields, which no file can be.
        uploads: Where Gradio puts what was uploaded.
    """
    page.has_launched = True
    allowed = uploads.resolve()

    def checked(path: Any) -> str:
        found = Path(path or "").resolve()
        if not found.is_relative_to(allowed):
            raise ValueError("The picture of a query was not uploaded.")
        return str(found)

    def path_of(payload: Any) -> str | None:
        return None if payload is None else checked(payload.path)

    async def uploaded(path: Any) -> str | None:
        return None if path is None else checked(path)

    async def no_file(path: Any) -> None:
        raise ValueError("This field takes no file.")

    picture.preprocess = path_of
    picture.async_move_resource_to_block_cache = uploaded
    for field in others:
        field.async_move_resource_to_block_cache = no_file
