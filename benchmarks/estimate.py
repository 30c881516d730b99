"""`puma-hf estimate` beside the peak of a real run: two steps of `puma-hf train` on the CPU, with random weights.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/estimate.py          # narrow layers, a minute
    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/estimate.py --full   # the shapes of Qwen2-VL-2B, 10 GB and minutes

The recipe is the released first stage (InfoNCE and the frozen teacher, LoRA of rank 128, bfloat16) with a small batch,
with and without gradient checkpointing. Measured is the peak of the resident set, less what it was before the model was
made (Linux). The parts that only the size of a file decides (reading, merging, saving) are left out: the model is made
in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from puma_hf import PumaConfig, PumaModel, lora_config, prune
from puma_hf.configs import TrainConfig
from puma_hf.estimate import estimate
from puma_hf.settings import load_config
from puma_hf.trainer import stages
from puma_hf.trainer.lora_puma import add_lora
from puma_hf.trainer.teachers import FrozenTeacher

ROOT = Path(__file__).parents[1]
TWO_B = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
NARROW = {"hidden_size": 256, "intermediate_size": 1536, "num_attention_heads": 2, "num_key_value_heads": 1}


@contextmanager
def in_bfloat16() -> Iterator[None]:
    """Weights are made in bfloat16, and so never take more memory than they keep."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def measure(full: bool, batch_size: int, tokens: int, checkpointing: bool, folder: Path) -> dict[str, float]:
    """Train for two steps, and return bytes: `measured` and `estimated`."""
    prune(ROOT / "demo" / "backbone", folder / "base", num_kept_layers=2)
    base: Any = PumaConfig.from_pretrained(folder / "base")
    ids = {key: value for key, value in base.to_dict().items() if key.endswith("_token_id")}
    kept, layers, depth = (14, 28, 32) if full else (4, 8, 2)
    text = {
        **base.text_config.to_dict(),
        "dtype": "bfloat16",  # else the decoder is made in the demo's float32, whatever the default is
        **(TWO_B if full else NARROW),
        "head_dim": None,
        "vocab_size": 151_936,
        "num_hidden_layers": layers,
        "layer_types": None,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    shape = PumaConfig(text_config=text, vision_config={"depth": depth, "hidden_size": text["hidden_size"]}, **ids)
    shape = PumaConfig.from_dict(shape.to_dict(), num_kept_layers=kept)
    shape._attn_implementation = "sdpa"
    (folder / "config.json").write_text(json.dumps(shape.to_dict(), default=str))
    words = " ".join(["red apple"] * tokens)
    (folder / "pairs.csv").write_text("sent0,sent1\n" + "".join(f"{n} {words},{n} {words}\n" for n in range(256)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {folder / 'base'}\noutput: {folder / 'out'}\ndata: {folder / 'pairs.csv'}\nloss: infonce\n"
        f"distillation_weight: 0.01\nlora_r: 128\nbf16: true\nmax_length: {tokens}\nmax_steps: 2\nsave_steps: 0\n"
        f"batch_size: {batch_size}\ngradient_checkpointing: {str(checkpointing).lower()}\n"
    )
    expected = estimate(recipe, model=folder / "config.json", images=0, device="cpu", gpu="RTX 4090")
    print(expected.to_markdown(), flush=True)
    before = _resident()

    def load(config: TrainConfig, rows: Any) -> SentenceTransformer:
        model = SentenceTransformer(str(config.model), trust_remote_code=True)
        first: Any = model[0]
        first.processor.tokenizer.model_max_length = tokens
        first.processing_kwargs.get("text", {}).pop("max_length", None)
        with in_bfloat16():
            first.model = PumaModel(shape)
        first.model.name_or_path = str(config.model)
        add_lora(model, lora_config(r=config.lora_r, dropout=config.lora_dropout))
        return model

    def teacher(config: TrainConfig) -> dict[str, Any]:
        student = made[0][0].model
        with in_bfloat16():
            dropped = [type(student.language_model.layers[0])(shape.text_config, 0) for _ in range(layers - kept)]
        return {
            "teacher": FrozenTeacher(student, torch.nn.ModuleList(dropped)),
            "teacher_mode": "frozen",
            "teacher_cache": None,
        }

    made: list[Any] = []
    stages._load = lambda config, rows: made.append(load(config, rows)) or made[0]  # type: ignore
    stages._teacher_arguments = teacher  # type: ignore[assignment]
    stages.train(load_config(TrainConfig, recipe))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"measured": peak - before, "estimated": expected.peak}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--checkpointing", choices=("on", "off"), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    batch_size = args.batch_size or (4 if args.full else 16)
    if args.checkpointing is not None:  # one case, in a process of its own
        with tempfile.TemporaryDirectory() as folder:
            found = measure(args.full, batch_size, args.tokens, args.checkpointing == "on", Path(folder))
        print(json.dumps(found))
        return
    for checkpointing in ("off", "on"):
        command = [sys.executable, __file__, *sys.argv[1:], "--checkpointing", checkpointing]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["estimated"] / found["measured"]
        print(
            f"gradient checkpointing {checkpointing}: measured {found['measured'] / 1e9:.2f} GB, estimated "
            f"{found['estimated'] / 1e9:.2f} GB ({ratio - 1:+.1%})",
            flush=True,
        )


if __name__ == "__main__":
    main()
