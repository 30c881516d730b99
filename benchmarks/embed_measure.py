"""Operations, time and correctness of ways of embedding, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

MIN_COSINE = 0.999


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Of one call for `(batch_size, num_heads, num_tokens, head_dim)` shapes."""
    batch, heads, queries, dim = query
    return 2 * batch * heads * queries * key[2] * (dim + value[3])


# The counter knows the kernels of GPUs.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass
class Measured:
    """One way on one workload.

    Args:
        workload: Its name.
        contestant: The way's name.
        num_inputs: Inputs of the workload.
        flops: Counted operations of a run; every product, also what is padded.
        cosine: The lowest cosine to the vector that the plain forward pass gives for the same input.
        seconds: Of each run.
    """

    workload: str
    contestant: str
    num_inputs: int
    flops: int
    cosine: float
    seconds: list[float]

    @property
    def median(self) -> float:
        """Seconds of the run in the middle."""
        return median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the median."""
        return {**asdict(self), "median": self.median}


def check_same(name: str, vectors: Tensor, expected: Tensor) -> float:
    """The lowest cosine of rows that must be the same, up to rounding, and nearer to theirs than to any other.

    Raises:
        SystemExit: If they are not: then times say nothing.
    """
    cosines = vectors.double() @ expected.double().T
    lowest = cosines.diagonal().min().item()
    nearest = cosines.argmax(dim=1).tolist() == list(range(len(expected)))
    if not (lowest >= MIN_COSINE and nearest):
        raise SystemExit(f"{name}: other vectors than the plain forward pass, lowest cosine {lowest:.6f}. Not timed.")
    return lowest


def count(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a run gives, and its floating-point operations: products, convolutions and attention, masked or not."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        vectors = run()
    return vectors, int(counter.get_total_flops())


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run in each round; a round begins with another one each time."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = now(device)
            runs[name]()
            seconds[name].append(now(device) - start)
    return seconds


def now(device: str) -> float:
    """Seconds: of the clock once a GPU has done what it was given; of this process on one CPU thread.

    Other jobs on the machine hardly disturb the latter.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def ceiling(device: str, dtype: torch.dtype, repeats: int = 10) -> float:
    """Operations a second of large matrix products: what arithmetic alone allows."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = interleaved({"product": lambda: left @ right}, repeats + 1, device)["product"][1:]
    return 2 * size**3 / median(seconds)
