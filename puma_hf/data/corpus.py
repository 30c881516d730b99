"""Single items of a corpus of one's own: a folder of images, a file of texts or images, a dataset."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from puma_hf.data.images import BrokenImageError, ImageFiles
from puma_hf.data.mbeir_problems import SHOWN
from puma_hf.data.nli import NLI_COLUMNS, nli_texts
from puma_hf.data.tables import read_table, without_decoding
from puma_hf.modeling.image_inputs_puma import is_image_name

logger = logging.getLogger(__name__)

COLUMNS = ("text", "image", "instruction")

Item = tuple[str | None, str | None, str | None]  # as COLUMNS


def folder_items(folder: Path) -> Iterator[Item]:
    """Every image below a folder, by name; hidden files and folders are left out.

    Args:
        folder: The folder.

    Yields:
        Items of an image each.

    Raises:
        ValueError: If there is no image; or, at the end, if files are not what their names say.
    """
    found = 0
    left_out: Counter[str] = Counter()
    images = ImageFiles(None)
    broken: list[BrokenImageError] = []
    for parent, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            if is_image_name(name):
                found += 1
                path = os.path.join(parent, name)
                try:
                    image = images.find(path, path)
                except BrokenImageError as error:
                    broken.append(error)  # who has to mend some wants to know of all
                else:
                    yield None, image, None
            else:
                left_out[os.path.splitext(name)[1].lower() or "no ending"] += 1
    if not found:
        raise ValueError(
            f"{folder} holds no image (such as .jpg, .png or .webp) and is no M-BEIR folder, which has query/ and "
            "cand_pool/. Name a folder of images, or a file."
        )
    if len(broken) == 1:
        raise broken[0]
    if broken:
        first = f". The first {SHOWN}" if len(broken) > SHOWN else ""
        lines = "".join(f"\n- {error}" for error in broken[:SHOWN])
        raise BrokenImageError(f"{folder}: {len(broken)} of {found} images cannot be used{first}:{lines}")
    if left_out:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in left_out.most_common())
        logger.info("%s: left out what is no image here: %s", folder, kinds)


def file_items(path: Path) -> Iterator[Item]:
    """The items of a file.

    Args:
        path: A file that `read_table` reads, with columns among text, image and instruction, or those of NLI.
            Images are relative to its folder and inside of it.

    Yields:
        Items in the file's order.

    Raises:
        FileNotFoundError: If the file or an image is missing.
        ValueError: If a row is wrong; the message names the line.
    """
    images = ImageFiles(path.parent)
    ignored: dict[str, None] = {}
    for where, row in read_table(path):
        yield from _row_items(row, where, images, ignored)
    _log_ignored(str(path), ignored)


def dataset_items(rows: datasets.Dataset) -> Iterator[Item]:
    """The items of a dataset.

    Args:
        rows: With columns among text, image (paths) and instruction, those of NLI, or one column `item` of them,
            as `load_items` makes it.

    Yields:
        Items in the dataset's order.

    Raises:
        FileNotFoundError: If an image is missing.
        ValueError: If the columns or a row are wrong; the message names the row.
    """
    images = ImageFiles(None)
    ignored: dict[str, None] = {}
    for number, row in enumerate(without_decoding(rows), start=1):
        if isinstance(row.get("item"), dict):
            ignored |= dict.fromkeys(name for name in row if name != "item")
            row = row["item"]
        yield from _row_items(row, f"the dataset, row {number}", images, ignored)
    _log_ignored("The dataset", ignored)


def _row_items(row: dict[str, Any], where: str, images: ImageFiles, ignored: dict[str, None]) -> Iterator[Item]:
    if "text" not in row and "image" not in row:
        if set(NLI_COLUMNS) <= set(row):
            ignored |= dict.fromkeys(name for name in row if name not in NLI_COLUMNS)
            yield from ((text, None, None) for text in nli_texts(row, where))
            return
        raise ValueError(
            f"{where}: no column text or image, nor {', '.join(NLI_COLUMNS)}. The columns here are "
            f"{', '.join(map(str, row)) or 'none'}: rename those that hold them, or leave the line out."
        )
    ignored |= dict.fromkeys(name for name in row if name not in COLUMNS)
    text, instruction = (_text(row, name, where) for name in ("text", "instruction"))
    image = row.get("image")
    image = None if image is None or image == "" else images.find(image, where)
    if text is None and image is None:
        raise ValueError(f"{where}: text and image are both empty. Fill one of them or leave the line out.")
    yield text, image, instruction


def _text(row: dict[str, Any], name: str, where: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {value!r}, must be a text or null.")
    return value.strip() or None


def _log_ignored(source: str, ignored: dict[str, None]) -> None:
    if ignored:
        logger.info("%s: ignored the columns %s", source, ", ".join(map(str, ignored)))
