from __future__ import annotations

from pathlib import Path

import pytest
from datasets import concatenate_datasets

from puma_hf.data import load_mbeir
from puma_hf.data.nli import load_nli

HEADER = "sent0,sent1,hard_neg\n"


def write(folder: Path, content: str, name: str = "nli.csv") -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def test_a_row_becomes_anchor_positive_and_negative(tmp_path: Path) -> None:
    rows = load_nli(write(tmp_path, HEADER + '"A man, running",Somebody runs., Nobody moves. \na,b,c\n'))
    assert rows[0] == {
        "anchor": {"text": "A man, running", "image": None, "instruction": None},
        "positive": {"text": "Somebody runs.", "image": None},
        "negative_1": {"text": "Nobody moves.", "image": None},
    }
    assert rows.num_rows == 2
    assert rows.column_names == ["anchor", "positive", "negative_1"]


def test_other_orders_and_kinds_of_file(tmp_path: Path) -> None:
    expected = load_nli(write(tmp_path, HEADER + "a,b,c\n"))[:]
    assert load_nli(write(tmp_path, "id,hard_neg,sent0,sent1\n1,c,a,b\n"))[:] == expected
    assert load_nli(str(write(tmp_path, "sent0\tsent1\thard_neg\na\tb\tc\n", "nli.tsv")))[:] == expected
    assert load_nli(write(tmp_path, '{"sent0": "a", "sent1": "b", "hard_neg": "c"}\n', "nli.jsonl"))[:] == expected


def test_rows_join_those_of_mbeir(root: Path, tmp_path: Path) -> None:
    nli = load_nli(write(tmp_path, HEADER + "a,b,c\n"))
    mbeir = load_mbeir(root, num_negatives=1)
    assert nli.features == mbeir.features
    assert len(concatenate_datasets([nli, mbeir])) == 1 + len(mbeir)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sent0,sent1\na,b\n", r"nli\.csv, line 2: no column hard_neg\. The columns here are sent0, sent1"),
        ("a,b\n1,2\n", r"nli\.csv, line 2: no column sent0, sent1, hard_neg\. The columns here are a, b"),
        (HEADER + "a,b,c\na, ,c\n", r"nli\.csv, line 3: sent1 is ' ', must be a text\. Mend the line or leave it out"),
        (HEADER + "a,b\n", r"nli\.csv, line 2: 2 cells, but the header has 3"),
        (HEADER, r"nli\.csv holds no rows\. A header alone"),
    ],
)
def test_bad_rows(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        load_nli(path)


def test_a_number_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path, '{"sent0": "a", "sent1": 3, "hard_neg": "c"}\n', "nli.jsonl")
    with pytest.raises(ValueError, match=r"nli\.jsonl, line 1: sent1 is 3, must be a text"):
        load_nli(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nli\.csv is not a file"):
        load_nli(tmp_path / "nli.csv")
