"""One record, one reader per kind of file, and one collector of what is wrong with their rows."""

from __future__ import annotations

import csv
import json
import os
import re
from codecs import BOM_UTF8
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import datasets
import pyarrow  # type: ignore[import-untyped]
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from pyarrow import parquet

from puma_hf.modeling.inputs_puma import modality_of
from puma_hf.settings import cut, is_unicode, shown

# What a table is, by the ending of its name.
TABLE_SUFFIXES: Final = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
SHOWN: Final = 5  # how many of the wrong rows of a kind a report quotes
COLUMNS = ("text", "image", "instruction")
NLI_COLUMNS = ("sent0", "sent1", "hard_neg")  # as in SimCSE's nli_for_simcse.csv, which PUMA's first stage reads
# What is read of a Parquet file: our names, BEIR's, those of the Hub's folders of images, NLI's.
_READ = ("id", *COLUMNS, "_id", "title", "file_name", "caption", *NLI_COLUMNS)

# A text such as "photo.jpg" would be opened by a model that takes bare strings for paths, so it is marked as text.
_LOOKS_LIKE_FILE = re.compile(r"^(?:data:|https?://)|\.\w{2,5}$")
_ROWS_AT_ONCE = 64  # of a Parquet file; an image inside has up to some megabytes
_BUFFER = 1 << 20  # bytes of a column read at a time; of a row group's images no more than all are held
_MOST_CHARACTERS = 2**24  # of a cell; Python's own limit is 131,072

_MISSING = "image missing"
# What readers raise of a file that is broken; the last of brackets in brackets without end.
_BROKEN = (UnicodeDecodeError, json.JSONDecodeError, csv.Error, pyarrow.ArrowException, OSError, RecursionError)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Record:
    """One input: a row of a table, an image of a folder, a side of a pair, a query or a candidate.

    The image is an absolute path, or bytes; `row` is its number in a corpus, from 0; `problem` is what is wrong with
    its line, which then holds nothing.
    """

    id: str = ""
    text: str | None = None
    image: Any = None
    instruction: str | None = field(default=None, kw_only=True)
    row: int = field(default=0, kw_only=True, compare=False)
    problem: str | None = field(default=None, kw_only=True)

    @property
    def modality(self) -> str:
        """ "text", "image" or "image,text"."""
        return modality_of(self.text is not None, self.image is not None, False)

    @property
    def model_input(self) -> str | dict[str, Any]:
        """The record as one input of `model.encode`: image before text, as the backbone's prompt has them.

        Text alone is a bare string, which every model takes, unless it might be taken for the path or address of
        a file: data must not make a model open one.
        """
        values = {"image": self.image, "text": self.text, "instruction": self.instruction}
        given = {name: value for name, value in values.items() if value is not None}
        return given["text"] if list(given) == ["text"] and not _LOOKS_LIKE_FILE.search(given["text"]) else given


class MBEIRFormatError(ValueError):
    """A row is not what the format says; the message names file and line, `kind` is what `Problems` counts by."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind or "wrong field"


def wrong(where: object, what: str, kind: str = "") -> MBEIRFormatError:
    """The error of a row, `<where>: <what>`."""
    return MBEIRFormatError(f"{where}: {what}", kind)


def location(path: Path, line: int) -> str:
    """How errors name a line of a file: `<path>, line <n>`."""
    return f"{path}, line {line}"


class Problems:
    """Wrong rows, collected while the reading goes on; memory does not grow with their number.

    At the end of a `with` block one error says how many there are, of which kinds, and quotes the first five of each. A
    single wrong row is raised as it is. If all that is wrong are missing images, the error is a `FileNotFoundError`.
    """

    def __init__(self, path: str | Path = "") -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.first: defaultdict[str, list[Exception]] = defaultdict(list)  # of each kind

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return ", ".join(f"{kind}: {count}" for kind, count in self.counts.most_common())

    def add(self, error: Exception) -> None:
        """Count what would have been raised for a row."""
        kind = error.kind if isinstance(error, MBEIRFormatError) else _MISSING
        self.counts[kind] += 1
        # Of ten million wrong rows only the first few are kept: a pool with a wrong root has nothing else.
        if len(self.first[kind]) < SHOWN:
            self.first[kind].append(error)

    def to_list(self) -> list[dict[str, Any]]:
        """The kinds, each with its count and the first messages."""
        first = {kind: list(map(str, errors)) for kind, errors in self.first.items()}
        return [{"kind": kind, "count": count, "first": first[kind]} for kind, count in self.counts.items()]

    def attempt(self, read: Callable[..., Result], *args: Any) -> Result | None:
        """What a function returns, or None if it found something wrong, which is counted."""
        try:
            return read(*args)
        except (MBEIRFormatError, FileNotFoundError) as error:
            self.add(error)
            return None

    def __enter__(self) -> Problems:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None and self:
            raise self.report()

    def report(self) -> Exception:
        """The error that tells of all of them; there must be one."""
        if self.counts.total() == 1:
            return next(iter(self.first.values()))[0]
        message = f"{self.path}: {self.counts.total()} problems ({self}):{self.quotes()}"
        return FileNotFoundError(message) if set(self.counts) == {_MISSING} else MBEIRFormatError(message)

    def quotes(self) -> str:
        """The first of each kind, a line each."""
        return "".join(f"\n- {error}" for first in self.first.values() for error in first)


# --- tables


class Line(NamedTuple):
    """A row of a table: how errors name it, and its columns."""

    where: str
    columns: Mapping[str, Any]

    def text(self, name: str) -> str | None:
        """The text of a column, None if there is none or it is blank."""
        return text_value(self.columns.get(name), self.where, name)


def text_value(value: Any, where: str, name: str) -> str | None:
    """A cell as a text, None if there is none or it is blank; an MBEIRFormatError if it holds something else."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str) or not is_unicode(value):
        what = "which holds half a character: mend its encoding" if isinstance(value, str) else "must be a text or null"
        raise wrong(where, f"{name} is {shown(value)}, {what}.", "text of another type")
    return value


def read_lines(path: Path, only: Container[str] | None = None) -> Iterator[Line]:
    """The rows of a file one after the other; blank lines are left out.

    A .txt has one text a line, the column "text"; a .json is a list of objects; a .csv and a .tsv have a header, and a
    quotation mark means nothing in a .tsv, as IANA has it. Of a .parquet the `only` columns are read, or all if it has
    none of these. A ValueError if the kind of file is another, or if it cannot be read to its end.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".jsonl":
            yield from json_lines(path)
        elif kind in (".csv", ".tsv"):
            yield from _separated(path, "," if kind == ".csv" else "\t")
        elif kind == ".parquet":
            yield from _parquet(path, only)
        elif kind == ".json":
            rows = json.loads(path.read_bytes())  # the one kind that is held whole
            for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
                if not isinstance(row, dict):
                    raise wrong(path, f"object {number} is {shown(row)}, must be a JSON object", "broken file")
                yield Line(f"{path}, object {number}", row)
        elif kind == ".txt":
            with path.open(encoding="utf-8-sig") as file:
                lines = ((number, line.strip()) for number, line in enumerate(file, start=1))
                yield from (Line(location(path, number), {"text": text}) for number, text in lines if text)
        else:
            raise ValueError(f"{path} ends in {path.suffix!r}, must be one of {', '.join(TABLE_SUFFIXES)}; convert it.")
    except _BROKEN as error:
        hint = "name it .jsonl if each line is an object" if kind == ".json" else "save it as UTF-8 if it is text"
        what = f"cannot be read ({cut(str(error))}). Mend it, download it again, or {hint}"
        raise wrong(path, what, "broken file") from error


def json_lines(path: Path) -> Iterator[Line]:
    """The objects of a file of JSON Lines; the first broken line is raised, as those behind it are seldom better.

    A file without any object is an error, too: it is what an interrupted download may leave.
    """
    row = None
    # Read as bytes: a line that is no UTF-8 is then an error of its own, and not of the rest of the file.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.removeprefix(BOM_UTF8).strip():
                continue
            where = location(path, number)
            try:
                row = json.loads(line)  # which takes a BOM in bytes, and tells UTF-8 from UTF-16
            except (ValueError, RecursionError) as error:
                raise broken_line(where, line, f"broken JSON ({error}), must be one JSON object in UTF-8") from error
            if not isinstance(row, dict):
                raise broken_line(where, line, f"must be a JSON object, is {shown(row)}")
            yield Line(where, row)
    if row is None:
        raise wrong(path, "the file is empty; download it again or remove it")


def broken_line(where: str, line: bytes, what: str) -> MBEIRFormatError:
    """The error of a line of a file."""
    # Nothing else tells a download that was interrupted: each line before its end is whole.
    end = "" if line.endswith(b"\n") else "; the file ends in the middle of this line: download it again"
    return wrong(where, what + end, "broken line")


# `csv`, and neither pandas nor Arrow: these fill up or cut short a row with cells too few or too many.
def _separated(path: Path, delimiter: str) -> Iterator[Line]:
    # The limit is one of the whole process, so it is raised for good: a generator cannot put it back in time.
    csv.field_size_limit(max(_MOST_CHARACTERS, csv.field_size_limit()))
    with path.open(encoding="utf-8-sig", newline="") as file:
        quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        # Strict: else a quotation mark that is never closed swallows the rest of the file.
        reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)
        # Columns without a name may come twice, as spreadsheets write them.
        _refuse_repeated(path, [name for name in reader.fieldnames or () if name])
        for row in reader:
            where = location(path, reader.line_num)
            if None in row or None in row.values():
                raise wrong(where, "more or fewer cells than the header has. Mend the line.", "broken file")
            yield Line(where, row)


def _refuse_repeated(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise wrong(path, f"the header has a name twice: {cut(', '.join(names))}. Rename one of the columns.")


def _parquet(path: Path, only: Container[str] | None) -> Iterator[Line]:
    # Without these Arrow reads a whole row group ahead, with all images inside of it.
    with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
        wanted = [name for name in file.schema_arrow.names if only is None or name in only]
        _refuse_repeated(path, wanted)  # a row is a dict, which would hold the last of them alone
        batches = file.iter_batches(_ROWS_AT_ONCE, columns=wanted or None)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from (Line(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def dataset_lines(rows: datasets.Dataset) -> Iterator[Line]:
    """The rows of a dataset, its images as `{"path": ..., "bytes": ...}`."""
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return (Line(f"the dataset, row {number}", row) for number, row in enumerate(rows, start=1))


def item_lines(path: Path) -> Iterator[Line]:
    """The lines of a table by our names, also those of the Hub's folders of images, of BEIR's corpora and of NLI.

    A title stands before its text where the id is an `_id`. Each sentence of a row of NLI is a line of its own.
    """
    for where, columns in read_lines(path, _READ):
        row = dict(columns)
        if "file_name" in row and "image" not in row:
            row["image"], row["text"] = row.pop("file_name"), row.get("text", row.get("caption"))
        if "_id" in row and "text" in row and "id" not in row:
            row["id"], title = row.pop("_id"), row.pop("title", None)
            row["text"] = row["text"] if title is None else f"{title} {row['text'] or ''}".strip()
        if row.keys() >= set(NLI_COLUMNS) and not row.keys() & {"text", "image"}:
            yield from (Line(where, {"text": row[name]}) for name in NLI_COLUMNS)
        else:
            yield Line(where, row)


# --- what is kept on the disk


def file_state(path: Path) -> list[Any]:
    """By what a file is known again: its path, size and time of change."""
    status = path.stat() if path.is_file() else None
    return [os.path.realpath(path), status and status.st_size, status and status.st_mtime_ns]


def on_disk(
    rows: Callable[[], Iterable[Mapping[str, Any]]], features: datasets.Features, key: list[Any]
) -> datasets.Dataset:
    """Rows as a dataset that lies in the cache of `datasets`, and not in the memory of each process.

    The first process of a machine makes it, the others wait for the lock of `datasets` and map the same file; the
    next run finds it there. To write a row takes some 50 microseconds, once.

    Equal keys mean equal rows. What making them raises is raised, and nothing is kept then.
    """
    try:
        # With a fingerprint of ours `datasets` need not pickle and hash the generator, and with it a pool or a model.
        # A part that a killed process left behind has another name, and is never taken for the whole.
        fingerprint = Hasher.hash([key, str(features)])
        return datasets.Dataset.from_generator(rows, features=features, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
