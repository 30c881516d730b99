"""Image files that rows name: where they may be, and whether they can be read."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from puma_hf.data.records import Problems, item_lines, wrong
from puma_hf.files import write_whole
from puma_hf.modeling.inputs_puma import MAX_ASPECT_RATIO, is_image_name, load_rgb_image, open_image, reason_of
from puma_hf.settings import cut, is_unicode, shown

logger = logging.getLogger(__name__)

# What `datasets` calls the table of a folder of images, and what others do.
TABLE_STEMS, TABLE_SUFFIXES = ("metadata", "captions"), (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_BROKEN_LINK = "link to nothing"

# Absolute, of another drive, climbing with `..`, or holding a NUL byte: none can be a file of the dataset.
_LEAVES_FOLDER = re.compile(r"^[/\\]|^[A-Za-z]:|(?:^|[/\\])\.\.(?:[/\\]|$)|\0")


class BrokenImageError(ValueError):
    """A file is there, but no model can take it as an image."""


class InsideImageError(ValueError):
    """An image is inside of a dataset, and nothing says where to save it."""


class ImageFinder:
    """Turns the path of an image into an absolute one, which may not leave a folder: somebody else may have written it.

    Folders are resolved once, so a pool of millions costs one `lstat` an image.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.realpath(root))
        self._folders: dict[str, str] = {}

    def find(self, img_path: str, where: str) -> str:
        """Absolute path of an image from its path relative to the root.

        Raises:
            MBEIRFormatError: If the path is absolute, climbs out with `..`, or passes a symbolic link to the outside.
            FileNotFoundError: If there is no such regular file.
        """
        if _LEAVES_FOLDER.search(img_path):
            remedy = "write paths relative to it, without '..', or move the file that names them up"
            what = f"image path {shown(img_path)} leaves {self._root}; images must be below it: {remedy}"
            raise wrong(where, what, "image outside the folder")
        folder, name = os.path.split(img_path)
        try:
            img_path.encode()  # JSON may hold half a character, which nobody could show, though a file may be called so
            if folder not in self._folders:
                self._folders[folder] = self._inside(self._root / folder, img_path, where)
            full = os.path.join(self._folders[folder], name)
            mode = os.lstat(full).st_mode
            if stat.S_ISLNK(mode):
                full = self._inside(Path(full), img_path, where)
                mode = os.lstat(full).st_mode
        except (OSError, UnicodeEncodeError):
            mode = 0
        if not stat.S_ISREG(mode):
            what = f"image {shown(img_path)} is not a file below {self._root}"
            remedy = "M-BEIR's may be elsewhere: MBEIR(..., image_root=...), in Python alone"
            raise FileNotFoundError(f"{where}: {what}. Check the path; {remedy}")
        return full

    def _inside(self, path: Path, img_path: str, where: str) -> str:
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(self._root):
            what = f"image path {shown(img_path)} passes a symbolic link that leaves {self._root}"
            remedy = "keep the files below it (hf download --local-dir FOLDER writes files instead of links), or name "
            remedy += "their real folder: MBEIR(..., image_root=...), in Python alone"
            raise wrong(where, f"{what}; {remedy}", "image outside the folder")
        return str(real)


class ImageFiles:
    """Turns the image of a row into the absolute path of an image file that can be read.

    Args:
        folder: The folder of the file whose rows name images, which they may not leave; None if any path will do.
        decode: Whether to decode each image; else only its header is read, and damage further in is found when
            a batch needs the image.
        save_to: Folder for images that are inside of a dataset; without one they are refused.
        dry: Whether to save nothing there, but to look at the images all the same.
    """

    def __init__(
        self, folder: Path | None, *, decode: bool = False, save_to: Path | None = None, dry: bool = False
    ) -> None:
        self._root = None if folder is None else os.path.realpath(folder)
        self._finder = None if folder is None else ImageFinder(folder)
        self._decode = decode
        self._save_to = None if save_to is None else Path(os.path.abspath(save_to))
        self._dry = dry
        self.sizes: dict[str, tuple[int, int]] = {}  # width and height of each path that was found

    def find(self, value: Any, where: str) -> str:
        """The absolute path of an image, which is a path or an Arrow image `{"bytes": ..., "path": ...}`.

        Raises:
            BrokenImageError: If the file cannot be read as an image that a model takes.
            FileNotFoundError: If there is no such file.
            InsideImageError: If it is bytes, and there is no folder to save them to.
            ValueError: If the value is no path, or one that leaves the folder.
        """
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            return self._save(value["bytes"], where)
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str):
            raise ValueError(f"{where}: image is {shown(value)}, must be the path of a file, or null.")
        if "\0" in path or not is_unicode(path):
            what = "a NUL byte" if "\0" in path else "half a character"
            raise ValueError(f"{where}: image {shown(path)} has {what}, which no path can have.")
        if self._finder is None or self._root is None:
            full = os.path.abspath(path)
            if not os.path.isfile(full):
                raise FileNotFoundError(f"{where}: image {shown(full)} is not a file. Check the path.")
        else:
            full = os.path.normpath(os.path.join(self._root, path))
            full = self._finder.find(os.path.relpath(full, self._root), where)
        if full not in self.sizes:
            self.sizes[full] = self._size(full, repr(full), where)[0]
        return full

    def _save(self, content: bytes, where: str) -> str:
        """The path of a file with the bytes of an image, named by their hash."""
        if self._save_to is None:
            what = "the image is inside the dataset, must be the path of a file, which is read when a batch needs it"
            raise InsideImageError(f"{where}: {what}. Save the images to a folder, and name that or their paths.")
        size, kind = self._size(io.BytesIO(content), f"the image inside ({len(content)} bytes)", where)
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        path = self._save_to / f"{digest}.{kind}"
        if not self._dry and not path.is_file():
            write_whole(path, content, sync=False)
        self.sizes[str(path)] = size
        return str(path)

    def _size(self, source: Any, name: str, where: str) -> tuple[tuple[int, int], str]:
        """Width, height and format."""
        try:
            with warnings.catch_warnings(action="ignore"), open_image(source) as image:
                size, kind = image.size, (image.format or "png").lower()
        except Exception as error:  # Pillow's decoders raise errors of many types on damaged files.
            what = f"{name} cannot be read as an image ({reason_of(error)})"
            raise BrokenImageError(f"{where}: {what}. Replace it or leave it out.") from error
        # What the processor would refuse later; the header tells it.
        pixels = f"{where}: {name} has {size[0]} x {size[1]} pixels"
        if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
            remedy = "Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust its source."
            raise BrokenImageError(f"{pixels}, more than Pillow's limit of {Image.MAX_IMAGE_PIXELS}. {remedy}")
        if max(size) > MAX_ASPECT_RATIO * min(size):
            most = f"Qwen2-VL takes at most {MAX_ASPECT_RATIO} times as long as wide"
            raise BrokenImageError(f"{pixels}; {most}. Crop it or leave it out.")
        if self._decode:
            try:
                load_rgb_image(source.getvalue() if isinstance(source, io.BytesIO) else source, where)
            except ValueError as error:
                raise BrokenImageError(str(error)) from error
        return size, kind


class LeftOut(Problems):
    """The files that are left out of a folder of images, counted by kind."""

    def __str__(self) -> str:
        links = cut(", ".join(self.first.get(_BROKEN_LINK, ())))
        return f"{super().__str__()}{f'; links to nothing: {links}' if links else ''}"

    def tell(self, folder: Path) -> None:
        """Log them, if there are any."""
        if self:
            logger.info("%s: left out what is no image here: %s", folder, self)

    def no_images(self, folder: Path) -> ValueError:
        """The error of a folder with nothing else."""
        rest = f" Left out: {self}." if self else ""
        return ValueError(
            f"{folder} holds no image (such as .jpg, .png or .webp) and is no M-BEIR folder, which has query/ and "
            f"cand_pool/ with files called mbeir_*.jsonl.{rest} Name a folder of images, or a file."
        )


def image_files(folder: Path, left_out: LeftOut) -> Iterator[str]:
    """The path below a folder of every image in it, by name; hidden files and folders are left out without a word.

    A link is an image if it leads to a file. Linked folders are not entered: two may lead into each other.
    """
    for parent, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
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
            left_out.add(ValueError(repr(os.path.relpath(path, folder))), kind)


def table_files(folder: Path, *, named: bool = False) -> list[Path]:
    """The tables in a folder, or only those that are called as tables of its images are."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLE_SUFFIXES and path.is_file())
    return [path for path in found if not named or path.stem.lower() in TABLE_STEMS]


def image_table(folder: Path) -> Path | None:
    """The table that describes the images of a folder, such as `metadata.csv` with columns `file_name` and `text`.

    It is one whose first row with a file's name names an image; a ValueError if there are several.
    """
    found = []
    for table in table_files(folder, named=True):
        rows = (line.columns for line in item_lines(table) if line.error is None)
        if "image" in next((row for row in rows if row.get("file_name", True)), {}):
            found.append(table)
    if len(found) > 1:
        names = ", ".join(table.name for table in found)
        raise ValueError(f"{folder} must hold one table of its images, and has {names}. Name the one that is meant.")
    if found:
        logger.info("%s: read by its table %s; images that it does not name are left out", folder, found[0].name)
    return found[0] if found else None
