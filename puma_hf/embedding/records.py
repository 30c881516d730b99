"""What a corpus holds, read as a stream: a folder of images, a table, or a pool in M-BEIR's layout.

Memory does not grow with the corpus, but for a .json that is one list, and the names of the files of one folder.
"""

from __future__ import annotations

import json
import logging
import os
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow  # type: ignore[import-untyped]
from pyarrow import parquet

from puma_hf.data.mbeir_format import ImageFinder, location, parse_candidate, read_jsonl
from puma_hf.data.mbeir_problems import MBEIRFormatError, Problems
from puma_hf.data.mbeir_reader import MBEIR
from puma_hf.data.tables import read_table
from puma_hf.modeling.image_inputs_puma import is_image_name

logger = logging.getLogger(__name__)

CONTENT = ("text", "image", "instruction")
GLOBAL_POOL = "global"
_ROWS_AT_ONCE = 64  # of a Parquet file: images may be inside
_HASH_BYTES = 16


class Line(NamedTuple):
    """A line of a corpus before it is checked: how errors name it, and its columns."""

    where: str
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """One input of a corpus.

    Args:
        row: Its number in the corpus, from 0.
        id: Its id.
        text: Its text, or None.
        image: Absolute path of its image, the bytes of the image, or None.
        instruction: Its own instruction, or None.
    """

    row: int
    id: str
    text: str | None = None
    image: str | bytes | None = None
    instruction: str | None = None

    @property
    def model_input(self) -> dict[str, Any]:
        """The record as one input of a model; never a bare string, which might be taken for a path."""
        values = {"image": self.image, "text": self.text, "instruction": self.instruction}
        return {name: value for name, value in values.items() if value is not None}


class _Images(ImageFinder):
    """Paths of images below a folder; a missing file is the trouble of who embeds it.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = os.path.realpath(root)
        self.look = True  # at every file, or once at every folder

    def find(self, img_path: str, where: str) -> str:
        path = img_path
        if os.path.isabs(path) and os.path.normpath(path).startswith(self.root + os.sep):
            path = os.path.relpath(path, self.root)
        if not self.look and os.path.dirname(path) in self._folders:
            return os.path.join(self.root, path)
        try:
            return super().find(path, where)
        except FileNotFoundError:
            return os.path.join(self.root, path)


class Corpus(ABC):
    """A corpus that is read from its first line to its last, as often as is wanted.

    Args:
        path: Its file or folder.
        root: The folder that its images are below.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self._images = _Images(root)

    @abstractmethod
    def lines(self, problems: Problems | None = None) -> Iterator[Line]:
        """The lines, not checked yet; broken ones are counted in `problems`, or raised."""

    @abstractmethod
    def record(self, row: int, line: Line) -> Record:
        """A line, checked. That its image is there is not checked.

        Raises:
            ValueError: If a field is not what it must be; the message names the line.
        """

    def survey(self, sample_size: int = 0, seed: int = 0) -> Survey:
        """Read the corpus once to count it, and to find all wrong lines before a model is loaded.

        Args:
            sample_size: Records to draw at random.
            seed: Seed of that choice.

        Raises:
            ValueError: If lines are wrong; all of them are counted.
        """
        generator = random.Random(seed)
        sample: list[tuple[int, Line]] = []
        num_items = 0
        self._images.look = False
        try:
            with Problems(self.path) as problems:
                for row, line in enumerate(self.lines(problems)):
                    problems.attempt(self.record, row, line)
                    num_items += 1
                    # Every set of so many lines is drawn with the same probability, and only those are kept.
                    place = row if row < sample_size else generator.randint(0, row)
                    if row < sample_size:
                        sample.append((row, line))
                    elif place < sample_size:
                        sample[place] = (row, line)
        finally:
            self._images.look = True
        if not num_items:
            raise ValueError(f"{self.path} holds no inputs. Name one with at least one text or image.")
        return Survey(num_items, [self.record(row, line) for row, line in sorted(sample, key=lambda pair: pair[0])])

    def content_hash(self, record: Record) -> str:
        """A name for what a model sees of a record: text, instruction, and of an image path, size and time of change.

        Paths are taken below the corpus, so that a folder may be moved.
        """
        return _hash([record.text, record.instruction, self._image_state(record.image)])

    def _image_state(self, image: str | bytes | None) -> list[Any] | None:
        if image is None:
            return None
        if isinstance(image, bytes):
            return [blake2b(image, digest_size=_HASH_BYTES).hexdigest()]
        name = image.removeprefix(self._images.root + os.sep)
        try:
            status = os.stat(image)
        except (OSError, ValueError):  # it is missing, or no name of a file
            return [name]
        return [name, status.st_size, status.st_mtime_ns]


class Survey(NamedTuple):
    """How many lines a corpus has, and some of them, drawn at random."""

    num_items: int
    sample: list[Record]


class TableCorpus(Corpus):
    """The rows of a file with columns among id, text, image and instruction; others are ignored.

    Images are paths below the folder of the file, or inside of a .parquet. Without ids a row's number, from 0, is
    its id.

    Args:
        path: A file that `puma_hf.data.tables.read_table` reads.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another kind, is empty, or its first line has neither text nor image.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, path.parent)
        with Problems(path) as problems:
            first = next(self.lines(problems), None)
        if first is None:
            raise ValueError(f"{path} holds no inputs. Name a file with at least one text or image.")
        columns = list(first.columns)
        if not {"text", "image"}.intersection(columns):
            raise ValueError(
                f"{path}: no column text or image. The columns here are {', '.join(map(str, columns)) or 'none'}: "
                "rename those that hold them."
            )
        self._has_ids = "id" in columns
        if ignored := [name for name in columns if name not in ("id", *CONTENT)]:
            logger.info("%s: ignored the columns %s", path, ", ".join(map(str, ignored)))

    def lines(self, problems: Problems | None = None) -> Iterator[Line]:
        if self.path.suffix.lower() == ".parquet" and self.path.is_file():
            return _parquet_lines(self.path)

        def bad_line(error: ValueError) -> None:
            if problems is None:
                raise error
            problems.add(MBEIRFormatError(str(error), "broken line"))

        return (Line(*row) for row in read_table(self.path, bad_line))

    def record(self, row: int, line: Line) -> Record:
        text, instruction = (_text(line, name) for name in ("text", "instruction"))
        return Record(row, self._id(row, line), text, self._image(line), instruction)

    def _id(self, row: int, line: Line) -> str:
        value = line.columns.get("id")
        if not self._has_ids and value is None:
            return str(row)
        if not self._has_ids or isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise MBEIRFormatError(
                f"{line.where}: id is {value!r}, must be a text or a whole number. Give every row one, or none.",
                "wrong id",
            )
        return str(value)

    def _image(self, line: Line) -> str | bytes | None:
        value = line.columns.get("image")
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if value is None or value == "" or isinstance(value, bytes):
            return value or None
        if not isinstance(value, str) or "://" in value:
            raise MBEIRFormatError(
                f"{line.where}: image is {value!r}, must be the path of a file below {self._images.root}. Download "
                "images first, or call puma_hf.embed with a loader of your own.",
                "wrong image",
            )
        return self._images.find(value, line.where)


class ImageFolder(Corpus):
    """Every image below a folder, by name; its path below the folder is its id. Hidden files are left out.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, path)
        self._left_out: Counter[str] = Counter()
        if next(self.lines(), None) is None:
            raise ValueError(
                f"{path} holds no image (such as .jpg, .png or .webp) and is no M-BEIR folder, which has query/ and "
                "cand_pool/. Name a folder of images, or a file."
            )

    def lines(self, problems: Problems | None = None) -> Iterator[Line]:
        self._left_out.clear()
        for parent, names, files in os.walk(self.path):
            names[:] = sorted(name for name in names if not name.startswith("."))
            # They are not followed: two may lead into each other.
            self._left_out["linked folder"] += sum(os.path.islink(os.path.join(parent, name)) for name in names)
            for name in sorted(files):
                if name.startswith("."):
                    continue
                if is_image_name(name):
                    path = os.path.join(parent, name)
                    yield Line(path, {"image": os.path.relpath(path, self.path)})
                else:
                    self._left_out[os.path.splitext(name)[1].lower() or "no ending"] += 1

    def survey(self, sample_size: int = 0, seed: int = 0) -> Survey:
        found = super().survey(sample_size, seed)
        if kinds := ", ".join(f"{count} x {kind}" for kind, count in self._left_out.most_common() if count):
            logger.info("%s: left out what is no image here: %s", self.path, kinds)
        return found

    def record(self, row: int, line: Line) -> Record:
        name = line.columns["image"]
        return Record(row, Path(name).as_posix(), image=self._images.find(name, line.where))


class PoolCorpus(Corpus):
    """The candidates of a folder in M-BEIR's layout, under their dids.

    Args:
        path: The folder.
        split: The split.
        pool: "global", or a task's name.

    Raises:
        FileNotFoundError: If there is no such pool.
        ValueError: If there is no such task.
    """

    def __init__(self, path: Path, split: str, pool: str) -> None:
        data = MBEIR(path)
        tasks = {} if pool == GLOBAL_POOL else {task.name: task for task in data.tasks(split)}
        if pool != GLOBAL_POOL and pool not in tasks:
            raise ValueError(f"pool={pool!r} must be {GLOBAL_POOL!r} or a task here: {', '.join(tasks)}. Choose one.")
        file = data.local_pool_path(tasks[pool], split) if tasks else data.global_pool_path(split)
        super().__init__(file, data.image_root)

    def lines(self, problems: Problems | None = None) -> Iterator[Line]:
        return (Line(location(self.path, line), record) for line, record in read_jsonl(self.path, problems))

    def record(self, row: int, line: Line) -> Record:
        candidate = parse_candidate(line.columns, line.where, self._images)
        return Record(row, candidate.did, candidate.text, candidate.image)


def input_hash(records: Sequence[Record], content_hashes: Sequence[str]) -> str:
    """A name for what these records are: their ids, and the hash of each one's content."""
    return _hash([[record.id, content] for record, content in zip(records, content_hashes, strict=True)])


def open_corpus(data: str | Path, *, split: str = "test", pool: str = GLOBAL_POOL) -> Corpus:
    """Find out what kind of corpus a path is.

    Args:
        data: A folder of images, a table, or a folder in M-BEIR's layout.
        split: Split of the latter.
        pool: Its pool, "global" or a task's name such as "webqa_task1".

    Raises:
        FileNotFoundError: If it, or the pool, is not there.
        ValueError: If it is of no such kind, holds nothing, or there is no such task.

    Example:

    ```python
    >>> from puma_hf.embedding.records import open_corpus

    >>> corpus = open_corpus("demo/emoji/concepts.tsv")
    Traceback (most recent call last):
    ...
    ValueError: demo/emoji/concepts.tsv: no column text or image. The columns here are ...
    >>> corpus = open_corpus("demo/emoji")
    >>> next(corpus.lines()).columns["did"]
    '10:7'
    ```
    """
    path = Path(data)
    if path.is_file():
        return TableCorpus(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{str(data)!r} is neither a file nor a folder. Check the path.")
    is_mbeir = (path / "query").is_dir() or (path / "cand_pool").is_dir()
    return PoolCorpus(path, split, pool) if is_mbeir else ImageFolder(path)


def _hash(values: Sequence[Any]) -> str:
    return blake2b(json.dumps(values).encode(), digest_size=_HASH_BYTES).hexdigest()


def _parquet_lines(path: Path) -> Iterator[Line]:
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            wanted = [name for name in file.schema_arrow.names if name in ("id", *CONTENT)]
            number = 0
            # Columns that are not wanted are not read; if none is, the error names what there is.
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted or None):
                for row in batch.to_pylist():
                    number += 1
                    yield Line(f"{path}, row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise MBEIRFormatError(
            f"{path} cannot be read as Parquet ({error}). Was the download cut off?", "cut file"
        ) from error


def _text(line: Line, name: str) -> str | None:
    value = line.columns.get(name)
    if value is not None and not isinstance(value, str):
        raise MBEIRFormatError(f"{line.where}: {name} is {value!r}, must be a text or null.", "wrong field")
    return value if value and value.strip() else None
