"""A run that is killed where it is told to, and one of two processes: as a script, so that both are real.

`python -m tests.embedding.embed_worker MODEL DATA FOLDER` leaves in FOLDER the outputs `whole` (never interrupted),
`killed` (killed five times, then finished), `terminated` (the command, ended by SIGTERM, then finished) and `two` (two
processes, refused first), and `report.json` on how they came about.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from puma_hf import cli
from puma_hf.configs import EmbedConfig
from puma_hf.embedding import run
from puma_hf.embedding.run import EmbedReport, embed_corpus
from puma_hf.embedding.store import EmbeddingStore
from puma_hf.files import LOCK_FILE, DirectoryInUseError
from tests.forks import exit_signal, in_a_fork, in_two_processes, kill_in_write

# In the n-th batch of the model, or the n-th write of a file whose name ends so: shards are finished in between.
KILLS = (("batch", 2), (".parquet", 2), (".safetensors", 2), ("batch", 2), ("manifest.json", 1))
OPTIONS = ("model", "output", "shard_size", "format", "precision", "on_error", "max_batch_tokens")


def config(model: str, data: str, output: Path) -> EmbedConfig:
    return EmbedConfig(
        data=data,
        model=model,
        output=output,
        shard_size=5,
        format="safetensors",
        precision="int8",
        on_error="skip",
        max_batch_tokens=100,
    )


def after_batch(number: int, act: Callable[[], None]) -> None:
    """Do something when the n-th batch, or a later one, is embedded."""
    iterate = run.iterate_embeddings

    def iterating(model: Any, inputs: Any, **options: Any) -> Any:
        for index, rows in enumerate(iterate(model, inputs, **options), start=1):
            yield rows
            if index >= number:
                act()

    run.iterate_embeddings = iterating


def kill_and_finish(settings: EmbedConfig) -> EmbedReport:
    for place, number in KILLS:

        def dying(place: str = place, number: int = number) -> None:
            if place == "batch":
                after_batch(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            else:
                kill_in_write(place, number)
            embed_corpus(settings)

        if exit_signal(in_a_fork(dying)) != signal.SIGKILL:
            raise SystemExit(f"The run was not killed in {place} {number}.")
    return embed_corpus(settings)


def terminate_and_finish(settings: EmbedConfig) -> dict[str, Any]:
    """Send SIGTERM while inputs are embedded; how the command ended, and what the last run still did."""

    def terminate() -> None:
        if Path(settings.output, "manifest.json").is_file():  # the ranges are there
            os.kill(os.getpid(), signal.SIGTERM)

    def command() -> None:
        after_batch(4, terminate)
        values = asdict(settings)
        options = [f"--{name.replace('_', '-')}={values[name]}" for name in OPTIONS]
        sys.argv = ["puma-hf", "embed", str(settings.data), *options]
        try:
            cli.main()
        except SystemExit as ended:
            Path(settings.output).with_name("status").write_text(str(ended.code))

    exit_signal(in_a_fork(command))
    kept = len(EmbeddingStore(settings.output, None))
    left = sorted(path.name for path in Path(settings.output).iterdir())
    report = embed_corpus(settings)
    status = int(Path(settings.output).with_name("status").read_text())
    return {"status": status, "left": left, "kept": kept, "num_new_items": report.num_new_items}


def share(settings: EmbedConfig, rank: int) -> None:
    """One of two processes."""
    with FileLock(Path(settings.output, LOCK_FILE)) if rank == 0 else nullcontext():
        try:
            embed_corpus(settings)
            refused = ""
        except DirectoryInUseError as error:
            refused = str(error)
    ids: list[str] = []
    add = run.StoreSink.add

    def counting(self: Any, items: Any, rows: Any) -> None:
        ids.extend(item.record.id for item in items)
        add(self, items, rows)

    run.StoreSink.add = counting  # type: ignore[method-assign]
    report = embed_corpus(settings)
    values = {"report": asdict(report), "ids": ids, "refused": refused}
    Path(settings.output).with_name(f"{rank}.json").write_text(json.dumps(values))


def main(model: str, data: str, folder: Path) -> None:
    torch.set_num_threads(1)
    whole = embed_corpus(config(model, data, folder / "whole"))
    finished = kill_and_finish(config(model, data, folder / "killed"))
    terminated = terminate_and_finish(config(model, data, folder / "terminated"))
    (folder / "two").mkdir()
    in_two_processes(partial(share, config(model, data, folder / "two")))
    reports = {"whole": asdict(whole), "finished": asdict(finished), "terminated": terminated}
    (folder / "report.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
