"""Kill commands at random points (SIGKILL), run them again, and compare with a run that nobody interrupted.

    .venv/bin/python benchmarks/kill.py                     # 20 points of each command, about half an hour on two cores
    .venv/bin/python benchmarks/kill.py --points 5 embed    # fewer, of one command

The commands are train, distill with stored teacher states, embed, evaluate and index, on the demo's backbone. Each
point is a moment drawn uniformly from an uninterrupted run, after the imports: processes are forked from one that has
made them. What must be equal: the adapter's weights and embeddings to 2e-5, figures exactly, the first ten answers of
an index with their scores to 1e-5. Linux and macOS only: Windows has no fork.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}

import torch

DEMO = Path(__file__).parents[1] / "demo"
NUM_IMAGES = 600
TOLERANCE = 2e-5


def main() -> None:
    """Measure the commands that were asked for, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("commands", nargs="*", default=list(COMMANDS), help="of train, states, embed, evaluate, index")
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="puma-hf-kill-") as temporary:
        root = Path(temporary)
        if in_child(lambda: prepare(root)):
            sys.exit("the material could not be made")
        warm_up()
        for name in arguments.commands:
            print(measure(name, root, arguments.points, random.Random(arguments.seed)), flush=True)


def prepare(root: Path) -> None:
    """A pruned model, a folder of images and a table of pairs."""
    from puma_hf import prune

    prune(DEMO / "backbone", root / "model", num_kept_layers=4)
    (root / "images").mkdir()
    for source in sorted((DEMO / "emoji/mbeir_images").rglob("*.webp"))[:NUM_IMAGES]:
        shutil.copy(source, root / "images" / f"{source.parent.name}-{source.name}")
    lines = [f"{path},picture {path.stem} of an emoji" for path in sorted((root / "images").iterdir())[:400]]
    (root / "pairs.csv").write_text("\n".join(["image,text", *lines]) + "\n")


def warm_up() -> None:
    """Import what the commands need, once; nothing is computed here, as threads of torch do not survive a fork."""
    for name in ("datasets", "peft", "sentence_transformers", "accelerate", "transformers.trainer", "puma_hf.cli"):
        __import__(name)
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------- the commands

TRAINING = ["--batch-size", "8", "--lora-r", "4", "--logging-steps", "1", "--seed", "3", "--learning-rate", "1e-3"]


def train(root: Path) -> list[Any]:
    steps = ["--max-steps", "12", "--save-steps", "3", "--temperature", "0.05", "--hard-temperature", "0.04"]
    return ["train", root / "model", "--data", DEMO / "emoji", *TRAINING, *steps]


def states(root: Path) -> list[Any]:
    teacher = ["--teacher", DEMO / "backbone", "--teacher-mode", "cached"]
    return ["distill", root / "model", "--data", root / "pairs.csv", *teacher, *TRAINING, "--max-steps", 4]


def embed(root: Path) -> list[Any]:
    return ["embed", DEMO / "emoji", "--model", root / "model", "--shard-size", 500]


def evaluate(root: Path) -> list[Any]:
    return ["evaluate", root / "model", "--data", DEMO / "emoji", "--split", "val"]


def index(root: Path) -> list[Any]:
    return ["index", root / "images", "--model", root / "model"]


def adapter(output: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    weights = load_file(output / "adapter_model.safetensors")
    return [weights[name] for name in sorted(weights)]


def rows(output: Path) -> dict[str, torch.Tensor]:
    from puma_hf.embedding import open_embeddings

    found: dict[str, torch.Tensor] = {}
    for ids, vectors in open_embeddings(output):
        for name, vector in zip(ids, vectors, strict=True):
            if name in found:
                raise ValueError(f"{name} is there twice")
            found[name] = torch.tensor(vector)
    return found


def figures(output: Path) -> list[Any]:
    return list(json.loads((output / "results.json").read_text())["rows"])


def answers(output: Path) -> list[tuple[str, float]]:
    from puma_hf.search import open_searcher

    searcher = open_searcher(output)
    queries = ("red apple", "a cat", "flag")
    return [(answer.id, float(answer.score)) for query in queries for answer in searcher.search(query).answers]


COMMANDS: dict[str, tuple[Callable[[Path], list[Any]], Callable[[Path], Any]]] = {
    "train": (train, adapter),
    "states": (states, adapter),
    "embed": (embed, rows),
    "evaluate": (evaluate, figures),
    "index": (index, answers),
}


# ---------------------------------------------------------------------------------------------------------- the points


def measure(name: str, root: Path, points: int, draw: random.Random) -> str:
    """Kill one command at so many points; one line says how it went."""
    command, read = COMMANDS[name]
    work = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
    log = work / "log"
    start = time.monotonic()
    if run([*command(root), "--output", work / "whole"], log):
        return f"{name}: the uninterrupted run failed:\n{log.read_text()[-2000:]}"
    seconds = time.monotonic() - start
    in_child(lambda: torch.save(read(work / "whole"), work / "whole.pt"))
    expected = torch.load(work / "whole.pt")
    faults: list[str] = []
    killed = point = 0
    while killed < points and point < 5 * points:
        point += 1
        output, found = work / f"{point}", work / f"{point}.pt"
        arguments, moment = [*command(root), "--output", output], draw.uniform(0.03, 1) * seconds
        if run(arguments, log, moment) is not None:
            seconds *= 0.9  # it was over before, and is no point: the machine is less busy than it was
            continue
        killed += 1
        again = ["--resume"] if name in ("train", "states") and output.exists() and any(output.iterdir()) else []
        status = run([*arguments, *again], log)
        if status or in_child(lambda output=output, found=found: torch.save(read(output), found)):
            faults.append(f"at {moment:.2f} s: run again, it ended with {status}: {log.read_text()[-500:]}")
        elif not same(expected, torch.load(found)):
            faults.append(f"at {moment:.2f} s: the result is another one")
        shutil.rmtree(output, ignore_errors=True)
    told = "".join(f"\n    {fault}" for fault in faults)
    good = killed - len(faults)
    return f"{name}: killed at {killed} points of {seconds:.0f} s, {good} end as the uninterrupted run did{told}"


def run(arguments: list[Any], log: Path, moment: float | None = None) -> int | None:
    """The exit status of a command, or None if it was killed at that moment."""

    def child() -> None:
        from puma_hf import cli

        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["puma-hf", *map(str, arguments)]
        cli.main()

    return in_child(child, moment)


def in_child(function: Callable[[], Any], moment: float | None = None) -> int | None:
    """Call a function in a process of its own: its exit status, or None if it was killed at that moment."""
    if (process := os.fork()) == 0:
        status: Any = 0
        try:
            function()
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        os._exit(status if isinstance(status, int) else 1)
    end = time.monotonic() + (moment if moment is not None else 3600)
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def same(first: Any, second: Any) -> bool:
    """Whether two results are equal: numbers closely, all else exactly."""
    if isinstance(first, torch.Tensor):
        return first.shape == second.shape and torch.allclose(first.double(), second.double(), TOLERANCE, TOLERANCE)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return abs(first - second) <= 1e-5 if isinstance(first, float) else first == second


if __name__ == "__main__":
    main()
