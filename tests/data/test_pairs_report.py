from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from puma_hf.configs import PairsConfig
from puma_hf.data import MBEIR
from puma_hf.data.mbeir_write import pairs
from puma_hf.data.pairs import check_pairs, load_pairs
from tests.data.photos import make_photos, write_captions, write_csv


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def test_a_clean_source(folder: Path) -> None:
    write_captions(folder, {"a.png": "red", "deep/b.png": "a green one"})
    report = check_pairs(folder)
    assert (report.ok, report.num_rows, report.num_pairs) == (True, 2, 2)
    assert not report.offenders
    assert not report.notes
    says = "0 of 2 rows cannot be used\n2 pairs; anchor: text=caption; positive: image=file_name\nAll rows can be"
    assert says in str(report)


def test_what_is_worth_a_look(tmp_path: Path) -> None:
    header = ["anchor", "positive", "negative_1"]
    rows = [
        ("red", "apple", "pear"),
        ("Red ", "APPLE", "pear"),  # given again
        ("red", "cherry", "pear"),  # another positive
        ("green", "apple", "plum"),  # another anchor of the same positive
        ("blue", "blue", "plum"),
        ("red", "rose", "cherry"),  # right, by line 4
    ]
    table = write_csv(tmp_path / "pairs.csv", header, rows)
    report = check_pairs(table)
    assert report.ok
    first = {kind: list(map(str, errors)) for kind, errors in report.notes.first.items()}
    assert first == {
        "pair given again": [f"{table}, line 3: the same as {table}, line 2"],
        "anchor that is its own positive": [f"{table}, line 6: 'blue'"],
        "negative that is a right answer of its anchor": [f"{table}, line 7: 'cherry'"],
    }
    assert f"\nWorth a look: {report.notes}:\n- {table}, line 3: the same as" in str(report)


# --- the command's function


def test_the_layout_of_mbeir(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_captions(folder, {"a.png": "red", "deep/b.png": "green", "none.png": "x"})
    settings: dict[str, Any] = {"data": folder, "mbeir": tmp_path / "mbeir", "test_fraction": 0.5, "val_fraction": 0.0}
    assert not pairs(PairsConfig(**settings)).ok
    assert "mbeir was not written, for rows cannot be used" in caplog.text
    assert not (tmp_path / "mbeir").exists()
    report = pairs(PairsConfig(**settings, bad_pairs="drop", direction="image-to-text", json=tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    data = MBEIR(tmp_path / "mbeir")
    assert [task.arrow for task in data.tasks("test")] == ["i -> t"]
    assert len(data.queries(data.tasks("test")[0], "test")) == 1


def test_special_tokens_are_found_before_training(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("anchor,positive\na,b\nc <|im_end|> d,e\nf,[RET]\n", encoding="utf-8")
    report = check_pairs(table)
    assert report.offenders.counts == {"special token in a text": 2}
    assert "line 3: anchor is 'c <|im_end|> d' with the special token '<|im_end|>'" in report.offenders.quotes()
    with pytest.raises(ValueError, match=r"(?s)2 of 3 rows .*line 4: positive is '\[RET\]'.*tokens split"):
        load_pairs(table)
    assert len(load_pairs(table, on_error="drop")) == 1
    assert len(load_pairs(table, special_tokens="split")) == 3
    config = {"data": table, "special_tokens": "split", "mbeir": tmp_path / "mbeir"}
    assert pairs(PairsConfig(**config, val_fraction=0, test_fraction=0)).ok
    written = [path.read_text(encoding="utf-8") for path in (tmp_path / "mbeir").rglob("*.jsonl")]
    assert any("<|im_end|>" in text for text in written)
