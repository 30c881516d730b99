"""PUMA as its authors run it: prune, stage 1, merge, stage 2, merge, evaluate, with the published figures beside.

    .venv/bin/python benchmarks/reproduce.py --tiny                       # on the demo's model and data, some minutes
    .venv/bin/python benchmarks/reproduce.py --mbeir M-BEIR --nli nli_for_simcse.csv          # Qwen2-VL-7B, k = 12
    accelerate launch --num_processes 4 benchmarks/reproduce.py ...       # as released: 4 GPUs of 80 GB

Every step is a `puma-hf` command, printed before it runs, with the recipes `configs/qwen2_vl_7b_stage1.yaml` and
`..._stage2.yaml`, whose numbers are those of the released code; "The paper, the released code, and puma-hf" in the docs
says what remains different. Run it again to go on: what is done is kept, and a stage goes on from its last checkpoint.
`--tiny` changes what the size of the demo asks for (model, data, batch, steps, rank), and nothing else.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState

from puma_hf.cli import app
from puma_hf.data.items import load_mbeir
from puma_hf.files import ADAPTER_CONFIG

ROOT = Path(__file__).resolve().parents[1]
CONFIGS, DEMO = ROOT / "configs", ROOT / "demo"
SOURCE, TINY_SOURCE = "Qwen/Qwen2-VL-7B-Instruct", DEMO / "backbone"
PENALTY = 0.2  # of the released evaluation
PUBLISHED = "54.4 is the paper's mean of 16 tasks in local pools (Qwen2-VL-7B, M-BEIR)"
# What the size of the demo asks for; temperatures, weights, schedule, learning rates and betas are the released ones.
TINY: dict[str, Any] = {"batch_size": 32, "lora_r": 32, "lora_alpha": 64, "save_steps": 0, "dataloader_num_workers": 0}
TINY_STEPS = {"stage1": 50, "stage2": 80}


def command(name: str, *arguments: object, **options: object) -> None:
    """Print and run one `puma-hf` command in this process, which spares starting Python anew."""
    words = [name, *map(str, arguments)]
    for option, value in options.items():
        flag = option.replace("_", "-")
        words += [f"--no-{flag}"] if value is False else [f"--{flag}", *([] if value is True else [str(value)])]
    if PartialState().is_main_process:
        print(f"\n$ puma-hf {shlex.join(words)}", flush=True)
    app(words, standalone_mode=False)


def once(output: Path, name: str, *arguments: object, **options: object) -> None:
    """Run a command on one process whose output appears whole or not at all, unless it is there."""
    with PartialState().main_process_first():
        if PartialState().is_main_process and not output.exists():
            command(name, *arguments, **options)


def stage(number: int, model: Path, output: Path, data: Path, args: argparse.Namespace) -> None:
    """Train an adapter by its recipe and merge it."""
    adapter = output.with_name(f"{output.name}-lora")
    if not output.exists() and not (adapter / ADAPTER_CONFIG).is_file():
        options: dict[str, Any] = {"resume": True} if adapter.exists() else {}
        if number == 1:
            options["teacher"] = args.source
        if args.tiny:
            options |= TINY | {
                "max_steps": TINY_STEPS[f"stage{number}"],
                "bf16": False,
                "gradient_checkpointing": False,
            }
            options |= {"split": "train"} if number == 2 else {}
        recipe = CONFIGS / f"qwen2_vl_7b_stage{number}.yaml"
        command("train", config=recipe, model=model, output=adapter, data=data, seed=args.seed, **options)
    once(output, "merge", adapter, output, base=model)


def text_pairs(data: Path, path: Path) -> Path:
    """The demo's pairs of two texts, in the columns of the NLI pairs that the released stage 1 reads."""
    rows = [row for row in load_mbeir(data, "train") if not row["anchor"]["image"] and not row["positive"]["image"]]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("sent0", "sent1"))
        writer.writerows((row["anchor"]["text"], row["positive"]["text"]) for row in rows)
    return path


def report(results: Path) -> str:
    """The means of an evaluation, plain and corrected, as a table with the published mean below."""
    means = json.loads((results / "results.json").read_text(encoding="utf-8"))["mean"]
    lines = ["| pool | hit@k, plain | corrected | hit@1, plain | hit@5, plain |", "|---|---:|---:|---:|---:|"]
    for pool, mean in means.items():
        values = (mean[name] for name in ("score", "corrected_score", "hit@1", "hit@5"))
        lines.append(f"| {pool} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |")
    return "\n".join([*lines, "", f"Corrected: less {PENALTY} times a candidate's popularity. {PUBLISHED}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the demo's model and data")
    parser.add_argument("--source", default=None, help=f"checkpoint to prune; by default {SOURCE}")
    parser.add_argument("--num-kept-layers", type=int, help="k; by default 12, with --tiny 4 of 8")
    parser.add_argument("--mbeir", type=Path, help="folder in M-BEIR's layout")
    parser.add_argument("--nli", type=Path, help="nli_for_simcse.csv")
    parser.add_argument("--output", type=Path, default=Path("reproduction"), help="where models and results go")
    parser.add_argument("--split", default="test", help="split to evaluate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.tiny and (args.mbeir is None or args.nli is None):
        parser.error("--mbeir and --nli name the data. Give both, or --tiny for the demo's.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.monotonic()
    work = args.output.resolve()
    work.mkdir(parents=True, exist_ok=True)
    args.source = args.source or str(TINY_SOURCE if args.tiny else SOURCE)
    data = args.mbeir or DEMO / "emoji"
    pairs = args.nli or text_pairs(data, work / "pairs.csv")
    pruned, stage1, puma = work / "pruned", work / "stage1", work / "puma"
    kept = args.num_kept_layers or (4 if args.tiny else 12)
    once(pruned, "prune", args.source, pruned, num_kept_layers=kept, reading="puma-released")
    stage(1, pruned, stage1, pairs, args)
    stage(2, stage1, puma, data, args)
    options: dict[str, Any] = {"data": data, "split": args.split, "pool": "both"}
    options |= {"popularity_penalty": PENALTY, "instruction_seed": args.seed}
    command("evaluate", puma, output=work / "results", **options)
    if PartialState().is_main_process:
        print(f"\n{report(work / 'results')}\n\nDone in {time.monotonic() - started:.0f} s. Models: {work}")


if __name__ == "__main__":
    main()
