"""The committed emoji dataset (demo/emoji): its layout, and that val and test are unseen in training."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent / "demo" / "emoji"
SPLITS = ("train", "val", "test")
HELD_OUT = ("val", "test")
TASKS = {
    0: ("text", "image"),
    1: ("text", "text"),
    2: ("text", "image,text"),
    3: ("image", "text"),
    4: ("image", "image"),
    6: ("image,text", "text"),
    7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}
EDIT_TASKS = (6, 7, 8)
QUERY_FIELDS = [
    "qid",
    "query_txt",
    "query_img_path",
    "query_modality",
    "query_src_content",
    "pos_cand_list",
    "neg_cand_list",
]
CANDIDATE_FIELDS = ["did", "txt", "img_path", "modality", "src_content"]
NEAR = 4.9  # root mean square difference at 16x16; the script leaves out what is nearer than 5
SMALL_WORDS = {"a", "an", "at", "in", "of", "or", "the"}
Record = dict[str, Any]

needs_data = pytest.mark.skipif(not ROOT.is_dir(), reason="demo/emoji is only in the repository")
pytestmark = needs_data


@cache
def read(path: str) -> list[Record]:
    with (ROOT / path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def queries(task: int, split: str) -> list[Record]:
    return read(f"query/{split}/mbeir_emoji_task{task}_{split}.jsonl")


def local_pool(task: int) -> list[Record]:
    return read(f"cand_pool/local/mbeir_emoji_task{task}_cand_pool.jsonl")


def global_pool(split: str) -> list[Record]:
    return read(f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl")


@cache
def candidates() -> dict[str, Record]:
    return {c["did"]: c for c in (*global_pool("train"), *global_pool("test"))}


def qrels(task: int, split: str) -> list[list[str]]:
    text = (ROOT / f"qrels/{split}/mbeir_emoji_task{task}_{split}_qrels.txt").read_text()
    return [line.split() for line in text.splitlines()]


@cache
def pixels(path: str) -> np.ndarray:
    with Image.open(ROOT / path) as picture:
        return np.asarray(picture.convert("RGB"))


@cache
def content(did: str) -> tuple[str | None, bytes | None]:
    """What a candidate shows: its text and its pixels."""
    candidate = candidates()[did]
    image = candidate["img_path"]
    return candidate["txt"], pixels(image).tobytes() if image else None


def emoji_of(candidate: Record) -> str:
    """The code points of what a candidate stands for (the file name of its drawing)."""
    if candidate["img_path"]:
        return Path(candidate["img_path"]).stem
    return str(json.loads(candidate["src_content"])["emoji"])


@cache
def names() -> dict[str, str]:
    with (ROOT / "concepts.tsv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {row["emoji"]: row["name"] for row in rows}


def train_images() -> set[str]:
    shown = {q["query_img_path"] for task in TASKS for q in queries(task, "train")}
    return (shown | {c["img_path"] for c in global_pool("train")}) - {None}


def held_out_images(*splits: str) -> set[str]:
    """Every image that a query of these splits shows or has as an answer."""
    found = set()
    for split in splits:
        for task in TASKS:
            for query in queries(task, split):
                found.add(query["query_img_path"])
                found |= {candidates()[did]["img_path"] for did in query["pos_cand_list"]}
    return found - {None}


def edits(*splits: str) -> set[frozenset[str]]:
    """The pairs (source, target) of emoji, without direction."""
    return {
        frozenset((Path(query["query_img_path"]).stem, emoji_of(candidates()[did])))
        for split in splits
        for task in EDIT_TASKS
        for query in queries(task, split)
        for did in query["pos_cand_list"]
    }


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower().replace("’", "")))


# --- layout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_queries_have_the_fields_of_mbeir(task: int, split: str) -> None:
    assert len(queries(task, split)) >= {"train": 1000, "val": 60, "test": 150}[split]
    for query in queries(task, split):
        assert list(query) == QUERY_FIELDS
        assert query["query_modality"] == TASKS[task][0]
        assert bool(query["query_txt"]) == ("text" in TASKS[task][0])
        assert bool(query["query_img_path"]) == ("image" in TASKS[task][0])
        assert query["pos_cand_list"]
        assert {candidates()[did]["modality"] for did in query["pos_cand_list"]} == {TASKS[task][1]}


def test_candidates_have_the_fields_of_mbeir() -> None:
    for candidate in candidates().values():
        assert list(candidate) == CANDIDATE_FIELDS
        assert (candidate["txt"] is None) == (candidate["modality"] == "image")
        assert (candidate["img_path"] is None) == (candidate["modality"] == "text")


def test_ids_are_unique() -> None:
    pool = [c["did"] for c in global_pool("test")]
    train = [c["did"] for c in global_pool("train")]
    qids = [q["qid"] for task in TASKS for split in SPLITS for q in queries(task, split)]
    for ids in (pool, train, qids):
        assert len(ids) == len(set(ids))
        assert all(re.fullmatch(r"10:[1-9]\d*", one) for one in ids)
    assert not set(qids) & candidates().keys()
    shared = {c["did"]: c for c in global_pool("train")}
    assert all(shared.get(c["did"], c) == c for c in global_pool("test")), "one id, two candidates"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_qrels_say_what_the_queries_say(task: int, split: str) -> None:
    expected = {(q["qid"], did) for q in queries(task, split) for did in q["pos_cand_list"]}
    lines = qrels(task, split)
    assert {(line[0], line[2]) for line in lines} == expected
    assert len(lines) == len(expected)
    assert {(line[1], line[3], line[4]) for line in lines} == {("0", "1", str(task))}


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_in_the_pools(task: int) -> None:
    local = {c["did"] for c in local_pool(task)}
    assert {c["modality"] for c in local_pool(task)} == {TASKS[task][1]}
    assert local <= {c["did"] for c in global_pool("test")}
    for split in HELD_OUT:
        assert {line[2] for line in qrels(task, split)} <= local
    assert 400 <= len(local) <= 900


def test_global_pool_is_the_union_of_the_local_pools() -> None:
    union = {c["did"]: c for task in TASKS for c in local_pool(task)}
    assert union == {c["did"]: c for c in global_pool("test")}


def test_train_pool_is_what_training_refers_to() -> None:
    used = set()
    for task in TASKS:
        for query in queries(task, "train"):
            used |= {*query["pos_cand_list"], *query["neg_cand_list"]}
    assert used == {c["did"] for c in global_pool("train")}


def test_every_query_has_an_instruction() -> None:
    with (ROOT / "instructions/query_instructions.tsv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    assert header[:4] == ["query_modality", "cand_modality", "dataset_name", "dataset_id"]
    assert {(row[0], row[1]) for row in rows} == set(TASKS.values())
    assert len(rows) == len(TASKS)
    for row in rows:
        assert row[3] == "10"
        assert len(set(row[4:])) == 4
        assert all(row[4:])


def test_images_are_there_and_48_pixels() -> None:
    used = {c["img_path"] for c in candidates().values()}
    used |= {q["query_img_path"] for task in TASKS for split in SPLITS for q in queries(task, split)}
    for path in used - {None}:
        assert path.startswith("mbeir_images/emoji_images/")
        assert (ROOT / path).resolve().is_relative_to(ROOT)
        assert pixels(path).shape == (48, 48, 3)
    stored = {str(p.relative_to(ROOT).as_posix()) for p in ROOT.glob("mbeir_images/**/*") if p.is_file()}
    assert stored == used - {None}


def test_size_and_licences() -> None:
    assert sum(p.stat().st_size for p in ROOT.rglob("*") if p.is_file()) <= 12_000_000
    expected = {
        "OFL-1.1.txt": "SIL OPEN FONT LICENSE Version 1.1",
        "CC-BY-4.0.txt": "creativecommons.org/licenses/by/4.0",
        "Unicode-DFS-2016.txt": "Unicode, Inc.",
    }
    for name, phrase in expected.items():
        assert phrase in (ROOT / "LICENSES" / name).read_text(encoding="utf-8")
        assert name in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", TASKS)
def test_card_counts_are_the_counts(task: int) -> None:
    card = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {task} \|.*$", card, flags=re.M)
    cells = [cell.strip().replace(",", "") for cell in row.strip("|").split("|")]
    assert cells[2:5] == [str(len(queries(task, split))) for split in SPLITS]
    kinds = Counter(json.loads(q["query_src_content"])["unseen"] for q in queries(task, "test"))
    assert cells[5] == " / ".join(str(kinds[k]) for k in ("drawing", "composition", "concept"))
    assert cells[6] == str(len(local_pool(task)))


# --- fairness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_no_two_candidates_of_a_pool_are_the_same(task: int) -> None:
    contents = [content(c["did"]) for c in local_pool(task)]
    assert len(contents) == len(set(contents))


def test_no_two_candidates_of_a_global_pool_are_the_same() -> None:
    for split in ("train", "test"):
        contents = [content(c["did"]) for c in global_pool(split)]
        assert len(contents) == len(set(contents))


@pytest.mark.parametrize("task", TASKS)
def test_every_right_answer_of_the_global_pool_is_listed(task: int) -> None:
    shown: dict[tuple[str, str], set[str]] = defaultdict(set)
    for candidate in global_pool("test"):
        shown[candidate["modality"], emoji_of(candidate)].add(candidate["did"])
    for split in HELD_OUT:
        for query in queries(task, split):
            asked = {emoji_of(candidates()[did]) for did in query["pos_cand_list"]}
            assert len(asked) == 1
            assert shown[TASKS[task][1], asked.pop()] == set(query["pos_cand_list"])


def test_answers_belong_to_their_queries() -> None:
    for candidate in candidates().values():
        if candidate["modality"] == "text":
            assert candidate["txt"] == names()[emoji_of(candidate)]
    for split in SPLITS:
        for task in (0, 2):
            for query in queries(task, split):
                assert {names()[emoji_of(candidates()[d])] for d in query["pos_cand_list"]} == {query["query_txt"]}
        for query in queries(3, split):
            assert {emoji_of(candidates()[d]) for d in query["pos_cand_list"]} == {Path(query["query_img_path"]).stem}
        for query in queries(4, split):
            (answer,) = query["pos_cand_list"]
            source, found = Path(query["query_img_path"]), Path(candidates()[answer]["img_path"])
            assert source.stem == found.stem
            assert {source.parent.name, found.parent.name} == {"noto", "twemoji"}


@pytest.mark.parametrize("task", EDIT_TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_edits_change_what_the_text_says(task: int, split: str) -> None:
    tones = {
        "1f3fb": "light",
        "1f3fc": "medium-light",
        "1f3fd": "medium",
        "1f3fe": "medium-dark",
        "1f3ff": "dark",
    }
    for query in queries(task, split):
        before = Path(query["query_img_path"]).stem.split("-")
        after = emoji_of(candidates()[query["pos_cand_list"][0]]).split("-")
        old, new = ([tones[c] for c in code if c in tones] for code in (before, after))
        text = query["query_txt"]
        if "skin" in text:
            assert old != new
            assert [c for c in before if c not in tones] == [c for c in after if c not in tones]
            assert (re.search(rf"(?<![a-z-]){new[0]} skin|tone {new[0]}$", text) is not None) if new else True
            assert new or re.search("yellow|without", text)
        else:
            assert old == new
            assert before != after


def test_keywords_do_not_give_the_name_away() -> None:
    for split in SPLITS:
        for query in queries(1, split):
            for did in query["pos_cand_list"]:
                name = candidates()[did]["txt"].lower()
                parts = [part.strip().lower() for part in query["query_txt"].split(",")]
                assert name not in parts
                assert not words(name) <= words(query["query_txt"])
    texts = Counter(frozenset(q["query_txt"].split(", ")) for split in SPLITS for q in queries(1, split))
    assert set(texts.values()) == {1}, "the same keywords with two answers"


@pytest.mark.parametrize("task", [2, 8])
def test_captions_never_tell_the_answer(task: int) -> None:
    sharers = Counter(c["txt"] for c in local_pool(task))
    for split in HELD_OUT:
        for query in queries(task, split):
            for did in query["pos_cand_list"]:
                caption = candidates()[did]["txt"]
                assert sharers[caption] >= 5
                assert not (words(caption) & words(names()[emoji_of(candidates()[did])])) - SMALL_WORDS


def test_negatives_are_wrong() -> None:
    wrong_modality = Counter()
    for task in TASKS:
        for query in queries(task, "train"):
            assert 2 <= len(query["neg_cand_list"]) <= 4
            assert len(set(query["neg_cand_list"])) == len(query["neg_cand_list"])
            right = [content(did) for did in query["pos_cand_list"]]
            for did in query["neg_cand_list"]:
                text, image = content(did)
                assert did not in query["pos_cand_list"]
                modality = candidates()[did]["modality"]
                assert image is None or image not in {r[1] for r in right}
                assert modality != "text" or text not in {r[0] for r in right}
                wrong_modality[modality != TASKS[task][1]] += 1
    assert 0.02 < wrong_modality[True] / wrong_modality.total() < 0.3
    assert not any(q["neg_cand_list"] for task in TASKS for s in HELD_OUT for q in queries(task, s))


# --- nothing of val or test is in training ----------------------------------------------------------------


def test_held_out_images_are_not_in_training() -> None:
    held, train = held_out_images(*HELD_OUT), train_images()
    assert len(held) > 500
    assert not held & train
    assert not {pixels(p).tobytes() for p in held} & {pixels(p).tobytes() for p in train}


def test_no_training_image_is_nearly_a_held_out_image() -> None:
    def rows(paths: set[str]) -> np.ndarray:
        stack = np.stack([pixels(path) for path in sorted(paths)]).astype(np.float32)
        return stack.reshape(-1, 16, 3, 16, 3, 3).mean((2, 4)).reshape(len(stack), -1)

    held, train = rows(held_out_images(*HELD_OUT)), rows(train_images())
    squares = (held**2).sum(1)[:, None] + (train**2).sum(1)[None] - 2 * held @ train.T
    nearest = np.sqrt(np.maximum(squares, 0).min() / held.shape[1])
    assert nearest >= NEAR


def test_val_and_test_are_disjoint() -> None:
    assert not held_out_images("val") & held_out_images("test")
    assert not edits("val") & edits("test")
    for task in TASKS:
        asked, answers = [], []
        for split in HELD_OUT:
            asked.append({(q["query_txt"], q["query_img_path"]) for q in queries(task, split)})
            answers.append({did for q in queries(task, split) for did in q["pos_cand_list"]})
        assert not asked[0] & asked[1]
        assert not answers[0] & answers[1]


def test_edits_of_val_and_test_are_not_in_training() -> None:
    train = edits("train")
    assert len(train) > 500
    assert not train & edits(*HELD_OUT)


def test_names_of_unseen_emoji_are_not_in_training() -> None:
    texts = {q["query_txt"] for task in TASKS for q in queries(task, "train")}
    texts |= {c["txt"] for c in global_pool("train")}
    shown = {Path(path).stem for path in train_images()}
    checked = 0
    for split in HELD_OUT:
        for task in (0, 1, 2, 3, 4):  # one emoji is asked for; the kind is its kind
            for query in queries(task, split):
                emoji = emoji_of(candidates()[query["pos_cand_list"][0]])
                kind = json.loads(query["query_src_content"])["unseen"]
                assert kind in {"drawing", "composition", "concept"}
                assert (names()[emoji] in texts) == (kind == "drawing")
                assert (emoji in shown) == (kind == "drawing")
                checked += kind != "drawing"
    assert checked > 500


@pytest.mark.parametrize("task", EDIT_TASKS)
def test_kind_of_an_edit_is_that_of_its_more_unseen_end(task: int) -> None:
    shown = {Path(path).stem for path in train_images()}
    for split in HELD_OUT:
        for query in queries(task, split):
            ends = {Path(query["query_img_path"]).stem, emoji_of(candidates()[query["pos_cand_list"][0]])}
            kind = json.loads(query["query_src_content"])["unseen"]
            assert (ends <= shown) == (kind == "drawing")
            assert not (kind == "concept" and ends & shown)
