"""What a layer sweep costs, and whether it says what evaluating each pruned model would.

    .venv/bin/python benchmarks/sweep.py

The time of embedding the demo's validation data at all eight depths, against embedding it with the full model alone, in
turns; the operations of both, counted; and the largest difference between the sweep's vectors and figures and those of
each model pruned to k layers and evaluated by itself. With `--elastic DIR`, a checkpoint of several depths, also those
between the sweep's pairs of depths and the same of models that were loaded at each depth.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path

from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from puma_hf import prune
from puma_hf.checkpoint import open_sentence_transformer
from puma_hf.data.mbeir import MBEIR
from puma_hf.evaluation.evaluator import HeldInputs
from puma_hf.evaluation.layer_sweep import embed_all_depths, encode_all_layers, open_model
from puma_hf.evaluation.mbeir import read_searches

ROOT = Path(__file__).resolve().parents[1]
SPLIT = "val"


def held_inputs(data: MBEIR) -> HeldInputs:
    """What the sweep embeds of the validation split."""
    return HeldInputs(read_searches(data, SPLIT, None, "local"))


def embed(model: SentenceTransformer, inputs: HeldInputs, batch_size: int) -> Tensor:
    """The embeddings of one model, `(len(row_of), hidden_size)`, in the sweep's order and with its groups."""
    options = {"batch_size": batch_size, "show_progress_bar": False}
    return inputs.embed(partial(model.encode, **options))


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def measure_cost(model: SentenceTransformer, inputs: HeldInputs, repeats: int, batch_size: int) -> None:
    """Print time and operations of the sweep against those of the full model."""
    all_depths: list[float] = []
    full: list[float] = []
    for _ in range(repeats):
        full.append(seconds(lambda: embed(model, inputs, batch_size)))
        all_depths.append(seconds(lambda: embed_all_depths(inputs, model, batch_size=batch_size)))
    ratios = [ours / theirs for ours, theirs in zip(all_depths, full, strict=True)]
    print(f"{len(inputs.row_of):,} inputs, {repeats} times each, in turns")
    print(f"full model, depth L alone   median {statistics.median(full):6.2f} s  lowest {min(full):6.2f} s")
    print(f"sweep, depths 1 to L        median {statistics.median(all_depths):6.2f} s  lowest {min(all_depths):6.2f} s")
    print(f"ratio of neighbours         median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    few = [record.model_input for record, _ in [*inputs.row_of][:batch_size]]
    one = flops(lambda: model.encode(few, prompt="", batch_size=batch_size, show_progress_bar=False))
    every = flops(lambda: encode_all_layers(model, few, batch_size=batch_size))
    print(f"operations of one batch     {one:,} and {every:,}: {every / one:.4f} x")


def compare_with_pruned(model: SentenceTransformer, backbone: Path, inputs: HeldInputs, batch_size: int) -> None:
    """Print how far the sweep is from each pruned model."""
    swept = embed_all_depths(inputs, model, batch_size=batch_size)
    for number, ours in enumerate(swept, start=1):
        with tempfile.TemporaryDirectory() as folder:
            prune(backbone, Path(folder, "pruned"), num_kept_layers=number)
            pruned = SentenceTransformer(str(Path(folder, "pruned")), trust_remote_code=True, device=str(model.device))
            theirs = embed(pruned, inputs, batch_size)
        tables = [inputs.results(embeddings, SPLIT).mean("local") for embeddings in (ours, theirs)]
        metric = max(abs(tables[0][name] - tables[1][name]) for name in tables[0])
        vector = float((ours - theirs).abs().max())
        print(f"k = {number}: vectors differ by at most {vector:.1e}, means of metrics by {metric:.1e}")


def compare_pairs(source: str, inputs: HeldInputs, batch_size: int) -> None:
    """Print how far the sweep's pairs of depths are from the models of each depth, loaded by themselves."""
    with open_model(source) as model:
        depths = model[0].model.config.trained_depths
        swept = dict(enumerate(embed_all_depths(inputs, model, batch_size=batch_size), start=1))
    loaded = {k: embed(open_sentence_transformer(source, num_kept_layers=k), inputs, batch_size) for k in depths}
    for query_k, candidate_k in combinations_with_replacement(depths, 2):
        ours, theirs = (
            inputs.results(embeddings[query_k], SPLIT, candidates=embeddings[candidate_k]).mean("local")
            for embeddings in (swept, loaded)
        )
        metric = max(abs(ours[name] - theirs[name]) for name in ours)
        vector = max(float((swept[k] - loaded[k]).abs().max()) for k in (query_k, candidate_k))
        told = f"vectors differ by at most {vector:.1e}, means of metrics by {metric:.1e}"
        print(f"queries at {query_k}, candidates at {candidate_k}: {100 * ours['score']:.1f}, {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, default=ROOT / "demo" / "backbone")
    parser.add_argument("--data", type=Path, default=ROOT / "demo" / "emoji")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--skip-pruned", action="store_true", help="leave out the comparison with each pruned model")
    parser.add_argument("--elastic", help="checkpoint of several depths, whose pairs are compared, too")
    args = parser.parse_args()
    logging.getLogger("puma_hf").setLevel(logging.WARNING)
    data = MBEIR(args.data)
    inputs = held_inputs(data)
    with open_model(str(args.backbone)) as model:
        measure_cost(model, inputs, args.repeats, args.batch_size)
        if not args.skip_pruned:
            compare_with_pruned(model, args.backbone, inputs, args.batch_size)
    if args.elastic:
        compare_pairs(args.elastic, inputs, args.batch_size)


if __name__ == "__main__":
    main()
