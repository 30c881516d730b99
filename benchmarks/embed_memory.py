"""Whether the memory of `embed` grows with the corpus: all of it against its first hundredth.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/embed_memory.py                # about 3 minutes on one core
    .venv/bin/python benchmarks/embed_memory.py --texts 10000 --images 500

A tiny model with random weights embeds 100,000 short texts, then 5,000 images from files, each in a process of its own,
and so it does their first hundredth. Inputs are made when they are asked for. What the whole corpus takes more at the
peak must fit into the array of its embeddings and 16 MiB, which is what the allocator makes of equal runs: some 160
bytes a text, 3 KiB an image. Linux only: peaks are read from /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embed_models import Models
from embed_workloads import jpeg, one_token_words

NUM_FILES = 25
IMAGE_SIZE = (640, 480)  # of all: batches of other sizes would take other amounts, in a short corpus or in a long one
MAX_BATCH_TOKENS = 512  # so that a hundredth of the corpus has many batches
SLACK = 16 * 2**20  # peaks of equal runs differ by some MiB


class Texts(Sequence[str]):
    """Captions, each made from its number."""

    def __init__(self, words: list[str], count: int) -> None:
        self._words, self._count = words, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        generator = np.random.default_rng(index)
        return " ".join(generator.choice(self._words, generator.integers(5, 16)))


class Images(Sequence[dict[str, str]]):
    """Images, some files again and again."""

    def __init__(self, folder: Path, count: int) -> None:
        self._files = sorted(map(str, folder.glob("*.jpg")))
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return {"image": self._files[index % len(self._files)]}


def embed_in_this_process(kind: str, count: int, folder: Path) -> dict[str, int]:
    """Peak bytes of this process, and those of the embeddings."""
    from puma_hf.embedding.embed import embed

    torch.set_num_threads(1)
    models = Models("tiny", device="cpu", dtype=torch.float32, max_visual_tokens=64, seed=0)
    model = models.at(2)
    module: Any = model[0]
    words = one_token_words(module.processor.tokenizer)
    inputs: Sequence[Any] = Texts(words, count) if kind == "texts" else Images(folder, count)
    embeddings = embed(model, inputs, max_batch_tokens=MAX_BATCH_TOKENS, show_progress_bar=False).embeddings
    if embeddings.shape != (count, model.get_embedding_dimension()):
        raise SystemExit(f"{kind}: embeddings of shape {embeddings.shape} for {count} inputs")
    return {"peak": peak_memory(), "output": embeddings.nbytes}


def peak_memory() -> int:
    """Peak resident bytes of this process. `getrusage` would include those of the parent before exec."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def run(kind: str, count: int, folder: Path) -> dict[str, int]:
    """The measurements in a fresh process."""
    command = [sys.executable, __file__, "--kind", kind, "--count", str(count), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr}")
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--kind", choices=["texts", "images"], help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(embed_in_this_process(args.kind, args.count, Path(args.folder))))
        return
    grown = False
    print("| corpus | peak of 1 % MiB | peak of all MiB | more | embeddings | |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        generator = np.random.default_rng(0)
        for number in range(NUM_FILES):
            (folder / f"{number:03}.jpg").write_bytes(jpeg(generator, IMAGE_SIZE))
        for kind, count in (("texts", args.texts), ("images", args.images)):
            first, whole = run(kind, max(1, count // 100), folder), run(kind, count, folder)
            more, output = whole["peak"] - first["peak"], whole["output"] - first["output"]
            held = more <= output + SLACK
            grown |= not held
            print(
                f"| {count:,} {kind} | {first['peak'] / 2**20:.0f} | {whole['peak'] / 2**20:.0f} | {more / 2**20:.0f} "
                f"| {output / 2**20:.0f} | {'held' if held else 'not held'} |",
                flush=True,
            )
    if grown:
        raise SystemExit("The memory of embed grows with the corpus")


if __name__ == "__main__":
    main()
