"""What a corpus holds, read as a stream: a folder of images, a table, or a pool in M-BEIR's layout.

Memory does not grow with the corpus, but for a .json that is one list, the names of the files of one folder, and
eight bytes for every id.
"""

from __future__ import annotations

import json
import logging
import os
import random
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from puma_hf.configs import OnError
from puma_hf.data.images import ImageFinder, LeftOut, image_files, image_table
from puma_hf.data.mbeir import MBEIR, check_is_file, is_mbeir
from puma_hf.data.records import COLUMNS, Line, MBEIRFormatError, Problems, item_lines, parse_candidate, read_lines
from puma_hf.settings import cut, is_unicode, shown

logger = logging.getLogger(__name__)

GLOBAL_POOL = "global"
_HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class Record:
    """One input of a corpus.

    Args:
        row: Its number in the corpus, from 0.
        id: Its id.
        text: Its text, or None.
        image: Absolute path of its image, the bytes of the image, or None.
        instruction: Its own instruction, or None.
        problem: What is wrong with its line, which then holds nothing; None of a good one.
    """

    row: int
    id: str
    text: str | None = None
    image: str | bytes | None = None
    instruction: str | None = None
    problem: str | None = None

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
            full = os.path.join(self.root, path)
            if os.path.exists(full):
                raise  # a folder, or a pipe, which nobody may open
            return full


class Corpus(ABC):
    """A corpus that is read from its first line to its last, as often as is wanted.

    Args:
        path: Its file or folder.
        root: The folder that its images are below.
    """

    has_ids = True  # of its own: else they cannot come twice
    on_error: OnError = "raise"  # what to do about wrong lines; but for "raise" they become records with a problem

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self._images = _Images(root)

    @abstractmethod
    def lines(self) -> Iterator[Line]:
        """The lines, not checked yet."""

    @abstractmethod
    def _record(self, row: int, line: Line) -> Record:
        """A line that could be read, checked."""

    def record(self, row: int, line: Line) -> Record:
        """A line, checked. That its image is there is not checked.

        Raises:
            FileNotFoundError: If its image is no regular file, and `on_error` is "raise".
            ValueError: If a field is not what it must be, likewise; the message names the line.
        """
        try:
            return self._checked(row, line)
        except (MBEIRFormatError, FileNotFoundError) as error:
            if self.on_error == "raise":
                raise
            return Record(row, str(row), problem=str(error))

    def _checked(self, row: int, line: Line) -> Record:
        if line.error is not None:
            raise MBEIRFormatError(str(line.error), "broken line")
        return self._record(row, line)

    def survey(self, sample_size: int = 0, seed: int = 0) -> Survey:
        """Read the corpus once to count it, and to find all wrong lines before a model is loaded.

        Args:
            sample_size: Records to draw at random.
            seed: Seed of that choice.

        Raises:
            ValueError: If lines are wrong, and `on_error` is "raise" or none is right; all of them are counted.
        """
        generator = random.Random(seed)
        sample: list[tuple[int, Line]] = []
        num_items = 0
        ids = array("q")
        problems = Problems(self.path)
        self._images.look = False
        try:
            for row, line in enumerate(self.lines()):
                record = problems.attempt(self._checked, row, line)
                num_items += 1
                if record is not None and self.has_ids:
                    ids.append(hash(record.id))
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
        if problems:
            if self.on_error == "raise" or problems.counts.total() == num_items:
                raise problems.report()
            logger.warning("%s\nThe run goes on without them (on_error=%r).", problems.report(), self.on_error)
        self._warn_of_repeated(ids)
        return Survey(num_items, [self.record(row, line) for row, line in sorted(sample, key=lambda pair: pair[0])])

    def _warn_of_repeated(self, ids: array[int]) -> None:
        values, counts = np.unique(np.frombuffer(ids, np.int64), return_counts=True)
        if repeated := set(values[counts > 1].tolist()):
            records = (self.record(row, line) for row, line in enumerate(self.lines()))
            logger.warning(
                "%d ids are of several items (first: %s). Answers are told apart, but a database that replaces items "
                "by their ids keeps one of each. Give every item its own, or leave the column id out.",
                len(repeated),
                next(shown(record.id) for record in records if hash(record.id) in repeated),
            )

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
    """The rows of a file with columns among id, text, image and instruction, or what `item_lines` takes for them.

    Others are ignored. Images are paths below the folder of the file, or inside of a .parquet. Without ids a row's
    number, from 0, is its id.

    Args:
        path: A file that `puma_hf.data.records.read_lines` reads.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another kind, is empty, or its first good line has neither text nor image.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, path.parent)
        error = ValueError(f"{path} holds no inputs. Name a file with at least one text or image.")
        first = next((line for line in self.lines() if line.error is None), None)
        if first is None:
            raise next((line.error for line in self.lines() if line.error), error)
        columns = list(first.columns)
        if not {"text", "image"}.intersection(columns):
            raise ValueError(
                f"{path}: no column text or image. The columns here are {cut(', '.join(map(str, columns))) or 'none'}: "
                "rename those that hold them."
            )
        self.has_ids = "id" in columns
        if ignored := [name for name in columns if name not in ("id", *COLUMNS)]:
            logger.info("%s: ignored the columns %s", path, cut(", ".join(map(str, ignored))))

    def lines(self) -> Iterator[Line]:
        return item_lines(self.path)

    def _record(self, row: int, line: Line) -> Record:
        text, instruction = (_text(line, name) for name in ("text", "instruction"))
        return Record(row, self._id(row, line), text, self._image(line), instruction)

    def _id(self, row: int, line: Line) -> str:
        value = line.columns.get("id")
        if not self.has_ids and value is None:
            return str(row)
        is_id = isinstance(value, str | int) and not isinstance(value, bool) and value != "" and is_unicode(str(value))
        if not self.has_ids or not is_id:
            raise MBEIRFormatError(
                f"{line.where}: id is {shown(value)}, must be a text or a whole number. Give every row one, or none.",
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
                f"{line.where}: image is {shown(value)}, must be the path of a file below {self._images.root}. "
                "Download images first, or call puma_hf.embed with a loader of your own.",
                "wrong image",
            )
        return self._images.find(value, line.where)


class ImageFolder(Corpus):
    """Every image below a folder, as `image_files` finds them; its path below the folder is its id.

    Args:
        path: The folder.
    """

    has_ids = False

    def __init__(self, path: Path) -> None:
        super().__init__(path, path)
        if next(self.lines(), None) is None:
            raise self._left_out.no_images(path)

    def lines(self) -> Iterator[Line]:
        self._left_out = LeftOut()
        for name in image_files(self.path, self._left_out):
            yield Line(os.path.join(self.path, name), {"image": name})

    def survey(self, sample_size: int = 0, seed: int = 0) -> Survey:
        found = super().survey(sample_size, seed)
        self._left_out.tell(self.path)
        return found

    def _record(self, row: int, line: Line) -> Record:
        name = line.columns["image"]
        return Record(row, Path(name).as_posix(), image=os.path.join(self._images.root, name))


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

    def lines(self) -> Iterator[Line]:
        check_is_file(self.path)
        return read_lines(self.path)

    def _record(self, row: int, line: Line) -> Record:
        candidate = parse_candidate(line.columns, line.where, self._images)
        return Record(row, candidate.did, candidate.text, candidate.image)


def input_hash(records: Sequence[Record], content_hashes: Sequence[str]) -> str:
    """A name for what these records are: their ids, and the hash of each one's content."""
    return _hash([[record.id, content] for record, content in zip(records, content_hashes, strict=True)])


def open_corpus(
    data: str | Path, *, split: str = "test", pool: str = GLOBAL_POOL, on_error: OnError = "raise"
) -> Corpus:
    """Find out what kind of corpus a path is.

    Args:
        data: A folder of images, which a table may describe (see `image_table`), a table, or a folder in M-BEIR's
            layout.
        split: Split of the latter.
        pool: Its pool, "global" or a task's name such as "webqa_task1".
        on_error: What to do about wrong lines: raise, or make records of them that say what is wrong.

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
    if not path.is_file() and not path.is_dir():
        raise FileNotFoundError(f"{str(data)!r} is neither a file nor a folder. Check the path.")
    corpus: Corpus
    if path.is_dir() and is_mbeir(path):
        corpus = PoolCorpus(path, split, pool)
    else:
        table = path if path.is_file() else image_table(path)
        corpus = ImageFolder(path) if table is None else TableCorpus(table)
    corpus.on_error = on_error
    return corpus


def _hash(values: Sequence[Any]) -> str:
    return blake2b(json.dumps(values).encode(), digest_size=_HASH_BYTES).hexdigest()


def _text(line: Line, name: str) -> str | None:
    value = line.columns.get(name)
    if value is not None and not isinstance(value, str):
        raise MBEIRFormatError(f"{line.where}: {name} is {shown(value)}, must be a text or null.", "wrong field")
    return value if value and value.strip() else None
