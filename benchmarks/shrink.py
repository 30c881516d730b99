"""Shrink an embedder in use: cut it to half, distil it without labels, and let it query the embedder's own index.

    .venv/bin/python benchmarks/shrink.py --seeds 0 1 2          # about fifteen minutes on two cores

The embedder is made first, as none can be downloaded here: the demo's backbone, trained under a template of its own (a
system turn, no "Summarize", no [RET] in its vocabulary), and saved as a plain directory of sentence-transformers with
last-token pooling. From there on it is a source like any other. Finished steps are not repeated.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from demo_seeds import spread

from puma_hf.cli import app

ROOT = Path(__file__).resolve().parents[1]
DATA, BACKBONE = ROOT / "demo" / "emoji", ROOT / "demo" / "backbone"
DISTILL, TRAIN = ROOT / "configs" / "demo_distill.yaml", ROOT / "configs" / "demo_train.yaml"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
MODULES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "sentence_bert_config.json": {
        "modality_config": {"message": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
    },
    "1_Pooling/config.json": {"embedding_dimension": 128, "pooling_mode": "lasttoken"},
    "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
}


def command(done: Path, *words: object) -> None:
    """Run a `puma-hf` command, unless what it writes is there."""
    if not done.exists():
        print(f"\n$ puma-hf {shlex.join(map(str, words))}", flush=True)
        app([*map(str, words)], standalone_mode=False)


def as_embedder(checkpoint: Path, folder: Path) -> Path:
    """A stock checkpoint as a plain sentence-transformers directory, without [RET] and with a template of its own."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(checkpoint, unfinished)
        (unfinished / "chat_template.jinja").write_text(TEMPLATE)
        dimension = json.loads((checkpoint / "config.json").read_text())["text_config"]["hidden_size"]
        (unfinished / "1_Pooling").mkdir()
        for name, content in MODULES.items():
            content = {**content, "embedding_dimension": dimension} if name.startswith("1_") else content
            (unfinished / name).write_text(json.dumps(content))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            file = unfinished / name
            file.write_text(file.read_text().replace("[RET]", "<|not_used|>"))
        unfinished.rename(folder)
    return folder


def adapted(kind: str, recipe: Path, model: Path, output: Path, *words: object) -> None:
    """Train an adapter by a recipe and merge it."""
    adapter = output.with_name(f"{output.name}-lora")
    command(adapter / "adapter_config.json", kind, "--config", recipe, "--model", model, "--output", adapter, "--data",
            DATA, "--overwrite", *words)  # fmt: skip
    command(output, "merge", adapter, output, "--base", model)


def figures(work: Path, model: Path, *words: object) -> dict[str, float]:
    """Mean hit@5 over the tasks in percent, local and global, and what else `evaluate` says of two models."""
    output = work / f"{model.name}-results{len(words)}"
    command(output / "results.json", "evaluate", model, "--data", DATA, "--pool", "both", "--batch-size", 64,
            "--output", output, *words)  # fmt: skip
    mean = json.loads((output / "results.json").read_text())["mean"]
    names = {f"{pool} {name}": 100 * value for pool, values in mean.items() for name, value in values.items()}
    return {name: value for name, value in names.items() if "hit@5" in name or "overlap" in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of distillation")
    parser.add_argument("--num-kept-layers", type=int, default=4)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "output" / "shrink")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    copy, embedder = work / "copy", work / "embedder"
    command(copy, "prune", as_embedder(BACKBONE, work / "untrained"), copy, "--num-kept-layers", 8)
    adapted("train", TRAIN, copy, work / "trained", "--loss", "infonce", "--max-steps", 300, "--learning-rate", 1e-3)
    command(work / "stock", "export", work / "trained", work / "stock")
    as_embedder(work / "stock", embedder)

    # A copy with all layers stands for the embedder: its vectors, and no torchvision, which stock classes need.
    cut, whole = work / "cut", work / "whole"
    command(whole, "prune", embedder, whole, "--num-kept-layers", 8)
    command(cut, "prune", embedder, cut, "--num-kept-layers", args.num_kept_layers)
    rows: dict[str, Sequence[dict[str, float]]] = {
        "embedder": [figures(work, whole)],
        "cut, untouched": [figures(work, cut)],
    }
    small = [work / f"small-{seed}" for seed in args.seeds]
    for seed, model in zip(args.seeds, small, strict=True):
        adapted("distill", DISTILL, cut, model, "--teacher", embedder, "--seed", seed, "--max-steps", args.steps)
    rows["cut and distilled"] = [figures(work, model) for model in small]
    rows["its queries, the embedder's candidates"] = [
        figures(work, model, "--candidates-model", whole) for model in small
    ]
    full = rows["embedder"][0]
    print("\n| | local hit@5 | of the embedder's, % | global hit@5 | of the embedder's, % |\n|---|---:|---:|---:|---:|")
    for name, found in rows.items():
        cells = []
        for metric in ("local hit@5", "global hit@5"):
            cells += [spread([one[metric] for one in found])]
            cells += [spread([100 * one[metric] / full[metric] for one in found])]
        print(f"| {name} | {' | '.join(cells)} |")
    asked = rows["its queries, the embedder's candidates"]
    for metric in sorted({name for one in asked for name in one if "overlap" in name}):
        print(f"\n{metric}: {spread([one[metric] for one in asked])} %")


if __name__ == "__main__":
    main()
