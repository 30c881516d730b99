"""Memory of each of several processes that read the same pool and training rows of M-BEIR's size, above the libraries.

    .venv/bin/python benchmarks/data_memory.py                    # 8 processes, 1 M candidates, 100,000 queries
    .venv/bin/python benchmarks/data_memory.py --in-turn          # on a busy machine: each starts after the last

Writes a synthetic folder in M-BEIR's layout to a temporary folder, and has every process make the training rows, the
global pool and the first batch, all at once. What is counted is memory that no file backs; the mapped files are in the
page cache once, for all. Linux only: /proc tells.

Measured with --in-turn on two busy cores (30 November 2026, all eight alive at the end): 38 MB in the process that
writes the files (100 s), 26 MB in each of the other seven (3 to 4 s). The pool alone would be some 350 MB of Python
objects in each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any


def write_folder(root: Path, num_candidates: int, num_queries: int) -> None:
    """Texts of about 90 characters, and queries with one positive and four hard negatives each."""
    pool, queries, table = (
        root / name
        for name in (
            "cand_pool/global/mbeir_union_train_cand_pool.jsonl",
            "query/train/mbeir_toys_task1_train.jsonl",
            "instructions/query_instructions.tsv",
        )
    )
    for path in (pool, queries, table):
        path.parent.mkdir(parents=True)
    with pool.open("w") as file:
        for number in range(num_candidates):
            text = f"candidate {number}, a passage of some words that nobody has to read, as long as a caption is"
            record = {"did": f"9:{number}", "txt": text, "img_path": None, "modality": "text"}
            file.write(json.dumps(record) + "\n")
    with queries.open("w") as file:
        for number in range(num_queries):
            dids = [f"9:{(number * 7 + step) % num_candidates}" for step in range(5)]
            record = {"qid": f"9:{num_candidates + number}", "query_txt": f"question {number}", "query_img_path": None}
            record |= {"query_modality": "text", "pos_cand_list": dids[:1], "neg_cand_list": dids[1:]}
            file.write(json.dumps(record) + "\n")
    table.write_text("header\ntext\ttext\ttoys\t9\tFind it.\n")


def anonymous() -> float:
    """Megabytes of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1024


def measure(root: str, rank: int, results: Any, done: Any) -> None:
    """What one process takes."""
    from puma_hf.data import MBEIR, DistinctPositivesBatchSampler, load_mbeir

    before, start = anonymous(), time.monotonic()
    rows = load_mbeir(root, num_negatives=1, with_ids=True)
    pool = MBEIR(root).global_pool("train")
    found = sum(1 for candidate in pool.values() if candidate.text) == len(pool) and "9:0" in pool
    sampler = DistinctPositivesBatchSampler(rows, rows["positives"], batch_size=64, drop_last=True, seed=0)
    rows[next(iter(sampler))]
    results.put((rank, anonymous() - before, time.monotonic() - start, found))
    done.wait()  # all are measured while all hold what they have


def show(rank: int, megabytes: float, seconds: float, found: bool) -> None:
    print(f"{rank:7}  {megabytes:22.0f}  {seconds:7.0f}{'' if found else '  WRONG'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=100_000)
    parser.add_argument("--in-turn", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        write_folder(Path(folder, "data"), args.candidates, args.queries)
        import sentence_transformers  # noqa: F401 - the libraries, whose memory does not count

        import puma_hf.data.items  # noqa: F401

        context = multiprocessing.get_context("fork")
        results, done = context.Queue(), context.Event()
        processes = [
            context.Process(target=measure, args=(f"{folder}/data", n, results, done)) for n in range(args.processes)
        ]
        print("process  MB above the libraries  seconds")
        for process in processes:
            process.start()
            if args.in_turn:
                show(*results.get())
        for _ in () if args.in_turn else processes:
            show(*results.get())
        done.set()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()
