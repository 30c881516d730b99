"""The tables of `embed.py`, and what they are held against."""

from __future__ import annotations

from dataclasses import dataclass

from embed_contestants import EMBED, ENCODE, FULL, LAMRA, PLAIN, READY, READY_PLAIN
from embed_measure import Measured

OURS = (ENCODE, EMBED)


@dataclass
class Claim:
    """A measured ratio and what it must reach."""

    text: str
    value: float
    bound: float

    @property
    def held(self) -> bool:
        """Whether it does."""
        return self.value >= self.bound


def table(results: list[Measured], ceiling: float) -> str:
    """All ways on all workloads as a markdown table."""
    by_name = {(one.workload, one.contestant): one for one in results}
    lines = [
        "| workload | way | inputs/s | x sentence-transformers | s, median (least to most) | GFLOP | of the products' "
        "rate | lowest cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        base = by_name.get((one.workload, PLAIN))
        ratio = f"{base.median / one.median:.2f}" if base else ""
        lines.append(
            f"| {one.workload} | {one.contestant} | {one.num_inputs / one.median:,.1f} | {ratio} "
            f"| {one.median:.3f} ({min(one.seconds):.3f} to {max(one.seconds):.3f}) | {one.flops / 1e9:,.1f} "
            f"| {one.flops / one.median / ceiling:.0%} | {one.cosine:.6f} |"
        )
    return "\n".join(lines)


def verdicts(results: list[Measured], ceiling: float, *, on_gpu: bool) -> list[Claim]:
    """The ratios that the project promises, on the CPU and on a GPU."""
    by_name = {(one.workload, one.contestant): one for one in results}
    claims: list[Claim] = []

    def faster(workload: str, ours: str, theirs: str, bound: float) -> None:
        one, other = by_name.get((workload, ours)), by_name.get((workload, theirs))
        if one and other:
            claims.append(Claim(f"{workload}: {ours} / {theirs}", other.median / one.median, bound))

    names = list(dict.fromkeys(one.workload for one in results))
    against_plain = {"images": 1.4} if on_gpu else {"captions": 1.25, "half": 1.15}
    for name in names:
        for ours in OURS:
            faster(name, ours, PLAIN, against_plain.get(name, 1.15 if on_gpu and name != "half" else 1.0))
    if not on_gpu:
        for ours in OURS:
            faster("half", ours, LAMRA, 1.8)
        claims += _against_counted(by_name, names)
    for name in ("images", "half"):
        faster(name, EMBED, READY, 0.9 if on_gpu else 0.0)  # without workers it cannot be
        faster(name, PLAIN, READY_PLAIN, 0.0)
    if on_gpu:
        for name in names:
            if name != "half" and (one := by_name.get((name, READY))):
                claims.append(Claim(f"{name}: {READY}, of the products' rate", one.flops / one.median / ceiling, 0.5))
    return claims


def _against_counted(by_name: dict[tuple[str, str], Measured], names: list[str]) -> list[Claim]:
    """Whether the time falls as the operations do, from all layers to the pruned model."""
    claims = []
    for name in names:
        for ours in OURS:
            one, full = by_name.get((name, ours)), by_name.get((name, FULL))
            if one and full:
                counted = full.flops / one.flops
                text = f"{name}: {ours} / {FULL}, of the counted ratio {counted:.2f}"
                claims.append(Claim(text, full.median / one.median / counted, 0.9))
    return claims


def depth_table(depths: dict[str, dict[int, Measured]]) -> str:
    """Inputs a second at each depth."""
    lines = [
        "| workload | k | inputs/s, ready tensors | x all layers | counted | s, median (least to most) | GFLOP |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in depths.items():
        full = row[max(row)]
        for depth, one in row.items():
            lines.append(
                f"| {name} | {depth} | {one.num_inputs / one.median:,.1f} | {full.median / one.median:.2f} "
                f"| {full.flops / one.flops:.2f} | {one.median:.3f} ({min(one.seconds):.3f} to {max(one.seconds):.3f}) "
                f"| {one.flops / 1e9:,.1f} |"
            )
    return "\n".join(lines)


def depth_verdicts(depths: dict[str, dict[int, Measured]]) -> list[Claim]:
    """Whether throughput grows as the counted operations fall."""
    claims = []
    for name, row in depths.items():
        full = row[max(row)]
        for depth, one in row.items():
            if one is not full and name != "half":
                counted = full.flops / one.flops
                text = f"{name}: k = {depth} / all layers, of the counted ratio {counted:.2f}"
                claims.append(Claim(text, full.median / one.median / counted, 0.95))
    return claims


def verdict_table(claims: list[Claim]) -> str:
    """Each ratio of throughputs beside its bound; a bound of 0 is none."""
    lines = ["| ratio of inputs/s | measured | at least | |", "|---|---|---|---|"]
    for claim in claims:
        bound, verdict = (f"{claim.bound}", "held" if claim.held else "not held") if claim.bound else ("", "")
        lines.append(f"| {claim.text} | {claim.value:.2f} | {bound} | {verdict} |")
    return "\n".join(lines)
