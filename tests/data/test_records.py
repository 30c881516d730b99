from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from PIL import Image as Pillow
from pyarrow import parquet

from puma_hf.data.records import Record, item_lines, read_lines
from puma_hf.modeling.inputs_puma import is_image_name

ROWS = [{"text": "a red shoe", "image": "1.png"}, {"text": 'zwölf, "hats"', "image": "2.png"}]


# --- records


def test_a_record_as_an_input() -> None:
    both = Record("9:1", "a dog", "/data/dog.png", instruction="Find it.")
    assert isinstance(both.model_input, dict)
    expected = [("image", "/data/dog.png"), ("text", "a dog"), ("instruction", "Find it.")]
    assert list(both.model_input.items()) == expected
    modalities = [one.modality for one in (both, Record(text="a dog"), Record(image="a.png"))]
    assert modalities == ["image,text", "text", "image"]
    assert Record(text="a dog").model_input == "a dog"


def test_text_that_a_model_might_open_is_marked_as_text() -> None:
    Pillow.init()
    names = [f"a{suffix}" for suffix in Pillow.EXTENSION if is_image_name(f"a{suffix}")]
    assert len(names) > 20
    for text in (*names, "https://a.b/c", "data:image/png;base64,AA", "photos/dog.jpg", "my dog.webp"):
        assert Record(text=text).model_input == {"text": text}


# --- tables


def read(path: Path) -> list[tuple[str, dict[str, object]]]:
    return [(line.where.removeprefix(str(path)), dict(line.columns)) for line in read_lines(path)]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


JSON_LINES = '{"text": "a red shoe", "image": "1.png"}\n\n{"text": "zwölf, \\"hats\\"", "image": "2.png"}\n'


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.csv", '\ufefftext,image\na red shoe,1.png\n\n"zwölf, ""hats""",2.png\n', [", line 2", ", line 4"]),
        ("a.TSV", 'text\timage\r\na red shoe\t1.png\r\nzwölf, "hats"\t2.png', [", line 2", ", line 3"]),
        ("a.jsonl", JSON_LINES, [", line 1", ", line 3"]),
        ("a.json", f"\ufeff\n [{JSON_LINES.strip().replace(chr(10) * 2, ',')}]", [", object 1", ", object 2"]),
    ],
)
def test_rows_and_their_places(tmp_path: Path, name: str, content: str, places: list[str]) -> None:
    assert read(write(tmp_path, name, content)) == list(zip(places, ROWS, strict=True))


def test_a_text_file_has_one_text_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\ufeff\nfirst, with a comma\r\n   \n  zwölf \n")
    assert read(path) == [(", line 2", {"text": "first, with a comma"}), (", line 4", {"text": "zwölf"})]


def test_a_tsv_has_no_quotation_marks(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'text\tn\n"one\t1\ntwo\t2\nthree"\t3\n"4" or ""\t4\n')
    assert [row["text"] for _, row in read(path)] == ['"one', "two", 'three"', '"4" or ""']


def test_cells_are_texts_and_may_be_long(tmp_path: Path) -> None:
    """No type is guessed: numbers keep their zeros, and "NA" is a word."""
    path = write(tmp_path, "a.csv", f"text,,\n007,,\nNA,,\n{'x' * 200_000},,\n")
    assert [row["text"] for _, row in read(path)] == ["007", "NA", "x" * 200_000]
    assert csv.field_size_limit() >= 2**24


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"t\xe4xt\na\n", r"a\.csv: cannot be read \('utf-8' codec"),
        ("a.csv", "text,text\na,b\n", r"a\.csv: the header has a name twice: text, text"),
        ("a.csv", "text,n\na,1\nb\n", r"a\.csv, line 3: more or fewer cells than the header"),
        ("a.csv", "text,n\nc,1,2\n", r"a\.csv, line 2: more or fewer cells than the header"),
        ("a.csv", 'text\na\n"b\n', r"a\.csv: cannot be read \(unexpected end of data"),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', r"a\.json: cannot be read \(Extra data.* name it \.jsonl"),
        ("a.json", '[{"text": "a"}, 3, {"text": "c"}]', r"a\.json: object 2 is 3, must be a JSON object"),
        ("a.jsonl", '{"text": "a"}\n{"text"\n', r"a\.jsonl, line 2: broken JSON .*, must be one JSON object"),
        ("a.jsonl", '{"text": "a"}\n{"text"', r"a\.jsonl, line 2: .* in the middle of this line: download it again"),
        ("a.jsonl", '{"a": ' + "[" * 200_000, r"a\.jsonl, line 1: broken JSON \(maximum recursion"),
        ("a.parquet", b"no parquet", r"a\.parquet: cannot be read \(.*magic bytes"),
        ("a.pdf", b"", r"a\.pdf ends in '\.pdf', must be one of \.txt, \.jsonl, "),
    ],
)
def test_files_that_are_broken(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, name, content))


def test_parquet_columns_of_one_name(tmp_path: Path) -> None:
    """A row is a dict: one of the two would be read, and nobody told."""
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has a name twice: text, text"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("file_name,caption\na.png,red\nb.pdf,blue\n", [("red", "a.png"), ("blue", "b.pdf")]),
        ("file_name,text\n,a chunk\n", [("a chunk", None)]),
        ("_id,title,text\nd1,Apples,are red.\n", [("Apples are red.", None)]),
        ("id,sent0,sent1,hard_neg\n1,a,b,c\n", [("a", None), ("b", None), ("c", None)]),
    ],
)
def test_names_that_others_give_to_columns(
    tmp_path: Path, content: str, expected: list[tuple[str, str | None]]
) -> None:
    lines = list(item_lines(write(tmp_path, "a.csv", content)))
    assert [(line.text("text"), line.text("image")) for line in lines] == expected
