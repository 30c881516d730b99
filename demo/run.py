"""The whole way on real images: prune, distil, merge, train with MAC-Loss, merge, evaluate, reload, index, search.

    .venv/bin/python demo/run.py            # what `make demo` runs; six minutes or more on two cores

Every step is a `puma-hf` command, printed before it runs; both stages follow recipes in `configs/`. The model is a tiny
Qwen2-VL (`demo/backbone/`), the data are emoji in M-BEIR's layout (`demo/emoji/`). Results go to `demo/output/`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from transformers.utils import logging as transformers_logging

from everyday import INSTRUCTION, copy_drawings, try_words
from picture import draw_answers
from puma_hf.checkpoint import open_sentence_transformer
from puma_hf.cli import app
from puma_hf.configs import DistillConfig, TrainConfig
from puma_hf.estimate import count_flops, count_parameters
from puma_hf.settings import load_config

DEMO = Path(__file__).resolve().parent
DATA = DEMO / "emoji"
BACKBONE = DEMO / "backbone"
TEXT = "woman running: medium skin tone"
IMAGE = DATA / "mbeir_images" / "emoji_images" / "noto" / "1f600.webp"

NUM_KEPT_LAYERS = 4
DEPTHS = "2,3,4,6"  # one training for all of these
CONFIGS = DEMO.parent / "configs"
DISTILL, TRAIN = CONFIGS / "demo_distill.yaml", CONFIGS / "demo_train.yaml"

# Name in the table, and directory.
MODELS = {
    "full model": "full",
    "pruned, untouched": "pruned",
    "pruned, distilled without labels": "distilled",
    "PUMA: distilled, then MAC-Loss": "puma",
    "pruned, InfoNCE for as many steps": "infonce",
    f"one training for {DEPTHS} layers, without labels": "elastic",
}
# What is not run with all of its layers.
RUN_LAYERS = {"elastic": NUM_KEPT_LAYERS}


def command(name: str, *arguments: str | Path, **options: object) -> None:
    """Print and run one `puma-hf` command in this process, which spares starting Python anew."""
    words = [name, *map(str, arguments)]
    for option, value in options.items():
        words += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
    shown = [word.replace(f"{DEMO.parent}/", "") for word in words]
    print(f"\n$ puma-hf {shlex.join(shown)}", flush=True)
    app(words, standalone_mode=False)


def stage(kind: str, recipe: Path, model: Path, output: Path, seed: int, **options: object) -> None:
    """Train an adapter by a recipe of `configs/` and merge it; what is given here wins over the recipe."""
    adapter = output.with_name(f"{output.name}-lora")
    command(kind, config=recipe, model=model, output=adapter, data=DATA, seed=seed, overwrite=True, **options)
    command("merge", adapter, output, base=model, overwrite=True)


def build_models(work: Path, backbone: Path, seed: int) -> None:
    """Make the six models of the table."""
    full, pruned, distilled = work / "full", work / "pruned", work / "distilled"
    steps = load_config(DistillConfig, DISTILL).max_steps + load_config(TrainConfig, TRAIN).max_steps
    command("prune", backbone, full, num_kept_layers=8, overwrite=True)
    command("prune", backbone, pruned, num_kept_layers=NUM_KEPT_LAYERS, overwrite=True)
    stage("distill", DISTILL, pruned, distilled, seed, teacher=backbone)
    stage("train", TRAIN, distilled, work / "puma", seed)
    stage("train", TRAIN, pruned, work / "infonce", seed, loss="infonce", max_steps=steps)
    deeper = work / "pruned-deeper"
    command("prune", backbone, deeper, num_kept_layers=DEPTHS.rpartition(",")[2], overwrite=True)
    # Smaller batches, for the time that six layers take.
    stage("distill", DISTILL, deeper, work / "elastic", seed, teacher=backbone, depths=DEPTHS, batch_size=32)


def results_folder(work: Path, model: str, split: str) -> Path:
    """Where `puma-hf evaluate` writes what it found for a model."""
    return work / f"{model}-{split}"


def measure(work: Path, split: str) -> dict[str, dict[str, float]]:
    """Evaluate each model; one row of figures a model."""
    rows = {}
    for name, folder in MODELS.items():
        output = results_folder(work, folder, split)
        shutil.rmtree(output, ignore_errors=True)  # embeddings of another run's model would be refused
        layers = RUN_LAYERS.get(folder)
        options = {"data": DATA, "split": split, "pool": "both", "batch_size": 64, "output": output}
        command("evaluate", work / folder, **options, **({} if layers is None else {"num_kept_layers": layers}))
        means = json.loads((output / "results.json").read_text())["mean"]
        model = open_sentence_transformer(str(work / folder), layers)
        rows[name] = {
            "layers": model[0].config.num_kept_layers,
            "parameters": count_parameters(model),
            "text MFLOP": count_flops(model, TEXT) / 1e6,
            "image MFLOP": count_flops(model, {"image": str(IMAGE)}) / 1e6,
            **{
                f"{pool} {metric}": 100 * means[pool][metric]
                for pool in ("local", "global")
                for metric in ("hit@1", "hit@5", "wrong_modality@1")
            },
        }
    return rows


def search(work: Path) -> Path:
    """Index all drawings with the trained model, and ask for everyday words."""
    index = work / "index"
    shutil.rmtree(index, ignore_errors=True)  # of another run's model
    command("index", copy_drawings(DATA, work / "drawings"), model=work / "puma", output=index)
    command("search", index, "brown heart", instruction=INSTRUCTION, **{"for": "image"}, top=3)
    try_words(index)
    return index


def table(rows: dict[str, dict[str, float]]) -> str:
    """The six models as a Markdown table, hit rates in percent and relative to the full model."""
    full = rows["full model"]["local hit@5"]
    lines = [
        "| model | layers | parameters | MFLOP text / image | local hit@1 / hit@5 | of full | global hit@1 / hit@5 "
        "| wrong modality, global |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['layers']:.0f} | {row['parameters'] / 1e6:.2f} M "
            f"| {row['text MFLOP']:.0f} / {row['image MFLOP']:.0f} "
            f"| {row['local hit@1']:.1f} / {row['local hit@5']:.1f} | {row['local hit@5'] / full:.1%} "
            f"| {row['global hit@1']:.1f} / {row['global hit@5']:.1f} | {row['global wrong_modality@1']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEMO / "output", help="where models and results go")
    parser.add_argument("--backbone", type=Path, default=BACKBONE, help="the full model")
    parser.add_argument("--seed", type=int, default=0, help="seed of LoRA's start, order and dropout")
    parser.add_argument("--split", default="test", choices=("val", "test"), help="split to measure on")
    args = parser.parse_args()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    started = time.monotonic()
    work = args.output.resolve()
    work.mkdir(parents=True, exist_ok=True)
    build_models(work, args.backbone.resolve(), args.seed)
    rows = measure(work, args.split)
    (work / f"table-{args.split}.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("\nReloading in a fresh process where puma_hf cannot be imported, and searching there:", flush=True)
    subprocess.run([sys.executable, str(DEMO / "fresh_process.py"), str(work / "puma")], check=True)
    index = search(work)
    picture = draw_answers(results_folder(work, "puma", args.split), DATA, args.split, work / "answers.png")
    print(f"\n{table(rows)}\n")
    print("Hit rates are means over eight tasks, in percent.")
    print("Wrong modality: share of first answers that are not of the kind asked for.")
    print(f"Picture: {picture}")
    program = Path(sys.executable).with_name("puma-hf")
    words = [os.path.relpath(program), "app", os.path.relpath(index), "--instruction", INSTRUCTION]
    print(f"Search these emoji in a browser: {shlex.join(words)}")
    print(f"Done in {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
