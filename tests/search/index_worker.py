"""An index whose runs are killed where they are told to: as a script, so that it is real.

`python -m tests.search.index_worker MODEL DATA FOLDER` leaves in FOLDER the indexes `whole` (never interrupted) and
`killed` (killed at each of some places, then finished), of DATA first and of DATA without its first line then, and
`refused.json`: what was said to who would have searched in between.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import torch

from puma_hf.search.build import build_index
from puma_hf.search.config import IndexConfig
from puma_hf.search.index import open_index
from tests.forks import exit_signal, in_a_fork, kill_in_write

# In the write of which file: while it embeds, while it writes items, and at the very end; then again while it embeds,
# when all is embedded, and while it writes what approximate search needs.
FIRST_KILLS = ("shard-00002.parquet", "items-00001.parquet", "index.json")
THEN_KILLS = ("shard-00001.parquet", "manifest.json", "ann.faiss")


def kill_and_finish(settings: IndexConfig, names: tuple[str, ...]) -> dict[str, str]:
    """Kill it at every place; what `open_index` has said after each."""
    said = {}
    for name in names:

        def dying(name: str = name) -> None:
            kill_in_write(name, 1)
            build_index(settings)

        if exit_signal(in_a_fork(dying)) != signal.SIGKILL:
            raise SystemExit(f"The run was not killed in the write of {name}.")
        try:
            open_index(settings.output)
            said[name] = "opened"
        except (ValueError, OSError) as error:
            said[name] = str(error)
    build_index(settings)
    return said


def main(model: str, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    said = []
    lines = data.read_text().splitlines(keepends=True)
    for kept, kills in ((lines, FIRST_KILLS), (lines[1:], THEN_KILLS)):
        data.write_text("".join(kept))
        values = {"data": data, "model": model, "shard_size": 2, "ann": "int8"}
        build_index(IndexConfig(**values, output=folder / "whole"))  # type: ignore[arg-type]
        said.append(kill_and_finish(IndexConfig(**values, output=folder / "killed"), kills))  # type: ignore[arg-type]
    (folder / "refused.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
