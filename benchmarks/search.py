"""Time and memory of exact search in a pool on disk that need not fit into memory.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/search.py
    .venv/bin/python benchmarks/search.py --candidates 20000 --dim 64

Random embeddings are written block by block into an `EmbeddingStore` and searched there. The peak is that of the whole
process, less what the libraries take: writing the pool, the queries, the search. A sample of the queries is searched
again in float64, with NumPy and none of the code that is measured: rank by rank, cosines must be the same to 2e-7.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from puma_hf.embedding.store import EmbeddingStore
from puma_hf.evaluation.topk import exact_search

SHARD_SIZE = 4096
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


def write_pool(folder: str, candidates: int, dim: int, dtype: torch.dtype) -> EmbeddingStore:
    """A store of random embeddings; shards that are there from an earlier run are kept."""
    settings = {"benchmark": "random", "dim": dim}
    store = EmbeddingStore(folder, settings, dtype=dtype, file_format="safetensors")
    keys = torch.arange(candidates)
    for number, shard in enumerate(keys.split(SHARD_SIZE)):
        if not bool(store.has(shard).all()):
            store.add(shard, torch.randn(len(shard), dim, generator=torch.Generator().manual_seed(number)))
    store.refresh()
    return store


def brute_force(
    queries: NDArray[np.float64], store: EmbeddingStore, num_candidates: int, top_k: int
) -> NDArray[np.float64]:
    """The best cosines `(num_queries, top_k)` in float64."""
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    best = np.full((len(queries), top_k), -np.inf)
    for _, block in store.blocks(torch.arange(num_candidates), SHARD_SIZE):
        rows = block.double().numpy()
        scores = queries @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
        best = -np.sort(-np.concatenate([best, scores], axis=1), axis=1)[:, :top_k]
    return best


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--block-size", type=int, default=4096)
    parser.add_argument("--pool-dtype", choices=["float32", "float16", "bfloat16"], default="float16")
    parser.add_argument("--sample", type=int, default=10, help="queries to search again by brute force")
    parser.add_argument("--folder", help="where the pool is kept for further runs; a temporary folder if left out")
    args = parser.parse_args()
    libraries = peak_mib()
    queries = torch.randn(args.queries, args.dim, generator=torch.Generator().manual_seed(-1))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        start = time.perf_counter()
        store = write_pool(folder, args.candidates, args.dim, DTYPES[args.pool_dtype])
        written = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
        start = time.perf_counter()
        blocks = store.blocks(torch.arange(args.candidates), args.block_size)
        result = exact_search(queries, blocks, args.top_k, block_size=args.block_size)
        seconds, peak = time.perf_counter() - start, peak_mib() - libraries
        sample = torch.linspace(0, args.queries - 1, min(args.sample, args.queries)).long()
        expected = brute_force(queries[sample].double().numpy(), store, args.candidates, args.top_k)
    same = int((np.abs(result.scores[sample].numpy() - expected) < 2e-7).all(axis=1).sum())
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; pool written in {written:.0f} s\n")
    print("| pool | on disk | queries | top k | s | peak above the libraries | as brute force |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {args.candidates:,} x {args.dim} | {size:,.0f} MiB | {args.queries:,} | {args.top_k} "
        f"| {seconds:.1f} | {peak:.0f} MiB | {same} of {len(sample)} queries |"
    )
    if same < len(sample):
        raise SystemExit("The search and the brute force differ")


if __name__ == "__main__":
    main()
