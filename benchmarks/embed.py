"""Inputs a second of `encode` and `embed` beside other ways of embedding with the same weights.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/embed.py                           # a small model, about 10 minutes
    .venv/bin/python benchmarks/embed.py --device cuda --model 7b --depths 8 12 14   # true shapes, with a GPU
    .venv/bin/python benchmarks/embed.py --device cuda --model 2b --profile          # waits for the device in a pass

Four workloads, the same from each seed: captions under one instruction, passages, images of 28 to 1,000 pixels as JPEG
bytes, and captions and images in a random order. Weights are random. All ways run in this process, in turns, and only
once their vectors are those of the plain forward pass on one input at a time. "sentence-transformers" is `encode`
without the fast path, on the pruned model, at its default batch size, against which ratios and verdicts are, and at 8,
which pads less; "encode" is the same call with the fast path, as it is by default; "ready tensors" are processed,
sorted and packed before the clock starts. Operations are counted by torch; they include padding.
On one CPU thread the time is that of the processor.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # read when tokenizers is imported; its threads would count

import sentence_transformers
import torch
import transformers
from embed_contestants import FULL, contestants, left_out, one_by_one
from embed_depths import measure_depths
from embed_measure import Measured, ceiling, check_same, count, interleaved
from embed_models import SHAPES, Models
from embed_profile import profile
from embed_report import depth_table, depth_verdicts, table, verdict_table, verdicts
from embed_workloads import Workload, workloads
from transformers.utils import logging as transformers_logging

SAMPLE = 32  # inputs that are embedded one by one, on a GPU; on the CPU all are


def measure(models: Models, kept: int, name: str, workload: Workload, args: argparse.Namespace) -> list[Measured]:
    """All ways on one workload."""
    ways = contestants(
        models, kept, batch_size=args.batch_size, max_batch_tokens=args.max_batch_tokens, ready=args.ready
    )
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=SHAPES, help="shapes; by default small, and 7b on cuda")
    parser.add_argument("--num-kept-layers", type=int, help="k; by default half of the layers, and 12 of 28")
    parser.add_argument("--depths", type=int, nargs="+", help="also compare these k with all layers, on ready tensors")
    parser.add_argument("--workloads", nargs="+", choices=["captions", "passages", "images", "half"])
    parser.add_argument("--only", nargs="+", help="names of the ways, as in the table")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many inputs")
    parser.add_argument("--max-visual-tokens", type=int, default=256, help="larger images are scaled down")
    parser.add_argument("--batch-size", type=int, default=32, help="of encode; 32 is sentence-transformers' default")
    parser.add_argument("--max-batch-tokens", type=int, help="of embed; by default its own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ready", action="store_true", help="time ready tensors, too; always on cuda")
    parser.add_argument("--profile", action="store_true", help="count waits for the device instead of timing")
    parser.add_argument("--json", help="file to write the measurements to")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA GPU, and torch sees none. Leave it out for the CPU.")
    args.ready = args.ready or on_gpu
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
    if args.profile:
        print(profile(models, kept, chosen))
        return
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
    claims = verdicts(results, top, on_gpu=args.device == "cuda")
    depths: dict[str, Any] = {}
    if args.depths:
        depths = measure_depths(models, args.depths, chosen, args.repeats)
        print("\n" + depth_table(depths))
        claims += depth_verdicts(depths)
    print("\n" + verdict_table(claims))
    print("\n" + left_out())
    if args.json:
        record = {
            "arguments": vars(args),
            "device": where,
            "ceiling": top,
            "results": [result.to_dict() for result in results],
            "depths": {name: [one.to_dict() for one in row.values()] for name, row in depths.items()},
            "claims": [{**asdict(claim), "held": claim.held} for claim in claims],
        }
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
