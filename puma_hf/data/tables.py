"""Rows of a file of any common kind, each with the place it was read from."""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow  # type: ignore[import-untyped]
from pyarrow import parquet

from puma_hf.data.mbeir_format import MBEIRFormatError, json_object, location
from puma_hf.values import cut, shown

Record = tuple[str, dict[str, Any]]  # where, and the columns
BadLine = Callable[[ValueError], None]

_ROWS_AT_ONCE = 64  # of a Parquet file; an image inside has up to some megabytes
_BUFFER = 1 << 20  # bytes of a column read at a time; of a row group's images no more than all are held
_MOST_CHARACTERS = 2**24  # of a cell; Python's own limit is 131,072


def read_table(path: Path, bad_line: BadLine | None = None, only: Container[str] | None = None) -> Iterator[Record]:
    """The rows of a file, one after the other.

    Args:
        path: A .txt (one text a line, the column "text"), .jsonl, .json (a list of objects, or JSON Lines), .csv,
            .tsv (both with a header; as IANA has it, a quotation mark means nothing in a .tsv) or .parquet.
        bad_line: What to do about the error of a line; the reader goes on after it, if the rest can be read at
            all. By default it is raised.
        only: The columns that are wanted of a .parquet; the others are not read, unless there is none of these.

    Yields:
        How errors name the place (`<path>, line <n>`), and the row as a dictionary. Blank lines are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the kind of file is not known, or a line is not what its kind asks for; of a damaged .parquet
            in any case.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from puma_hf.data.tables import read_table

    >>> where, row = next(read_table(Path("demo/emoji/concepts.tsv")))
    >>> row["name"]
    'keycap: #'
    ```
    """
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise ValueError(f"{path} ends in {path.suffix!r}, must be one of {', '.join(_READERS)}; convert it.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. Check the path.")
    if kind == ".parquet":
        return _parquet(path, bad_line or _raise, only)
    return _READERS[kind](path, bad_line or _raise)


class Line(NamedTuple):
    """A line of a table: how errors name it, and its columns; or why it cannot be read."""

    where: str
    columns: Mapping[str, Any]
    error: ValueError | None = None


def read_lines(path: Path, only: Container[str] | None = None) -> Iterator[Line]:
    """The rows of a file as `read_table` has them, and in their places those that cannot be read."""
    broken: list[ValueError] = []
    for where, columns in read_table(path, broken.append, only):
        yield from (Line("", {}, error) for error in broken)
        broken.clear()
        yield Line(where, columns)
    yield from (Line("", {}, error) for error in broken)


def without_decoding(rows: datasets.Dataset) -> datasets.Dataset:
    """The dataset with its columns of images as `{"path": ..., "bytes": ...}`."""
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _raise(error: ValueError) -> None:
    raise error


def _text_lines(path: Path, bad_line: BadLine) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = location(path, number)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                bad_line(_not_utf8(where, error))
                continue
            if text:
                yield where, {"text": text}


def _json_lines(path: Path, bad_line: BadLine) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = location(path, number)
            try:
                record = json_object(line, where)
            except MBEIRFormatError as error:
                bad_line(error)
            else:
                yield where, record


def _json(path: Path, bad_line: BadLine) -> Iterator[Record]:
    with path.open("rb") as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:
            file.seek(0)
        is_list = next((byte for byte in iter(lambda: file.read(1), b"") if not byte.isspace()), b"") == b"["
    if not is_list:
        yield from _json_lines(path, bad_line)
        return
    try:
        records = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        bad_line(ValueError(f"{path}: broken JSON ({error}); was the download cut off?"))
        return
    for number, record in enumerate(records, start=1):
        where = f"{path}, object {number}"
        if isinstance(record, dict):
            yield where, record
        else:
            bad_line(ValueError(f"{where}: expected a JSON object, got {type(record).__name__}."))


def _separated(delimiter: str) -> Callable[[Path, BadLine], Iterator[Record]]:
    def read(path: Path, bad_line: BadLine) -> Iterator[Record]:
        # Bytes that are no UTF-8 become halves of characters here, so that they are told with their line.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
            # Strict: else a quotation mark that is never closed swallows the rest of the file.
            reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)
            try:
                with _long_cells():
                    names = list(reader.fieldnames or ())
                _check_header(names, path, delimiter)
            except csv.Error as error:  # the next line must not be taken for the header
                bad_line(ValueError(f"{path}: the header cannot be read ({error}). Mend it."))
                return
            except ValueError as error:
                bad_line(error)
                return
            while True:
                try:
                    with _long_cells():
                        row: dict[Any, Any] | None = next(reader, None)
                    if row is None:
                        return
                    where = location(path, reader.line_num)
                    _check_cells(row, names, where, delimiter)
                except csv.Error as error:
                    where = location(path, reader.line_num + 1)
                    bad_line(ValueError(f"{where}: {error}. Mend the line, or its quotation marks."))
                except ValueError as error:
                    bad_line(error)
                else:
                    yield where, row

    return read


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(_MOST_CHARACTERS)  # of the whole process
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_header(names: list[str], path: Path, delimiter: str) -> None:
    _check_utf8(names, f"{path}, line 1")
    other = next((sign for sign in ",;\t|" if names and sign in names[0] and sign != delimiter), None)
    if len(names) == 1 and other:
        raise ValueError(
            f"{path}: the header {shown(names[0])} is one column, and looks separated by {other!r}, where "
            f"{path.suffix} has {delimiter!r}. Save it so, or under another ending: .csv has commas, .tsv tabs."
        )
    _check_names(names, path)


def _check_names(names: Iterable[str], path: Path) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise ValueError(f"{path}: the header has {shown(twice[0])} twice. Rename one of the columns.")


def _check_cells(row: dict[Any, Any], names: list[str], where: str, delimiter: str) -> None:
    if None in row or None in row.values():
        found = sum(row[name] is not None for name in names) + len(row.get(None, ()))
        remedy = (
            "quotation mark missing, or a cell with ',' not quoted" if delimiter == "," else "tab missing or too many"
        )
        header = f"{len(names)} ({cut(', '.join(names))})"
        raise ValueError(f"{where}: {found} cells, but the header has {header}. Is a {remedy}?")
    _check_utf8(row.values(), where)


def _check_utf8(cells: Iterable[str], where: str) -> None:
    try:
        "".join(cells).encode(errors="surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error


def _parquet(path: Path, bad_line: BadLine, only: Container[str] | None = None) -> Iterator[Record]:
    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            names = file.schema_arrow.names
            _check_names(names, path)
            number = 0
            wanted = [name for name in names if only is None or name in only]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted or None):
                for row in _rows(batch):
                    number += 1
                    where = f"{path}, row {number}"
                    if isinstance(row, Exception):
                        bad_line(ValueError(f"{where}: a cell cannot be read ({cut(str(row))}). Mend it."))
                    else:
                        yield where, row
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


def _not_utf8(where: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{where}: not UTF-8 ({error.reason}, byte {error.object[error.start]:#04x}). Convert the file.")


_READERS: dict[str, Callable[[Path, BadLine], Iterator[Record]]] = {
    ".txt": _text_lines,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
