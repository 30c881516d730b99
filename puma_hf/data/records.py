"""One record, one reader per kind of file, and one collector of what is wrong with their rows."""

from __future__ import annotations

import csv
import json
import os
import re
from codecs import BOM_UTF8
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, ParamSpec, Protocol, TypeVar

import datasets
import pyarrow  # type: ignore[import-untyped]
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from pyarrow import parquet

from puma_hf.modeling.inputs_puma import MODALITY_NAMES, is_image_name, modality_of
from puma_hf.settings import cut, is_unicode, shown

SHOWN: Final = 5  # how many of the wrong rows a report quotes
COLUMNS = ("text", "image", "instruction")
CAPTION_NAMES = ("caption", "captions", "text", "title", "description", "sentence", "sentences")
NLI_COLUMNS = ("sent0", "sent1", "hard_neg")  # as in SimCSE's nli_for_simcse.csv, which PUMA's first stage reads
# What is read of a Parquet file: our names, BEIR's, those of the Hub's folders of images, NLI's.
_READ = ("id", *COLUMNS, "_id", "title", "file_name", *CAPTION_NAMES, *NLI_COLUMNS)

RECORD_ID = re.compile(r"(\d+):\S+")  # of M-BEIR
_LOOKS_LIKE_FILE = re.compile(r"^(?:data:|https?://)|\.\w{2,5}$")
_ROWS_AT_ONCE = 64  # of a Parquet file; an image inside has up to some megabytes
_BUFFER = 1 << 20  # bytes of a column read at a time; of a row group's images no more than all are held
_MOST_CHARACTERS = 2**24  # of a cell; Python's own limit is 131,072

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Record:
    """One input: a row of a table, an image of a folder, a side of a pair, a query or a candidate.

    Args:
        id: Its id, or "".
        text: Its text, or None.
        image: Absolute path of its image, or None.
        instruction: Its own instruction, or None.
    """

    id: str = ""
    text: str | None = None
    image: str | None = None
    instruction: str | None = field(default=None, kw_only=True)

    @property
    def modality(self) -> str:
        """ "text", "image" or "image,text"."""
        return modality_of(self.text is not None, self.image is not None, False)

    @property
    def model_input(self) -> str | dict[str, str]:
        """The record as one input of `model.encode`: image before text, as the backbone's prompt has them.

        Text alone is a bare string, which every model takes, unless it might be taken for the path or address of
        a file: data must not make a model open one.
        """
        values = {"image": self.image, "text": self.text, "instruction": self.instruction}
        given = {name: value for name, value in values.items() if value is not None}
        return given["text"] if list(given) == ["text"] and not _LOOKS_LIKE_FILE.search(given["text"]) else given


class MBEIRFormatError(ValueError):
    """A row is not what the format says; the message names the file and the line.

    Args:
        message: What is wrong, where, and what to do.
        kind: The kind of mistake in a few words, by which `Problems` counts.
    """

    def __init__(self, message: str, kind: str = "wrong field") -> None:
        super().__init__(message)
        self.kind = kind


def wrong(where: object, what: str, kind: str = "wrong field") -> MBEIRFormatError:
    """The error of a row, `<where>: <what>`."""
    return MBEIRFormatError(f"{where}: {what}", kind)


class Problems:
    """Wrong rows, collected while the reading goes on; memory does not grow with their number.

    At the end of a `with` block one error says how many there are, of which kinds, and quotes the first five. A
    single wrong row is raised as it is. If all that is wrong are missing images, the error is a `FileNotFoundError`.

    Args:
        path: The file, or the folder of several.

    Example:

    ```python
    >>> from puma_hf.data.records import MBEIRFormatError, Problems

    >>> try:
    ...     with Problems("pool.jsonl") as problems:
    ...         for line in (3, 8):
    ...             problems.add(MBEIRFormatError(f"pool.jsonl, line {line}: no did", "missing field"))
    ... except MBEIRFormatError as error:
    ...     print(error)
    pool.jsonl: 2 problems (missing field: 2):
    - pool.jsonl, line 3: no did
    - pool.jsonl, line 8: no did
    ```
    """

    def __init__(self, path: str | Path = "") -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.first: defaultdict[str, list[str]] = defaultdict(list)  # messages of each kind
        self._quoted: list[Exception] = []
        self._only_missing = True

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, error: Exception, kind: str | None = None) -> None:
        """Count what would have been raised for a row."""
        is_missing = isinstance(error, FileNotFoundError)
        own: str = "missing image" if is_missing else getattr(error, "kind", "wrong field")
        kind = kind or own
        self.counts[kind] += 1
        self._only_missing &= is_missing
        if len(self._quoted) < SHOWN:
            self._quoted.append(error)
        if len(self.first[kind]) < SHOWN:
            self.first[kind].append(str(error))

    def attempt(
        self, read: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result | None:
        """What a function returns, or None if it found something wrong, which is counted."""
        try:
            return read(*args, **kwargs)
        except (MBEIRFormatError, FileNotFoundError) as error:
            self.add(error)
            return None

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self:
            raise self.report()

    def report(self) -> Exception:
        """The error that tells of all of them; there must be one."""
        total = self.counts.total()
        if total == 1:
            return self._quoted[0]
        kinds = ", ".join(f"{kind}: {count}" for kind, count in self.counts.most_common())
        first = "" if total <= SHOWN else f". The first {SHOWN}"
        lines = "".join(f"\n- {error}" for error in self._quoted)
        message = f"{self.path}: {total} problems ({kinds}){first}:{lines}"
        return FileNotFoundError(message) if self._only_missing else MBEIRFormatError(message, "several")

    def some(self) -> list[str]:
        """A few messages, the first of each kind before any second."""
        turns = zip_longest(*self.first.values())
        return [message for turn in turns for message in turn if message is not None][:SHOWN]

    def __str__(self) -> str:
        return ", ".join(f"{count} x {kind}" for kind, count in self.counts.most_common())


# --- tables


class Line(NamedTuple):
    """A row of a table: how errors name it, and its columns; or why it cannot be read."""

    where: str
    columns: Mapping[str, Any]
    error: ValueError | None = None


def location(path: Path, line: int) -> str:
    """How errors name a line of a file: `<path>, line <n>`."""
    return f"{path}, line {line}"


def read_lines(path: Path, only: Container[str] | None = None) -> Iterator[Line]:
    """The rows of a file one after the other, those that cannot be read with their error; blank lines are left out.

    Args:
        path: A .txt (one text a line, the column "text"), .jsonl, .json (a list of objects, or JSON Lines), .csv,
            .tsv (both with a header; as IANA has it, a quotation mark means nothing in a .tsv) or .parquet.
        only: The columns that are wanted of a .parquet; the others are not read, unless there is none of these.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the kind of file is not known, or a .parquet is damaged.
    """
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise ValueError(f"{path} ends in {path.suffix!r}, must be one of {', '.join(_READERS)}; convert it.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. Check the path.")
    return _parquet(path, only) if kind == ".parquet" else _READERS[kind](path)


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """A line of JSON Lines; an MBEIRFormatError if it is not a JSON object in UTF-8."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = f"broken JSON ({error})"
        if not line.endswith(b"\n"):
            raise cut_off(where, what) from error
        raise wrong(where, f"{what}; each line must be one JSON object in UTF-8", "broken JSON") from error
    if not isinstance(record, dict):
        raise wrong(where, f"expected a JSON object, got {type(record).__name__}", "broken JSON")
    return record


def cut_off(where: str, what: str) -> MBEIRFormatError:
    """The error of a last line that does not end as lines do."""
    cause = "the file ends in the middle of this line, was the download interrupted? Mend it, or download it again"
    return wrong(where, f"{what}; {cause}", "cut last line")


def _numbered(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield location(path, number), line


def _text_lines(path: Path) -> Iterator[Line]:
    for where, line in _numbered(path):
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            yield Line(where, {}, _not_utf8(where, error))
        else:
            if text:
                yield Line(where, {"text": text})


def _json_lines(path: Path) -> Iterator[Line]:
    for where, line in _numbered(path):
        try:
            yield Line(where, json_object(line, where))
        except MBEIRFormatError as error:
            yield Line(where, {}, error)


def _json(path: Path) -> Iterator[Line]:
    with path.open("rb") as file:
        if not file.read(1000).removeprefix(BOM_UTF8).lstrip().startswith(b"["):
            yield from _json_lines(path)
            return
    try:
        records = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        yield Line(str(path), {}, ValueError(f"{path}: broken JSON ({error}); was the download cut off?"))
        return
    for number, record in enumerate(records, start=1):
        where = f"{path}, object {number}"
        if isinstance(record, dict):
            yield Line(where, record)
        else:
            yield Line(where, {}, ValueError(f"{where}: expected a JSON object, got {type(record).__name__}."))


def _separated(path: Path, delimiter: str) -> Iterator[Line]:
    # Bytes that are no UTF-8 become halves of characters here, so that they are told with their line.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        # Strict: else a quotation mark that is never closed swallows the rest of the file.
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        names: list[str] | None = None
        while True:
            where = location(path, reader.line_num + 1)
            try:
                with _long_cells():
                    cells = next(reader, None)
                if cells is None:
                    return
                where = location(path, reader.line_num)
                _check_utf8(cells, where)
                if not cells:
                    continue
                if names is None:
                    _check_names(cells, path)
                    names = cells
                    continue
                if len(cells) != len(names):
                    header = f"{len(names)} ({cut(', '.join(names))})"
                    raise ValueError(f"{where}: {len(cells)} cells, but the header has {header}. Mend the line.")
            except (csv.Error, ValueError) as error:
                is_csv = isinstance(error, csv.Error)
                message = f"{where}: {error}. Mend the line, or its quotation marks." if is_csv else str(error)
                yield Line(where, {}, ValueError(message))
                if names is None:
                    return  # the next line must not be taken for the header
            else:
                yield Line(where, dict(zip(names, cells, strict=True)))


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(_MOST_CHARACTERS)  # of the whole process
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_names(names: Iterable[str], path: Path) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise ValueError(f"{path}: the header has {shown(twice[0])} twice. Rename one of the columns.")


def _check_utf8(cells: Iterable[str], where: str) -> None:
    try:
        "".join(cells).encode(errors="surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error


def _not_utf8(where: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{where}: not UTF-8 ({error.reason}, byte {error.object[error.start]:#04x}). Convert the file.")


def _parquet(path: Path, only: Container[str] | None = None) -> Iterator[Line]:
    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            names = file.schema_arrow.names
            _check_names(names, path)
            wanted = [name for name in names if only is None or name in only]
            rows = (row for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted or None) for row in _rows(batch))
            for number, row in enumerate(rows, start=1):
                where = f"{path}, row {number}"
                if isinstance(row, Exception):
                    yield Line(where, {}, ValueError(f"{where}: a cell cannot be read ({cut(str(row))}). Mend it."))
                else:
                    yield Line(where, row)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        message = f"{path} is not a whole Parquet file ({cut(str(error))}). Was the download cut off? Delete it, and "
        raise MBEIRFormatError(f"{message}make or download it again.", "cut file") from error


def _rows(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError) as error:  # no UTF-8, a date that Python has not
        if batch.num_rows == 1:
            yield error
        else:
            for row in range(batch.num_rows):
                yield from _rows(batch.slice(row, 1))


_READERS: dict[str, Callable[[Path], Iterator[Line]]] = {
    ".txt": _text_lines,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": lambda path: _separated(path, ","),
    ".tsv": lambda path: _separated(path, "\t"),
    ".parquet": _parquet,
}


def dataset_lines(rows: datasets.Dataset) -> Iterator[Line]:
    """The rows of a dataset, its images as `{"path": ..., "bytes": ...}`."""
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return (Line(f"the dataset, row {number}", row) for number, row in enumerate(rows, start=1))


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


# --- records of M-BEIR


@dataclass(frozen=True, slots=True)
class Candidate(Record):
    """One candidate of a pool; its id is a did, `<dataset_id>:<number>`."""

    @property
    def did(self) -> str:
        """Its id."""
        return self.id


@dataclass(frozen=True, slots=True)
class Query(Record):
    """One query; its id is a qid, `<dataset_id>:<number>`.

    Args:
        positives: Ids of the relevant candidates, in the file's order.
        negatives: Ids of its hard negatives, in the file's order.
        line: Line of the file it was read from, for error messages.
    """

    positives: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    line: int = field(default=0, compare=False, repr=False)

    @property
    def qid(self) -> str:
        """Its id."""
        return self.id

    @property
    def dataset_id(self) -> int:
        """Number of the dataset, the part of the qid before the colon."""
        return dataset_id_of(self.id)


def dataset_id_of(record_id: str) -> int:
    """Number of the dataset of a qid or did, the part before the colon."""
    return int(record_id.partition(":")[0])


class Finder(Protocol):
    """Turns the path of an image into an absolute one, as `ImageFinder` does."""

    def find(self, img_path: str, where: str) -> str: ...


def parse_candidate(record: Mapping[str, Any], where: str, images: Finder) -> Candidate:
    """A line of a pool, checked, its image as an absolute path.

    Raises:
        MBEIRFormatError: If a field is missing or wrong.
        FileNotFoundError: If the image is missing.
    """
    return Candidate(_record_id(record, "did", where), *_content(record, "", where, images))


def parse_query(record: Mapping[str, Any], line: int, where: str, images: Finder) -> Query:
    """A line of a query file likewise; whether its candidates exist is checked by who has the pool."""
    qid = _record_id(record, "qid", where)
    content = _content(record, "query_", where, images)
    positives, negatives = (_id_list(record, key, where) for key in ("pos_cand_list", "neg_cand_list"))
    return Query(qid, *content, positives, negatives, line)


def _required(record: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in record:
        raise wrong(where, f"field {key!r} is missing; the line has {shown(sorted(record))}", "missing field")
    return record[key]


def _record_id(record: Mapping[str, Any], key: str, where: str) -> str:
    value = _required(record, key, where)
    if not isinstance(value, str) or not RECORD_ID.fullmatch(value):
        raise wrong(where, f"{key} must look like '<dataset_id>:<number>', got {shown(value)}", "wrong id")
    return value


def _id_list(record: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = _required(record, key, where)
    if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise wrong(where, f"{key} must be a list of dids, got {shown(value)}")
    return tuple(dict.fromkeys(value or ()))


def _content(record: Mapping[str, Any], prefix: str, where: str, images: Finder) -> tuple[str | None, str | None]:
    """Text and absolute image path of a query (prefix "query_") or a candidate (no prefix)."""
    values: list[str | None] = []
    for key in (f"{prefix}txt", f"{prefix}img_path"):
        value = _required(record, key, where)
        if value is not None and not isinstance(value, str):
            raise wrong(where, f"{key} must be a string or null, got {shown(value)}")
        values.append(value if value and value.strip() else None)
    text, img_path = values
    if text is not None and not is_unicode(text):
        raise wrong(where, f"{prefix}txt is {shown(text)}, which holds half a character; mend it")
    label = _required(record, f"{prefix}modality", where)
    present = modality_of(text is not None, img_path is not None, False)
    if label not in MODALITY_NAMES[:3] or label != present:
        says = f"{prefix}modality is {shown(label)}, must be one of {list(MODALITY_NAMES[:3])}"
        if label in MODALITY_NAMES[:3]:
            says = (
                f"{prefix}modality is {label!r} but the line holds {present or 'neither text nor image'}; mend either"
            )
        raise wrong(where, says, "wrong modality label")
    return text, images.find(img_path, where) if img_path else None


# --- what is kept on the disk


def file_state(path: Path) -> list[Any]:
    """By what a file is known again: its path, size and time of change."""
    status = path.stat() if path.is_file() else None
    return [os.path.realpath(path), status and status.st_size, status and status.st_mtime_ns]


def on_disk(
    rows: Callable[[], Iterator[Mapping[str, Any]]], features: datasets.Features, key: list[Any]
) -> datasets.Dataset:
    """Rows as a dataset that lies in the cache of `datasets`, and not in the memory of each process.

    The first process of a machine makes it, the others wait for the lock of `datasets` and map the same file; the
    next run finds it there. To write a row takes some 50 microseconds, once.

    Args:
        rows: Makes them.
        features: Their columns.
        key: What they depend on; equal keys mean equal rows.

    Raises:
        Exception: What making them raises; nothing is kept then.
    """
    try:
        fingerprint = Hasher.hash([key, str(features)])
        return datasets.Dataset.from_generator(rows, features=features, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
