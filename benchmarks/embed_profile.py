"""Where a forward pass on the device waits for the host to read a value, or the host for the device."""

from __future__ import annotations

from typing import Any

import torch
from embed_contestants import PLAIN, fast_path
from embed_models import Models
from embed_workloads import Workload
from torch.profiler import ProfilerActivity

from puma_hf.modeling.fast_path_puma import FastPath

WAITS = (
    "aten::_local_scalar_dense",  # .item(), .tolist(), bool(tensor)
    "aten::nonzero",  # a mask as an index
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
BATCH_SIZE = 16


def profile(models: Models, kept: int, chosen: dict[str, Workload]) -> str:
    """A table of waits in a pass over one batch that is on the device, with the fast path and without."""
    lines = ["| workload | pass | products | waits before the first | between them | after the last |"]
    lines.append("|---|---|---|---|---|---|")
    for name, workload in chosen.items():
        for way, setting in ((PLAIN, None), ("fast path", FastPath())):
            before, between, after, products = _waits(models, kept, workload, setting)
            lines.append(f"| {name} | {way} | {products} | {before} | {between} | {after} |")
    return "\n".join(lines)


def _waits(models: Models, kept: int, workload: Workload, setting: FastPath | None) -> tuple[int, int, int, int]:
    model = models.at(kept)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if models.device == "cuda" else [])]
    with fast_path(model, setting) as module, torch.inference_mode():
        batch: Any = module.packer(workload.prompt)(workload.inputs[:BATCH_SIZE])
        if isinstance(batch, dict):
            batch = {key: value.to(models.device) for key, value in batch.items() if torch.is_tensor(value)}
        else:
            batch = batch.to(models.device)
        # The plain pass adds its results to the batch; `embed_batch` takes it as it is.
        embed = module.embed_batch if setting is not None else lambda given: module(dict(given))
        embed(batch)
        if models.device == "cuda":
            torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as recorded:
            embed(batch)
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    products = [event.start_ns() for event in events if event.name() in PRODUCTS]
    waits = [event.start_ns() for event in events if event.name() in WAITS]
    before = sum(start < products[0] for start in waits)
    after = sum(start > products[-1] for start in waits)
    return before, len(waits) - before - after, after, len(products)
