"""A folder of tiny photos with a table of captions, as a user might have it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image


def make_photos(folder: Path) -> Path:
    """`a.png` (4 x 6), `deep/b.png` (10 x 5), `copy of a.png`, and `broken.png`; beside the folder `outside.png`."""
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (4, 6), (200, 0, 0)).save(folder / "a.png")
    Image.new("RGB", (10, 5), (0, 200, 0)).save(folder / "deep" / "b.png")
    (folder / "copy of a.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "broken.png").write_bytes(b"<html>404</html>")
    Image.new("RGB", (4, 4)).save(folder.parent / "outside.png")
    return folder


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_captions(folder: Path, captions: Mapping[str, str] | Sequence[tuple[str, str]]) -> Path:
    rows = captions.items() if isinstance(captions, Mapping) else captions
    return write_csv(folder / "captions.csv", ["file_name", "caption"], rows)
