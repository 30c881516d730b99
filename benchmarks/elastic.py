"""One checkpoint of several depths beside a distillation for each: quality at every exit, and what the training costs.

    .venv/bin/python benchmarks/elastic.py --seeds 0 1 2          # about an hour and a half on two cores

The demo's backbone has 8 layers. It is cut to each of the depths and distilled for it alone, and cut to the deepest and
distilled for all depths at once (`puma-hf distill --depths`): for as many steps as one of these, for 1.3 times the
operations of the deepest one's training, and for the operations of all of them together. Operations are counted in a
step of each kind, teacher and backward pass included. All runs follow the demo's recipe, with a smaller batch.
Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from demo_seeds import spread
from shrink import BACKBONE, DATA, DISTILL, ROOT, adapted, command
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from puma_hf.checkpoint import open_sentence_transformer
from puma_hf.configs import DistillConfig
from puma_hf.data.mbeir_hub import open_mbeir
from puma_hf.evaluation.evaluator import HeldInputs
from puma_hf.evaluation.layer_sweep import embed_all_depths
from puma_hf.evaluation.mbeir import read_searches
from puma_hf.settings import load_config
from puma_hf.trainer.stages import distill

BUDGET = 1.3  # operations of the one training, in those of the deepest one's


def flops_of_step(pruned: Path, work: Path, depths: str | None, batch_size: int) -> int:
    """Operations of one optimizer step, counted: teacher, student, and backward pass, of the same rows for every k."""
    kept = work / f"flops-{pruned.name}{'-all' if depths else ''}-{batch_size}.json"
    if not kept.is_file():
        values = {"model": str(pruned), "output": str(work / "counted"), "data": str(DATA), "teacher": str(BACKBONE)}
        values |= {"max_steps": 1, "batch_size": batch_size, "depths": depths, "overwrite": True}
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            distill(load_config(DistillConfig, DISTILL, **values))
        kept.write_text(json.dumps(counter.get_total_flops()))
    flops: int = json.loads(kept.read_text())
    return flops


def held_inputs(split: str) -> HeldInputs:
    """What an evaluation of the demo's data embeds."""
    data = open_mbeir(DATA, split=split, tasks=None)
    return HeldInputs(read_searches(data, split, None, "both"))


def figures(held: HeldInputs, split: str, model: Path, depths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Mean hit@5 in percent of each depth and, as "q>c", of queries at q against candidates at the deepest."""
    kept = model.with_name(f"{model.name}-{split}.json")
    if not kept.is_file():
        embeddings = embed_all_depths(held, open_sentence_transformer(str(model)).eval(), batch_size=64)
        by_name = {str(depth): embeddings[depth - 1] for depth in depths}
        for depth in depths[:-1]:
            candidates = embeddings[depths[-1] - 1][: held.num_candidates]
            queries = embeddings[depth - 1][held.num_candidates :]
            by_name[f"{depth}>{depths[-1]}"] = torch.cat([candidates, queries])
        found = {}
        for name, rows in by_name.items():
            results = held.results(rows, split)
            found[name] = {pool: 100 * results.mean(pool)["hit@5"] for pool in results.pools}
        kept.write_text(json.dumps(found, indent=1))
    values: dict[str, dict[str, float]] = json.loads(kept.read_text())
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--depth-weights", default="linear")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of all runs")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "output" / "elastic")
    args = parser.parse_args()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    work, depths, deepest = args.work.resolve(), sorted(args.depths), max(args.depths)
    work.mkdir(parents=True, exist_ok=True)
    cut = {depth: work / f"cut-{depth}" for depth in (*depths, 8)}
    for depth, folder in cut.items():
        command(folder, "prune", BACKBONE, folder, "--num-kept-layers", depth)

    every = ",".join(map(str, depths))
    alone = {depth: flops_of_step(cut[depth], work, None, args.batch_size) for depth in depths}
    together = flops_of_step(cut[deepest], work, every, args.batch_size)
    steps = {
        f"all depths, {args.steps} steps": args.steps,
        f"all depths, {BUDGET} x the deepest's operations": int(BUDGET * args.steps * alone[deepest] / together),
        "all depths, as many operations as all four": args.steps * sum(alone.values()) // together,
    }
    print(f"operations of a step, in those of k = {deepest} alone: all depths {together / alone[deepest]:.4f}, "
          + ", ".join(f"k = {depth} {flops / alone[deepest]:.3f}" for depth, flops in alone.items()))  # fmt: skip

    held = held_inputs(args.split)
    options = ["--teacher", BACKBONE, "--batch-size", args.batch_size, "--learning-rate", args.learning_rate]
    rows: dict[str, list[dict[str, dict[str, float]]]] = {"untouched": [figures(held, args.split, cut[8], depths)]}
    rows["one depth each"] = []
    for seed in args.seeds:
        found: dict[str, dict[str, float]] = {}
        for depth in depths:
            model = work / f"k{depth}-{seed}"
            adapted("distill", DISTILL, cut[depth], model, *options, "--seed", seed, "--max-steps", args.steps)
            found |= figures(held, args.split, model, [depth])
        rows["one depth each"].append(found)
        for name, number in steps.items():
            model = work / f"all-{args.depth_weights}-{number}-{seed}"
            more = ["--depths", every, "--depth-weights", args.depth_weights]
            adapted("distill", DISTILL, cut[deepest], model, *options, *more, "--seed", seed, "--max-steps", number)
            rows.setdefault(name, []).append(figures(held, args.split, model, depths))

    print(f"\nseeds {args.seeds}, {args.split} split, hit@5 in percent, mean [lowest, highest] over the seeds; steps: "
          + ", ".join(f"{name}: {number}" for name, number in steps.items()))  # fmt: skip
    for pool in ("local", "global"):
        names = [str(depth) for depth in depths] + [f"{depth}>{deepest}" for depth in depths[:-1]]
        print(f"\n| {pool} | " + " | ".join(names) + " |\n|---|" + "---:|" * len(names))
        for name, seeds in rows.items():
            cells = [spread([one[exit_][pool] for one in seeds]) if exit_ in seeds[0] else "" for exit_ in names]
            print(f"| {name} | " + " | ".join(cells) + " |")
        for name in steps:
            pairs = list(zip(rows[name], rows["one depth each"], strict=True))
            shares = [[100 * one[k][pool] / own[k][pool] for one, own in pairs] for k in names[: len(depths)]]
            print(f"| {name}, of one depth each | " + " | ".join(map(spread, shares)) + " |" + " |" * (len(depths) - 1))


if __name__ == "__main__":
    main()
