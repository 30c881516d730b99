"""What searching a large index takes, exactly and approximately: time, memory, recall, and sizes of files.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/search_index.py
    .venv/bin/python benchmarks/search_index.py --items 20000 --dim 256 --clusters 40 --kinds torch int8

Embeddings are drawn in clusters, so that near and far differ as they do for a model, and written by the store and the
items of an index itself; so is the file for approximate search. A cluster has more items than are rescored: to find it
is not enough. No model runs: the queries are embeddings, drawn from the same clusters, and what a model takes comes on
top. Each kind is measured in a process of its own: opening the index, then queries for anything, then for pictures
alone, which are every second item. The peak is that of the process above what it had when the libraries were imported.
The first query reads what stays in memory, from files that the operating system most likely still holds, since they
were just written.
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
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from puma_hf.embedding.shards import Shard
from puma_hf.embedding.store import EmbeddingStore, open_embeddings
from puma_hf.evaluation.search import exact_search
from puma_hf.search.ann import ANN_FILE, write_ann
from puma_hf.search.config import RESCORE_MULTIPLIER
from puma_hf.search.index import DESCRIPTION, FORMAT, FORMAT_VERSION, manifest_hash, open_index
from puma_hf.search.items import Item, write_items

QUERIES = "queries.safetensors"  # drawn once, so that it takes no memory where that is measured
KINDS = ("torch", "faiss", "int8", "binary", "hnsw")
SHARD_SIZE = 10_000
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


def write_index(folder: Path, args: argparse.Namespace) -> None:
    """Embeddings and items as `puma-hf index` writes them; every second item is a picture."""
    settings = {"precision": "float32", "fingerprint": "benchmark", "truncate_dim": None}
    store = EmbeddingStore(folder, settings, args.format)
    infos, items = [], []
    for shard, start in enumerate(range(0, args.items, SHARD_SIZE)):
        rows = np.arange(start, min(start + SHARD_SIZE, args.items))
        ids = [str(row) for row in rows]
        content = Shard(ids, rows, draw(len(rows), args.dim, args.clusters, shard + 1))
        infos.append(store.write(store.info(shard, start, len(rows), "", "skip"), content, ()))
        shown = [Item(name, f"text {name}", None if row % 2 else f"{name}.png") for row, name in enumerate(ids, start)]
        items.append(write_items(folder, shard, shown, ["00"] * len(shown)))
    store.finish(infos, {"embedding_dim": args.dim, "ranges": None})
    describe(folder, {"items": items, "ann": None})


def describe(folder: Path, values: dict[str, Any]) -> None:
    """Write or change what the index says of itself."""
    path = folder / DESCRIPTION
    known = json.loads(path.read_text()) if path.is_file() else {"format": FORMAT, "format_version": FORMAT_VERSION}
    path.write_text(json.dumps({**known, "manifest_hash": manifest_hash(folder), "counts": {}, **values}))


def peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts what the process that started this one had
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def ask(folder: Path, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Open the index and search it, as `Searcher.search` does once it has the query's embedding."""
    # They belong to the libraries, and who has loaded a model has them.
    import faiss  # noqa: F401
    import pyarrow.dataset  # type: ignore[import-untyped]  # noqa: F401
    import sentence_transformers.util  # noqa: F401

    libraries = peak_mib()
    queries = load_file(folder / QUERIES)["queries"]
    result: dict[str, Any] = {}
    start = time.perf_counter()
    index = open_index(folder)
    for target in ("any", "image"):
        seconds, found = [], []
        for query in queries.unsqueeze(1):
            candidates = index.candidates(target)
            if kind not in ("torch", "faiss"):
                candidates = index.nearest(query[0].numpy(), candidates, args.rescore_multiplier * TOP_K)
            best = exact_search(query, candidates, TOP_K, backend="faiss" if kind == "faiss" else "torch")
            positions = candidates.positions[best.indices[0].numpy()].tolist()
            index.items(positions)
            seconds.append(time.perf_counter() - start)
            found.append(positions)
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


def table(folder: Path, args: argparse.Namespace) -> None:
    start = time.perf_counter()
    if not (folder / DESCRIPTION).is_file():
        write_index(folder, args)
    stored = open_embeddings(folder)
    size = sum(path.stat().st_size for path in folder.glob("shard-*")) / 2**20
    print(
        f"{args.items:,} items of {args.dim} dimensions in {args.clusters:,} clusters, {args.format}, {size:,.0f} MiB;"
    )
    print(f"{torch.get_num_threads()} threads; written in {time.perf_counter() - start:.0f} s\n")
    print(
        "| kind | built in | file | open, first query | later query | pictures alone | peak memory | recall@10, both |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    queries = draw(args.queries, args.dim, args.clusters, 0)
    save_file({"queries": torch.from_numpy(queries)}, folder / QUERIES)
    expected: dict[str, Any] = {}
    for kind in args.kinds:
        built = file = "-"
        if kind not in ("torch", "faiss"):
            start = time.perf_counter()
            describe(folder, {"ann": write_ann(stored, kind, manifest_hash(folder), None)})
            built = f"{time.perf_counter() - start:.0f} s"
            file = f"{(folder / ANN_FILE).stat().st_size / 2**20:,.0f} MiB"
        values = measure(folder, kind)
        expected = expected or values
        recalls = " / ".join(
            f"{recall(values[name]['found'], expected[name]['found']):.3f}" for name in ("any", "image")
        )
        times = [values["any"]["first"], values["any"]["later"], values["image"]["later"]]
        shown = " | ".join(f"{seconds * 1000:,.0f} ms" for seconds in times)
        print(f"| {kind} | {built} | {file} | {shown} | {values['peak']:,.0f} MiB | {recalls} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--queries", type=int, default=30)
    parser.add_argument("--rescore-multiplier", type=int, default=RESCORE_MULTIPLIER)
    parser.add_argument("--format", choices=["safetensors", "parquet"], default="safetensors")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="the first counts as exact")
    parser.add_argument("--folder", help="where the index is kept for further runs; a temporary folder if left out")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(Path(args.folder), args.ask, args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        table(folder, args)


if __name__ == "__main__":
    main()
