"""What torch.compile and quantised weights gain, and what they do to the vectors. None of them is a default.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/embed_options.py              # the CPU, some five minutes
    .venv/bin/python benchmarks/embed_options.py --device cuda --model 7b       # true shapes and fp8, with a GPU

Needs `pip install 'puma-hf[torchao]'`, and a C++ compiler for torch.compile. The first table is of random weights, on
the four workloads of `embed.py`, as tensors that are packed before the clock starts: the time of the model alone. All
options run in this process, in turns; on one CPU thread the time is that of the processor. The second is of trained
weights, those of the demo: the figures of its validation data with each option, and the lowest cosine to the vectors as
they are. Each option is a function of this file, and these are all that it takes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # read when tokenizers is imported; its threads would count
os.environ.setdefault(
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1"
)  # likewise by torch: the first run waits for a compiler

import torch
from embed_contestants import ready_batches
from embed_measure import interleaved
from embed_models import BACKBONE, SHAPES, Models
from embed_workloads import workloads
from sentence_transformers import SentenceTransformer
from sweep import SPLIT, held_inputs
from sweep import embed as embed_inputs
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers.utils import logging as transformers_logging

from puma_hf import prune
from puma_hf.data.mbeir import MBEIR

DATA = BACKBONE.parent / "emoji"
FP8_CAPABILITY = (8, 9)
METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@10")
COMPILED = ", MLPs compiled"


# --- the options


def compile_mlps(model: SentenceTransformer) -> None:
    """Compile what every layer does most of, for any number of tokens; the first batch waits for the compiler.

    It is in place: names of weights stay, and encode, embed and training go through it. What else lies around attention
    gained nothing more on the CPU. Attention is one call for each length of a batch, so it would be compiled again and
    again. A batch of one input is compiled once more, for its last layer sees a single token.
    """
    transformer: Any = model[0]
    parts = (*transformer.model.language_model.layers, *transformer.model.visual.blocks)
    for part in parts:
        part.mlp.compile(dynamic=True)


def to_bfloat16(model: SentenceTransformer) -> None:
    """Half the bits; the same as opening the model with `model_kwargs={"dtype": "bfloat16"}`."""
    model.to(torch.bfloat16)


def quantize_with_torchao(settings: str, model: SentenceTransformer) -> None:
    """Quantise all linear layers, decoder and vision tower, in place.

    The same as opening the model with `model_kwargs={"quantization_config": TorchAoConfig(settings)}` of transformers,
    which holds the weights in full only one at a time.
    """
    from torchao import quantization

    transformer: Any = model[0]
    quantization.quantize_(transformer.model, getattr(quantization, settings)())


OPTIONS: dict[str, tuple[Callable[[SentenceTransformer], None], ...]] = {
    "as it is": (),
    "MLPs compiled": (compile_mlps,),
    "bfloat16": (to_bfloat16,),
    "int8 weights": (partial(quantize_with_torchao, "Int8WeightOnlyConfig"),),
    "int8 weights" + COMPILED: (partial(quantize_with_torchao, "Int8WeightOnlyConfig"), compile_mlps),
    "int8": (partial(quantize_with_torchao, "Int8DynamicActivationInt8WeightConfig"),),
    "int8" + COMPILED: (partial(quantize_with_torchao, "Int8DynamicActivationInt8WeightConfig"), compile_mlps),
    "fp8": (partial(quantize_with_torchao, "Float8DynamicActivationFloat8WeightConfig"),),
    "fp8" + COMPILED: (partial(quantize_with_torchao, "Float8DynamicActivationFloat8WeightConfig"), compile_mlps),
}


def possible(device: str) -> dict[str, str]:
    """Options by name with the reason why one is left out here, if it is."""
    reasons = dict.fromkeys(OPTIONS, "")
    if device == "cuda":
        reasons["bfloat16"] = "the weights are in bfloat16 as they are"
    for name in OPTIONS:
        if name.startswith("fp8") and (device == "cpu" or torch.cuda.get_device_capability() < FP8_CAPABILITY):
            reasons[name] = "fp8 needs a GPU of compute capability 8.9 or later"
    return reasons


def with_option(model: SentenceTransformer, name: str) -> SentenceTransformer:
    """A copy of the model with this option."""
    changed = copy.deepcopy(model)
    for change in OPTIONS[name]:
        change(changed)
    return changed.eval()


# --- what is measured


@dataclass
class Measured:
    """One option.

    Args:
        option: Its name.
        num_bytes: Of the weights.
        first: Seconds by the clock of the first run of each workload: what compiling takes.
        seconds: Of each later run, by workload.
        cosines: The lowest cosine to the vector of the model as it is, by workload.
    """

    option: str
    num_bytes: int
    first: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)


def num_bytes(model: SentenceTransformer) -> int:
    """Of the weights as they are held; quantised ones are tensors made of others."""

    def of(tensor: Any) -> int:
        if not hasattr(tensor, "__tensor_flatten__"):
            return int(tensor.numel() * tensor.element_size())
        parts, _ = tensor.__tensor_flatten__()
        return sum(of(getattr(tensor, part)) for part in parts)

    return sum(of(parameter.data) for parameter in model.parameters())


def measure_random(args: argparse.Namespace, names: list[str]) -> list[Measured]:
    """Time and vectors of random weights."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    models = Models(args.model, device=args.device, dtype=dtype, max_visual_tokens=256, seed=args.seed)
    base = models.at(args.num_kept_layers or (12 if models.num_layers == 28 else models.num_layers // 2))
    chosen = workloads(base[0].processor.tokenizer, device=args.device, scale=args.scale, seed=args.seed)
    changed = {name: with_option(base, name) for name in names}
    results = {name: Measured(name, num_bytes(model)) for name, model in changed.items()}
    for workload, inputs in chosen.items():
        runs = {name: ready_batches(model, inputs) for name, model in changed.items()}
        expected: Tensor | None = None
        for name, run in runs.items():
            start = time.perf_counter()
            vectors = run().float()
            results[name].first += time.perf_counter() - start
            expected = vectors if expected is None else expected
            results[name].cosines[workload] = cosine_similarity(vectors, expected).min().item()
        for name, seconds in interleaved(runs, args.repeats, args.device).items():
            results[name].seconds[workload] = seconds
    return list(results.values())


def measure_trained(names: list[str], device: str) -> dict[str, tuple[float, dict[str, float]]]:
    """The lowest cosine and the means of the figures of the demo's backbone, cut to half of its layers."""
    inputs = held_inputs(MBEIR(DATA))
    results: dict[str, tuple[float, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prune(BACKBONE, Path(folder, "pruned"), num_kept_layers=4)
        base = SentenceTransformer(str(Path(folder, "pruned")), trust_remote_code=True, device=device)
    if device == "cuda":
        base.to(torch.bfloat16)
    expected: Tensor | None = None
    for name in names:
        vectors = embed_inputs(with_option(base, name), inputs, batch_size=64).float()
        expected = vectors if expected is None else expected
        figures = inputs.results(vectors, SPLIT).mean("local")
        results[name] = (cosine_similarity(vectors, expected).min().item(), figures)
    return results


# --- the tables


def table(results: list[Measured]) -> str:
    """Time as ratios to the model as it is, in the same round; the first row has seconds."""
    base, *others = results
    head = ["option", "weights, MB", *base.seconds, "lowest cosine", "first runs, s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for one in (base, *others):
        cells = [one.option, f"{one.num_bytes / 1e6:,.0f}"]
        for workload, seconds in one.seconds.items():
            if one is base:
                cells.append(f"{median(seconds):.3f} s")
                continue
            ratios = [ours / theirs for ours, theirs in zip(base.seconds[workload], seconds, strict=True)]
            cells.append(f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")
        cells += [f"{min(one.cosines.values()):.5f}", f"{one.first:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trained_table(results: dict[str, tuple[float, dict[str, float]]]) -> str:
    """Figures of trained weights with each option."""
    lines = [
        "| " + " | ".join(["option", "lowest cosine", *METRICS]) + " |",
        "|---" * (len(METRICS) + 2) + "|",
    ]
    for name, (cosine, figures) in results.items():
        lines.append("| " + " | ".join([name, f"{cosine:.5f}", *(f"{figures[key]:.4f}" for key in METRICS)]) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=SHAPES, help="shapes; by default medium, and 7b on cuda")
    parser.add_argument("--num-kept-layers", type=int, help="k; by default half of the layers, and 12 of 28")
    parser.add_argument("--options", nargs="+", choices=OPTIONS, help="by default all that are possible here")
    parser.add_argument("--scale", type=float, help="how many inputs; by default 0.15, and 1 on cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-trained", action="store_true", help="leave out the demo's trained weights")
    parser.add_argument("--json", help="file to write the measurements to")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA GPU, and torch sees none. Leave it out for the CPU.")
    args.model = args.model or ("7b" if args.device == "cuda" else "medium")
    args.scale = args.scale or (1 if args.device == "cuda" else 0.15)
    return args


def main() -> None:
    args = parse()
    try:
        import torchao
    except ImportError as error:
        raise SystemExit("This needs torchao, which is not installed: pip install 'puma-hf[torchao]'.") from error
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    # All compiled options share the code of the MLPs, and so the number of its versions that torch allows.
    torch._dynamo.config.recompile_limit = 64
    reasons = possible(args.device)
    wanted = dict.fromkeys(["as it is", *(args.options or OPTIONS)])
    names = [name for name in wanted if not reasons[name]]
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(
        f"{args.model}, {where}; torch {torch.__version__}, torchao {torchao.__version__}; medians of {args.repeats} "
        f"rounds, seed {args.seed}\n"
    )
    results = measure_random(args, names)
    print(table(results))
    trained = {}
    if not args.skip_trained:
        # Compiling changes no vector, as the first table shows.
        trained = measure_trained([name for name in names if not name.endswith("compiled")], args.device)
        print("\nTrained weights: the demo's backbone, 4 layers, and the means of its validation data\n")
        print(trained_table(trained))
    for name in wanted:
        if reasons[name]:
            print(f"\n{name} is left out: {reasons[name]}.")
    if args.json:
        record = {"arguments": vars(args), "results": [vars(one) for one in results], "trained": trained}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
