"""An index whose runs are killed where they are told to: as a script, so that it is real.

`python -m tests.search.index_worker MODEL DATA FOLDER` leaves in FOLDER the index `killed`, of DATA without its first
line, and `said.json`: before each run, how many items a search would have found, or what it was told.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from puma_hf.configs import IndexConfig
from puma_hf.search import build as module
from puma_hf.search.index import open_index
from tests.forks import exit_signal, in_a_fork

# In the first runs before the second write of rows, and when all is written; then before what is gone is removed.
# The last of each may end.
KILLS = (("add", 2), ("_finish", 1), ("_finish", 2)), (("_finish", 1), ("_finish", 2))


def look_and_run(config: IndexConfig, said: Path, name: str, number: int) -> None:
    """One run, in a fork that has loaded LanceDB itself, whose thread is in no other."""
    try:
        found: Any = len(open_index(config.output))
    except (ValueError, OSError) as error:
        found = str(error)
    said.write_text(json.dumps([*(json.loads(said.read_text()) if said.exists() else []), found]))
    owner: Any = module if name == "_finish" else module._TableSink
    plain, calls = getattr(owner, name), 0

    def die(*values: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*values)

    setattr(owner, name, die)
    module.build_index(config)


def main(model: str, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    config = IndexConfig(data=data, model=model, shard_size=2, max_batch_tokens=1, output=folder / "killed")
    lines = data.read_text().splitlines(keepends=True)
    texts = [f'{{"id": "new{number}", "text": "red {number}"}}\n' for number in range(4)]
    for kept, kills in zip((lines, [*texts, *lines[1:]]), KILLS, strict=True):
        data.write_text("".join(kept))
        for name, number in kills:
            process = in_a_fork(
                lambda name=name, number=number: look_and_run(config, folder / "said.json", name, number)
            )
            if exit_signal(process) != (signal.SIGKILL if (name, number) != kills[-1] else 0):
                raise SystemExit(f"The run did not end as it should in {name}.")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
