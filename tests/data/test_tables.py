from __future__ import annotations

import csv
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pytest
from datasets import Dataset, Features, Image, Value
from pyarrow import parquet

from puma_hf.data.mbeir_format import MBEIRFormatError
from puma_hf.data.tables import read_table

ROWS = [{"text": "a red shoe", "image": "1.png"}, {"text": 'zwölf, "hats"', "image": "2.png"}]


DEEP = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"


def read(path: Path) -> list[tuple[str, dict[str, object]]]:
    return [(where.removeprefix(str(path)), row) for where, row in read_table(path)]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.csv", 'text,image\na red shoe,1.png\n"zwölf, ""hats""",2.png\n', [", line 2", ", line 3"]),
        ("a.TSV", 'text\timage\r\na red shoe\t1.png\r\nzwölf, "hats"\t2.png', [", line 2", ", line 3"]),
        ("a.csv", '\ufefftext,image\na red shoe,1.png\n\n"zwölf, ""hats""",2.png\n', [", line 2", ", line 4"]),
        (
            "a.jsonl",
            '{"text": "a red shoe", "image": "1.png"}\n\n{"text": "zwölf, \\"hats\\"", "image": "2.png"}\n',
            [", line 1", ", line 3"],
        ),
        (
            "a.json",
            '{"text": "a red shoe", "image": "1.png"}\n{"text": "zwölf, \\"hats\\"", "image": "2.png"}\n',
            [", line 1", ", line 2"],
        ),
        (
            "a.json",
            '\n [{"text": "a red shoe", "image": "1.png"},\n {"text": "zwölf, \\"hats\\"", "image": "2.png"}]',
            [", object 1", ", object 2"],
        ),
    ],
)
def test_rows_and_their_places(tmp_path: Path, name: str, content: str, places: list[str]) -> None:
    path = write(tmp_path, name, content)
    assert read(path) == list(zip(places, ROWS, strict=True))


def test_a_text_file_has_one_text_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\ufefffirst, with a comma\r\n\n   \n  zwölf \n")
    assert read(path) == [(", line 1", {"text": "first, with a comma"}), (", line 4", {"text": "zwölf"})]


def test_parquet(tmp_path: Path) -> None:
    image = write(tmp_path, "1.png", "no image: nothing decodes it")
    path = tmp_path / "a.parquet"
    features = Features({"text": Value("string"), "image": Image()})
    Dataset.from_dict({"text": ["a"], "image": [str(image)]}, features=features).to_parquet(path)
    assert read(path) == [(", row 1", {"text": "a", "image": {"path": str(image), "bytes": None}})]


def test_a_damaged_row_of_parquet(tmp_path: Path) -> None:
    cells = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [None, pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"a\xffb")],
    )
    parquet.write_table(pyarrow.table({"text": cells}), tmp_path / "a.parquet")
    bad: list[str] = []
    rows = read_table(tmp_path / "a.parquet", lambda error: bad.append(str(error)))
    assert [(where[-5:], row["text"]) for where, row in rows] == [("row 1", "a"), ("row 3", "b")]
    (message,) = bad
    assert message.startswith(f"{tmp_path / 'a.parquet'}, row 2: a cell cannot be read ('utf-8' codec can't decode")


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: the header has 'text' twice\. Rename one of the columns"):
        read(tmp_path / "a.parquet")


def test_a_tsv_has_no_quotation_marks(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'text\tn\n"one\t1\ntwo\t2\nthree"\t3\n"4" or ""\t4\n')
    assert [row["text"] for _, row in read(path)] == ['"one', "two", 'three"', '"4" or ""']


def test_long_cells_and_the_limit_of_others(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    for _, row in read_table(write(tmp_path, "a.csv", "text\n" + "x" * 200_000)):
        assert len(row["text"]) == 200_000
        assert csv.field_size_limit() == before


def test_a_list_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.json", '\ufeff[\n{"text": "a"}]')) == [(", object 1", {"text": "a"})]


def test_values_in_errors_are_cut(tmp_path: Path) -> None:
    header = ",".join(f"column {number}" for number in range(10_000))
    with pytest.raises(ValueError, match="1 cells, but the header has 10000 ") as caught:
        read(write(tmp_path, "a.csv", f"{header}\na\n"))
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_a_cell_of_several_lines_names_its_last(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.csv", 'text\n"one\ntwo"\n')) == [(", line 3", {"text": "one\ntwo"})]


def test_a_file_without_rows(tmp_path: Path) -> None:
    for name, content in (("a.txt", ""), ("a.csv", "text,image\n"), ("b.csv", ""), ("a.jsonl", ""), ("a.json", "[]")):
        assert read(write(tmp_path, name, content)) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\nb\xe4d\n", r"a\.txt, line 2: not UTF-8 \(invalid continuation byte, byte 0xe4\)\. Convert"),
        ("a.csv", b"text\nb\xe4d\n", r"a\.csv, line 2: not UTF-8 \(invalid continuation byte, byte 0xe4\)"),
        ("a.csv", b"t\xe4xt\na\n", r"a\.csv, line 1: not UTF-8 .*0xe4\)"),
        ("a.csv", "text,image\na\n", r"a\.csv, line 2: 1 cells, but the header has 2 \(text, image\)\. Is a quot"),
        ("a.csv", "text,image\na,b,c,d\n", r"a\.csv, line 2: 4 cells, but the header has 2"),
        ("a.tsv", "text\timage\na\n", r"a\.tsv, line 2: 1 cells, .* Is a tab missing or too many\?"),
        (
            "a.csv",
            "text\ngood\n" + "x" * (2**24 + 1),
            r"a\.csv, line 3: field larger than field limit .* Mend the line",
        ),
        ("a.csv", 'text,image\n"an open quote,1\nb,2\nc,3\n', r"a\.csv, line 2: unexpected end of data\. .* quotation"),
        ("a.csv", '"text"s,image\na,b\n', r"a\.csv: the header cannot be read \(',' expected after '\"'\)\. Mend it"),
        ("a.csv", "id;text\n1;b\n", r"a\.csv: the header 'id;text' is one column, and looks .* by ';'.* commas"),
        ("a.csv", "id\ttext\n1\tb\n", r"looks separated by '\\t', where \.csv has ','"),
        ("a.tsv", "id,text\n1,b\n", r"looks separated by ',', where \.tsv has '\\t'"),
        ("a.csv", "text,text\na,b\n", r"a\.csv: the header has 'text' twice"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: broken JSON"),
        ("a.jsonl", '{"text": "a"}\n"b"\n', r"a\.jsonl, line 2: expected a JSON object, got str"),
        ("a.jsonl", DEEP, r"a\.jsonl, line 1: broken JSON \(maximum recursion depth exceeded"),
        ("a.json", f"[{DEEP}]", r"a\.json: broken JSON \(maximum recursion depth exceeded"),
        ("a.json", '[{"text": "a"}, ', r"a\.json: broken JSON .*cut off"),
        ("a.json", '[{"text": "a"}, 3]', r"a\.json, object 2: expected a JSON object, got int"),
        ("a.parquet", b"no parquet", r"a\.parquet is not a whole Parquet file \(.*magic bytes"),
        ("a.docx", "", r"a\.docx ends in '\.docx', must be one of \.txt, \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_json_lines_raise_the_error_of_mbeir(tmp_path: Path) -> None:
    with pytest.raises(MBEIRFormatError, match="line 1"):
        read(write(tmp_path, "a.jsonl", "{"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv is not a file\. Check the path"):
        read(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("name", "content", "texts", "messages"),
    [
        ("a.csv", "text,n\na,1\nb\nc,1,2\nd,4\n", ["a", "d"], ["line 3: 1 cells", "line 4: 3 cells"]),
        ("a.csv", "text\na\n" + "x" * (2**24 + 1) + "\nb\n", ["a", "b"], ["line 3: field larger"]),
        ("a.csv", b"text\na\n\xff\nc\n", ["a", "c"], ["line 3: not UTF-8"]),
        ("a.jsonl", DEEP + '\n{"text": "b"}\n', ["b"], ["line 1: broken JSON"]),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text"\n[]\n{"text": "d"}',
            ["a", "d"],
            ["line 2: broken JSON", "line 3: expected"],
        ),
        ("a.json", '[{"text": "a"}, 3, {"text": "c"}]', ["a", "c"], ["object 2: expected a JSON object, got int"]),
        ("a.json", '[{"text": "a"}', [], ["broken JSON"]),
        ("a.txt", b"a\n\xff\nc\n", ["a", "c"], ["line 2: not UTF-8"]),
    ],
)
def test_reading_goes_on_after_bad_lines(
    tmp_path: Path, name: str, content: str | bytes, texts: list[str], messages: list[str]
) -> None:
    bad: list[str] = []
    rows = read_table(write(tmp_path, name, content), lambda error: bad.append(str(error)))
    assert [row["text"] for _, row in rows] == texts
    assert len(bad) == len(messages)
    assert all(message in error for message, error in zip(messages, bad, strict=True))


def test_unnamed_columns_may_come_twice(tmp_path: Path) -> None:
    assert [row["text"] for _, row in read_table(write(tmp_path, "a.csv", "text,,\na,,\n"))] == ["a"]


def test_without_its_header_a_table_has_no_rows(tmp_path: Path) -> None:
    bad: list[ValueError] = []
    assert list(read_table(write(tmp_path, "a.csv", '"text"s\na\nb\n'), bad.append)) == []
    assert len(bad) == 1
