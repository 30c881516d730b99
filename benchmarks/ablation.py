"""What the released numbers, stage 1 and the choice of layers are worth on the emoji of the demo, every seed.

    .venv/bin/python benchmarks/ablation.py --report            # the tables of docs/ablation.jsonl, our runs
    .venv/bin/python benchmarks/ablation.py --fresh --jobs 2    # everything anew, then the tables

Two backbones of 8 layers: the demo's (`demo/backbone/`), trained as a retriever, hence a teacher worth following; and
one that was only taught to caption (`demo/train_captioner.py`, 30 minutes on one core), as published backbones are. Cut
to 3 or 4 layers, they are trained with six losses, and before MAC-Loss with nothing, label-free distillation, the
released stage 1, or both. Measured on the test split, in local and global pools, plain and popularity-corrected.

All runs of a backbone cost the same number of decoder layers, passed forward or backward and the teacher's included:
where there is a stage 1, it takes half of the budget. Each finished run is a line of `results-*.jsonl` in the working
directory, and a call after an interruption goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ablation_lab import LOSSES, Prepared, contrast, distil, labelled_rows
from sentence_transformers import SentenceTransformer
from transformers.utils import logging as transformers_logging

from puma_hf import evaluate_mbeir, prune

ROOT = Path(__file__).resolve().parents[1]
DATA, RETRIEVER = ROOT / "demo" / "emoji", ROOT / "demo" / "backbone"
# The runs behind the tables of README and docs, one a line.
PUBLISHED = ROOT / "docs" / "ablation.jsonl"
NUM_LAYERS = 8
BACKBONES = ("retriever", "captioner")
NO_LOSS, MAC = "(none)", "MAC as released"
STAGES = ("label-free", "released", "label-free, then released")
# Steps of 64 pairs that stage 2 has if there is no stage 1.
BUDGET = {"retriever": 80, "captioner": 160}
# Chosen on the val split, seed 0, 3 layers, with InfoNCE 0.05.
LEARNING_RATE = {"retriever": 2e-3, "captioner": 4e-3}
PENALTY = 0.2  # of the released evaluation
KEYS = ("backbone", "layers", "share", "stage 1", "loss", "seed")
METRICS = (
    "local hit@1",
    "local hit@5",
    "local corrected",
    "global hit@1",
    "global hit@5",
    "global corrected",
    "global wrong_modality@1",
)


def conditions(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every run, seed by seed, so that an unfinished ablation has whole seeds."""
    return [dict(zip(KEYS, (*run, seed), strict=True)) for seed in seeds for run in _runs(first=seed == seeds[0])]


def _runs(first: bool) -> Iterator[tuple[str, str, float, str, str]]:
    """Backbone, layers, share of the labels, stage 1 and loss; what no seed changes is measured once."""
    for backbone in BACKBONES:
        for k in (3, 4):
            for layers in (str(k), f"{k - 1} + last"):
                if first:
                    yield backbone, layers, 1.0, "none", NO_LOSS
                yield backbone, layers, 1.0, "none", MAC
            for stage in STAGES if k == 3 else STAGES[:2]:
                yield backbone, str(k), 1.0, stage, MAC
            for loss in LOSSES if k == 3 else ("InfoNCE 0.05",):
                if loss != MAC:
                    yield backbone, str(k), 1.0, "none", loss
    for stage in ("none", *STAGES[:2]):
        yield "retriever", "3", 0.1, stage, MAC
    for stage in STAGES[:2]:
        yield "retriever", "3", 1.0, stage, NO_LOSS


def layer_numbers(layers: str) -> list[int]:
    """The layers of "3", the first three, or of "2 + last"."""
    first, _, last = layers.partition(" + ")
    return [*range(int(first)), *([NUM_LAYERS - 1] if last else [])]


def stage_1_steps(backbone: str, layers: str, stage: str, share: float) -> int:
    """Steps that take a share of the budget; a student layer counts 3 (forward and twice backward), a teacher's 1."""
    kept = len(layer_numbers(layers))
    items = 1 if stage == "label-free" else 2
    return round(share * BUDGET[backbone] * 2 * 3 * kept / (items * (3 * kept + NUM_LAYERS)))


def key_of(condition: dict[str, Any]) -> str:
    """A condition as text, whatever else its line holds."""
    return json.dumps({name: condition[name] for name in KEYS})


class Lab:
    """Makes the starting points of the runs in a working directory, and runs them."""

    def __init__(self, work: Path, part: int = 0) -> None:
        self.work, self.scratch = work, work / f"scratch-{part}"
        self.sources = {"captioner": work / "captioner", "retriever": RETRIEVER}
        self.prepared: dict[str, Prepared] = {}
        self.rows = {share: labelled_rows(DATA, share) for share in (0.1, 1.0)}

    def make_backbones(self) -> None:
        """The backbone that captions, and the pruned forms of both."""
        if not self.sources["captioner"].is_dir():
            script = ROOT / "demo" / "train_captioner.py"
            options = ["--output", str(self.sources["captioner"]), "--work", str(self.work)]
            subprocess.run([sys.executable, str(script), *options], check=True)
        for backbone, source in self.sources.items():
            for layers in ("3", "2 + last", "4", "3 + last"):
                if not (pruned := self.pruned(backbone, layers)).is_dir():
                    prune(source, pruned, keep_layers=layer_numbers(layers))

    def pruned(self, backbone: str, layers: str) -> Path:
        """Where a pruned backbone is."""
        return self.work / f"{backbone}-{layers.replace(' + ', '-and-')}"

    def inputs(self, backbone: str) -> Prepared:
        """The inputs as the backbone's processor and vision tower see them."""
        if backbone not in self.prepared:
            model = SentenceTransformer(str(self.pruned(backbone, "3")), trust_remote_code=True)
            self.prepared[backbone] = Prepared(model)
        return self.prepared[backbone]

    def start(self, condition: dict[str, Any]) -> tuple[Path, int]:
        """The model that stage 2 starts from, and how many steps it then has."""
        backbone, layers, stages, seed = (condition[name] for name in ("backbone", "layers", "stage 1", "seed"))
        folder, budget = self.pruned(backbone, layers), BUDGET[backbone]
        if stages == "none":
            return folder, budget
        parts = stages.split(", then ")
        for number, stage in enumerate(parts):
            output = self.scratch / f"stage-1-{number}"
            distil(
                folder,
                self.sources[backbone],
                output,
                self.inputs(backbone),
                None if stage == "label-free" else self.rows[condition["share"]],
                data=DATA,
                steps=stage_1_steps(backbone, layers, stage, 0.5 / len(parts)),
                learning_rate=LEARNING_RATE[backbone],
                seed=seed,
            )
            folder = output
        return folder, budget // 2

    def run(self, condition: dict[str, Any], split: str = "test") -> dict[str, Any]:
        """Train and measure one condition."""
        inputs = self.inputs(condition["backbone"])
        folder, steps = self.start(condition)
        if condition["loss"] == NO_LOSS:
            model = SentenceTransformer(str(folder), trust_remote_code=True)
            inputs.attach(model)
        else:
            model = contrast(
                folder,
                inputs,
                self.rows[condition["share"]],
                loss=condition["loss"],
                steps=steps,
                learning_rate=LEARNING_RATE[condition["backbone"]],
                seed=condition["seed"],
                work=self.scratch,
            )
        shutil.rmtree(self.scratch, ignore_errors=True)
        return {**condition, **measure(model, split)}


def measure(model: SentenceTransformer, split: str) -> dict[str, float]:
    """Means over the eight tasks, in percent; "corrected" is hit@5 after the popularity correction."""
    options: dict[str, Any] = {"pool": "both", "batch_size": 128, "popularity_penalty": PENALTY}
    results = evaluate_mbeir(model, DATA, split=split, show_progress_bar=False, **options)
    found = {}
    for pool in ("local", "global"):
        means = results.mean(pool)
        found |= {f"{pool} {name}": 100 * means[name] for name in ("hit@1", "hit@5", "wrong_modality@1")}
        corrected = [row.corrected["hit@5"] for row in results.rows if row.pool == pool]
        found[f"{pool} corrected"] = 100 * sum(corrected) / len(corrected)
    return {name: round(value, 3) for name, value in found.items()}


def work_through(work: Path, runs: list[dict[str, Any]], part: int, parts: int, fresh: bool) -> None:
    """This process's share of the runs that no file has yet."""
    lab = Lab(work, part)
    done = {key_of(row) for row in read_results(work, fresh)}
    todo = [condition for condition in runs[part::parts] if key_of(condition) not in done]
    for number, condition in enumerate(todo, start=1):
        row = lab.run(condition)
        with (work / f"results-{part}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{number}/{len(todo)} {key_of(condition)} {row['local hit@1']:.1f} {row['global hit@1']:.1f}", flush=True
        )


def read_results(work: Path, fresh: bool) -> list[dict[str, Any]]:
    """Every finished run, once; the published ones too, unless all is to be run anew."""
    files = [*([] if fresh else [PUBLISHED]), *sorted(work.glob("results-*.jsonl"))]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return list({key_of(row): row for row in rows}.values())


def report(rows: list[dict[str, Any]]) -> str:
    """One table for each backbone, choice of layers and share of labels."""
    columns = [name.replace("_", " ") for name in METRICS]
    groups: dict[tuple[str, ...], dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for row in rows:
        table = groups.setdefault((row["backbone"], row["layers"], f"{row['share']:.0%}"), {})
        table.setdefault((row["stage 1"], row["loss"]), []).append(row)
    lines = []
    for (backbone, layers, share), table in sorted(groups.items(), key=lambda group: group[0], reverse=True):
        lines.append(f"\n**{backbone}, layers {layers} of {NUM_LAYERS}, {share} of the labelled pairs**\n")
        lines.append("| stage 1 | loss | seeds | " + " | ".join(columns) + " |")
        lines.append("|---|---|---:|" + "---:|" * len(columns))
        for (stage, loss), found in table.items():
            cells = [spread([row[metric] for row in found]) for metric in METRICS]
            lines.append(f"| {stage} | {loss} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and range."""
    return f"{sum(values) / len(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "output" / "ablation")
    parser.add_argument("--fresh", action="store_true", help="do not count the runs of docs/ablation.jsonl")
    parser.add_argument("--report", action="store_true", help="only print the tables of the finished runs")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work.resolve()
    torch.set_num_threads(1)
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.part is not None:
        work_through(work, conditions(args.seeds), args.part, args.jobs, args.fresh)
        return
    if not args.report:
        work.mkdir(parents=True, exist_ok=True)
        Lab(work).make_backbones()
        command = [sys.executable, __file__, "--work", str(work), "--jobs", str(args.jobs), "--seeds"]
        command += [*map(str, args.seeds), *(["--fresh"] if args.fresh else [])]
        parts = [subprocess.Popen([*command, "--part", str(part)]) for part in range(args.jobs)]
        if any([process.wait() for process in parts]):
            sys.exit("A part failed; its error is above. Run again to go on.")
    print(report(read_results(work, args.fresh)))


if __name__ == "__main__":
    main()
