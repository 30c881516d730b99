from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from puma_hf.data.mbeir_format import (
    Candidate,
    ImageFinder,
    MBEIRFormatError,
    Query,
    parse_candidate,
    parse_query,
    read_instructions,
    read_jsonl,
    read_qrels,
)
from puma_hf.data.mbeir_problems import Problems

CANDIDATE = {"did": "9:1", "txt": "a dog", "img_path": "dog.png", "modality": "image,text"}
QUERY = {
    "qid": "9:2",
    "query_txt": "a dog",
    "query_img_path": None,
    "query_modality": "text",
    "pos_cand_list": ["9:1", "9:1"],
    "neg_cand_list": None,
}


@pytest.fixture
def images(tmp_path: Path) -> ImageFinder:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dog.png").write_bytes(b"")
    return ImageFinder(folder)


def test_records_become_dataclasses(images: ImageFinder, tmp_path: Path) -> None:
    dog = str((tmp_path / "data" / "dog.png").resolve())
    candidate = parse_candidate(CANDIDATE, "here", images)
    assert candidate == Candidate("9:1", "a dog", dog, "image,text")
    assert isinstance(candidate.model_input, dict)
    assert list(candidate.model_input.items()) == [("image", dog), ("text", "a dog")]
    query = parse_query(QUERY, 7, "here", images)
    assert query == Query("9:2", "a dog", None, "text", ("9:1",), ())
    assert (query.line, query.dataset_id, query.model_input) == (7, 9, "a dog")


@pytest.mark.parametrize("text", ["https://a.b/c", "data:image/png;base64,AA", "photos/dog.jpg", "my dog.webp"])
def test_text_that_a_model_might_open_is_marked_as_text(text: str) -> None:
    assert Candidate("9:1", text, None, "text").model_input == {"text": text}


def test_image_alone() -> None:
    assert Candidate("9:1", None, "dog.png", "image").model_input == {"image": "dog.png"}


def test_blank_text_counts_as_none(images: ImageFinder) -> None:
    assert parse_candidate({**CANDIDATE, "txt": " ", "modality": "image"}, "here", images).text is None


@pytest.mark.parametrize("key", ["did", "txt", "img_path", "modality"])
def test_missing_candidate_field(images: ImageFinder, key: str) -> None:
    record = {name: value for name, value in CANDIDATE.items() if name != key}
    with pytest.raises(MBEIRFormatError, match=rf"^pool, line 3: field '{key}' is missing; the line has \["):
        parse_candidate(record, "pool, line 3", images)


@pytest.mark.parametrize("key", list(QUERY))
def test_missing_query_field(images: ImageFinder, key: str) -> None:
    record = {name: value for name, value in QUERY.items() if name != key}
    with pytest.raises(MBEIRFormatError, match=rf"^queries, line 3: field '{key}' is missing"):
        parse_query(record, 3, "queries, line 3", images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": "txt"}, r"modality is 'txt', must be one of \['text', 'image', 'image,text'\]"),
        ({"modality": "video"}, "modality is 'video', must be one of"),
        ({"modality": "image"}, "modality is 'image' but the line holds image,text; mend txt, img_path or"),
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
def test_wrong_candidate_field(images: ImageFinder, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MBEIRFormatError, match=r"^here: .*" + message):
        parse_candidate({**CANDIDATE, **changes}, "here", images)


@pytest.mark.parametrize("value", ["9:1", [{"did": "9:1"}]])
def test_candidate_lists_must_be_lists_of_ids(images: ImageFinder, value: Any) -> None:
    with pytest.raises(MBEIRFormatError, match=r"^here: pos_cand_list must be a list of dids, got"):
        parse_query({**QUERY, "pos_cand_list": value}, 1, "here", images)


@pytest.mark.parametrize(
    "path", ["../secret.png", "a/../../secret.png", "/etc/passwd", "C:\\secret.png", "..\\secret.png", "a\0b"]
)
def test_image_path_that_leaves_the_folder(images: ImageFinder, path: str) -> None:
    with pytest.raises(MBEIRFormatError, match=r"^here: image path .* leaves the dataset folder; .* without"):
        images.find(path, "here")


def test_symbolic_links_may_stay_inside_but_not_leave(images: ImageFinder, tmp_path: Path) -> None:
    root = tmp_path / "data"
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "cat.png").write_bytes(b"")
    (root / "file.png").symlink_to(tmp_path / "outside" / "cat.png")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "inside.png").symlink_to("dog.png")
    (root / "broken.png").symlink_to("nothing.png")
    assert images.find("inside.png", "here") == str((root / "dog.png").resolve())
    for path in ("file.png", "folder/cat.png"):
        with pytest.raises(MBEIRFormatError, match=r"^here: image path .* symbolic link that leaves .*image_root"):
            images.find(path, "here")
    with pytest.raises(FileNotFoundError, match=r"^here: image 'broken.png' is not a file"):
        images.find("broken.png", "here")


@pytest.mark.parametrize("path", ["cat.png", "folder/cat.png", "."])
def test_missing_image(images: ImageFinder, path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"^here: image .* is not a file below .*image_root"):
        images.find(path, "here")


def test_read_jsonl_counts_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n\n{"a": "\u2028"}\n', encoding="utf-8")
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": "\u2028"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [(b'{"a": 1', "broken JSON"), (b"\xff", "broken JSON"), (b"[1]", "expected a JSON object, got list")],
)
def test_broken_json(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(json.dumps({"a": 1}).encode() + b"\n" + line + b"\n")
    with pytest.raises(MBEIRFormatError, match=rf"lines\.jsonl, line 2: {message}"):
        list(read_jsonl(path))


@pytest.mark.parametrize("read", [read_jsonl, read_instructions, lambda path: read_qrels(path, (), ())])
def test_missing_file(tmp_path: Path, read: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing is missing; M-BEIR's layout needs it"):
        list(read(tmp_path / "nothing"))


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


def test_qrels_keep_grades_and_leave_out_other_datasets_candidates(tmp_path: Path) -> None:
    path = tmp_path / "qrels.txt"
    path.write_text("5:1 0 5:7 2 6\n5:1 0 5:8 0 6\n5:1 0 6:9 1 6\n5:1 0 5:7 2 6\n\n5:2 0 6:9 1 6\n", encoding="utf-8")
    assert read_qrels(path, {"5:1", "5:2"}, {"5:7", "5:8"}) == {"5:1": {"5:7": 2}}
    assert read_qrels(path, {"5:1", "5:2"}, {"5:7", "5:8", "6:9"}) == {
        "5:1": {"5:7": 2, "6:9": 1},
        "5:2": {"6:9": 1},
    }


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


@pytest.mark.parametrize("cut", [1, 5, 9])
def test_a_cut_last_line_is_said(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 22}'[:-cut])
    if cut == 9:  # between two lines nobody can tell
        assert len(list(read_jsonl(path))) == 1
        return
    with pytest.raises(
        MBEIRFormatError, match=r"line 2: broken JSON \(.*\); the file ends in the middle of this line, .* download it"
    ):
        list(read_jsonl(path))


def test_a_whole_last_line_needs_no_line_break(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert len(list(read_jsonl(path))) == 2


def test_broken_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\nno\n[1]\n{"a": 4}\n{"a":')
    problems = Problems(path)
    assert [number for number, _ in read_jsonl(path, problems)] == [1, 4]
    assert problems.counts == {"broken JSON": 2, "cut last line": 1}


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
