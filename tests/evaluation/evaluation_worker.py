"""An evaluation that kills itself where it is told to, and one of two processes: as a script, so that both are real.

`python -m tests.evaluation.evaluation_worker DATA FOLDER` leaves in FOLDER the outputs `whole` (never interrupted),
`killed` (killed three times, then finished) and `two` (two processes), and `report.json` on how they came about.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from puma_hf.evaluation.mbeir import evaluate_mbeir
from puma_hf.evaluation.mbeir_results import MBEIRResults
from tests.evaluation.fake_encoder import FakeEncoder

NUM_KILLS = 3
SHARD_SIZE = 2
SHARES = (0, 1)


class DyingEncoder(FakeEncoder):
    """Its rows depend a little on what else is in the batch, as those of models do; after `last` calls it kills."""

    def __init__(self, last: int = -1) -> None:
        super().__init__()
        self.last = last

    def encode(self, inputs: list[Any], prompt: str | None = None, **kwargs: Any) -> NDArray[np.float32]:
        if len(self.calls) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)
        rows = super().encode(inputs, prompt, **kwargs)
        company = sum(len(str(item)) % 7 for item in inputs)
        return rows + np.float32(1e-6) * np.arange(company, company + rows.size, dtype=np.float32).reshape(rows.shape)


def run(data: Path, output: Path, encoder: DyingEncoder) -> MBEIRResults:
    return evaluate_mbeir(
        encoder, data, pool="both", output_dir=output, shard_size=SHARD_SIZE, batch_size=2, show_progress_bar=False
    )


def kill_in_write(number: int) -> None:
    """Kill this process in its n-th write of a file: its name is still to be given."""
    written = 0
    replace = os.replace

    def dying_replace(source: Any, target: Any) -> None:
        nonlocal written
        if str(target).endswith(".safetensors"):
            written += 1
            if written == number:
                with open(source, "rb+") as file:  # half of it reached the disk
                    file.truncate(os.path.getsize(source) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying_replace


def in_a_fork(action: Callable[[], object]) -> int:
    """Start it in a process of its own, which shares the imported libraries; the id of the process."""
    process = os.fork()
    if process == 0:
        try:
            action()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1 if sys.exc_info()[0] else 0)
    return process


def exit_signal(process: int) -> int:
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    if os.WEXITSTATUS(status):
        raise SystemExit("A process ended with an error, see above.")
    return 0


def kill_and_finish(data: Path, output: Path, num_calls: int) -> tuple[list[str], int]:
    """Kill it at random points, then let it end; the points, and the calls that the last run needed."""
    generator = random.Random(4)
    points = []
    for kill in range(NUM_KILLS):
        number, in_write = generator.randint(1, num_calls // (NUM_KILLS + 1)), kill % 2 == 1

        def dying(number: int = number, in_write: bool = in_write) -> None:
            if in_write:
                kill_in_write(number)
            run(data, output, DyingEncoder(-1 if in_write else number))

        if exit_signal(in_a_fork(dying)) != signal.SIGKILL:
            raise SystemExit(f"The run was not killed in its {number}th {'write' if in_write else 'call'}.")
        points.append(f"{'write' if in_write else 'call'} {number}")
    encoder = DyingEncoder()
    run(data, output, encoder)
    return points, len(encoder.calls)


def share(data: Path, output: Path, rank: int, port: int) -> None:
    """One of two processes, which know of each other what a launcher tells them."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(SHARES)), LOCAL_WORLD_SIZE=str(len(SHARES))
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="1")
    encoder = DyingEncoder()
    results = run(data, output, encoder)
    values = {"results": results.to_dict(include_rankings=True), "calls": len(encoder.calls)}
    output.with_name(f"{rank}.json").write_text(json.dumps(values))
    # Without an output they need a folder, too, and leave nothing of it.
    again = evaluate_mbeir(DyingEncoder(), data, tasks="toys_task1", show_progress_bar=False)
    output.with_name(f"temporary-{rank}.json").write_text(json.dumps(again.to_dict(include_rankings=True)))
    dist.destroy_process_group()


def main(data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    encoder = DyingEncoder()
    results = run(data, folder / "whole", encoder)
    points, calls_left = kill_and_finish(data, folder / "killed", len(encoder.calls))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for process in [in_a_fork(partial(share, data, folder / "two", rank, port)) for rank in SHARES]:
        exit_signal(process)
    report = {
        "results": results.to_dict(include_rankings=True),
        "calls": len(encoder.calls),
        "points": points,
        "calls_left": calls_left,
    }
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
