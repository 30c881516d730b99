"""Training rows of M-BEIR, items without labels, and corpora to embed."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pytest
from datasets import Dataset
from PIL import Image
from pyarrow import parquet

from puma_hf.data import MBEIR, MBEIRFormatError, load_items, load_mbeir, load_mbeir_items, open_mbeir
from puma_hf.data.items import Corpus, open_corpus
from puma_hf.data.records import Record
from tests.data import mbeir_builder as builder

NUM_ROWS = len(builder.MODALITIES) * builder.NUM_QUERIES


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def table(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- M-BEIR's pairs


def test_choices_come_from_the_query_and_never_repeat_while_there_are_enough(root: Path) -> None:
    data = MBEIR(root)
    queries = {query.id: query for task in data.tasks("train") for query in data.queries(task, "train")}
    did_of = {(one.text, one.image): did for did, one in MBEIR(root).global_pool("train").items()}
    drawn = [load_mbeir(root, num_negatives=3, seed=seed, with_ids=True) for seed in (3, 3, 4)]
    assert len(drawn[0]) == NUM_ROWS
    assert drawn[0].to_list() == drawn[1].to_list() != drawn[2].to_list()
    for row in (row for rows in drawn for row in rows):
        query = queries[row["qid"]]
        assert row["did"] in query.positives == tuple(row["positives"])
        assert did_of[row["positive"]["text"], row["positive"]["image"]] == row["did"]
        negatives = [did_of[row[f"negative_{n}"]["text"], row[f"negative_{n}"]["image"]] for n in (1, 2, 3)]
        assert set(negatives) <= set(query.negatives)
        assert len(set(negatives)) == min(3, len(query.negatives))
    some = load_mbeir(root, tasks=["toys_task4"], num_negatives=3, seed=3, with_ids=True).to_list()
    start = list(builder.MODALITIES).index(4) * builder.NUM_QUERIES
    assert some == drawn[0].to_list()[start : start + builder.NUM_QUERIES]  # no row depends on the rows before it


def name_files_as_m_beir_does(root: Path) -> None:
    """All training queries of a dataset in one file, whose name has no task."""
    folder = root / "query" / "train"
    lines = [line for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    for path in folder.iterdir():
        path.unlink()
    builder.write_lines(folder / f"mbeir_{builder.DATASET}_train.jsonl", lines)


@pytest.mark.parametrize("split", ["train", "union_train"])
def test_files_that_do_not_tell_their_tasks(root: Path, split: str) -> None:
    qids = set(load_mbeir(root, with_ids=True)["qid"])
    items = {(row["text"], row["image"]) for row in load_mbeir_items(root)["item"]}
    name_files_as_m_beir_does(root)
    assert set(load_mbeir(root, split, with_ids=True)["qid"]) == qids
    assert {(row["text"], row["image"]) for row in load_mbeir_items(root, split)["item"]} == items
    chosen = set(load_mbeir(root, split, tasks=["toys_task3"], with_ids=True)["qid"])
    assert chosen == {builder.qid(3, number) for number in range(builder.NUM_QUERIES)}
    some = load_mbeir_items(root, split, tasks=["toys_task3"])["item"]
    assert sum(row["instruction"] is not None for row in some) == builder.NUM_QUERIES
    with pytest.raises(ValueError, match=r"must be some of \['toys_task0', "):
        load_mbeir(root, split, tasks=["toys_task5"])


def test_a_positive_is_never_a_negative(root: Path) -> None:
    dids = [builder.did(1, 0), builder.did(1, 3)]
    builder.change_record(builder.query_path(root, 1, "train"), 1, neg_cand_list=dids)
    row = load_mbeir(root, tasks=["toys_task1"], num_negatives=2)[0]
    assert row["negative_1"]["text"] == row["negative_2"]["text"] == "text of c1_3"


def test_query_without_negatives(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    builder.change_record(builder.query_path(root, 1, "train"), 2, neg_cand_list=[])
    assert len(load_mbeir(root)) == NUM_ROWS
    with pytest.raises(MBEIRFormatError, match=r"line 2: query '11:1101' has no negatives; .*missing_negatives='drop'"):
        load_mbeir(root, num_negatives=1)
    assert len(load_mbeir(root, num_negatives=1, missing_negatives="drop")) == NUM_ROWS - 1
    assert "Dropped 1 queries of train without negatives" in caplog.text


# --- items


def items_of(source: Any) -> list[tuple[str | None, ...]]:
    return [tuple(item.values()) for item in load_items(source)["item"]]


def test_every_query_and_candidate_is_an_item(root: Path) -> None:
    rows = load_mbeir_items(root)["item"]
    queries = [row for row in rows if row["instruction"] is not None]
    candidates = [row for row in rows if row["instruction"] is None]
    assert len(queries) == NUM_ROWS
    pool = MBEIR(root).global_pool("train").values()
    assert [(row["text"], row["image"]) for row in candidates] == [(c.text, c.image) for c in pool]
    assert queries[0] == {"text": "text of q0_0", "image": None, "instruction": "0 wording 3."}


def test_pairs_are_never_looked_at(root: Path) -> None:
    before = load_mbeir_items(root)["item"]
    for task in builder.MODALITIES:
        path = builder.query_path(root, task, "train")
        builder.write_records(
            path, [{**record, "pos_cand_list": [], "neg_cand_list": []} for record in builder.read_records(path)]
        )
        builder.qrels_path(root, task, "train").unlink()
    assert load_mbeir_items(root)["item"] == before


def test_a_folder_of_mbeir_is_known_by_its_files(root: Path, tmp_path: Path) -> None:
    expected = load_mbeir_items(root, seed=3)[:]
    assert load_items(root, seed=3)[:] == load_items(MBEIR(root), seed=3)[:] == expected != load_items(root)[:]
    # Half an M-BEIR folder is not taken for a folder of images, nor one of images for M-BEIR by the names of folders.
    shutil.rmtree(root / "query")
    with pytest.raises(FileNotFoundError, match=r"There is no mbeir_<dataset>_task<n>_train\.jsonl in"):
        load_items(root)
    names = ["cand_pool/b.png", "query/test/a.png"]
    for name in names:
        picture(tmp_path / "images" / name)
    (tmp_path / "images" / "query" / "test" / "notes.jsonl").write_text("{}\n")
    assert [record.id for record in records(open_corpus(tmp_path / "images"))] == names
    with pytest.raises(FileNotFoundError, match="is not M-BEIR"):
        open_mbeir(tmp_path / "images")


def test_several_sources_and_equal_items(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" one \ntwo\none\n")
    (tmp_path / "b,c.csv").write_text("sent0,sent1,hard_neg\ntwo,three,four\n")
    rows = load_items([tmp_path / "a.txt", root / "images", load_mbeir_items(root), str(tmp_path / "b,c.csv")])
    texts = [row["text"] for row in rows["item"]]
    assert (texts[:2], texts[-2:]) == (["one", "two"], ["three", "four"])
    alone = [row for row in rows["item"] if row["text"] is None and row["instruction"] is None]
    assert len(alone) == len(list((root / "images").iterdir()))
    assert load_items([rows, rows])[:] == rows[:]  # the same source twice adds nothing
    assert items_of(f"{tmp_path / 'a.txt'}, {root / 'images'}")[0][0] == "one"
    assert items_of(str(tmp_path / "b,c.csv"))[0][0] == "two"  # a comma may be part of a name
    with pytest.raises(ValueError, match=r"A source holds no items\. Name one with at least one text"):
        load_items(Dataset.from_dict({"text": []}))
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*b'"):
        load_items(f"{tmp_path / 'a.txt'},{tmp_path / 'b'},c")


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [{"image": "a.png"}, {"text": " "}, {"text": 3}, {"image": "broken.png"}, {"image": "../a.png"}]
    with pytest.raises(ValueError, match=r"\.jsonl: 5 problems") as caught:
        load_items(table(tmp_path / "t.jsonl", *rows, {"image": "none.png"}))
    for message in (
        r"line 2: text and image are both empty, or no columns: these are text\.",
        r"line 3: text is 3, must be a text or null",
        r"line 4: '.*broken.png' cannot be read",
        r"line 5: image path '../a.png' leaves",
        r"line 6: image .*none.png' is not a file",
    ):
        assert re.search(message, str(caught.value))


# --- corpora


def records(corpus: Corpus) -> list[Record]:
    return [corpus.record(row, line) for row, line in enumerate(corpus.lines())]


def test_a_table(tmp_path: Path) -> None:
    image = picture(tmp_path / "images" / "a.png")
    path = table(
        tmp_path / "t.jsonl",
        {"id": "a", "text": " red", "other": 1},
        {"id": 7, "image": "images/a.png", "text": " "},
        {"id": "c", "image": str(image), "text": "blue", "instruction": "Find it."},
        {"id": "d", "image": "images/gone.png"},  # who embeds it will see
    )
    found = records(open_corpus(path))
    assert found[:2] == [Record("a", " red"), Record("7", None, str(image))]
    gone = Record("d", None, str(tmp_path / "images" / "gone.png"))
    assert found[2:] == [Record("c", "blue", str(image), instruction="Find it."), gone]
    assert [record.row for record in found] == [0, 1, 2, 3]


def test_parquet_with_images_inside(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    cells = [{"bytes": path.read_bytes(), "path": "x.png"}, {"bytes": None, "path": "a.png"}, None]
    columns = {"id": [5, 6, 7], "image": cells, "text": [None, None, "red"], "other": [1, 2, 3]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    found = records(open_corpus(tmp_path / "t.parquet"))
    assert found == [Record("5", None, path.read_bytes()), Record("6", None, str(path)), Record("7", "red")]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet"])
def test_a_folder_of_images_with_its_table(tmp_path: Path, name: str) -> None:
    image = picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "other.png")
    (tmp_path / "metadata.json").write_text('{"album": "of another program"}')
    row = {"file_name": "images/a.png", "caption": "a red one"}
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / name)
    else:
        (tmp_path / name).write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    for source in (tmp_path, tmp_path / name):
        assert records(open_corpus(source)) == [Record("0", "a red one", str(image))]
        assert items_of(source) == [("a red one", str(image), None)]
    (tmp_path / "captions.tsv").write_text("file_name\ttext\nother.png\tred\n")
    with pytest.raises(ValueError, match=r"must hold one table of its images, and has captions\.tsv, .*Name the one"):
        open_corpus(tmp_path)


def test_a_folder_of_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b/c.jpg", "b/a.PNG", "a.webp"):
        picture(tmp_path / name)
    for name in ("IMG_1.HEIX", "IMG_2.heix", "README"):
        (tmp_path / name).write_text("")
    (tmp_path / "link.png").symlink_to("b/c.jpg")
    with caplog.at_level(logging.INFO, logger="puma_hf"):
        corpus = open_corpus(tmp_path)
    assert caplog.messages == [f"{tmp_path}: 4 images; left out 2 x .heix, 1 x no ending"]
    assert [(record.row, record.id, record.image) for record in records(corpus)] == [
        (row, name, str(tmp_path / name)) for row, name in enumerate(["a.webp", "link.png", "b/a.PNG", "b/c.jpg"])
    ]
    assert len(load_items(tmp_path)) == 4
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none holds no image, nor is it M-BEIR\. Left out: none"):
        open_corpus(tmp_path / "none")


@pytest.mark.parametrize("pool", ["global", "toys_task0", "toys_task8"])
def test_a_pool(root: Path, pool: str) -> None:
    data = MBEIR(root)
    expected = data.global_pool() if pool == "global" else data.local_pool(data.tasks()[0 if pool[-1] == "0" else -1])
    assert records(open_corpus(root, pool=pool)) == list(expected.values())
    with pytest.raises(ValueError, match=r"\['toys_task9'\], must be some of \['toys_task0', "):
        open_corpus(root, pool="toys_task9")
    with pytest.raises(FileNotFoundError, match=r"No such file .*mbeir_union_dev_cand_pool\.jsonl"):
        open_corpus(root, split="dev").survey()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": None, "text": "a"}, r"line 2: id is None, must be a text or number"),
        ({"id": "b", "image": "https://a.org/a.png"}, r"line 2: image is 'https.*Download images first"),
        ({"id": "b", "image": "/etc/a.png"}, r"line 2: image path '/etc/a\.png' leaves "),
        (
            {"id": "b", "file_name": "a.pdf", "text": "c"},
            r"line 2: image is 'a\.pdf', whose ending is that of no image",
        ),
    ],
)
def test_a_wrong_row_is_found_by_the_survey(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_corpus(table(tmp_path / "t.jsonl", {"id": "a", "text": "red"}, row)).survey()


def test_wrong_rows_that_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = table(
        tmp_path / "t.jsonl", {"id": "a", "text": ""}, {"id": "b", "text": "red"}, {"id": "c", "text": 3}, {"text": "x"}
    )
    corpus = open_corpus(path, on_error="skip")
    assert corpus.survey(4) == (4, [Record("b", "red"), Record("3", "x")])
    assert "2 problems (empty row: 1, text of another type: 1)" in caplog.messages[0]
    found = records(corpus)
    assert [record.problem is None for record in found] == [False, True, False, True]
    assert found[2].problem == f"{path}, line 3: text is 3, must be a text or null."
    with pytest.raises(ValueError, match=r"2 problems"):
        open_corpus(path).survey()
    with pytest.raises(ValueError, match="line 1: text is 3"):  # none is right
        open_corpus(table(path, {"text": 3}), on_error="skip").survey()
    # What is no JSON is no row, and stops the run before a model is loaded.
    path.write_text('{"text": "red"}\n{"text": \n')
    with pytest.raises(ValueError, match="line 2: broken JSON"):
        open_corpus(path, on_error="skip").survey()


def test_ids_that_repeat_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = ({"id": "a", "text": "red"}, {"id": "b", "text": "red"}, {"id": "a", "text": "blue"})
    assert open_corpus(table(tmp_path / "t.jsonl", *rows)).survey().num_items == 3
    assert "1 rows repeat the id of another" in caplog.text


def test_the_survey_draws_the_same_sample_from_all_rows(tmp_path: Path) -> None:
    corpus = open_corpus(table(tmp_path / "t.jsonl", *({"text": str(row)} for row in range(100))))
    num_items, sample = corpus.survey(10, seed=3)
    rows = [record.row for record in sample]
    assert (num_items, len(rows), rows) == (100, 10, sorted(set(rows)))
    assert sample[0] == Record(str(rows[0]), str(rows[0]))
    assert corpus.survey(10, seed=3).sample == sample != corpus.survey(10, seed=4).sample
    assert [record.row for record in corpus.survey(500).sample] == list(range(100))


def hash_of(corpus: Corpus) -> str:
    return str([corpus.content_hash(record) for record in records(corpus)])


def test_the_hash_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    image = picture(tmp_path / "first" / "a.png")
    path = tmp_path / "first" / "t.jsonl"
    rows = [{"id": "a", "text": "red"}, {"id": "b", "image": "a.png", "instruction": "Find it."}]
    seen = {first := hash_of(open_corpus(table(path, *rows)))}
    for key, value in (("text", "blue"), ("instruction", "Name it."), ("image", "gone.png")):
        seen.add(hash_of(open_corpus(table(path, rows[0], {**rows[1], key: value}))))
    corpus, status = open_corpus(table(path, *rows)), image.stat()
    os.utime(image, ns=(0, status.st_mtime_ns + 1))
    seen.add(hash_of(corpus))
    assert len(seen) == 5
    os.utime(picture(image), ns=(0, status.st_mtime_ns))
    (tmp_path / "first").rename(tmp_path / "second")
    corpus = open_corpus(tmp_path / "second" / "t.jsonl")
    assert hash_of(corpus) == first
    # The content is what the model sees: neither the id nor the row.
    assert corpus.content_hash(Record("a", "red", row=1)) == corpus.content_hash(Record("b", "red"))
    assert corpus.content_hash(Record("a", "red")) != corpus.content_hash(Record("a", instruction="red"))
