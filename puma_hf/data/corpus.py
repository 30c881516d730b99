"""Single items of a corpus of one's own: a folder of images, a file of texts or images, a dataset."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from puma_hf.data.images import BrokenImageError, ImageFiles
from puma_hf.data.mbeir_problems import SHOWN
from puma_hf.data.pair_columns import CAPTION_NAMES
from puma_hf.data.pair_rows import Offenders, named_tables
from puma_hf.data.tables import Line, read_lines, without_decoding
from puma_hf.modeling.image_inputs_puma import is_image_name
from puma_hf.values import cut, is_unicode, shown

logger = logging.getLogger(__name__)

NLI_COLUMNS = ("sent0", "sent1", "hard_neg")  # as in SimCSE's nli_for_simcse.csv, which PUMA's first stage reads

COLUMNS = ("text", "image", "instruction")

Item = tuple[str | None, str | None, str | None]  # as COLUMNS

# What is read of a Parquet file: our names, BEIR's, those of the Hub's folders of images, NLI's.
_READ = ("id", *COLUMNS, "_id", "title", "file_name", *CAPTION_NAMES, *NLI_COLUMNS)
_BROKEN_LINK = "link to nothing"


class LeftOut(Offenders):
    """The files that are left out of a folder of images, counted by kind."""

    def __str__(self) -> str:
        links = cut(", ".join(self.first.get(_BROKEN_LINK, ())))
        return f"{super().__str__()}{f'; links to nothing: {links}' if links else ''}"

    def tell(self, folder: Path) -> None:
        """Log them, if there are any."""
        if self.counts:
            logger.info("%s: left out what is no image here: %s", folder, self)

    def no_images(self, folder: Path) -> ValueError:
        """The error of a folder with nothing else."""
        rest = f" Left out: {self}." if self.counts else ""
        return ValueError(
            f"{folder} holds no image (such as .jpg, .png or .webp) and is no M-BEIR folder, which has query/ and "
            f"cand_pool/ with files called mbeir_*.jsonl.{rest} Name a folder of images, or a file."
        )


def image_files(folder: Path, left_out: LeftOut) -> Iterator[str]:
    """Every image below a folder, by name; a link is one if it leads to a file, and linked folders are not entered.

    Args:
        folder: The folder.
        left_out: Counts what is left out, by kind; what is hidden is not counted.

    Yields:
        Paths below the folder.
    """
    for parent, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        # Of linked folders two may lead into each other.
        links = [name for name in names if os.path.islink(os.path.join(parent, name))]
        for name in (*links, *sorted(name for name in files if not name.startswith("."))):
            path = os.path.join(parent, name)
            if name in links:
                kind = "linked folder"
            elif not is_image_name(name):
                kind = os.path.splitext(name)[1].lower() or "no ending"
            elif not is_unicode(path):
                kind = "name that is not UTF-8"
            elif not os.path.exists(path):
                kind = _BROKEN_LINK
            elif not os.path.isfile(path):
                kind = "pipe or device"  # to open one may take for ever
            else:
                yield os.path.relpath(path, folder)
                continue
            left_out.add(kind, repr(os.path.relpath(path, folder)))


def image_table(folder: Path) -> Path | None:
    """The table that describes the images of a folder, such as `metadata.csv` with columns `file_name` and `text`.

    Args:
        folder: The folder.

    Returns:
        The table, or None if there is none whose first row with a file's name names an image.

    Raises:
        ValueError: If there are several.
    """
    found = []
    for table in named_tables(folder):
        rows = (line.columns for line in item_lines(table) if line.error is None)
        if "image" in next((row for row in rows if row.get("file_name", True)), {}):
            found.append(table)
    if len(found) > 1:
        names = ", ".join(table.name for table in found)
        raise ValueError(f"{folder} must hold one table of its images, and has {names}. Name the one that is meant.")
    if found:
        logger.info("%s: read by its table %s; images that it does not name are left out", folder, found[0].name)
    return found[0] if found else None


def item_lines(path: Path) -> Iterator[Line]:
    """The lines of a table by our names, as the first good one tells them that does not leave `file_name` empty.

    `file_name` is an image if it names one, with a caption, as in the Hub's folders of images; `_id` is an id, and a
    title stands before its text, as in BEIR's corpora.
    """
    names: dict[str, str] | None = None
    for line in read_lines(path, _READ):
        if line.error is None:
            names = _names(line.columns) if names is None else names
            line = line._replace(columns=_renamed(line.columns, names or {}))
        yield line


def _names(first: Mapping[str, Any]) -> dict[str, str] | None:
    """Our names of columns by theirs; None if a later row has to tell them, as `file_name` is empty."""
    if "file_name" in first and not first["file_name"]:
        return None
    names = {}
    if "_id" in first and "text" in first and "id" not in first:
        names["_id"] = "id"
    if "image" not in first and is_image_name(str(first.get("file_name"))):
        names["file_name"] = "image"
        caption = next((name for name in CAPTION_NAMES if name in first), None)
        names |= {caption: "text"} if caption and "text" not in first else {}
    return names


def _renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    item = {names.get(name, name): value for name, value in row.items()}
    title, text = item.get("title"), item.get("text")
    if "_id" in names and isinstance(title, str) and isinstance(text, str | None):
        item["text"] = f"{title} {text or ''}".strip()
        del item["title"]
    return item


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
    left_out = LeftOut()
    images = ImageFiles(None)
    broken: list[BrokenImageError] = []
    for name in image_files(folder, left_out):
        found += 1
        path = os.path.join(folder, name)
        try:
            image = images.find(path, path)
        except BrokenImageError as error:
            broken.append(error)  # who has to mend some wants to know of all
        else:
            yield None, image, None
    if not found:
        raise left_out.no_images(folder)
    if len(broken) == 1:
        raise broken[0]
    if broken:
        first = f". The first {SHOWN}" if len(broken) > SHOWN else ""
        lines = "".join(f"\n- {error}" for error in broken[:SHOWN])
        raise BrokenImageError(f"{folder}: {len(broken)} of {found} images cannot be used{first}:{lines}")
    left_out.tell(folder)


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
    for line in item_lines(path):
        if line.error is not None:
            raise line.error
        yield from _row_items(line.columns, line.where, images, ignored)
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


def _row_items(row: Mapping[str, Any], where: str, images: ImageFiles, ignored: dict[str, None]) -> Iterator[Item]:
    if "text" not in row and "image" not in row:
        if set(NLI_COLUMNS) <= set(row):
            ignored |= dict.fromkeys(name for name in row if name not in NLI_COLUMNS)
            for name in NLI_COLUMNS:
                if (text := _text(row, name, where)) is None:
                    raise ValueError(f"{where}: {name} is {shown(row[name])}, must be a text. Mend or remove the line.")
                yield text, None, None
            return
        raise ValueError(
            f"{where}: no column text or image, nor {', '.join(NLI_COLUMNS)}. The columns here are "
            f"{cut(', '.join(map(str, row))) or 'none'}: rename those that hold them, or leave the line out."
        )
    ignored |= dict.fromkeys(name for name in row if name not in COLUMNS)
    text, instruction = (_text(row, name, where) for name in ("text", "instruction"))
    image = row.get("image")
    image = None if image is None or image == "" else images.find(image, where)
    if text is None and image is None:
        raise ValueError(f"{where}: text and image are both empty. Fill one of them or leave the line out.")
    yield text, image, instruction


def _text(row: Mapping[str, Any], name: str, where: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {shown(value)}, must be a text or null.")
    if not is_unicode(value):
        raise ValueError(f"{where}: {name} is {shown(value)}, which holds half a character. Mend its encoding.")
    return value.strip() or None


def _log_ignored(source: str, ignored: dict[str, None]) -> None:
    if ignored:
        logger.info("%s: ignored the columns %s", source, cut(", ".join(map(str, ignored))))
