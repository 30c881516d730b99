"""Time and memory of the MAC-Loss against InfoNCE, on given embeddings.

    .venv/bin/python benchmarks/mac_loss.py
    .venv/bin/python benchmarks/mac_loss.py --dim 64 --sizes 512 1024

Compares forward and backward with sentence-transformers' `MultipleNegativesRankingLoss`: the median time of interleaved
repeats, and the peak of the memory taken beside the embeddings, in matrices of N x N float32. Candidates are of three
modalities; one in 16 is a copy of another where copies are masked. No model runs: in training its time comes on top
of both, and makes the difference smaller.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn

from puma_hf.losses.multimodal_mac import MultimodalMACLoss

Step = Callable[[], None]
BASELINE = "MultipleNegativesRankingLoss"


def make_losses(size: int, device: str) -> dict[str, Callable[[list[Tensor]], Tensor]]:
    """Each loss as a function of the embeddings of `size` anchors and as many positives."""
    generator = torch.Generator().manual_seed(1)
    modality_ids = [torch.randint(3, (size,), generator=generator).to(device) for _ in range(2)]
    contents = torch.arange(size)
    contents[::16] = contents[1::16]
    content_ids = [contents.to(device)] * 2
    stub = nn.Identity()
    infonce = MultipleNegativesRankingLoss(stub, scale=20.0)
    mac = MultimodalMACLoss(stub, schedule="constant")
    split = MultimodalMACLoss(stub, schedule="constant", objective="split")
    margin = MultimodalMACLoss(stub, schedule="constant", false_negative_margin=0.1)
    return {
        BASELINE: lambda columns: infonce.compute_loss_from_embeddings(columns, torch.empty(0)),
        "MAC": lambda columns: mac.compute_loss_from_embeddings(columns, modality_ids),
        "MAC, copies masked": lambda columns: mac.compute_loss_from_embeddings(columns, modality_ids, content_ids),
        "MAC, copies and margin": lambda columns: margin.compute_loss_from_embeddings(
            columns, modality_ids, content_ids
        ),
        "split, copies masked": lambda columns: split.compute_loss_from_embeddings(columns, modality_ids, content_ids),
    }


def make_step(loss: Callable[[list[Tensor]], Tensor], size: int, dim: int, device: str) -> Step:
    """Forward and backward on the same normalised embeddings, whose gradients are dropped."""
    generator = torch.Generator().manual_seed(0)
    columns = [
        nn.functional.normalize(torch.randn(size, dim, generator=generator), dim=1).to(device).requires_grad_()
        for _ in range(2)
    ]

    def step() -> None:
        torch.autograd.grad(loss(columns), columns)

    return step


def median_times(steps: dict[str, Step], repeats: int, device: str) -> dict[str, float]:
    """Seconds of each step, measured in turns: what else runs on the machine then slows all alike.

    On one CPU thread it is the time of the processor, which other jobs hardly disturb.
    """
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(step: Step, device: str = "cpu") -> int:
    """Most bytes that a step holds at a time beyond what was held before it, temporaries inside of kernels too."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    results = profile.profiler.kineto_results
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"dim {args.dim}, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"| N | loss | ms | x {BASELINE} | N x N float32 at the peak |\n|---|---|---|---|---|")
    for size in args.sizes:
        losses = make_losses(size, args.device)
        steps = {name: make_step(loss, size, args.dim, args.device) for name, loss in losses.items()}
        times = median_times(steps, args.repeats, args.device)
        for name in steps:
            # Measured with small embeddings: with large ones these would take most of the memory at small N.
            matrices = peak_bytes(make_step(losses[name], size, 8, args.device), args.device) / (4 * size**2)
            ratio = times[name] / times[BASELINE]
            print(f"| {size} | {name} | {1000 * times[name]:.1f} | {ratio:.2f} | {matrices:.2f} |", flush=True)


if __name__ == "__main__":
    main()
