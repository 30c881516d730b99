"""What pruning saves: the same inputs, made ready before, through the first k layers and through all of them."""

from __future__ import annotations

from embed_contestants import one_by_one, ready_batches
from embed_measure import Measured, check_same, count, interleaved
from embed_models import Models
from embed_workloads import Workload

SAMPLE = 8  # inputs that are embedded one by one


def measure_depths(
    models: Models, depths: list[int], chosen: dict[str, Workload], repeats: int
) -> dict[str, dict[int, Measured]]:
    """By workload and depth, the fast path on ready tensors; the last depth is that of all layers."""
    results: dict[str, dict[int, Measured]] = {}
    for name, workload in chosen.items():
        runs = {
            depth: ready_batches(models.at(depth), models.device, None, workload)
            for depth in sorted({*depths, models.num_layers})
        }
        sample = list(range(0, len(workload.inputs), max(1, len(workload.inputs) // SAMPLE)))
        flops, cosines = {}, {}
        for depth, run in runs.items():
            vectors, flops[depth] = count(run)
            expected = one_by_one(models.at(depth), workload, sample)
            cosines[depth] = check_same(f"k = {depth}, {name}", vectors[sample], expected)
        seconds = interleaved({str(depth): run for depth, run in runs.items()}, repeats, models.device)
        results[name] = {
            depth: Measured(
                name, f"k = {depth}", len(workload.inputs), flops[depth], cosines[depth], seconds[str(depth)]
            )
            for depth in runs
        }
    return results
