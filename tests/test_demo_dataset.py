"""The committed emoji dataset (demo/emoji): complete, fair, and with nothing of val or test in training."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from puma_hf.data.mbeir import MBEIR, Candidate, Query
from puma_hf.data.tasks import MBEIRTask
from tests.data.mbeir_builder import MODALITIES as TASKS

ROOT = Path(__file__).resolve().parent.parent / "demo" / "emoji"
SPLITS = ("train", "val", "test")
HELD_OUT = ("val", "test")
EDIT_TASKS = (6, 7, 8)
NEAR = 4.9  # root mean square difference at 16x16; the script leaves out what is nearer than 5

pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason="demo/emoji is only in the repository")


@cache
def queries(task: int, split: str) -> list[Query]:
    return MBEIR(ROOT).queries(MBEIRTask(task, "emoji"), split)  # which checks every field


@cache
def local_pool(task: int) -> dict[str, Candidate]:
    return dict(MBEIR(ROOT).local_pool(MBEIRTask(task, "emoji"), "test"))


@cache
def global_pool(split: str) -> dict[str, Candidate]:
    return dict(MBEIR(ROOT).global_pool(split))


@cache
def candidates() -> dict[str, Candidate]:
    return global_pool("train") | global_pool("test")


@cache
def raw(path: str) -> dict[str, dict[str, Any]]:
    """The lines of a file by id, for what the reader leaves out."""
    lines = map(json.loads, (ROOT / path).read_text(encoding="utf-8").splitlines())
    return {line.get("qid") or line["did"]: line for line in lines}


def raw_queries(task: int, split: str) -> dict[str, dict[str, Any]]:
    return raw(f"query/{split}/mbeir_emoji_task{task}_{split}.jsonl")


@cache
def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@cache
def emoji_of(did: str) -> str:
    """The code points of what a candidate stands for (the file name of its drawing)."""
    if (image := candidates()[did].image) is not None:
        return Path(image).stem
    pools = (raw(f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl") for split in ("train", "test"))
    return str(json.loads(next(pool[did] for pool in pools if did in pool)["src_content"])["emoji"])


def asked(split: str, tasks: Any = tuple(TASKS)) -> list[tuple[int, Query]]:
    return [(task, query) for task in tasks for query in queries(task, split)]


def images(*splits: str) -> set[str]:
    """Every image that a query of these splits shows or has as an answer; of training, those of the pool too."""
    found = {query.image for split in splits for _, query in asked(split)}
    found |= {candidates()[did].image for split in splits for _, query in asked(split) for did in query.positives}
    if "train" in splits:
        found |= {candidate.image for candidate in global_pool("train").values()}
    return found - {None}  # type: ignore[return-value]


def edits(*splits: str) -> set[frozenset[str]]:
    """The pairs (source, target) of emoji, without direction."""
    found = [query for split in splits for _, query in asked(split, EDIT_TASKS)]
    return {frozenset((Path(query.image or "").stem, emoji_of(did))) for query in found for did in query.positives}


# --- layout


def test_every_file_is_read_and_says_what_the_queries_say() -> None:
    data = MBEIR(ROOT)
    for split in SPLITS:
        for task, (modality, wanted) in TASKS.items():
            assert len(queries(task, split)) >= {"train": 1000, "val": 60, "test": 150}[split]
            pool = global_pool("train") if split == "train" else local_pool(task)
            judged = data.qrels(MBEIRTask(task, "emoji"), split, queries(task, split), pool)
            for query in queries(task, split):
                assert (query.modality, {candidates()[did].modality for did in query.positives}) == (modality, {wanted})
                assert judged[query.qid] == dict.fromkeys(query.positives, 1)
                assert data.instruction(query, wanted)
    qids = [query.qid for split in SPLITS for _, query in asked(split)]
    assert len(qids) == len(set(qids))
    assert all(re.fullmatch(r"10:[1-9]\d*", one) for one in [*qids, *candidates()])
    assert global_pool("test") == {did: one for task in TASKS for did, one in local_pool(task).items()}
    assert all(400 <= len(local_pool(task)) <= 900 for task in TASKS)


def test_images_size_and_licences() -> None:
    stored = {str(path) for path in ROOT.glob("mbeir_images/**/*") if path.is_file()}
    assert stored == images(*SPLITS) | {one.image for one in candidates().values() if one.image}
    assert {pixels(path).shape for path in stored} == {(48, 48, 3)}
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) <= 12_000_000
    for name, phrase in {
        "OFL-1.1.txt": "SIL OPEN FONT LICENSE Version 1.1",
        "CC-BY-4.0.txt": "creativecommons.org/licenses/by/4.0",
        "Unicode-DFS-2016.txt": "Unicode, Inc.",
    }.items():
        assert phrase in (ROOT / "LICENSES" / name).read_text(encoding="utf-8")
        assert name in (ROOT / "README.md").read_text(encoding="utf-8")


# --- fairness


# --- nothing of val or test is in training


def test_no_training_image_is_nearly_a_held_out_image() -> None:
    def rows(paths: set[str]) -> np.ndarray:
        stack = np.stack([pixels(path) for path in sorted(paths)]).astype(np.float32)
        return stack.reshape(-1, 16, 3, 16, 3, 3).mean((2, 4)).reshape(len(stack), -1)

    assert len(images(*HELD_OUT)) > 500
    held, train = rows(images(*HELD_OUT)), rows(images("train"))
    squares = (held**2).sum(1)[:, None] + (train**2).sum(1)[None] - 2 * held @ train.T
    assert np.sqrt(np.maximum(squares, 0).min() / held.shape[1]) >= NEAR


def test_splits_are_disjoint() -> None:
    assert not images("val") & images("test")
    assert not edits("val") & edits("test")
    assert len(edits("train")) > 500
    assert not edits("train") & edits(*HELD_OUT)
    for task in TASKS:
        val, test = (queries(task, split) for split in HELD_OUT)
        assert not {(query.text, query.image) for query in val} & {(query.text, query.image) for query in test}
        assert not {did for query in val for did in query.positives} & {did for one in test for did in one.positives}
