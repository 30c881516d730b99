"""Every check that waits for a GPU, in one command of at most 25 minutes: what puma-hf does there was written on a CPU.

    .venv/bin/python benchmarks/gpu.py                    # all of it; run it again to go on where it ended
    .venv/bin/python benchmarks/gpu.py --minutes 9        # only as much as fits, the rest another time
    .venv/bin/python benchmarks/gpu.py --only attention fast_path --again
    .venv/bin/python benchmarks/gpu.py --list

Weights are random; no download is made. Each check runs in a process of its own, so that one that crashes or runs out
of memory ends alone, and what is done stands in `docs/gpu.json`, which the page "What was verified" shows. A result of
another commit, device or torch is not counted as done. Without a CUDA GPU the checks are listed and the command ends.
`--rehearse` runs them at tiny shapes on the CPU instead, to see that this program works; it writes no result.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "gpu.json"
CONFIGS = ROOT / "configs"
BACKBONE = ROOT / "demo" / "backbone"
BLACK, KEPT = "left out", 12
GIB = 2**30
Figures = dict[str, Any]


class LeftOut(Exception):
    """A check that cannot be made here, with the reason."""


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        says: What holds if it succeeds.
        minutes: What it takes at most; one that takes longer is ended.
        run: Makes it on a device; returns its figures, raises `AssertionError` if it does not hold.
    """

    says: str
    minutes: float
    run: Callable[[str], Figures]


def holds(claim: bool, message: str) -> None:
    """Raise AssertionError with the message if the claim is false; `python -O` does not remove it."""
    if not claim:
        raise AssertionError(message)


# --- the fast path


def attention(device: str) -> Figures:
    """Blocks with and without shared prefixes, causal and not, against float32 attention of each sequence alone."""
    from puma_hf.modeling import attention_puma
    from puma_hf.modeling.attention_puma import Block, attend, blocks_of_lengths, sequences_of

    # Two prefixes of 30 and 50 tokens; three sequences with the first, one with the second, then one without.
    prefixes = blocks_of_lengths([30, 50])
    shared = (*prefixes, Block(2, 40, 40, 80, 80, 0, 30), Block(1, 1, 1, 160, 160, 0, 30), Block(1, 7, 7, 161, 161, 30, 50))
    layouts = {"alone": blocks_of_lengths([1, 700, 33, 33, 5]), "shared prefix": shared}
    worst: dict[str, float] = {}
    for name, blocks in layouts.items():
        sequences = sequences_of(blocks)
        total = sum(block.count * block.num_queries for block in blocks)
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(total, heads, 128, generator=generator) for heads in (28, 4, 4))
        for causal in (True, False):
            exact = attend(query, key, value, sequences, scale=128**-0.5, causal=causal)  # float32, on the CPU
            halves = (part.to(device, torch.bfloat16) for part in (query, key, value))
            fast = attend(*halves, sequences.to(device), scale=128**-0.5, causal=causal)
            worst[f"{name}{', causal' if causal else ''}"] = (fast.float().cpu() - exact).abs().max().item()
    holds(max(worst.values()) < 0.03, f"largest differences {worst}, bfloat16 explains 0.03")
    uses_kernel = device == "cuda" and attention_puma._has_varlen(torch.device(device), 128)
    if device == "cuda" and not uses_kernel:
        raise LeftOut(f"torch {torch.__version__} has no varlen_attn with scale and window; blocks: {worst}")
    return {"largest difference": max(worst.values()), "varlen kernel": uses_kernel}


def fast_path(device: str) -> Figures:
    """The vectors of `encode` with the fast path and without, in both precisions, of texts, images and both."""
    figures: Figures = {}
    shapes = (("small", torch.float32), *([("2b", torch.bfloat16)] if device == "cuda" else []))
    for shape, dtype in shapes:
        figures |= _fast_against_plain(shape, dtype, device, "sdpa")
    return figures


def flash_attention(device: str) -> Figures:
    """The plain path with flash-attn against the plain path with SDPA."""
    if importlib.util.find_spec("flash_attn") is None:
        raise LeftOut("flash-attn is not installed: pip install 'puma-hf[flash-attn]'")
    return _fast_against_plain("2b", torch.bfloat16, device, "flash_attention_2")


def _fast_against_plain(shape: str, dtype: torch.dtype, device: str, implementation: str) -> Figures:
    from embed_contestants import fast_path as with_fast_path
    from embed_models import Models
    from embed_workloads import workloads

    from puma_hf.modeling.fast_path_puma import FastPath

    models = Models(shape, device=device, dtype=dtype, max_visual_tokens=256, seed=0)
    model = models.at(models.num_layers // 2)
    module: Any = model[0]
    chosen = workloads(module.processor.tokenizer, device="cpu", scale=0.25, seed=0)
    lowest = 1.0
    for workload in chosen.values():
        vectors = []
        for setting in (FastPath(), None):
            # Only the plain path asks transformers for an attention of this name.
            module.model.set_attn_implementation("sdpa" if setting else implementation)
            with with_fast_path(model, setting):
                vectors.append(model.encode(workload.inputs, prompt=workload.prompt, convert_to_tensor=True).double())
        lowest = min(lowest, (vectors[0] * vectors[1]).sum(dim=1).min().item())
    bound = 1 - 1e-5 if dtype == torch.float32 else 0.999
    holds(lowest >= bound, f"{shape}, {dtype}: lowest cosine {lowest:.6f} of fast and plain, at least {bound} expected")
    return {f"1 - cosine, {shape}, {str(dtype).removeprefix('torch.')}": 1 - lowest}


def tests(device: str) -> Figures:
    """The tests that are skipped without a GPU: `embed` with and without worker processes, pinned copies."""
    if device == "cpu":
        raise LeftOut("they are skipped on a CPU")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    holds(done.returncode == 0, done.stdout[-2000:])
    return {"pytest": done.stdout.strip().splitlines()[-1]}


def throughput(shape: str) -> Callable[[str], Figures]:
    """Inputs a second by depth, and beside plain sentence-transformers, from `embed.py`."""

    def run(device: str) -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "embed.json"
            # "half" is captions and images as they come.
            options = ["--device", device, "--json", str(output), "--repeats", "3", "--workloads", "captions", "images"]
            options += ["--model", shape, "--num-kept-layers", str(KEPT), "--depths", "8", "12", "14"]
            if device == "cpu":
                options = ["--json", str(output), "--repeats", "1", "--scale", "0.05", "--workloads", "captions"]
                options += ["--model", "tiny", "--depths", "2"]
            _benchmark("embed.py", *options)
            measured = json.loads(output.read_text())
        rates = {f"{r['contestant']}, {r['workload']}": r["num_inputs"] / r["median"] for r in measured["results"]}
        for name, row in measured["depths"].items():
            rates |= {f"{one['contestant']}, {name}": one["num_inputs"] / one["median"] for one in row}
        return {f"{name}, inputs/s": round(rate, 1) for name, rate in rates.items()}

    return run


def waits(device: str) -> Figures:
    """Where the host waits for the device within a pass: not between the layers of the fast path."""
    options = ["--device", "cuda", "--model", "2b"] if device == "cuda" else ["--model", "tiny", "--scale", "0.1"]
    lines = _benchmark("embed.py", *options, "--profile").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "fast path" in line]
    between = {row[0]: int(row[4]) for row in rows}
    holds(device == "cpu" or not any(between.values()), f"waits between products: {between}")
    return {"waits between products": sum(between.values())}


# --- training


def teachers(device: str) -> Figures:
    """A step of distillation with each teacher, beside two models held side by side."""
    lines = _benchmark("teachers.py", *(["--full-size", "--num-kept-layers", str(KEPT)] if device == "cuda" else []))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines() if line.startswith("|")]
    return {row[0]: f"{row[1]} s, {row[3]} GiB" for row in rows[2:]}


def _benchmark(name: str, *options: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    holds(done.returncode == 0, f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout
