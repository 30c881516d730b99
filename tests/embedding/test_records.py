"""What a corpus holds, of each kind."""

from __future__ import annotations

import json
import logging
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pytest
from PIL import Image
from pyarrow import parquet

from puma_hf.data.items import load_items
from puma_hf.data.mbeir import MBEIR, MBEIRTask
from puma_hf.data.mbeir_hub import open_mbeir
from puma_hf.embedding.records import Corpus, Record, input_hash, open_corpus
from tests.data.mbeir_builder import build_mbeir


def records(corpus: Corpus) -> list[Record]:
    return [corpus.record(row, line) for row, line in enumerate(corpus.lines())]


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- tables


def test_a_table(tmp_path: Path) -> None:
    image = picture(tmp_path / "images" / "a.png")
    rows = [
        {"id": "a", "text": "red", "other": 1},
        {"id": 7, "image": "images/a.png", "text": " "},
        {"id": "c", "image": str(image), "text": "blue", "instruction": "Find it."},
        {"id": "d", "image": "images/gone.png"},
    ]
    corpus = open_corpus(table(tmp_path / "t.jsonl", rows))
    assert records(corpus) == [
        Record(0, "a", "red"),
        Record(1, "7", None, str(image)),
        Record(2, "c", "blue", str(image), "Find it."),
        Record(3, "d", None, str(tmp_path / "images" / "gone.png")),
    ]
    assert records(corpus)[2].model_input == {"image": str(image), "text": "blue", "instruction": "Find it."}


def test_a_text_that_looks_like_a_path_stays_a_text(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    corpus = open_corpus(table(tmp_path / "t.jsonl", [{"text": str(tmp_path / "a.png")}]))
    assert records(corpus)[0].model_input == {"text": str(tmp_path / "a.png")}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.txt", "red\n\nblue\n"),
        ("t.csv", 'text,image\nred,\n"blue",\n'),
        ("t.tsv", "text\nred\nblue\n"),
        ("t.json", '[{"text": "red"}, {"text": "blue"}]'),
    ],
)
def test_without_ids_rows_are_numbered(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert records(open_corpus(tmp_path / name)) == [Record(0, "0", "red"), Record(1, "1", "blue")]


def test_parquet_with_images_inside(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    cells = [{"bytes": path.read_bytes(), "path": "x.png"}, {"bytes": None, "path": "a.png"}, None]
    parquet.write_table(
        pyarrow.table({"id": [5, 6, 7], "image": cells, "text": [None, None, "red"], "other": [1, 2, 3]}),
        tmp_path / "t.parquet",
    )
    found = records(open_corpus(tmp_path / "t.parquet"))
    assert found == [Record(0, "5", None, path.read_bytes()), Record(1, "6", None, str(path)), Record(2, "7", "red")]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet", "captions.tsv"])
@pytest.mark.parametrize("column", ["text", "caption"])
def test_a_folder_of_images_with_its_table(tmp_path: Path, name: str, column: str) -> None:
    image = picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "other.png")
    (tmp_path / "metadata.json").write_text('{"album": "of another program"}')
    row = {"file_name": "images/a.png", column: "a red one"}
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / name)
    elif name.endswith(".jsonl"):
        table(tmp_path / name, [row])
    else:
        sign = "," if name.endswith(".csv") else "\t"
        (tmp_path / name).write_text(f"{sign.join(row)}\n{sign.join(row.values())}\n")
    for source in (tmp_path, tmp_path / name):
        assert records(open_corpus(source)) == [Record(0, "0", "a red one", str(image))]
        assert load_items(source)["item"][:] == [{"text": "a red one", "image": str(image), "instruction": None}]


def test_a_row_without_a_file_says_nothing_of_the_others(tmp_path: Path) -> None:
    """The images of the other rows would be left out without a word."""
    image = picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n,no image\na.png,red\n")
    assert records(open_corpus(tmp_path)) == [Record(0, "0", "no image"), Record(1, "1", "red", str(image))]
    assert [item["image"] for item in load_items(tmp_path)["item"]] == [None, str(image)]


def test_a_folder_with_two_tables(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for name in ("captions.csv", "metadata.csv"):
        (tmp_path / name).write_text("file_name,text\na.png,red\n")
    with pytest.raises(ValueError, match=r"must hold one table of its images, and has captions\.csv, metadata\.csv"):
        open_corpus(tmp_path)


def test_names_of_files_of_another_kind_stay_a_column(tmp_path: Path) -> None:
    path = table(tmp_path / "chunks.jsonl", [{"text": "a chunk", "file_name": "report.pdf"}])
    assert records(open_corpus(path)) == [Record(0, "0", "a chunk")]


def test_a_corpus_of_beir(tmp_path: Path) -> None:
    rows = [
        {"_id": "d1", "title": "Apples", "text": "are red."},
        {"_id": "d2", "title": "", "text": "Pears.", "metadata": {}},
    ]
    path = table(tmp_path / "corpus.jsonl", rows)
    assert records(open_corpus(path)) == [Record(0, "d1", "Apples are red."), Record(1, "d2", "Pears.")]
    assert [item["text"] for item in load_items(path)["item"]] == ["Apples are red.", "Pears."]
    # A title of other tables is not theirs to read.
    path = table(tmp_path / "t.jsonl", [{"id": "d1", "title": "Apples", "text": "are red."}])
    assert records(open_corpus(path)) == [Record(0, "d1", "are red.")]


def test_repeated_ids_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_corpus(table(tmp_path / "t.jsonl", [{"id": str(row), "text": "a"} for row in range(9)])).survey()
    assert not caplog.messages
    open_corpus(table(tmp_path / "t.jsonl", [{"id": f"d{row % 5}", "text": "a"} for row in range(9)])).survey()
    (message,) = caplog.messages
    assert message.startswith("4 ids are of several items (first: 'd0'). Answers are told apart, but a database")


def test_wrong_lines_that_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": \n{"id": "b", "text": "red"}\n{"id": "c", "text": 3}\n{"text": "blue"}\n')
    corpus = open_corpus(path, on_error="skip")
    assert corpus.survey().num_items == 4
    (message,) = caplog.messages
    assert "3 problems (broken line: 1, wrong field: 1, wrong id: 1)" in message
    found = records(corpus)
    assert [record.problem is None for record in found] == [False, True, False, False]
    assert found[1] == Record(1, "b", "red")
    assert found[2].problem == f"{path}, line 3: text is 3, must be a text or null."
    path.write_text('{"id": "b", "text": "red"\n[]\n')
    with pytest.raises(ValueError, match="line 1: broken JSON"):
        open_corpus(path, on_error="skip")
    with pytest.raises(ValueError, match="line 1: text is 3"):
        open_corpus(table(path, [{"text": 3}]), on_error="skip").survey()


def test_an_error_shows_a_line_of_a_value(tmp_path: Path) -> None:
    images = [{"bytes": "0" * 1000}] * 1000
    for row in ({"id": "a", "text": images}, {"id": images, "text": "a"}, {"id": "a", "image": images}):
        with pytest.raises(ValueError, match=r"line 1: \w+ is .*\.\.\., must be") as caught:
            open_corpus(table(tmp_path / "t.jsonl", [row])).survey()
        assert len(str(caught.value)) < 600 + len(str(tmp_path))
    for row in ({"text": images}, {"image": images}):
        with pytest.raises(ValueError, match=r"line 1: \w+ is .*\.\.\., must be") as caught:
            load_items(table(tmp_path / "t.jsonl", [row]))
        assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_a_parquet_file_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"t\.parquet is not a whole Parquet file .* Was the download cut off\?"):
        open_corpus(tmp_path / "t.parquet")
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        open_corpus(tmp_path / "gone.parquet")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": None, "text": "a"}, r"line 2: id is None, must be a text or a whole number\. Give every row one, or"),
        ({"id": True, "text": "a"}, r"line 2: id is True, must be"),
        ({"id": "b", "text": 3}, r"line 2: text is 3, must be a text or null"),
        ({"id": "b", "instruction": []}, r"line 2: instruction is \[\], must be a text or null"),
        ({"id": "b", "image": 3}, r"line 2: image is 3, must be the path of a file below"),
        (
            {"id": "b", "image": "https://a.org/a.png"},
            r"line 2: image is 'https.*Download images first, or call puma_hf",
        ),
        ({"id": "b", "image": "../a.png"}, r"line 2: image path '\.\./a\.png' leaves "),
        ({"id": "b", "image": "/etc/a.png"}, r"line 2: image path '/etc/a\.png' leaves "),
    ],
)
def test_a_wrong_row_is_found_by_the_survey(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    corpus = open_corpus(table(tmp_path / "t.jsonl", [{"id": "a", "text": "red"}, row]))
    with pytest.raises(ValueError, match=message):
        corpus.survey()


def test_ids_for_some_rows_only(tmp_path: Path) -> None:
    corpus = open_corpus(table(tmp_path / "t.jsonl", [{"text": "red"}, {"text": "blue", "id": "b"}]))
    with pytest.raises(ValueError, match=r"line 2: id is 'b', must be .*\. Give every row one, or none"):
        corpus.survey()


def test_all_wrong_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": \n{"text": 3}\n{"text": 4}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl: 3 problems \(wrong field: 2, broken line: 1\)"):
        open_corpus(tmp_path / "t.jsonl").survey()


def test_a_table_without_content(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column text or image\. The columns here are caption, id: rename those"):
        open_corpus(table(tmp_path / "t.jsonl", [{"caption": "red", "id": 1}]))
    with pytest.raises(ValueError, match="holds no inputs"):
        open_corpus(table(tmp_path / "empty.jsonl", []))
    (tmp_path / "t.docx").write_text("")
    with pytest.raises(ValueError, match=r"ends in '\.docx', must be one of \.txt"):
        open_corpus(tmp_path / "t.docx")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_a_link_to_the_outside_is_refused(tmp_path: Path) -> None:
    secret = picture(tmp_path / "secret.png")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").symlink_to(secret)
    corpus = open_corpus(table(folder / "t.jsonl", [{"image": "a.png"}]))
    with pytest.raises(ValueError, match="passes a symbolic link that leaves"):
        records(corpus)


# --- folders


def test_a_folder_of_images(tmp_path: Path) -> None:
    for name in ("b/c.jpg", "b/a.PNG", "a.webp", ".hidden/x.png", ".x.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    found = records(open_corpus(tmp_path))
    assert [(record.row, record.id) for record in found] == [(0, "a.webp"), (1, "b/a.PNG"), (2, "b/c.jpg")]
    assert found[1].model_input == {"image": str(tmp_path / "b" / "a.PNG")}


def test_what_is_left_out_of_a_folder_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "photos" / "a.png")
    picture(tmp_path / "more" / "b.png")
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "more")
    for name in ("IMG_1.HEIC", "IMG_2.heic", ".DS_Store", "README"):
        (tmp_path / "photos" / name).write_text("")
    with caplog.at_level(logging.INFO, logger="puma_hf"):
        assert open_corpus(tmp_path / "photos").survey().num_items == 1
    assert caplog.messages == [
        f"{tmp_path / 'photos'}: left out what is no image here: 2 x .heic, 1 x linked folder, 1 x no ending"
    ]
    caplog.clear()
    open_corpus(tmp_path / "more").survey()
    assert not caplog.messages


def test_links_are_followed_to_files_and_nothing_else_is_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A snapshot in the Hub's cache consists of links; a pipe would be waited for, a linked folder may be a loop."""
    blob = picture(tmp_path / "a.png").rename(tmp_path / "1234")
    folder = tmp_path / "snapshots" / "photos"
    folder.mkdir(parents=True)
    (folder / "a.png").symlink_to("../../1234")
    (folder / "gone.png").symlink_to("../../5678")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    (folder / os.fsdecode(b"\xe4.png")).write_bytes(blob.read_bytes())
    with caplog.at_level(logging.INFO, logger="puma_hf"):
        corpus = open_corpus(folder)
        assert corpus.survey().num_items == 1
        items = load_items(folder)["item"]
    assert records(corpus) == [Record(0, "a.png", None, str(folder / "a.png"))]
    assert [item["image"] for item in items] == [str(folder / "a.png")]
    # Both say the same.
    (told,) = {message.partition("left out what is no image here: ")[2] for message in caplog.messages}
    counts, _, links = told.partition("; links to nothing: ")
    kinds = {"linked folder", "link to nothing", "pipe or device", "name that is not UTF-8"}
    assert set(counts.split(", ")) == {f"1 x {kind}" for kind in kinds}
    assert links == "'gone.png'"
    (folder / "a.png").unlink()
    with pytest.raises(ValueError, match=r"holds no image .* Left out: .*1 x link to nothing"):
        open_corpus(folder)


@pytest.mark.parametrize("name", ["pipe.png", "folder.png", "\udce4.png"])
def test_a_table_that_names_no_file(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    picture(tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"\xe4.png"))
    path = table(tmp_path / "t.jsonl", [{"image": name}])
    with pytest.raises(FileNotFoundError, match=r"line 1: image '.*\.png' is not a file below"):
        open_corpus(path).survey()


def test_a_folder_of_images_called_as_one_of_mbeir(tmp_path: Path) -> None:
    picture(tmp_path / "query" / "test" / "a.png")
    picture(tmp_path / "cand_pool" / "b.png")
    (tmp_path / "query" / "test" / "notes.jsonl").write_text("{}\n")
    assert [record.id for record in records(open_corpus(tmp_path))] == ["cand_pool/b.png", "query/test/a.png"]
    assert len(load_items(tmp_path)) == 2
    with pytest.raises(FileNotFoundError, match="is not M-BEIR"):
        open_mbeir(tmp_path)


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no image \(.*\) and is no M-BEIR folder"):
        open_corpus(tmp_path)


@pytest.mark.parametrize("pool", ["global", "toys_task0", "toys_task8"])
def test_a_pool(tmp_path: Path, pool: str) -> None:
    root = build_mbeir(tmp_path / "mbeir")
    data = MBEIR(root)
    task = MBEIRTask(int(pool[-1]), "toys") if pool != "global" else None
    expected = data.global_pool() if task is None else data.local_pool(task)
    found = records(open_corpus(root, pool=pool))
    assert [(record.id, record.text, record.image) for record in found] == [
        (candidate.did, candidate.text, candidate.image) for candidate in expected.values()
    ]


def test_no_such_pool(tmp_path: Path) -> None:
    root = build_mbeir(tmp_path / "mbeir")
    with pytest.raises(ValueError, match=r"pool='toys_task9' must be 'global' or a task here: toys_task0, "):
        open_corpus(root, pool="toys_task9")
    with pytest.raises(FileNotFoundError, match=r"mbeir_union_dev_cand_pool\.jsonl is missing"):
        open_corpus(root, split="dev").survey()


# --- survey and hash


def test_the_survey_draws_the_same_sample_from_all_rows(tmp_path: Path) -> None:
    corpus = open_corpus(table(tmp_path / "t.jsonl", [{"text": str(row)} for row in range(100)]))
    num_items, sample = corpus.survey(10, seed=3)
    assert num_items == 100
    rows = [record.row for record in sample]
    assert rows == sorted(set(rows))
    assert len(rows) == 10
    assert sample[0] == Record(rows[0], str(rows[0]), str(rows[0]))
    assert corpus.survey(10, seed=3).sample == sample
    assert corpus.survey(10, seed=4).sample != sample
    assert [record.row for record in corpus.survey(500).sample] == list(range(100))
    # Every row is drawn about as often: 200 samples of 10 out of 100 draw each about 20 times.
    counts = [0] * 100
    for seed in range(200):
        for record in corpus.survey(10, seed=seed).sample:
            counts[record.row] += 1
    assert min(counts) > 5
    assert max(counts) < 40


def hash_of(corpus: Corpus) -> str:
    found = records(corpus)
    return input_hash(found, [corpus.content_hash(record) for record in found])


def test_the_hash_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    image = picture(tmp_path / "first" / "a.png")
    rows = [{"id": "a", "text": "red"}, {"id": "b", "image": "a.png", "instruction": "Find it."}]
    corpus = open_corpus(table(tmp_path / "first" / "t.jsonl", rows))
    seen = {hash_of(corpus)}
    for key, value in (("id", "c"), ("text", "blue"), ("instruction", "Name it."), ("image", "gone.png")):
        changed = open_corpus(table(tmp_path / "first" / "t.jsonl", [rows[0], {**rows[1], key: value}]))
        seen.add(hash_of(changed))
    assert len(seen) == 5
    table(tmp_path / "first" / "t.jsonl", rows)
    first, status = hash_of(corpus), image.stat()
    assert first in seen
    os.utime(image, ns=(0, status.st_mtime_ns + 1))
    seen.add(hash_of(corpus))
    image.write_bytes(image.read_bytes() + b"1")
    os.utime(image, ns=(0, status.st_mtime_ns))
    seen.add(hash_of(corpus))
    assert len(seen) == 7
    os.utime(picture(image), ns=(0, status.st_mtime_ns))
    (tmp_path / "first").rename(tmp_path / "second")
    assert hash_of(open_corpus(tmp_path / "second" / "t.jsonl")) == first
    assert corpus.content_hash(Record(0, "a", image=b"1")) != corpus.content_hash(Record(0, "a", image=b"2"))
    # The content is what the model sees: neither the id nor the row.
    assert corpus.content_hash(Record(0, "a", "red")) == corpus.content_hash(Record(1, "b", "red"))
    assert corpus.content_hash(Record(0, "a", "red")) != corpus.content_hash(Record(0, "a", instruction="red"))


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    def peak(num_rows: int) -> int:
        corpus = open_corpus(
            table(tmp_path / f"{num_rows}.jsonl", [{"text": f"{row:090d}"} for row in range(num_rows)])
        )
        tracemalloc.start()
        assert corpus.survey(8).num_items == num_rows
        value = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return value

    peak(10)
    # The rows themselves are 360,000 bytes more; what other threads of the process do meanwhile counts, too.
    assert peak(4000) < peak(400) + 180_000
