from __future__ import annotations

import csv
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pytest
from PIL import Image as Pillow
from pyarrow import parquet

from puma_hf.data.records import (
    Candidate,
    MBEIRFormatError,
    Problems,
    Query,
    Record,
    parse_candidate,
    parse_query,
    read_lines,
)
from puma_hf.modeling.inputs_puma import is_image_name

ROWS = [{"text": "a red shoe", "image": "1.png"}, {"text": 'zwölf, "hats"', "image": "2.png"}]
DEEP = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
CANDIDATE = {"did": "9:1", "txt": "a dog", "img_path": "dog.png", "modality": "image,text"}


class Finder:
    """Finds every image."""

    def find(self, img_path: str, where: str) -> str:
        return f"/data/{img_path}"


QUERY = {
    "qid": "9:2",
    "query_txt": "a dog",
    "query_img_path": None,
    "query_modality": "text",
    "pos_cand_list": ["9:1", "9:1"],
    "neg_cand_list": None,
}
PATH = Path("pool.jsonl")


def wrong(line: int, kind: str = "wrong id") -> MBEIRFormatError:
    return MBEIRFormatError(f"pool.jsonl, line {line}: wrong", kind)


def missing(line: int) -> FileNotFoundError:
    return FileNotFoundError(f"pool.jsonl, line {line}: no image")


def report(*errors: MBEIRFormatError | FileNotFoundError) -> Exception:
    problems = Problems(PATH)
    for error in errors:
        problems.add(error)
    with pytest.raises((MBEIRFormatError, FileNotFoundError)) as caught, problems:
        pass
    return caught.value


@pytest.mark.parametrize("error", [wrong(3), missing(3)])
def test_one_offender_keeps_its_own_error(error: MBEIRFormatError | FileNotFoundError) -> None:
    assert report(error) is error


def test_several_are_counted_by_kind_and_all_quoted() -> None:
    error = report(wrong(1), missing(2), wrong(3), wrong(4, "missing field"))
    assert isinstance(error, MBEIRFormatError)
    assert str(error).splitlines() == [
        "pool.jsonl: 4 problems (wrong id: 2, missing image: 1, missing field: 1):",
        "- pool.jsonl, line 1: wrong",
        "- pool.jsonl, line 2: no image",
        "- pool.jsonl, line 3: wrong",
        "- pool.jsonl, line 4: wrong",
    ]


def test_missing_images_alone_are_missing_files() -> None:
    assert isinstance(report(missing(1), missing(2)), FileNotFoundError)
    # One other mistake is enough, wherever it comes.
    assert isinstance(report(*map(missing, range(20)), wrong(21)), MBEIRFormatError)


def test_memory_does_not_grow_with_the_offenders() -> None:
    problems = Problems(PATH)
    tracemalloc.start()
    for line in range(20_000):
        problems.add(wrong(line))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 20_000


def test_the_first_few_of_each_kind() -> None:
    offenders = Problems()
    for number in range(7):
        offenders.add(ValueError(f"one {number}"), "one")
    offenders.add(ValueError("other 0"), "other")
    assert offenders.first["one"] == [f"one {number}" for number in range(5)]
    assert offenders.some() == ["one 0", "other 0", "one 1", "one 2", "one 3"]
    assert str(offenders) == "7 x one, 1 x other"


def test_records_become_dataclasses() -> None:
    images, dog = Finder(), "/data/dog.png"
    candidate = parse_candidate(CANDIDATE, "here", images)
    assert candidate == Candidate("9:1", "a dog", dog)
    assert isinstance(candidate.model_input, dict)
    assert list(candidate.model_input.items()) == [("image", dog), ("text", "a dog")]
    query = parse_query(QUERY, 7, "here", Finder())
    assert query == Query("9:2", "a dog", None, ("9:1",), ())
    assert (query.line, query.dataset_id, query.model_input) == (7, 9, "a dog")


@pytest.mark.parametrize("text", ["https://a.b/c", "data:image/png;base64,AA", "photos/dog.jpg", "my dog.webp"])
def test_text_that_a_model_might_open_is_marked_as_text(text: str) -> None:
    assert Candidate("9:1", text, None).model_input == {"text": text}


def test_every_name_of_an_image_is_marked_when_it_is_text() -> None:
    names = [f"a{suffix}" for suffix in Pillow.EXTENSION if is_image_name(f"a{suffix}")]
    assert len(names) > 20
    assert [name for name in names if Record(text=name).model_input != {"text": name}] == []


@pytest.mark.parametrize("key", ["did", "txt", "img_path", "modality"])
def test_missing_candidate_field(key: str) -> None:
    record = {name: value for name, value in CANDIDATE.items() if name != key}
    with pytest.raises(MBEIRFormatError, match=rf"^pool, line 3: field '{key}' is missing; the line has \["):
        parse_candidate(record, "pool, line 3", Finder())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": "txt"}, r"modality is 'txt', must be one of \['text', 'image', 'image,text'\]"),
        ({"modality": "video"}, "modality is 'video', must be one of"),
        ({"modality": "image"}, "modality is 'image' but the line holds image,text; mend either"),
        (
            {"modality": "text", "img_path": None, "txt": ""},
            "'text' but the line holds neither text nor image",
        ),
        ({"img_path": None}, "modality is 'image,text' but the line holds text"),
        ({"txt": 3}, "txt must be a string or null, got 3"),
        ({"did": 12}, "did must look like '<dataset_id>:<number>', got 12"),
        ({"did": "12"}, "did must look like '<dataset_id>:<number>', got '12'"),
        ({"modality": None}, "modality is None, must be one of"),
    ],
)
def test_wrong_candidate_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MBEIRFormatError, match=r"^here: .*" + message):
        parse_candidate({**CANDIDATE, **changes}, "here", Finder())


@pytest.mark.parametrize("value", ["9:1", [{"did": "9:1"}]])
def test_candidate_lists_must_be_lists_of_ids(value: Any) -> None:
    with pytest.raises(MBEIRFormatError, match=r"^here: pos_cand_list must be a list of dids, got"):
        parse_query({**QUERY, "pos_cand_list": value}, 1, "here", Finder())


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


def test_a_damaged_row_of_parquet(tmp_path: Path) -> None:
    cells = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [None, pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"a\xffb")],
    )
    parquet.write_table(pyarrow.table({"text": cells}), tmp_path / "a.parquet")
    lines = list(read_lines(tmp_path / "a.parquet"))
    assert [(line.where[-5:], line.columns.get("text")) for line in lines] == [
        ("row 1", "a"),
        ("row 2", None),
        ("row 3", "b"),
    ]
    message = str(lines[1].error)
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
    for line in read_lines(write(tmp_path, "a.csv", "text\n" + "x" * 200_000)):
        assert len(line.columns["text"]) == 200_000
        assert csv.field_size_limit() == before


def test_values_in_errors_are_cut(tmp_path: Path) -> None:
    header = ",".join(f"column {number}" for number in range(10_000))
    with pytest.raises(ValueError, match="1 cells, but the header has 10000 ") as caught:
        read(write(tmp_path, "a.csv", f"{header}\na\n"))
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_a_file_without_rows(tmp_path: Path) -> None:
    for name, content in (("a.txt", ""), ("a.csv", "text,image\n"), ("b.csv", ""), ("a.jsonl", ""), ("a.json", "[]")):
        assert read(write(tmp_path, name, content)) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\nb\xe4d\n", r"a\.txt, line 2: not UTF-8 \(invalid continuation byte, byte 0xe4\)\. Convert"),
        ("a.csv", b"text\nb\xe4d\n", r"a\.csv, line 2: not UTF-8 \(invalid continuation byte, byte 0xe4\)"),
        ("a.csv", b"t\xe4xt\na\n", r"a\.csv, line 1: not UTF-8 .*0xe4\)"),
        ("a.csv", "text,image\na\n", r"a\.csv, line 2: 1 cells, but the header has 2 \(text, image\)\. Mend the line"),
        ("a.csv", "text,image\na,b,c,d\n", r"a\.csv, line 2: 4 cells, but the header has 2"),
        ("a.tsv", "text\timage\na\n", r"a\.tsv, line 2: 1 cells, but"),
        (
            "a.csv",
            "text\ngood\n" + "x" * (2**24 + 1),
            r"a\.csv, line 3: field larger than field limit .* Mend the line",
        ),
        ("a.csv", 'text,image\n"an open quote,1\nb,2\nc,3\n', r"a\.csv, line 2: unexpected end of data\. .* quotation"),
        ("a.csv", '"text"s,image\na,b\n', r"a\.csv, line 1: ',' expected after '\"'\. Mend the line"),
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
    lines = list(read_lines(write(tmp_path, name, content)))
    bad = [str(line.error) for line in lines if line.error is not None]
    assert [line.columns["text"] for line in lines if line.error is None] == texts
    assert len(bad) == len(messages)
    assert all(message in error for message, error in zip(messages, bad, strict=True))


def test_unnamed_columns_may_come_twice(tmp_path: Path) -> None:
    assert [row["text"] for _, row in read(write(tmp_path, "a.csv", "text,,\na,,\n"))] == ["a"]
