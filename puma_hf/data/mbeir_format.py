"""The records of M-BEIR's files: the dataclasses and the checks of each line.

Every error names the file, the line and what to do.
Source: M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136; TIGER-Lab/M-BEIR on the Hub).
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puma_hf.data.mbeir_problems import MBEIRFormatError as MBEIRFormatError  # the name has always been here
from puma_hf.data.mbeir_problems import Problems, check_is_file
from puma_hf.data.mbeir_tasks import IMAGE, MBEIR_MODALITIES, TEXT, dataset_id_of
from puma_hf.values import shown

RECORD_ID = re.compile(r"(\d+):\S+")
# Absolute, of another drive, climbing with `..`, or holding a NUL byte: none can be a file of the dataset.
_LEAVES_FOLDER = re.compile(r"^[/\\]|^[A-Za-z]:|(?:^|[/\\])\.\.(?:[/\\]|$)|\0")
_LOOKS_LIKE_FILE = re.compile(r"^(?:data:|https?://)|\.\w{2,5}$")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One candidate of a pool.

    Args:
        did: Its id, `<dataset_id>:<number>`.
        text: Its text, or None.
        image: Absolute path of its image, or None.
        modality: "text", "image" or "image,text".
    """

    did: str
    text: str | None
    image: str | None
    modality: str

    @property
    def model_input(self) -> str | dict[str, str]:
        """The candidate as one input of `model.encode`."""
        return model_input(self.text, self.image)


@dataclass(frozen=True, slots=True)
class Query:
    """One query.

    Args:
        qid: Its id, `<dataset_id>:<number>`.
        text: Its text, or None.
        image: Absolute path of its image, or None.
        modality: "text", "image" or "image,text".
        positives: Ids of the relevant candidates, in the file's order.
        negatives: Ids of its hard negatives, in the file's order.
        line: Line of the file it was read from, for error messages.
    """

    qid: str
    text: str | None
    image: str | None
    modality: str
    positives: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    line: int = field(default=0, compare=False, repr=False)

    @property
    def dataset_id(self) -> int:
        """Number of the dataset, the part of the qid before the colon."""
        return dataset_id_of(self.qid)

    @property
    def model_input(self) -> str | dict[str, str]:
        """The query, without its instruction, as one input of `model.encode`."""
        return model_input(self.text, self.image)


def model_input(text: str | None, image: str | None) -> str | dict[str, str]:
    """One input of `model.encode`: image before text, as the backbone's prompt has them.

    Text alone is a bare string, which every model takes, unless it might be taken for the path or address of
    a file: data must not make a model open one.

    Args:
        text: Text or None.
        image: Path of an image or None.

    Returns:
        The text, or a dictionary of what there is.

    Example:
        >>> model_input("a red shoe", None), model_input("http://shop/shoe.png", None)
        ('a red shoe', {'text': 'http://shop/shoe.png'})
    """
    if text is not None and image is None and not _LOOKS_LIKE_FILE.search(text):
        return text
    values = {"image": image, "text": text}
    return {key: value for key, value in values.items() if value is not None}


def location(path: Path, line: int) -> str:
    """How errors name a line of a file: `<path>, line <n>`."""
    return f"{path}, line {line}"


def is_mbeir(folder: Path) -> bool:
    """Whether a folder is in M-BEIR's layout: it holds a file of queries or a pool under the name of the layout."""
    return any(any(folder.glob(f"{part}/*/mbeir_*.jsonl")) for part in ("query", "cand_pool"))


class ImageFinder:
    """Turns an `img_path` into an absolute path, making sure that it stays in the dataset's folder.

    Folders are resolved once, so a pool of millions costs one `lstat` an image.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.realpath(root))
        self._folders: dict[str, str] = {}

    def find(self, img_path: str, where: str) -> str:
        """Absolute path of an image.

        Args:
            img_path: Path from a record, relative to the root.
            where: File and line, for errors.

        Returns:
            The absolute path of an existing file inside the root.

        Raises:
            MBEIRFormatError: If the path is absolute, climbs out with `..`, or is or passes a symbolic link
                to the outside.
            FileNotFoundError: If there is no such file.
        """
        if _LEAVES_FOLDER.search(img_path):
            raise MBEIRFormatError(
                f"{where}: image path {shown(img_path)} leaves the dataset folder; write it relative to "
                f"{self._root}, without '..'",
                "image outside the folder",
            )
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
            raise FileNotFoundError(
                f"{where}: image {shown(img_path)} is not a file below {self._root}; unpack M-BEIR's images "
                "there, or name the folder they are in: MBEIR(..., image_root=...), in Python alone"
            )
        return full

    def _inside(self, path: Path, img_path: str, where: str) -> str:
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(self._root):
            raise MBEIRFormatError(
                f"{where}: image path {shown(img_path)} passes a symbolic link that leaves {self._root}; keep "
                "the files below it (hf download --local-dir FOLDER writes files instead of links), or name their real "
                "folder: MBEIR(..., image_root=...), in Python alone",
                "image outside the folder",
            )
        return str(real)


def read_jsonl(path: Path, problems: Problems | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their line numbers; blank lines are skipped.

    Args:
        path: The file.
        problems: Where broken lines are counted, which are then left out; by default the first one is raised.

    Yields:
        Line number, from 1, and the object.

    Raises:
        FileNotFoundError: If the file is missing.
        MBEIRFormatError: If a line is not a JSON object in UTF-8.
    """
    check_is_file(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if problems is None:
                yield number, json_object(line, location(path, number))
                continue
            record = problems.attempt(json_object, line, location(path, number))
            if record is not None:
                yield number, record


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """A line of JSON Lines.

    Args:
        line: The line.
        where: File and line, for errors.

    Raises:
        MBEIRFormatError: If it is not a JSON object in UTF-8.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            raise cut_off(f"{where}: broken JSON ({error})") from error
        raise MBEIRFormatError(
            f"{where}: broken JSON ({error}); each line must be one JSON object in UTF-8, was the download cut off?",
            "broken JSON",
        ) from error
    if not isinstance(record, dict):
        raise MBEIRFormatError(f"{where}: expected a JSON object, got {type(record).__name__}", "broken JSON")
    return record


def cut_off(what: str) -> MBEIRFormatError:
    return MBEIRFormatError(
        f"{what}; the file ends in the middle of this line, was the download interrupted? Mend the line, or download "
        "it again",
        "cut last line",
    )


def parse_candidate(record: Mapping[str, Any], where: str, images: ImageFinder) -> Candidate:
    """A line of a pool, checked.

    Args:
        record: The JSON object.
        where: File and line, for errors.
        images: Finder of the image.

    Returns:
        The candidate, its image as an absolute path.

    Raises:
        MBEIRFormatError: If a field is missing or wrong.
        FileNotFoundError: If the image is missing.
    """
    did = _record_id(record, "did", where)
    return Candidate(did, *_content(record, "", where, images))


def parse_query(record: Mapping[str, Any], line: int, where: str, images: ImageFinder) -> Query:
    """A line of a query file, checked.

    Args:
        record: The JSON object.
        line: Its line number.
        where: File and line, for errors.
        images: Finder of the image.

    Returns:
        The query, its image as an absolute path; whether its candidates exist is checked by who has the pool.

    Raises:
        MBEIRFormatError: If a field is missing or wrong.
        FileNotFoundError: If the image is missing.
    """
    qid = _record_id(record, "qid", where)
    text, image, modality = _content(record, "query_", where, images)
    positives = _id_list(record, "pos_cand_list", where)
    negatives = _id_list(record, "neg_cand_list", where)
    return Query(qid, text, image, modality, positives, negatives, line)


def _required(record: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in record:
        raise MBEIRFormatError(
            f"{where}: field {key!r} is missing; the line has {shown(sorted(record))}", "missing field"
        )
    return record[key]


def _record_id(record: Mapping[str, Any], key: str, where: str) -> str:
    value = _required(record, key, where)
    if not isinstance(value, str) or not RECORD_ID.fullmatch(value):
        raise MBEIRFormatError(f"{where}: {key} must look like '<dataset_id>:<number>', got {shown(value)}", "wrong id")
    return value


def _id_list(record: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = _required(record, key, where)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise MBEIRFormatError(f"{where}: {key} must be a list of dids, got {shown(value)}")
    return tuple(dict.fromkeys(value))


def _content(
    record: Mapping[str, Any], prefix: str, where: str, images: ImageFinder
) -> tuple[str | None, str | None, str]:
    """Text, absolute image path and modality of a query (prefix "query_") or a candidate (no prefix)."""
    values: list[str | None] = []
    for key in (f"{prefix}txt", f"{prefix}img_path"):
        value = _required(record, key, where)
        if value is not None and not isinstance(value, str):
            raise MBEIRFormatError(f"{where}: {key} must be a string or null, got {shown(value)}")
        values.append(value if value and value.strip() else None)
    text, img_path = values
    modality = _required(record, f"{prefix}modality", where)
    if modality not in MBEIR_MODALITIES:
        expected = f"must be one of {list(MBEIR_MODALITIES)}"
        raise MBEIRFormatError(f"{where}: {prefix}modality is {shown(modality)}, {expected}", "wrong modality label")
    present = ",".join(name for name, value in ((IMAGE, img_path), (TEXT, text)) if value)
    if present != modality:
        raise MBEIRFormatError(
            f"{where}: {prefix}modality is {modality!r} but the line holds "
            f"{present or 'neither text nor image'}; mend {prefix}txt, {prefix}img_path or {prefix}modality",
            "wrong modality label",
        )
    return text, images.find(img_path, where) if img_path else None, modality
