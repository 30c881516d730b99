"""What distillation and MAC-Loss are worth on the emoji of the demo, every seed on the test split.

    .venv/bin/python benchmarks/ablation.py --report                  # the tables of docs/ablation.jsonl, our runs
    .venv/bin/python benchmarks/ablation.py --fresh --all --jobs 2   # everything anew, then the tables
    .venv/bin/python benchmarks/ablation.py --fresh --jobs 2         # the more telling half of it

Two backbones, cut to 3 of 8 layers: the demo's (`demo/backbone/`), trained as a retriever, hence a teacher worth
following; and one that was only taught to caption (`demo/train_captioner.py`, 25 minutes on one core), which knows
nothing of retrieval and so leaves the losses everything to do. Five losses, mixed or twin batches, with and without
stage 1 and its teachers, and shares of the labelled pairs; results in the local pools and in the global one.

Equal compute: a run without stage 1 trains as much longer as stage 1 costs, its teacher's forward passes included. Each
finished run is a line of `results-*.jsonl` in the working directory, and a call after an interruption goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from ablation_lab import LOSSES, MORE_LOSSES, Prepared, contrast, distil, labelled_rows
from sentence_transformers import SentenceTransformer
from transformers.utils import logging as transformers_logging

from puma_hf import evaluate_mbeir, prune

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "demo" / "emoji"
NUM_KEPT_LAYERS, NUM_LAYERS = 3, 8
BACKBONES = ("retriever", "captioner")
# "cached" is not listed: its vectors are those of "frozen" (tests/trainer hold them equal), so would be its rows.
TEACHERS = ("none", "frozen")
# A teacher that went on from the student's own states, and is gone; the report shows what it did.
REPORTED_TEACHERS = (*TEACHERS, "one_pass")
FRACTIONS = (1.0, 0.25, 0.05)
BATCHES = ("mixed", "twin")
NO_LOSS = "(none)"
MAIN_LOSSES = ("InfoNCE", "MAC, scheduled", "split 0.2 (ours)")
DISTILL_STEPS = 60
TRAIN_STEPS = {"captioner": 160, "retriever": 40}
# One row of stage 1 is one item: k layers forward and backward (3 k) and the teacher's forward (all layers). One of
# stage 2 is two items without a teacher.
STAGE_1_IN_STEPS = round(DISTILL_STEPS * (3 * NUM_KEPT_LAYERS + NUM_LAYERS) / (2 * 3 * NUM_KEPT_LAYERS))
KEYS = ("backbone", "fraction", "seed", "teacher", "batches", "loss")
# Chosen on the val split with InfoNCE, seed 0.
DISTILL_LEARNING_RATE = 2e-3
TRAIN_LEARNING_RATE = {"captioner": 4e-3, "retriever": 2e-3}
TEMPERATURE, HARD_TEMPERATURE = 0.05, 0.02
RETRIEVER = ROOT / "demo" / "backbone"
# The runs behind the README's tables, one a line.
PUBLISHED = ROOT / "docs" / "ablation.jsonl"
METRICS = ("local hit@1", "local hit@5", "global hit@1", "global hit@5", "global wrong_modality@1")
HEADER = (
    "| stage 1 | loss | seeds | local hit@1 | local hit@5 | global hit@1 | global hit@5 | wrong modality, global |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|"
)


def conditions(seeds: list[int], everything: bool = False) -> list[dict[str, Any]]:
    """Every run, the more telling ones first; with `everything` also the rest of the grid."""
    starts = [(backbone, 1.0, seed, teacher, "mixed", NO_LOSS) for backbone, seed, teacher in starting_points(seeds)]
    runs: list[tuple[Any, ...]] = [*starts]
    runs += [("captioner", 1.0, *rest) for rest in product(seeds, TEACHERS[:1], BATCHES, LOSSES + MORE_LOSSES)]
    runs += [("retriever", 1.0, *rest) for rest in product(seeds, TEACHERS[:2], BATCHES, LOSSES)]
    few = product((0.05, 0.25), seeds, TEACHERS[:2], BATCHES[:1], MAIN_LOSSES)
    runs += [("retriever", *rest) for rest in few]
    if everything:
        runs += [("retriever", *rest) for rest in product(FRACTIONS, seeds, TEACHERS, BATCHES, LOSSES)]
    return [dict(zip(KEYS, run, strict=True)) for run in dict.fromkeys(runs)]


def starting_points(seeds: list[int]) -> list[tuple[str, int, str]]:
    """What is measured before stage 2: the pruned backbones, and the distilled ones of each seed."""
    distilled = [("retriever", seed, teacher) for seed, teacher in product(seeds, TEACHERS[1:])]
    return [("captioner", seeds[0], "none"), ("retriever", seeds[0], "none"), *distilled]


def key_of(condition: dict[str, Any]) -> str:
    """A condition as text, whatever else its line holds."""
    return json.dumps({name: condition[name] for name in KEYS})


def measure(model: SentenceTransformer, split: str) -> dict[str, float]:
    """Means over the eight tasks, in percent."""
    results = evaluate_mbeir(model, DATA, split=split, pool="both", batch_size=128, show_progress_bar=False)
    return {
        f"{pool} {metric}": 100 * results.mean(pool)[metric]
        for pool in ("local", "global")
        for metric in ("hit@1", "hit@5", "wrong_modality@1")
    }


def make_backbones(work: Path) -> None:
    """The backbone that captions, and the first layers of both."""
    captioner = work / "captioner"
    if not captioner.is_dir():
        script = ROOT / "demo" / "train_captioner.py"
        subprocess.run([sys.executable, str(script), "--output", str(captioner), "--work", str(work)], check=True)
    for backbone, source in (("captioner", captioner), ("retriever", RETRIEVER)):
        if not (work / f"{backbone}-none").is_dir():
            prune(source, work / f"{backbone}-none", num_kept_layers=NUM_KEPT_LAYERS)


def make_starts(work: Path, seeds: list[int]) -> None:
    """Stage 1 with each teacher and seed, where it is missing."""
    prepared = prepare(work, "retriever")
    for _, seed, teacher in starting_points(seeds):
        output = work / f"retriever-{teacher}-{seed}"
        if teacher != "none" and not output.is_dir():
            distil(
                work / "retriever-none",
                RETRIEVER,
                output,
                prepared,
                data=DATA,
                mode=teacher,
                steps=DISTILL_STEPS,
                learning_rate=DISTILL_LEARNING_RATE,
                seed=seed,
            )


def train_steps(backbone: str, teacher: str) -> int:
    """Steps of stage 2: more of them where stage 1 was left out, so that all runs of a backbone cost the same."""
    return TRAIN_STEPS[backbone] + (STAGE_1_IN_STEPS if (backbone, teacher) == ("retriever", "none") else 0)


def prepare(work: Path, backbone: str) -> Prepared:
    """The inputs as the backbone's processor and vision tower see them."""
    return Prepared(SentenceTransformer(str(work / f"{backbone}-none"), trust_remote_code=True))


def run_one(condition: dict[str, Any], work: Path, prepared: Prepared, scratch: Path) -> dict[str, Any]:
    """Train and measure one condition."""
    backbone, seed, teacher = condition["backbone"], condition["seed"], condition["teacher"]
    start = work / (f"{backbone}-none" if teacher == "none" else f"{backbone}-{teacher}-{seed}")
    if condition["loss"] == NO_LOSS:
        model = SentenceTransformer(str(start), trust_remote_code=True)
        prepared.attach(model)
    else:
        model = contrast(
            start,
            prepared,
            labelled_rows(DATA, condition["fraction"]),
            loss=condition["loss"],
            twins=condition["batches"] == "twin",
            steps=train_steps(backbone, teacher),
            learning_rate=TRAIN_LEARNING_RATE[backbone],
            temperature=TEMPERATURE,
            hard_temperature=HARD_TEMPERATURE,
            seed=seed,
            work=scratch,
        )
    return {**condition, **measure(model, "test")}


def quiet() -> None:
    """One thread, and no logs but ours."""
    torch.set_num_threads(1)
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def work_through(work: Path, runs: list[dict[str, Any]], part: int, parts: int, fresh: bool) -> None:
    """This process's share of the runs that no file has yet."""
    prepared = {backbone: prepare(work, backbone) for backbone in BACKBONES}
    done = {key_of(row) for row in read_results(work, fresh)}
    todo = [condition for condition in runs if key_of(condition) not in done][part::parts]
    scratch = work / f"scratch-{part}"
    for number, condition in enumerate(todo, start=1):
        row = run_one(condition, work, prepared[condition["backbone"]], scratch)
        with (work / f"results-{part}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{number}/{len(todo)} {key_of(condition)} {row['local hit@1']:.1f} {row['global hit@1']:.1f}", flush=True
        )
        shutil.rmtree(scratch, ignore_errors=True)


def read_results(work: Path, fresh: bool) -> list[dict[str, Any]]:
    """Every finished run, once; the published ones too, unless all is to be run anew."""
    files = [*([] if fresh else [PUBLISHED]), *sorted(work.glob("results-*.jsonl"))]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return list({key_of(row): row for row in rows}.values())


def report(rows: list[dict[str, Any]]) -> str:
    """One table for each backbone, share of labels and kind of batch."""
    lines = []
    for backbone, fraction, batches in product(BACKBONES, FRACTIONS, BATCHES):
        table = []
        for teacher, loss in product(REPORTED_TEACHERS, (NO_LOSS, *LOSSES, *MORE_LOSSES)):
            wanted = {"backbone": backbone, "fraction": fraction, "batches": batches, "teacher": teacher, "loss": loss}
            found = [row for row in rows if wanted.items() <= row.items()]
            if found:
                cells = [spread([row[metric] for row in found]) for metric in METRICS]
                table.append(f"| {teacher} | {loss} | {len(found)} | " + " | ".join(cells) + " |")
        if table:
            lines += [f"\n**{backbone}, {fraction:.0%} of the labelled pairs, {batches} batches**\n", HEADER, *table]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and range."""
    return f"{sum(values) / len(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "output" / "ablation")
    parser.add_argument("--all", action="store_true", help="the whole grid: twice as many runs")
    parser.add_argument("--fresh", action="store_true", help="do not count the runs of docs/ablation.jsonl")
    parser.add_argument("--report", action="store_true", help="only print the tables of the finished runs")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work.resolve()
    if args.part is not None:
        quiet()
        work_through(work, conditions(args.seeds, args.all), args.part, args.jobs, args.fresh)
        return
    if not args.report:
        work.mkdir(parents=True, exist_ok=True)
        quiet()
        make_backbones(work)
        make_starts(work, args.seeds)
        command = [sys.executable, __file__, "--work", str(work), "--jobs", str(args.jobs), "--seeds"]
        command += [*map(str, args.seeds), *(["--all"] if args.all else []), *(["--fresh"] if args.fresh else [])]
        parts = [subprocess.Popen([*command, "--part", str(part)]) for part in range(args.jobs)]
        if any([process.wait() for process in parts]):
            sys.exit("A part failed; its error is above. Run again to go on.")
    print(report(read_results(work, args.fresh)))


if __name__ == "__main__":
    main()
