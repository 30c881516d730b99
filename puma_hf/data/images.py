"""Image files that rows name: where they may be, whether they can be read, and which a folder holds."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from puma_hf.data.records import TABLE_SUFFIXES, MBEIRFormatError, item_lines, wrong
from puma_hf.files import write_whole
from puma_hf.modeling.inputs_puma import MAX_ASPECT_RATIO, is_image_name, open_image, reason_of
from puma_hf.settings import is_unicode, shown

logger = logging.getLogger(__name__)

# What `datasets` calls the table of a folder of images, and what others do.
TABLE_STEMS = ("metadata", "captions")


class Images:
    """Finds the images that rows name, which may not leave a folder: somebody else may have written the rows.

    Args:
        root: The folder; None if any path will do, as in a dataset that the caller has made.
        decode: Whether `read` decodes each image, and not its header alone.
        save_to: Folder for images that are inside of a dataset; without one they are refused.
    """

    def __init__(self, root: Path | None = None, *, decode: bool = False, save_to: Path | None = None) -> None:
        self.root = None if root is None else os.path.realpath(root)
        self._folders: dict[str, str] = {}
        self._decode, self._save_to = decode, save_to
        self.read_paths: set[str] = set()

    def find(self, img_path: str, where: str, *, may_be_missing: bool = False) -> str:
        """The absolute path of an image.

        Raises:
            MBEIRFormatError: If the path is absolute, climbs out with `..`, or passes a symbolic link to the outside.
            FileNotFoundError: If there is no such regular file, unless it may be missing.
        """
        if "\0" in img_path or not is_unicode(img_path):  # JSON may hold half a character, which nobody could show
            raise FileNotFoundError(f"{where}: image {shown(img_path)} is not a file: no path can be called so.")
        # Normalised as text first, then followed: a `..` behind a link would lead elsewhere on the disk.
        full = os.path.normpath(os.path.join(self.root or os.getcwd(), img_path))
        if self.root is not None:
            # Folders are resolved once: a pool of millions costs two looks at the disk an image, and no more.
            folder, name = os.path.split(full)
            if folder not in self._folders:
                self._folders[folder] = os.path.realpath(folder)
            full = os.path.join(self._folders[folder], name)
            full = os.path.realpath(full) if os.path.islink(full) else full
            if os.path.commonpath([self.root, full]) != self.root:
                remedy = "keep it below (hf download --local-dir FOLDER writes no links), or use MBEIR(image_root=...)"
                raise wrong(where, f"image path {shown(img_path)} leaves {self.root}; {remedy}", "image refused")
        is_good = os.path.isfile(full) or (may_be_missing and not os.path.exists(full))
        if not is_good:  # nor may it be a pipe: to open one may take for ever
            below = "" if self.root is None else f" below {self.root} (or elsewhere: MBEIR(image_root=...))"
            raise FileNotFoundError(f"{where}: image {shown(img_path)} is not a file{below}. Check the path.")
        return full

    def read(self, value: Any, where: str) -> str:
        """The absolute path of an image file that can be read.

        Takes a path, bytes, or an Arrow image `{"bytes": ..., "path": ...}`; an MBEIRFormatError or FileNotFoundError
        if no model could take it, it may not be read, or it is bytes and there is no folder to save them to.
        """
        content = value.get("bytes") if isinstance(value, dict) else value
        path = value.get("path") if isinstance(value, dict) else value
        if isinstance(content, bytes):
            if self._save_to is None:
                what = "the image is inside the dataset. Save it to a folder (images_to=FOLDER, --images-to)."
                raise wrong(where, what, "image inside of the dataset")
            full = os.path.abspath(save_image(content, self._save_to, where, self._decode))
        elif isinstance(path, str):
            full = self.find(path, where)
            if full not in self.read_paths:  # five captions of an image cost one look at it
                image_header(full, f"{where}: {full!r}", self._decode)
        else:
            raise wrong(where, f"image is {shown(value)}, must be the path of a file, or null.", "image refused")
        self.read_paths.add(full)
        return full


def save_image(content: bytes, folder: Path, where: str, decode: bool = False) -> Path:
    """Write an image under a hash of its bytes, so that none is there twice; an MBEIRFormatError if it is none."""
    kind = image_header(content, f"{where}: the image inside ({len(content)} bytes)", decode)
    digest = hashlib.sha256(content).hexdigest()
    suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    path = folder / digest[:2] / f"{digest[2:]}.{suffix}"
    # Written whole, but without a wait for the disk; a file that lost its end in a power cut is written again.
    if not path.is_file() or path.stat().st_size != len(content):
        write_whole(path, content, sync=False)
    return path


def image_header(source: str | bytes, name: str, decode: bool = False) -> str:
    """The format of an image; an MBEIRFormatError if a model could not take it."""
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with warnings.catch_warnings(action="ignore"), open_image(file) as image:
            size, kind = image.size, image.format or "png"
            if decode:
                image.load()
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files.
        what = f"{name} cannot be read as an image ({reason_of(error)}). Replace it."
        raise MBEIRFormatError(what, "image broken") from error
    # What the processor would refuse later, in the middle of a run; the header tells it.
    most = Image.MAX_IMAGE_PIXELS or float("inf")
    if size[0] * size[1] > most or max(size) > MAX_ASPECT_RATIO * min(size):
        what = f"{name} has {size[0]} x {size[1]} pixels; at most {most} in all (PIL.Image.MAX_IMAGE_PIXELS)"
        what += f" and {MAX_ASPECT_RATIO} times as long as wide can be read. Scale or crop it."
        raise MBEIRFormatError(what, "image broken")
    return kind


# --- folders of images


def image_files(folder: Path, left_out: Counter[str] | None = None) -> Iterator[str]:
    """The path below a folder of every image in it, by name; hidden files and folders are left out without a word.

    A link is an image if it leads to a file: a snapshot in the Hub's cache has nothing else. Linked folders are not
    entered: two may lead into each other. What else is left out is counted by its ending.
    """
    # Names of hidden files are of other programs: thumbnails, `._photo.jpg` of macOS, checkouts.
    for parent, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        left = ["linked folder" for name in names if os.path.islink(os.path.join(parent, name))]
        for name in sorted(name for name in files if not name.startswith(".")):
            path = os.path.join(parent, name)
            # Not a link to nothing, nor a pipe: to open one may take for ever.
            if is_image_name(name) and is_unicode(path) and os.path.isfile(path):
                yield os.path.relpath(path, folder)
            else:
                left.append(os.path.splitext(name)[1].lower() or "no ending")
        if left_out is not None:
            left_out.update(left)


def image_table(folder: Path) -> Path | None:
    """The table that describes the images of a folder, such as `metadata.csv` with columns `file_name` and `text`.

    A ValueError if there are several.
    """
    found = []
    for table in sorted(folder.iterdir()):
        if table.stem.lower() in TABLE_STEMS and table.suffix.lower() in TABLE_SUFFIXES and table.is_file():
            # Other programs write a `metadata.json`, too, which must not hide the images.
            found += [table] if any("image" in line.columns for line in islice(item_lines(table), 1)) else []
    if len(found) > 1:
        names = ", ".join(table.name for table in found)
        raise ValueError(f"{folder} must hold one table of its images, and has {names}. Name the one that is meant.")
    if found:
        logger.info("%s: read by its table %s; images that it does not name are left out", folder, found[0].name)
    return found[0] if found else None
