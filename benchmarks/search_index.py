"""What searching a large index takes, exactly and approximately: time, memory, recall, and sizes of files.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/search_index.py
    .venv/bin/python benchmarks/search_index.py --items 20000 --dim 256 --clusters 40 --kinds exact int8

Embeddings are drawn in clusters, so that near and far differ as they do for a model, and put into the table of an
index. A cluster has more items than are rescored: to find it is not enough. No model runs: the queries are embeddings,
drawn from the same clusters, and what a model takes comes on top. Each kind is measured in a process of its own:
opening the index, then queries for anything, then for pictures alone, which are every second item. The peak is that
of the process above what it had when the libraries were imported. The operating system most likely still holds
the files, since they were just written.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray

from puma_hf.configs import RESCORE_MULTIPLIER
from puma_hf.search.build import create_table, tag_complete, update_ann
from puma_hf.search.index import FORMAT, open_index

QUERIES = "queries.npy"  # drawn once, so that it takes no memory where that is measured
KINDS = ("exact", "int8", "binary", "hnsw")
ROWS = 4096  # of a write
TOP_K = 10
SPREAD = 0.9  # of an embedding around its cluster's center, relative to the length of the center


def draw(count: int, dim: int, num_clusters: int, seed: int) -> NDArray[np.float32]:
    """Embeddings of length 1 around centers that do not depend on the seed; dimensions differ in weight."""
    weights = (1 / np.sqrt(1 + np.arange(dim) / 32)).astype(np.float32)
    centers = np.random.default_rng(0).standard_normal((num_clusters, dim), np.float32) * weights
    generator = np.random.default_rng((1, seed))  # of none of the numbers that the centers are made of
    rows = generator.standard_normal((count, dim), np.float32) * weights * SPREAD
    rows += centers[generator.integers(0, num_clusters, count)]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def write_index(folder: Path, args: argparse.Namespace) -> Any:
    """A table as `puma-hf index` writes it; every second item is a picture."""
    about = {"format_version": FORMAT, "precision": "float32", "fingerprint": "benchmark", "model": "none"}
    table = create_table(folder, about, args.dim)
    for start in range(0, args.items, ROWS):
        ids = [str(row) for row in range(start, min(start + ROWS, args.items))]
        vectors = draw(len(ids), args.dim, args.clusters, start + 1)
        columns: dict[str, Any] = {name: ids for name in ("key", "seen", "id", "text")}
        columns["image"] = [None if row % 2 else f"{row}.png" for row in range(len(ids))]
        columns["modality"] = ["text" if row % 2 else "image" for row in range(len(ids))]
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), args.dim)
        table.add(pa.table(columns, schema=table.schema))
    return table


def peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts what the process that started this one had
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def ask(folder: Path, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Open the index and search it, as `Searcher.search` does once it has the query's embedding."""
    import lancedb  # noqa: F401
    import sentence_transformers.util  # noqa: F401  # who has loaded a model has it

    libraries = peak_mib()
    queries = np.load(folder / QUERIES)
    rescored = None if kind == "exact" else args.rescore_multiplier
    result: dict[str, Any] = {}
    start = time.perf_counter()
    index = open_index(folder)
    targets: Any = ("any", "image")
    for target in targets:
        seconds, found = [], []
        for query in queries:
            found.append([int(row["id"]) for row in index.nearest(query, target, TOP_K, rescored=rescored)])
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        result[target] = {"first": seconds[0], "later": statistics.median(seconds[1:]), "found": found}
    return {**result, "peak": peak_mib() - libraries}


def measure(folder: Path, kind: str) -> dict[str, Any]:
    """Ask in a new process."""
    command = [sys.executable, *sys.argv, "--folder", str(folder), "--ask", kind]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{kind} failed:\n{ended.stderr}")
    values: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return values


def recall(found: list[list[int]], expected: list[list[int]]) -> float:
    return statistics.mean(len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True))


def size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def table(folder: Path, args: argparse.Namespace) -> None:
    start = time.perf_counter()
    written = write_index(folder, args)
    print(f"{args.items:,} items of {args.dim} dimensions in {args.clusters:,} clusters, {size_mib(folder):,.0f} MiB;")
    print(f"{torch.get_num_threads()} threads; written in {time.perf_counter() - start:.0f} s\n")
    print(
        "| kind | built in | file | open, first query | later query | pictures alone | peak memory | recall@10, both |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    np.save(folder / QUERIES, draw(args.queries, args.dim, args.clusters, 0))
    expected: dict[str, Any] = {}
    for kind in args.kinds:
        start, size = time.perf_counter(), size_mib(folder)
        update_ann(written, "none" if kind == "exact" else kind)
        tag_complete(written)
        built = f"{time.perf_counter() - start:.0f} s | {size_mib(folder) - size:,.0f} MiB"
        values = measure(folder, kind)
        expected = expected or values
        recalls = " / ".join(
            f"{recall(values[name]['found'], expected[name]['found']):.3f}" for name in ("any", "image")
        )
        times = [values["any"]["first"], values["any"]["later"], values["image"]["later"]]
        shown = " | ".join(f"{seconds * 1000:,.0f} ms" for seconds in times)
        print(f"| {kind} | {built} | {shown} | {values['peak']:,.0f} MiB | {recalls} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--queries", type=int, default=30)
    parser.add_argument("--rescore-multiplier", type=int, default=RESCORE_MULTIPLIER)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="the first counts as exact")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(Path(args.folder), args.ask, args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        table(Path(temporary), args)


if __name__ == "__main__":
    main()
