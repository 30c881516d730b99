"""Inputs a second of `encode` and `embed` beside other ways of embedding with the same weights.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/embed.py                           # a small model, about 10 minutes
    .venv/bin/python benchmarks/embed.py --device cuda --model 7b                    # true shapes, with a GPU

Four workloads, the same from each seed: captions under one instruction, passages, images of 28 to 1,000 pixels as JPEG
bytes, and captions and images in a random order. Weights are random. All ways run in this process, in turns, and only
once their vectors are those of the plain forward pass on one input at a time. "sentence-transformers" is `encode`
without the fast path, on the pruned model, at its default batch size, against which ratios and verdicts are, and at 8,
which pads less; "encode" is the same call with the fast path, as it is by default. torch counts operations, those of
padding among them.
On one CPU thread the time is that of the processor.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # read when tokenizers is imported; its threads would count

import sentence_transformers
import torch
import transformers
from embed_contestants import EMBED, ENCODE, FULL, LAMRA, PLAIN, contestants, left_out, one_by_one
from embed_measure import Measured, ceiling, check_same, count, interleaved
from embed_models import SHAPES, Models
from embed_workloads import Workload, workloads
from transformers.utils import logging as transformers_logging

OURS = (ENCODE, EMBED)
SAMPLE = 32  # inputs that are embedded one by one, on a GPU; on the CPU all are


def measure(models: Models, kept: int, name: str, workload: Workload, args: argparse.Namespace) -> list[Measured]:
    """All ways on one workload."""
    ways = contestants(models, kept, batch_size=args.batch_size, max_batch_tokens=args.max_batch_tokens)
    runs = {way: prepare(workload) for way, prepare in ways.items() if args.only is None or way in args.only}
    total = len(workload.inputs)
    step = max(1, total // SAMPLE) if args.device == "cuda" else 1
    sample = list(range(0, total, step))
    expected = {depth: one_by_one(models.at(depth), workload, sample) for depth in {kept, models.num_layers}}
    cosines, flops = {}, {}
    for way, run in runs.items():
        vectors, flops[way] = count(run)
        same = expected[models.num_layers if way == FULL else kept]
        cosines[way] = check_same(f"{way}, {name}", vectors[sample], same)
    seconds = interleaved(runs, args.repeats, args.device)
    return [Measured(name, way, total, flops[way], cosines[way], seconds[way]) for way in runs]


@dataclass
class Claim:
    """A measured ratio and what it must reach."""

    text: str
    value: float
    bound: float

    @property
    def held(self) -> bool:
        """Whether it does."""
        return self.value >= self.bound


def table(results: list[Measured], ceiling: float) -> str:
    """All ways on all workloads as a markdown table."""
    by_name = {(one.workload, one.contestant): one for one in results}
    lines = [
        "| workload | way | inputs/s | x sentence-transformers | s, median (least to most) | GFLOP | of the products' "
        "rate | lowest cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        base = by_name.get((one.workload, PLAIN))
        ratio = f"{base.median / one.median:.2f}" if base else ""
        lines.append(
            f"| {one.workload} | {one.contestant} | {one.num_inputs / one.median:,.1f} | {ratio} "
            f"| {one.median:.3f} ({min(one.seconds):.3f} to {max(one.seconds):.3f}) | {one.flops / 1e9:,.1f} "
            f"| {one.flops / one.median / ceiling:.0%} | {one.cosine:.6f} |"
        )
    return "\n".join(lines)


def verdicts(results: list[Measured], *, on_gpu: bool) -> list[Claim]:
    """The ratios that the project promises, on the CPU and on a GPU."""
    by_name = {(one.workload, one.contestant): one for one in results}
    claims: list[Claim] = []

    def faster(workload: str, ours: str, theirs: str, bound: float) -> None:
        one, other = by_name.get((workload, ours)), by_name.get((workload, theirs))
        if one and other:
            claims.append(Claim(f"{workload}: {ours} / {theirs}", other.median / one.median, bound))

    names = list(dict.fromkeys(one.workload for one in results))
    against_plain = {"images": 1.4} if on_gpu else {"captions": 1.25, "half": 1.15}
    for name in names:
        for ours in OURS:
            faster(name, ours, PLAIN, against_plain.get(name, 1.15 if on_gpu and name != "half" else 1.0))
    if not on_gpu:
        for ours in OURS:
            faster("half", ours, LAMRA, 1.8)
        claims += _against_counted(by_name, names)
    return claims


def _against_counted(by_name: dict[tuple[str, str], Measured], names: list[str]) -> list[Claim]:
    """Whether the time falls as the operations do, from all layers to the pruned model."""
    claims = []
    for name in names:
        for ours in OURS:
            one, full = by_name.get((name, ours)), by_name.get((name, FULL))
            if one and full:
                counted = full.flops / one.flops
                text = f"{name}: {ours} / {FULL}, of the counted ratio {counted:.2f}"
                claims.append(Claim(text, full.median / one.median / counted, 0.9))
    return claims


def verdict_table(claims: list[Claim]) -> str:
    """Each ratio of throughputs beside its bound; a bound of 0 is none."""
    lines = ["| ratio of inputs/s | measured | at least | |", "|---|---|---|---|"]
    for claim in claims:
        bound, verdict = (f"{claim.bound}", "held" if claim.held else "not held") if claim.bound else ("", "")
        lines.append(f"| {claim.text} | {claim.value:.2f} | {bound} | {verdict} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=SHAPES, help="shapes; by default small, and 7b on cuda")
    parser.add_argument("--num-kept-layers", type=int, help="k; by default half of the layers, and 12 of 28")
    parser.add_argument("--workloads", nargs="+", choices=["captions", "passages", "images", "half"])
    parser.add_argument("--only", nargs="+", help="names of the ways, as in the table")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many inputs")
    parser.add_argument("--max-visual-tokens", type=int, default=256, help="larger images are scaled down")
    parser.add_argument("--batch-size", type=int, default=32, help="of encode; 32 is sentence-transformers' default")
    parser.add_argument("--max-batch-tokens", type=int, help="of embed; by default its own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file to write the measurements to")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA GPU, and torch sees none. Leave it out for the CPU.")
    args.model = args.model or ("7b" if on_gpu else "small")
    return args


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    models = Models(
        args.model, device=args.device, dtype=dtype, max_visual_tokens=args.max_visual_tokens, seed=args.seed
    )
    kept = args.num_kept_layers or (12 if models.num_layers == 28 else models.num_layers // 2)
    module: Any = models.at(kept)[0]
    chosen = workloads(module.processor.tokenizer, device=args.device, scale=args.scale, seed=args.seed)
    chosen = {name: workload for name, workload in chosen.items() if name in (args.workloads or chosen)}
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(
        f"{args.model}, {kept} of {models.num_layers} layers, {dtype}, {where}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, sentence-transformers {sentence_transformers.__version__}; "
        f"batches of {args.batch_size}, medians of {args.repeats} runs, seed {args.seed}"
    )
    rates = [ceiling(args.device, dtype)]
    results: list[Measured] = []
    for name, workload in chosen.items():
        results += measure(models, kept, name, workload, args)
        rates.append(ceiling(args.device, dtype))
    top = max(rates)
    print(f"Matrix products of this run: {top / 1e9:,.0f} GFLOP/s\n")
    print(table(results, top))
    claims = verdicts(results, on_gpu=args.device == "cuda")
    print("\n" + verdict_table(claims))
    print("\n" + left_out())
    if args.json:
        record = {
            "arguments": vars(args),
            "device": where,
            "ceiling": top,
            "results": [result.to_dict() for result in results],
            "claims": [{**asdict(claim), "held": claim.held} for claim in claims],
        }
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
