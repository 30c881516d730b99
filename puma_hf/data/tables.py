"""Rows of a file of any common kind, each with the place it was read from."""

from __future__ import annotations

import csv
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from puma_hf.data.mbeir_format import MBEIRFormatError, location

Record = tuple[str, dict[str, Any]]  # where, and the columns
BadLine = Callable[[ValueError], None]


def read_table(path: Path, bad_line: BadLine | None = None) -> Iterator[Record]:
    """The rows of a file, one after the other.

    Args:
        path: A .txt (one text a line, the column "text"), .jsonl, .json (a list of objects, or JSON Lines), .csv,
            .tsv (both with a header) or .parquet.
        bad_line: What to do about the error of a line; the reader goes on after it, if the rest can be read at
            all. By default it is raised.

    Yields:
        How errors name the place (`<path>, line <n>`), and the row as a dictionary. Blank lines are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the kind of file is not known, or a line is not what its kind asks for.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from puma_hf.data.tables import read_table

    >>> where, row = next(read_table(Path("demo/emoji/concepts.tsv")))
    >>> row["name"]
    'keycap: #'
    ```
    """
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"{path} ends in {path.suffix!r}, must be one of {', '.join(_READERS)}; convert it.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. Check the path.")
    return _READERS[path.suffix.lower()](path, bad_line or _raise)


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
                record = json.loads(line)
            except ValueError as error:
                bad_line(
                    MBEIRFormatError(
                        f"{where}: broken JSON ({error}); each line must be one JSON object in UTF-8, was the download "
                        "cut off?"
                    )
                )
                continue
            if isinstance(record, dict):
                yield where, record
            else:
                bad_line(MBEIRFormatError(f"{where}: expected a JSON object, got {type(record).__name__}"))


def _json(path: Path, bad_line: BadLine) -> Iterator[Record]:
    with path.open("rb") as file:
        is_list = next((byte for byte in iter(lambda: file.read(1), b"") if not byte.isspace()), b"") == b"["
    if not is_list:
        yield from _json_lines(path, bad_line)
        return
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
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
        with path.open(encoding="utf-8-sig", newline="") as file:
            # Strict: else a quotation mark that is never closed swallows the rest of the file.
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            try:
                names = list(reader.fieldnames or ())
            except UnicodeDecodeError as error:
                bad_line(_not_utf8(f"{path}, line 1 or later", error))
                return
            except csv.Error as error:  # the next line must not be taken for the header
                bad_line(ValueError(f"{path}: the header cannot be read ({error}). Mend it."))
                return
            if len(names) == 1 and (
                other := next((sign for sign in ",;\t|" if sign in names[0] and sign != delimiter), None)
            ):
                bad_line(
                    ValueError(
                        f"{path}: the header {names[0]!r} is one column, and looks separated by {other!r}, where "
                        f"{path.suffix} has {delimiter!r}. Save it so, or under another ending: .csv has commas, .tsv "
                        "tabs."
                    )
                )
                return
            if twice := [name for name, count in Counter(names).items() if count > 1 and name]:
                bad_line(ValueError(f"{path}: the header has {twice[0]!r} twice. Rename one of the columns."))
                return
            while True:
                try:
                    row: dict[Any, Any] | None = next(reader, None)
                except UnicodeDecodeError as error:  # a block of the file is decoded at once, so the rest is lost
                    bad_line(_not_utf8(f"{path}, somewhere after line {reader.line_num}", error))
                    return
                except csv.Error as error:
                    bad_line(
                        ValueError(
                            f"{location(path, reader.line_num + 1)}: {error}. Mend the line, or its quotation marks."
                        )
                    )
                    continue
                if row is None:
                    return
                where = location(path, reader.line_num)
                if None in row or None in row.values():
                    found = sum(row[name] is not None for name in names) + len(row.get(None, ()))
                    bad_line(
                        ValueError(
                            f"{where}: {found} cells, but the header has {len(names)} ({', '.join(names)}). Is a "
                            f"quotation mark missing, or a cell with {delimiter!r} not quoted?"
                        )
                    )
                    continue
                yield where, row

    return read


def _parquet(path: Path, bad_line: BadLine) -> Iterator[Record]:
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # the reader's errors are of many types, wrapped in one of the builder's
            bad_line(ValueError(f"{path} cannot be read as Parquet ({error.__cause__ or error})."))
            return
        for number, record in enumerate(without_decoding(rows), start=1):
            yield f"{path}, row {number}", record


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
