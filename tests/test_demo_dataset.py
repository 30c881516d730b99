"""The committed emoji dataset (demo/emoji): complete, licensed, and with nothing of val or test in training."""

from __future__ import annotations

import csv
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from puma_hf.data.mbeir import MBEIR, Candidate, Query
from puma_hf.data.tasks import MBEIRTask
from tests.data.mbeir_builder import MODALITIES as TASKS

ROOT = Path(__file__).resolve().parent.parent / "demo" / "emoji"
SPLITS = {"train": 1000, "val": 60, "test": 150}  # at least as many queries a task
NEAR = 4.9  # root mean square difference at 16x16; the script leaves out what is nearer than 5

pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason="demo/emoji is only in the repository")


@cache
def queries(split: str) -> dict[MBEIRTask, list[Query]]:
    tasks = [MBEIRTask(number, "emoji") for number in TASKS]
    return {task: MBEIR(ROOT).queries(task, split) for task in tasks}  # which checks every field


@cache
def candidates() -> dict[str, Candidate]:
    return dict(MBEIR(ROOT).global_pool("train")) | dict(MBEIR(ROOT).global_pool("test"))


@cache
def images(split: str) -> set[str]:
    """Every image that a query of this split shows or has as an answer; of training, those of the pool too."""
    asked = [query for found in queries(split).values() for query in found]
    shown = {query.image for query in asked} | {candidates()[did].image for query in asked for did in query.positives}
    if split == "train":
        shown |= {candidate.image for candidate in MBEIR(ROOT).global_pool("train").values()}
    return {image for image in shown if image is not None}


@cache
def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("split", SPLITS)
def test_every_file_is_read_and_says_what_the_queries_say(split: str) -> None:
    data = MBEIR(ROOT)
    for task, found in queries(split).items():
        modality, wanted = TASKS[task.task_id]
        assert len(found) >= SPLITS[split]
        judged = data.qrels(task, split, found, candidates() if split == "train" else data.local_pool(task))
        for query in found:
            assert (query.modality, {candidates()[did].modality for did in query.positives}) == (modality, {wanted})
            assert judged[query.id] == dict.fromkeys(query.positives, 1)
            assert data.instruction(query, wanted)


def test_images_size_and_licences() -> None:
    stored = {str(path) for path in ROOT.glob("mbeir_images/**/*") if path.is_file()}
    assert stored == set.union(*map(images, SPLITS)) | {one.image for one in candidates().values() if one.image}
    assert {pixels(path).shape for path in stored} == {(48, 48, 3)}
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) <= 12_000_000
    assert "SIL OPEN FONT LICENSE Version 1.1" in (ROOT / "LICENSES" / "OFL-1.1.txt").read_text(encoding="utf-8")
    assert "creativecommons.org/licenses/by/4.0" in (ROOT / "LICENSES" / "CC-BY-4.0.txt").read_text(encoding="utf-8")
    assert "Unicode, Inc." in (ROOT / "LICENSES" / "Unicode-DFS-2016.txt").read_text(encoding="utf-8")


def test_no_training_image_is_nearly_a_held_out_image() -> None:
    def rows(paths: set[str]) -> np.ndarray:
        stack = np.stack([pixels(path) for path in sorted(paths)]).astype(np.float32)
        return stack.reshape(-1, 16, 3, 16, 3, 3).mean((2, 4)).reshape(len(stack), -1)

    assert not images("val") & images("test")
    held, train = rows(images("val") | images("test")), rows(images("train"))
    assert len(held) > 500
    squares = (held**2).sum(1)[:, None] + (train**2).sum(1)[None] - 2 * held @ train.T
    assert np.sqrt(np.maximum(squares, 0).min() / held.shape[1]) >= NEAR


def test_val_and_test_share_no_query_and_no_answer() -> None:
    for task, val in queries("val").items():
        test = queries("test")[task]
        assert not {(query.text, query.image) for query in val} & {(query.text, query.image) for query in test}
        assert not {did for query in val for did in query.positives} & {did for one in test for did in one.positives}


def emoji_of(did: str) -> str:
    """The code points of what a candidate stands for: the name of its image, or what its line in the file says."""
    image = candidates()[did].image
    return Path(image).stem if image else str(json.loads(sources()[did])["emoji"])


@cache
def sources() -> dict[str, str]:
    lines = [line for path in ROOT.glob("cand_pool/global/*.jsonl") for line in path.read_text("utf-8").splitlines()]
    return {record["did"]: record["src_content"] for record in map(json.loads, lines)}


def edits(split: str) -> set[frozenset[str]]:
    """The pairs of emoji of which one is the image of a query and the other its answer, without direction."""
    asked = [query for task, found in queries(split).items() if task.task_id >= 6 for query in found]
    return {frozenset((Path(str(query.image)).stem, emoji_of(did))) for query in asked for did in query.positives}


def test_no_edit_of_val_or_test_is_in_training() -> None:
    assert len(edits("train")) > 500
    assert not edits("train") & (edits("val") | edits("test"))
    assert not edits("val") & edits("test")


def test_keywords_and_captions_do_not_give_the_answer_away() -> None:
    with (ROOT / "concepts.tsv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = {row["emoji"]: row["name"] for row in rows}

    def words(text: str) -> set[str]:
        return set(re.findall(r"[a-z0-9]+", text.lower().replace("’", ""))) - {"a", "an", "at", "in", "of", "or", "the"}

    for split in ("val", "test"):
        for task, found in queries(split).items():
            for query in found if task.task_id in (1, 2, 8) else ():
                for did in query.positives:
                    name = words(names[emoji_of(did)])
                    if task.task_id == 1:  # keywords, of which no set names the whole answer
                        assert not name <= words(str(query.text))
                    else:  # the caption beside an image, which others share
                        assert not name & words(str(candidates()[did].text))
