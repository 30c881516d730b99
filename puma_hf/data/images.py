"""Image files that rows name: where they may be, and whether they can be read."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from puma_hf.files import write_whole
from puma_hf.modeling.image_inputs_puma import MAX_ASPECT_RATIO, load_rgb_image, open_image, reason_of
from puma_hf.values import is_unicode, shown


class BrokenImageError(ValueError):
    """A file is there, but no model can take it as an image."""


class InsideImageError(ValueError):
    """An image is inside of a dataset, and nothing says where to save it."""


class ImageFiles:
    """Turns the image of a row into the absolute path of an image file that can be read.

    As with M-BEIR, a file may not name images outside of its own folder: who wrote it may be somebody else.
    Without a folder any path will do.

    Args:
        folder: The folder of the file whose rows name images, or None.
        decode: Whether to decode each image; else only its header is read, and damage further in is found when
            a batch needs the image.
        save_to: Folder for images that are inside of a dataset; without one they are refused.
        dry: Whether to save nothing there, but to look at the images all the same.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from puma_hf.data.images import ImageFiles

    >>> images = ImageFiles(Path("demo/emoji/mbeir_images/emoji_images"))
    >>> images.sizes[images.find("noto/1f34e.webp", "line 2")]
    (48, 48)
    ```
    """

    def __init__(
        self, folder: Path | None, *, decode: bool = False, save_to: Path | None = None, dry: bool = False
    ) -> None:
        self._folder = None if folder is None else Path(os.path.realpath(folder))
        self._decode = decode
        self._save_to = None if save_to is None else Path(os.path.abspath(save_to))
        self._dry = dry
        self._found: dict[str, str] = {}
        self.sizes: dict[str, tuple[int, int]] = {}  # width and height of each path that was found

    def find(self, value: Any, where: str) -> str:
        """The absolute path of an image.

        Args:
            value: A path, or an Arrow image `{"bytes": ..., "path": ...}`.
            where: File and line, for errors.

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
        if path not in self._found:
            self._found[path] = self._check(path, where)
        return self._found[path]

    def _check(self, path: str, where: str) -> str:
        if "\0" in path or not is_unicode(path):
            what = "a NUL byte" if "\0" in path else "half a character"
            raise ValueError(f"{where}: image {shown(path)} has {what}, which no path can have.")
        full = os.path.abspath(path)
        if self._folder is not None:
            full = os.path.realpath(self._folder / path)
            if not Path(full).is_relative_to(self._folder):
                raise ValueError(
                    f"{where}: image {shown(path)} leaves {self._folder}. Images must be below the folder of the file "
                    "that names them: move that file up, put files in the place of links (hf download --local-dir "
                    "FOLDER does), or pass a datasets.Dataset (Python), which may name any path."
                )
        if full not in self.sizes:
            if not os.path.isfile(full):
                raise FileNotFoundError(f"{where}: there is no image {shown(full)}. Check the path.")
            self.sizes[full] = self._size(full, repr(full), where)[0]
        return full

    def _save(self, content: bytes, where: str) -> str:
        """The path of a file with the bytes of an image, named by their hash."""
        if self._save_to is None:
            raise InsideImageError(
                f"{where}: the image is inside the dataset, must be the path of a file, which is read when a "
                "batch needs it. Save the images to a folder, and name that or their paths."
            )
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
            raise BrokenImageError(
                f"{where}: {name} cannot be read as an image ({reason_of(error)}). Replace it or leave it out."
            ) from error
        _check_size(size, name, where)
        if self._decode:
            try:
                load_rgb_image(source.getvalue() if isinstance(source, io.BytesIO) else source, where)
            except ValueError as error:
                raise BrokenImageError(str(error)) from error
        return size, kind


def _check_size(size: tuple[int, int], name: str, where: str) -> None:
    """What the processor would refuse later; the header tells it."""
    width, height = size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise BrokenImageError(
            f"{where}: {name} has {width} x {height} pixels, more than Pillow's limit of {Image.MAX_IMAGE_PIXELS}. "
            "Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust its source."
        )
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise BrokenImageError(
            f"{where}: {name} has {width} x {height} pixels; Qwen2-VL takes at most {MAX_ASPECT_RATIO} times as long "
            "as wide. Crop it or leave it out."
        )


class ContentHashes:
    """A name for what an image file holds: equal for copies of a file, and for nothing else.

    Only files whose size another file has, too, are read.
    """

    def __init__(self) -> None:
        self._first: dict[int, str] = {}  # the first file of each size
        self._names: dict[str, str] = {}

    def add(self, path: str) -> None:
        """Make a file known; all have to be, before the first is named."""
        if path in self._names:
            return
        self._names[path] = path
        first = self._first.setdefault(os.path.getsize(path) if os.path.isfile(path) else -1, path)
        for one in {first, path} if first != path else ():
            if self._names[one] == one and os.path.isfile(one):
                with open(one, "rb") as file:
                    self._names[one] = hashlib.file_digest(file, "blake2b").hexdigest()

    def __getitem__(self, path: str) -> str:
        return self._names[path]
