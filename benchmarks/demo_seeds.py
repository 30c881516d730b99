"""The demo's table over several seeds: the mean, and the lowest and highest value in brackets.

    .venv/bin/python benchmarks/demo_seeds.py --seeds 0 1 2

The seeds change LoRA's start, the order of the rows, the wordings and dropout. The backbone and its pruned form are
the same for all: their rows have no spread. Run again after an interruption: finished seeds are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_seed(seed: int, output: Path, split: str) -> dict[str, dict[str, float]]:
    """The table of one seed, from its file if it is there."""
    result = output / f"seed-{seed}" / f"table-{split}.json"
    if not result.is_file():
        command = [sys.executable, str(ROOT / "demo" / "run.py"), "--seed", str(seed), "--split", split]
        subprocess.run([*command, "--output", str(result.parent)], check=True)
    rows: dict[str, dict[str, float]] = json.loads(result.read_text())
    return rows


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and range, the range only where there is one."""
    mean, low, high = sum(values) / len(values), min(values), max(values)
    shown = f"{mean:.{digits}f}"
    return shown if low == high else f"{shown} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "output")
    args = parser.parse_args()
    tables = [run_seed(seed, args.output.resolve(), args.split) for seed in args.seeds]
    full = [table["full model"]["local hit@5"] for table in tables]
    print(f"\nseeds {args.seeds}, {args.split} split, percent, mean [lowest, highest]\n")
    print("| model | local hit@1 | local hit@5 | of full, % | global hit@1 | global hit@5 | wrong modality, global |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in tables[0]:
        rows = [table[name] for table in tables]
        keys = (
            "local hit@1",
            "local hit@5",
            "of full",
            "global hit@1",
            "global hit@5",
            "global wrong_modality@1",
        )
        for row, reference in zip(rows, full, strict=True):
            row["of full"] = 100 * row["local hit@5"] / reference
        print(f"| {name} | " + " | ".join(spread([row[key] for row in rows]) for key in keys) + " |")


if __name__ == "__main__":
    main()
