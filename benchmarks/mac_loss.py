"""Time and memory of the MAC-Loss against InfoNCE, on given embeddings.

    .venv/bin/python benchmarks/mac_loss.py
    .venv/bin/python benchmarks/mac_loss.py --dim 64 --columns 1 2 --sizes 512

Forward and backward beside sentence-transformers' `MultipleNegativesRankingLoss`: the median time of interleaved
repeats, and the peak of the memory taken beside the embeddings, in float32 matrices of queries by candidates. These
are of three modalities; one in 16 is a copy of another where copies are masked. No model runs: in training its time
comes on top of both, and makes the difference smaller.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn

from puma_hf.losses import MultimodalMACLoss

Step = Callable[[], object]
BASELINE = "MultipleNegativesRankingLoss"


def make_steps(size: int, columns: int, dim: int, device: str) -> dict[str, Step]:
    """Forward and backward of each loss, for `size` queries and `columns` times as many candidates."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(size, dim, generator=generator).to(device).requires_grad_() for _ in range(1 + columns)]
    modality_ids = [torch.randint(3, (size,), generator=generator).to(device) for _ in vectors]
    contents = torch.arange(size, device=device)
    contents[::16] = contents[1::16]
    masked = {"modality_ids": modality_ids, "content_ids": [contents] * len(vectors)}

    def step(loss: nn.Module, *labels: Tensor, **ids: list[Tensor]) -> Step:
        return lambda: torch.autograd.grad(loss.compute_loss_from_embeddings(vectors, *labels, **ids), vectors)

    def mac(**options: object) -> MultimodalMACLoss:
        return MultimodalMACLoss(nn.Identity(), schedule="constant", **options)  # type: ignore[arg-type]

    return {
        BASELINE: step(MultipleNegativesRankingLoss(nn.Identity(), scale=20.0), torch.empty(0)),
        "MAC": step(mac(), modality_ids=modality_ids),
        "MAC, copies masked": step(mac(), **masked),
        "MAC, copies and margin": step(mac(false_negative_margin=0.1), **masked),
        "split, copies masked": step(mac(objective="split"), **masked),
    }


def median_times(steps: dict[str, Step], repeats: int, device: str) -> dict[str, float]:
    """Seconds of each step, measured in turns: what else runs on the machine then slows all alike."""
    # On one CPU thread that of the processor, which other jobs hardly disturb.
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first one warms up


def peak_bytes(step: Step, device: str = "cpu") -> int:
    """Most bytes that a step holds at a time beyond what was held before it, temporaries inside of kernels too."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 8192], help="Numbers of queries.")
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 2], help="Candidates of each query.")
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"dim {args.dim}, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"| queries x candidates | loss | ms | x {BASELINE} | matrices at the peak |\n|---|---|---|---|---|")
    for size, columns in ((size, columns) for size in args.sizes for columns in args.columns):
        times = median_times(make_steps(size, columns, args.dim, args.device), args.repeats, args.device)
        # Memory with small embeddings: large ones would take most of it at small sizes.
        for name, step in make_steps(size, columns, 8, args.device).items():
            matrices = peak_bytes(step, args.device) / (4 * size**2 * columns)
            row = f"{1000 * times[name]:.1f} | {times[name] / times[BASELINE]:.2f} | {matrices:.2f}"
            print(f"| {size} x {size * columns} | {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
