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

from puma_hf.modeling.inputs_puma import is_image_name, modality_of
from puma_hf.settings import cut, is_unicode, shown

SHOWN: Final = 5  # how many of the wrong rows a report quotes
COLUMNS = ("text", "image", "instruction")
CAPTION_NAMES = ("caption", "captions", "text", "title", "description", "sentence", "sentences")
NLI_COLUMNS = ("sent0", "sent1", "hard_neg")  # as in SimCSE's nli_for_simcse.csv, which PUMA's first stage reads
# What is read of a Parquet file: our names, BEIR's, those of the Hub's folders of images, NLI's.
_READ = ("id", *COLUMNS, "_id", "title", "file_name", *CAPTION_NAMES, *NLI_COLUMNS)

# A text such as "photo.jpg" would be opened by a model that takes bare strings for paths, so it is marked as text.
_LOOKS_LIKE_FILE = re.compile(r"^(?:data:|https?://)|\.\w{2,5}$")
_ROWS_AT_ONCE = 64  # of a Parquet file; an image inside has up to some megabytes
_BUFFER = 1 << 20  # bytes of a column read at a time; of a row group's images no more than all are held
_MOST_CHARACTERS = 2**24  # of a cell; Python's own limit is 131,072

_MISSING = "image missing"

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


def existing(name: str | Path) -> Path:
    """A path that must be there."""
    if not Path(name).exists():
        raise FileNotFoundError(f"{str(name)!r} is neither a file nor a folder. Check the path.")
    return Path(name)


def location(path: Path, line: int) -> str:
    """How errors name a line of a file: `<path>, line <n>`."""
    return f"{path}, line {line}"


class Problems:
    """Wrong rows, collected while the reading goes on; memory does not grow with their number.

    At the end of a `with` block one error says how many there are, of which kinds, and quotes the first five. A
    single wrong row is raised as it is. If all that is wrong are missing images, the error is a `FileNotFoundError`.
    """

    def __init__(self, path: str | Path = "") -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.first: defaultdict[str, list[str]] = defaultdict(list)  # messages of each kind
        self._quoted: list[Exception] = []

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return ", ".join(f"{kind}: {count}" for kind, count in self.counts.most_common())

    def add(self, error: Exception) -> None:
        """Count what would have been raised for a row."""
        kind = error.kind if isinstance(error, MBEIRFormatError) else _MISSING
        self.counts[kind] += 1
        # Of ten million wrong rows only the first few are kept: a pool with a wrong root has nothing else.
        self._quoted += [error] if len(self._quoted) < SHOWN else []
        self.first[kind] += [str(error)] if len(self.first[kind]) < SHOWN else []

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
            return self._quoted[0]
        message = f"{self.path}: {self.counts.total()} problems ({self}){self.quotes()}"
        return FileNotFoundError(message) if set(self.counts) == {_MISSING} else MBEIRFormatError(message)

    def quotes(self) -> str:
        """The first of them, a line each."""
        first = "" if self.counts.total() <= SHOWN else f". The first {SHOWN}"
        return f"{first}:" + "".join(f"\n- {error}" for error in self._quoted)


# --- tables


class Line(NamedTuple):
    """A row of a table: how errors name it, and its columns; or why it cannot be read."""

    where: str
    columns: Mapping[str, Any]
    error: MBEIRFormatError | None = None

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
    """The rows of a file one after the other, those that cannot be read with their error; blank lines are left out.

    A .txt has one text a line, the column "text"; a .json is a list of objects or JSON Lines; a .csv and a .tsv have a
    header, and a quotation mark means nothing in a .tsv, as IANA has it. Of a .parquet the `only` columns are read, or
    all if it has none of these. A ValueError if the kind of file is another, or a .parquet is damaged.
    """
    # Python's own `csv` and `json` and not Arrow's readers, which guess types ("007" becomes 7, "NA" nothing) and stop
    # at the first broken line: here a run may go on without it, and can name it.
    readers = {
        ".txt": _each_line(path, lambda line: {"text": line.decode("utf-8-sig").strip()}),
        ".jsonl": _each_line(path, _json_line),
        ".json": _json(path),
        ".csv": _separated(path, ","),
        ".tsv": _separated(path, "\t"),
        ".parquet": _parquet(path, only),
    }
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} ends in {path.suffix!r}, must be one of {', '.join(readers)}; convert it.")
    return readers[path.suffix.lower()]


def _bad(where: str, what: str) -> Line:
    return Line(where, {}, wrong(where, what, "broken line"))


def _each_line(path: Path, parse: Callable[[bytes], dict[str, Any]]) -> Iterator[Line]:
    # Read as bytes: a line that is no UTF-8 is then an error of its own, and not of the rest of the file.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = location(path, number)
            try:
                if line.removeprefix(BOM_UTF8).strip():
                    yield Line(where, parse(line))
            except (ValueError, RecursionError) as error:
                # Nothing else tells a download that was interrupted: each line before its end is whole.
                is_whole = line.endswith(b"\n")
                yield _bad(where, f"{error}.") if is_whole else Line(where, {}, cut_off(where, str(error)))


def _json_line(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)  # which takes a BOM in bytes, and tells UTF-8 from UTF-16
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({error}), each line must be one JSON object in UTF-8") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def cut_off(where: str, what: str) -> MBEIRFormatError:
    """The error of a last line that does not end as lines do."""
    return wrong(where, f"{what}; the file ends in the middle of this line: download it again", "cut last line")


def _json(path: Path) -> Iterator[Line]:
    with path.open("rb") as file:
        is_list = file.read(1000).removeprefix(BOM_UTF8).lstrip().startswith(b"[")
    if not is_list:
        yield from _each_line(path, _json_line)
        return
    try:
        rows = json.loads(path.read_bytes())  # the one kind that is held whole
    except (ValueError, RecursionError) as error:
        rows = [f"broken JSON ({error}); was the download cut off?"]
    for number, row in enumerate(rows, start=1):
        where = f"{path}, object {number}"
        yield Line(where, row) if isinstance(row, dict) else _bad(where, f"expected a JSON object, got {shown(row)}")


def _separated(path: Path, delimiter: str) -> Iterator[Line]:
    # The limit is one of the whole process, so it is raised for good: a generator cannot put it back in time.
    csv.field_size_limit(max(_MOST_CHARACTERS, csv.field_size_limit()))
    # Bytes that are no UTF-8 become halves of characters here, so that they are told with their line.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        # Strict: else a quotation mark that is never closed swallows the rest of the file.
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        names: list[str] = []
        while True:
            where, what = location(path, reader.line_num + 1), ""
            try:
                if (cells := next(reader, None)) is None:
                    return
            except csv.Error as error:
                cells, what = [], f"{error}. Mend the line, or its quotation marks."
            if not is_unicode("".join(cells)):
                what = "not UTF-8. Convert the file."
            elif names and cells and len(cells) != len(names):
                what = f"{len(cells)} cells, but the header has {len(names)} ({cut(', '.join(names))}). Mend the line."
            if what:
                yield _bad(where, what)
                if not names:
                    return  # the next line must not be taken for the header
            elif names and cells:
                yield Line(where, dict(zip(names, cells, strict=True)))
            else:
                names = names or _different(cells, path)


def _different(names: list[str], path: Path) -> list[str]:
    """Names of columns; those without one may come twice, as spreadsheets write them."""
    if twice := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise wrong(path, f"the header has {shown(twice[0])} twice. Rename one of the columns.")
    return names


def _parquet(path: Path, only: Container[str] | None) -> Iterator[Line]:
    try:
        # Without these Arrow reads a whole row group ahead, with all images inside of it.
        with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            names = _different(file.schema_arrow.names, path)
            wanted = [name for name in names if only is None or name in only]
            batches = file.iter_batches(_ROWS_AT_ONCE, columns=wanted or None)
            for number, row in enumerate((row for batch in batches for row in _rows(batch)), start=1):
                where = f"{path}, row {number}"
                yield Line(where, row) if isinstance(row, dict) else _bad(where, f"a cell cannot be read ({row})")
    except (pyarrow.ArrowException, OSError) as error:
        what = f"{path} is not a whole Parquet file ({cut(str(error))}). Make or download it again."
        raise MBEIRFormatError(what, "cut file") from error


def _rows(batch: Any) -> list[Any]:
    """The rows of a batch; in the place of one that Python cannot hold (no UTF-8, an odd date) what is wrong."""
    try:
        # One bad cell spoils a whole batch; only then is it cut into rows, each of which is slow.
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [cut(str(error))]
        return [row for number in range(batch.num_rows) for row in _rows(batch.slice(number, 1))]


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
    ours: dict[str, str] | None = None
    for line in read_lines(path, _READ):
        name = line.columns.get("file_name", "-")
        # `file_name` is an image, with a caption, if the first that is given names one: were this asked of each row,
        # one `.heic` among `.jpg` would become a text in silence.
        if ours is None and line.error is None and name:
            caption = next((name for name in ("text", *CAPTION_NAMES) if name in line.columns), "text")
            is_image = is_image_name(str(name)) and "image" not in line.columns
            ours = {"file_name": "image", caption: "text"} if is_image else {}
        row = {(ours or {}).get(name, name): value for name, value in line.columns.items()}
        if "_id" in row and "text" in row and "id" not in row:
            row["id"], title = row.pop("_id"), row.pop("title", None)
            row["text"] = row["text"] if title is None else f"{title} {row['text'] or ''}".strip()
        if row.keys() >= set(NLI_COLUMNS) and not row.keys() & {"text", "image"}:
            yield from (Line(line.where, {"text": row[name]}) for name in NLI_COLUMNS)
        else:
            yield line._replace(columns=row)


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
