from __future__ import annotations

import csv
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pytest
from PIL import Image as Pillow
from pyarrow import parquet

from puma_hf.data.records import Problems, Record, item_lines, read_lines
from puma_hf.modeling.inputs_puma import is_image_name

ROWS = [{"text": "a red shoe", "image": "1.png"}, {"text": 'zwölf, "hats"', "image": "2.png"}]
DEEP = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"


# --- records


def test_a_record_as_an_input() -> None:
    both = Record("9:1", "a dog", "/data/dog.png", instruction="Find it.")
    assert isinstance(both.model_input, dict)
    assert list(both.model_input.items()) == [
        ("image", "/data/dog.png"),
        ("text", "a dog"),
        ("instruction", "Find it."),
    ]
    assert (both.modality, Record(text="a dog").modality, Record(image="a.png").modality) == (
        "image,text",
        "text",
        "image",
    )
    assert Record(text="a dog").model_input == "a dog"


def test_text_that_a_model_might_open_is_marked_as_text() -> None:
    Pillow.init()
    names = [f"a{suffix}" for suffix in Pillow.EXTENSION if is_image_name(f"a{suffix}")]
    assert len(names) > 20
    for text in (*names, "https://a.b/c", "data:image/png;base64,AA", "photos/dog.jpg", "my dog.webp"):
        assert Record(text=text).model_input == {"text": text}


def test_missing_images_alone_are_missing_files_and_the_first_problems_are_quoted() -> None:
    problems = Problems("a")
    for line in range(20):
        problems.add(FileNotFoundError(f"a, line {line}: no image"))
    with pytest.raises(FileNotFoundError, match=r"20 problems \(image missing: 20\)") as caught, problems:
        pass
    assert len(str(caught.value).splitlines()) == 6


# --- tables


def read(path: Path) -> list[tuple[str, dict[str, object]]]:
    found = []
    for line in read_lines(path):
        if line.error is not None:
            raise line.error
        found.append((line.where.removeprefix(str(path)), dict(line.columns)))
    return found


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


def test_a_damaged_row_of_parquet(tmp_path: Path) -> None:
    offsets = pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1]
    cells = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"a\xffb")])
    parquet.write_table(pyarrow.table({"text": cells}), tmp_path / "a.parquet")
    lines = list(read_lines(tmp_path / "a.parquet"))
    assert [line.columns.get("text") for line in lines] == ["a", None, "b"]
    assert str(lines[1].error).startswith(f"{tmp_path / 'a.parquet'}, row 2: a cell cannot be read ('utf-8' codec")


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
        ("a.csv", b"t\xe4xt\na\n", r"a\.csv, line 1: not UTF-8"),
        ("a.csv", "text,text\na,b\n", r"a\.csv: the header has 'text' twice"),
        ("a.json", '[{"text": "a"}, ', r"a\.json, object 1: .*broken JSON .*cut off"),
        ("a.parquet", b"no parquet", r"a\.parquet is not a whole Parquet file \(.*magic bytes"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, name, content))


@pytest.mark.parametrize(
    ("name", "content", "texts", "messages"),
    [
        ("a.csv", "text,n\na,1\nb\nc,1,2\nd,4\n", ["a", "d"], ["line 3: 1 cells", "line 4: 3 cells"]),
        ("a.csv", 'text\na\n"b\n', ["a"], ["line 3: unexpected end of data"]),
        ("a.tsv", b"text\na\n\xff\nc\n", ["a", "c"], ["line 3: not UTF-8"]),
        ("a.jsonl", DEEP + '\n{"text": "b"}\n', ["b"], ["line 1: broken JSON (maximum recursion"]),
        ("a.jsonl", '{"text": "a"}\n{"text"\n[]\n{"text": "d"}', ["a", "d"], ["line 2: broken", "line 3: expected"]),
        ("a.json", '[{"text": "a"}, 3, {"text": "c"}]', ["a", "c"], ["object 2: expected a JSON object, got 3"]),
    ],
)
def test_reading_goes_on_after_bad_lines(
    tmp_path: Path, name: str, content: str | bytes, texts: list[str], messages: list[str]
) -> None:
    lines = list(read_lines(write(tmp_path, name, content)))
    bad = [str(line.error) for line in lines if line.error is not None]
    assert [line.columns["text"] for line in lines if line.error is None] == texts
    assert len(bad) == len(messages)
    assert all(message in error for message, error in zip(messages, bad, strict=True))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("file_name,caption\na.png,red\nb.pdf,blue\n", [("red", "a.png"), ("blue", "b.pdf")]),
        ("file_name,text\nreport.pdf,a chunk\n", [("a chunk", None)]),
        ("_id,title,text\nd1,Apples,are red.\n", [("Apples are red.", None)]),
        ("id,sent0,sent1,hard_neg\n1,a,b,c\n", [("a", None), ("b", None), ("c", None)]),
    ],
)
def test_names_that_others_give_to_columns(
    tmp_path: Path, content: str, expected: list[tuple[str, str | None]]
) -> None:
    lines = list(item_lines(write(tmp_path, "a.csv", content)))
    assert [(line.text("text"), line.text("image")) for line in lines] == expected
