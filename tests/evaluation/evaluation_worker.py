"""An evaluation that kills itself where it is told to, and one of two processes: as a script, so that both are real.

`python -m tests.evaluation.evaluation_worker DATA FOLDER` leaves in FOLDER the outputs `whole` (never interrupted),
`killed` (killed three times, then finished) and `two` (two processes), and `report.json` on how they came about.
FOLDER/tmp is the place for temporary files.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from puma_hf.evaluation.mbeir import evaluate_mbeir
from puma_hf.evaluation.results import MBEIRResults
from tests.evaluation.fake_encoder import FakeEncoder
from tests.forks import exit_signal, in_a_fork, in_two_processes, kill_in_write

NUM_KILLS = 3
SHARD_SIZE = 2


class DyingEncoder(FakeEncoder):
    """After `last` calls it kills."""

    def __init__(self, last: int = -1) -> None:
        super().__init__()
        self.last = last

    def encode(self, inputs: list[Any], prompt: str | None = None, **kwargs: Any) -> NDArray[np.float32]:
        if len(self.calls) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)
        return super().encode(inputs, prompt, **kwargs)


def run(data: Path, output: Path, encoder: DyingEncoder) -> MBEIRResults:
    return evaluate_mbeir(
        encoder, data, pool="both", output_dir=output, shard_size=SHARD_SIZE, batch_size=2, show_progress_bar=False
    )


def kill_and_finish(data: Path, output: Path, num_calls: int) -> tuple[list[str], int]:
    """Kill it at random points, then let it end; the points, and the calls that the last run needed."""
    generator = random.Random(4)
    points = []
    for kill in range(NUM_KILLS):
        number, in_write = generator.randint(1, num_calls // (NUM_KILLS + 1)), kill % 2 == 1

        def dying(number: int = number, in_write: bool = in_write) -> None:
            if in_write:
                kill_in_write(".safetensors", number)
            run(data, output, DyingEncoder(-1 if in_write else number))

        if exit_signal(in_a_fork(dying)) != signal.SIGKILL:
            raise SystemExit(f"The run was not killed in its {number}th {'write' if in_write else 'call'}.")
        points.append(f"{'write' if in_write else 'call'} {number}")
    encoder = DyingEncoder()
    run(data, output, encoder)
    return points, len(encoder.calls)


def share(data: Path, output: Path, rank: int) -> None:
    """One of two processes."""
    encoder = DyingEncoder()
    results = run(data, output, encoder)
    values = {"results": results.to_dict() | {"rankings": results.rankings}, "calls": len(encoder.calls)}
    output.with_name(f"{rank}.json").write_text(json.dumps(values))
    # Without an output they need a folder, too, and leave nothing of it.
    again = evaluate_mbeir(DyingEncoder(), data, tasks="toys_task1", show_progress_bar=False)
    output.with_name(f"temporary-{rank}.json").write_text(json.dumps(again.to_dict() | {"rankings": again.rankings}))


def main(data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    tempfile.tempdir = str(folder / "tmp")
    encoder = DyingEncoder()
    results = run(data, folder / "whole", encoder)
    points, calls_left = kill_and_finish(data, folder / "killed", len(encoder.calls))
    in_two_processes(partial(share, data, folder / "two"))
    report = {
        "results": results.to_dict() | {"rankings": results.rankings},
        "calls": len(encoder.calls),
        "points": points,
        "calls_left": calls_left,
    }
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
