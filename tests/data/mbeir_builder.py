"""A tiny dataset in M-BEIR's layout: all eight tasks, three modalities, one invented dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

DATASET, DATASET_ID = "toys", 11
MODALITIES = {
    0: ("text", "image"), 1: ("text", "text"), 2: ("text", "image,text"), 3: ("image", "text"), 4: ("image", "image"),
    6: ("image,text", "text"), 7: ("image,text", "image"), 8: ("image,text", "image,text"),
}  # fmt: skip
NUM_CANDIDATES, NUM_QUERIES = 6, 4
UNJUDGED_QUERY = 3  # the last query of every task has no line in the qrels


def did(task: int, number: int) -> str:
    return f"{DATASET_ID}:{100 * task + number}"


def qid(task: int, number: int) -> str:
    return f"{DATASET_ID}:{1000 + 100 * task + number}"


def query_path(root: Path, task: int, split: str) -> Path:
    return root / "query" / split / f"mbeir_{DATASET}_task{task}_{split}.jsonl"


def local_pool_path(root: Path, task: int) -> Path:
    part = "_test" if task == 0 else ""  # task 0 has a pool of its own for the test split, as MSCOCO has
    return root / "cand_pool" / "local" / f"mbeir_{DATASET}_task{task}{part}_cand_pool.jsonl"


def global_pool_path(root: Path, split: str) -> Path:
    return root / "cand_pool" / "global" / f"mbeir_union_{split}_cand_pool.jsonl"


def qrels_path(root: Path, task: int, split: str) -> Path:
    return root / "qrels" / split / f"mbeir_{DATASET}_task{task}_{split}_qrels.txt"


def instructions_path(root: Path) -> Path:
    return root / "instructions" / "query_instructions.tsv"


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    write_lines(path, [json.dumps(record) for record in records])


def change_record(path: Path, line: int, **changes: Any) -> None:
    """Change fields of one line; an Ellipsis removes the field."""
    records = read_records(path)
    record = {**records[line - 1], **changes}
    records[line - 1] = {key: value for key, value in record.items() if value is not ...}
    write_records(path, records)


def append_line(path: Path, line: str) -> int:
    """Append a line and return its number."""
    lines = path.read_text(encoding="utf-8").splitlines()
    write_lines(path, [*lines, line])
    return len(lines) + 1


def build_mbeir(root: Path) -> Path:
    (root / "images").mkdir(parents=True)
    everything = []
    union = []
    for task in MODALITIES:
        pool = [_candidate(root, task, number) for number in range(NUM_CANDIDATES)]
        everything += pool
        write_records(local_pool_path(root, task), pool)
        queries = [_query(root, task, number) for number in range(NUM_QUERIES)]
        union += queries
        for split in ("train", "test"):
            write_records(query_path(root, task, split), queries)
            judged = [query for query in queries if query["qid"] != qid(task, UNJUDGED_QUERY)]
            lines = [
                f"{query['qid']} 0 {relevant} {relevance} {task}"
                for query in judged
                for relevance, relevant in enumerate(query["pos_cand_list"], start=1)
            ]
            write_lines(qrels_path(root, task, split), lines)
    for split in ("train", "test"):
        write_records(global_pool_path(root, split), everything)
    write_records(root / "query" / "union_train" / "mbeir_union_up_train.jsonl", [*union, union[0]])
    rows = [
        "\t".join([query, candidate, "Toys", str(DATASET_ID), *(f"{task} wording {n}." for n in range(1, 5))])
        for task, (query, candidate) in MODALITIES.items()
    ]
    header = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3\tprompt_4"
    write_lines(instructions_path(root), [header, *rows])
    return root


def _content(root: Path, modality: str, name: str, shade: int) -> tuple[str | None, str | None]:
    img_path = None
    if "image" in modality:
        img_path = f"images/{name}.png"
        Image.new("L", (2, 2), shade % 256).save(root / img_path)
    return (f"text of {name}" if "text" in modality else None), img_path


def _candidate(root: Path, task: int, number: int) -> dict[str, Any]:
    modality = MODALITIES[task][1]
    text, img_path = _content(root, modality, f"c{task}_{number}", 10 * task + number)
    record = {"did": did(task, number), "txt": text, "img_path": img_path, "modality": modality}
    return {**record, "src_content": None}


def _query(root: Path, task: int, number: int) -> dict[str, Any]:
    """Query n: positives n and, if n is odd, n + 1; negatives are the others, but query 0 has only one."""
    modality = MODALITIES[task][0]
    text, img_path = _content(root, modality, f"q{task}_{number}", 100 + 10 * task + number)
    positives = [did(task, number)] + ([did(task, number + 1)] if number % 2 else [])
    negatives = [did(task, other) for other in range(NUM_CANDIDATES) if did(task, other) not in positives]
    record = {"qid": qid(task, number), "query_txt": text, "query_img_path": img_path}
    record |= {"query_modality": modality, "query_src_content": None}
    return {**record, "pos_cand_list": positives, "neg_cand_list": negatives[: 1 if number == 0 else None]}
