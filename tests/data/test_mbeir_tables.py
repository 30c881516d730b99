from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from puma_hf.data.mbeir_problems import MBEIRFormatError
from puma_hf.data.mbeir_tables import read_instructions, read_qrels


@pytest.mark.parametrize("read", [read_instructions, lambda path: read_qrels(path, (), ())])
def test_missing_file(tmp_path: Path, read: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing is missing; M-BEIR's layout needs it"):
        read(tmp_path / "nothing")


def test_instructions(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_text('q\tc\tname\tid\tp1\tp2\ntext\timage\tToys\t3\t"First."\t\tSecond. \r\n\n', encoding="utf-8")
    assert read_instructions(path) == ({(3, "text", "image"): ("First.", "Second.")}, {3: "toys"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text\timage\tToys\t3\t\t", "expected query modality, candidate modality, dataset name"),
        ("text\timage\tToys\tthree\tFind it.", "expected query modality"),
        ("text\timage", "expected query modality"),
        ("text\ttext\tToys\t3\tAgain.", r"instruction key \(3, 'text', 'text'\) was already given"),
    ],
)
def test_broken_instructions(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "table.tsv"
    path.write_text(f"header\ntext\ttext\tToys\t3\tFind.\n{row}\n", encoding="utf-8")
    with pytest.raises(MBEIRFormatError, match=rf"table\.tsv, line 3: {message}"):
        read_instructions(path)


def test_instructions_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_bytes(b"header\ntext\ttext\tToys\t3\tF\xfcr.\n")
    with pytest.raises(MBEIRFormatError, match=r"table\.tsv is not UTF-8 .* convert it"):
        read_instructions(path)


def test_qrels_keep_grades_and_leave_out_other_datasets_candidates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "qrels.txt"
    path.write_text("5:1 0 5:7 2 6\n5:1 0 5:8 0 6\n5:1 0 6:9 1 6\n5:1 0 5:7 2 6\n\n5:2 0 6:9 1 6\n", encoding="utf-8")
    assert read_qrels(path, {"5:1", "5:2"}, {"5:7", "5:8"}) == {"5:1": {"5:7": 2}}
    left_out = "qrels.txt: left out 1 judged candidates of other datasets that this pool does not hold, such as 6:9"
    assert caplog.messages == [left_out]
    assert read_qrels(path, {"5:1", "5:2"}, {"5:7", "5:8", "6:9"}) == {
        "5:1": {"5:7": 2, "6:9": 1},
        "5:2": {"6:9": 1},
    }
    assert caplog.messages == [left_out]  # none was left out of this one


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5:1 0 5:7 1", "expected 'qid 0 did relevance task_id'"),
        ("5:1 0 5:7 -1 6", "expected 'qid 0 did relevance task_id'"),
        ("5:1 0 5:7 yes 6", "expected 'qid 0 did relevance task_id'"),
        ("5:1 0 seven 1 6", "expected 'qid 0 did relevance task_id'"),
        ("5:2 0 5:7 1 6", "qid '5:2' is not in the query file of this task"),
        ("5:1 0 5:8 1 6", "did '5:8' is not in the candidate pool"),
        ("5:1 0 5:7 3 6", "'5:1' and '5:7' were judged 1 before, now 3"),
    ],
)
def test_broken_qrels(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "qrels.txt"
    path.write_text(f"5:1 0 5:7 1 6\n{line}\n", encoding="utf-8")
    with pytest.raises(MBEIRFormatError, match=rf"qrels\.txt, line 2: {message}"):
        read_qrels(path, {"5:1"}, {"5:7"})


@pytest.mark.parametrize("line", ["5" * 5000, f"5:{'1' * 5000} 0 5:7 1 6", f"5:1 0 5:{'7' * 5000} 1 6"])
def test_an_error_shows_one_line_of_a_field(tmp_path: Path, line: str) -> None:
    (tmp_path / "qrels.txt").write_text(f"{line}\n")
    with pytest.raises(MBEIRFormatError, match=r"qrels\.txt, line 1: ") as caught:
        read_qrels(tmp_path / "qrels.txt", {"5:1"}, {"5:7"})
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_all_of_a_qrels_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "qrels.txt"
    lines = ["5:1 0 5:7 1 6", "5:9 0 5:7 1 6", "5:1 0 5:8 1 6", "5:1 0 5:7 2 6", "no", "5:1 0 5:9 1 6", "5:1 0 5"]
    path.write_text("\n".join(lines))
    with pytest.raises(MBEIRFormatError) as caught:
        read_qrels(path, {"5:1"}, {"5:7"})
    first, *quoted = str(caught.value).splitlines()
    assert first == (
        f"{path}: 6 problems (did that is in no pool: 2, unknown qid: 1, contradiction: 1, malformed line: 1, "
        "cut last line: 1). The first 5:"
    )
    assert [line.partition(": ")[0] for line in quoted] == [f"- {path}, line {number}" for number in range(2, 7)]


def test_a_cut_qrels_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "qrels.txt"
    path.write_bytes(b"5:1 0 5:7 1 6\n5:1 0 \xff")
    with pytest.raises(MBEIRFormatError, match=r"line 2: expected 'qid 0 did .*; the file ends in the middle of this"):
        read_qrels(path, {"5:1"}, {"5:7"})
