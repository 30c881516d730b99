from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from puma_hf.data.mbeir_format import (
    Candidate,
    ImageFinder,
    MBEIRFormatError,
    Query,
    model_input,
    parse_candidate,
    parse_query,
    read_jsonl,
)
from puma_hf.data.mbeir_problems import Problems
from puma_hf.modeling.image_inputs_puma import is_image_name

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


def test_every_name_of_an_image_is_marked_when_it_is_text() -> None:
    names = [f"a{suffix}" for suffix in Image.EXTENSION if is_image_name(f"a{suffix}")]
    assert len(names) > 20
    assert [name for name in names if model_input(name, None) != {"text": name}] == []


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
        with pytest.raises(
            MBEIRFormatError,
            match=r"^here: image path .* symbolic link that leaves .*MBEIR\(\.\.\., image_root=\.\.\.\), in Python",
        ):
            images.find(path, "here")
    with pytest.raises(FileNotFoundError, match=r"^here: image 'broken.png' is not a file"):
        images.find("broken.png", "here")


@pytest.mark.parametrize("path", ["cat.png", "folder/cat.png", ".", "half \ud800.png", "half \ud800/cat.png"])
def test_missing_image(images: ImageFinder, path: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^here: image .* is not a file below .*MBEIR\(\.\.\., image_root=\.\.\.\), in Python"
    ):
        images.find(path, "here")


def test_read_jsonl_counts_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n\n{"a": "\u2028"}\n', encoding="utf-8")
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": "\u2028"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "broken JSON"),
        (b"\xff", "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b"[1]", "expected a JSON object, got list"),
    ],
)
def test_broken_json(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(json.dumps({"a": 1}).encode() + b"\n" + line + b"\n")
    with pytest.raises(MBEIRFormatError, match=rf"lines\.jsonl, line 2: {message}"):
        list(read_jsonl(path))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing is missing; M-BEIR's layout needs it"):
        list(read_jsonl(tmp_path / "nothing"))


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
