"""What a training run tells beside its loss, averaged from one log line to the next."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# What a contrastive loss of ours keeps of each forward pass, as means per query.
LOSS_STATISTICS = (
    "intra_negatives",
    "inter_negatives",
    "masked_negatives",
    "positive_similarity",
    "intra_similarity",
    "inter_similarity",
)
# Steps after which a run is told that its batches make MAC-Loss plain InfoNCE.
WATCHED_STEPS = 20
# Embeddings that are looked at when logging: enough for a trend, and the time stays bounded.
MAX_SPREAD_ROWS = 512
# A batch whose effective rank is below this share of the largest possible one has collapsed. Unit vectors of
# pairwise cosine 0.95, a narrow cone, have 40 % of it; below 5 % the cosine is above 0.999.
COLLAPSED_SHARE = 0.05
# The same for small batches, where 5 % would be less than the 1.0 of equal vectors.
COLLAPSED_RANK = 1.5
MIN_SPREAD_ROWS = 4


def effective_rank(embeddings: Tensor) -> float:
    """How many directions a set of embeddings uses: `exp` of the entropy of its normalised singular values.

    Between 1 (all on one line) and `min(num, dim)`.

    Args:
        embeddings: `(num, dim)`.

    Example:

    ```python
    >>> import torch
    >>> from puma_hf.trainer.statistics import effective_rank

    >>> round(effective_rank(torch.eye(4)), 3), round(effective_rank(torch.ones(4, 4)), 3)
    (4.0, 1.0)
    ```

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007; as a measure of collapse Garrido et al.,
    "RankMe", arXiv 2210.02885.
    """
    values = torch.linalg.svdvals(embeddings.float())
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def uniformity(embeddings: Tensor) -> float:
    """How evenly unit vectors cover the sphere: `log mean exp(-2 ||x - y||^2)` over all pairs.

    From 0 (all equal) downwards; about -4 for random directions.

    Args:
        embeddings: `(num, dim)` of length 1, num >= 2.

    Example:

    ```python
    >>> import torch
    >>> from puma_hf.trainer.statistics import uniformity

    >>> round(uniformity(torch.eye(4)), 3), uniformity(torch.ones(2, 1))
    (-4.0, 0.0)
    ```

    Source: Wang and Isola, arXiv 2005.10242, with their t = 2.
    """
    cosines = embeddings.float() @ embeddings.float().T
    # ||x - y||^2 = 2 - 2 cos, of each pair once.
    pairs = cosines[torch.ones_like(cosines).triu(diagonal=1).bool()]
    return float(torch.logsumexp(4 * pairs - 4, dim=0) - math.log(len(pairs)))


class TrainingStatistics:
    """Collects what is worth logging, without waiting for the device before a log line is written.

    Args:
        loss: The loss of a trainer, or its dict from dataset name to loss. Those of ours are found inside
            wrappers too, each by its prefix; of one in `MatryoshkaLoss` the last dimension's are taken.
    """

    def __init__(self, loss: nn.Module | Mapping[str, Any]) -> None:
        self.losses = _find_losses(loss)
        self._names = [f"{prefix}{name}" for prefix in self.losses for name in LOSS_STATISTICS] + ["teacher_cosine"]
        self._read: dict[str, Any] = {}
        self._candidates: Tensor | None = None
        self._states: Tensor | None = None
        self._hook: Any = None
        self._collapsed = False
        self._sums: Tensor | None = None
        self._steps = 0
        # Like the window's sums, but from the first step on: to see whether batches are mixed.
        self._watched: Tensor | None = None
        self._start_window()

    def attach(self, model: nn.Module) -> None:
        """Watch the states that a model returns in training: `pooler_output`, and a `teacher_state` beside it."""
        self.detach()
        self._hook = model.register_forward_hook(self._see_states)
        self._steps, self._watched = 0, None
        self._start_window()

    def detach(self) -> None:
        """Stop watching the model."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._states = self._candidates = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time in this block is no training: saving, evaluating."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - started

    def count_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Count the items and images of a collated batch."""
        for key, value in inputs.items():
            if key.endswith("input_ids"):
                self._items += len(value)
            elif key.endswith("image_grid_thw"):
                self._images += len(value)

    def read_losses(self) -> None:
        """Add what the losses found in the forward pass that has just ended."""
        for number, (prefix, loss) in enumerate(self.losses.items()):
            found = loss.statistics
            # With several datasets only one loss is called in a step; the others still hold an earlier one's.
            if found is None or found is self._read.get(prefix):
                continue
            self._read[prefix] = found
            values = torch.stack([found[name].detach().float() for name in LOSS_STATISTICS])
            self._add(number * len(LOSS_STATISTICS), values)
            self._candidates = getattr(loss, "candidates_seen", None)

    def collect(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last call, over all processes; a new window begins.

        Returns:
            What `PumaTrainer` logs: see there. Names without a value are left out.
        """
        seconds = time.perf_counter() - self._started
        sums = self._window(accelerator.device)
        counted = torch.tensor([[self._items, self._images], [1.0, 1.0]], device=accelerator.device)
        total: Any = accelerator.reduce(torch.cat([sums, counted], dim=1), reduction="sum")
        values, counts = total.tolist()
        means = zip(self._names, values, counts, strict=False)
        logs = {name: round(value / count, 4) for name, value, count in means if count}
        logs |= self._spread()
        for name, value in zip(("items_per_second", "images_per_second"), values[-2:], strict=True):
            if value and seconds > 0:
                logs[name] = round(value / seconds, 2)
        self._start_window()
        return logs

    def watch_modalities(self, accelerator: Accelerator, last_step: bool) -> None:
        """Warn once if the first steps gave MAC-Loss no candidate of another modality. Call it at each step."""
        self._steps += 1
        if not self.losses or self._steps > WATCHED_STEPS or (self._steps < WATCHED_STEPS and not last_step):
            return
        self._steps = WATCHED_STEPS
        seen = torch.zeros(2, len(self._names), device=accelerator.device) if self._watched is None else self._watched
        total: Any = accelerator.reduce(seen, reduction="sum")
        values = dict(zip(self._names, total[0].tolist(), strict=True))
        for prefix, loss in self.losses.items():
            if loss.temperature == loss.hard_temperature:
                continue  # InfoNCE was asked for
            if values[f"{prefix}intra_negatives"] > 0 and values[f"{prefix}inter_negatives"] == 0:
                logger.warning(
                    "%sIn the first steps no batch held a candidate of another modality than the target's, so MAC-Loss "
                    "is InfoNCE at the hard temperature. If the data has several target modalities, mix them: train "
                    "on one dataset, as load_mbeir returns it or datasets.concatenate_datasets joins it, with "
                    "BatchSamplers.BATCH_SAMPLER (the default), BatchSamplers.NO_DUPLICATES, or "
                    "PumaTrainer(positives=...). A DatasetDict fills each batch from one of its datasets, whichever "
                    "of MultiDatasetBatchSamplers is chosen.",
                    f"{prefix.removesuffix('_')}: " if prefix else "",
                )

    def _see_states(self, module: nn.Module, args: Any, output: Any) -> None:
        if not module.training or not isinstance(output, Mapping) or "pooler_output" not in output:
            return
        states = output["pooler_output"].detach()
        self._states = states
        if (teacher := output.get("teacher_state")) is not None:
            cosine = torch.nn.functional.cosine_similarity(states.float(), teacher.detach().to(states).float()).mean()
            self._add(len(self._names) - 1, cosine.unsqueeze(0))

    def _add(self, offset: int, values: Tensor) -> None:
        """Sum values and count those that are numbers."""
        if self._sums is None:
            self._sums = torch.zeros(2, len(self._names), device=values.device)
        if self._watched is None:
            self._watched = torch.zeros_like(self._sums)
        known = ~values.isnan()
        both = torch.stack([values.nan_to_num(0.0), known.float()])
        for table in (self._sums, self._watched):
            table[:, offset : offset + len(values)] += both.to(table.device)

    def _window(self, device: torch.device) -> Tensor:
        return torch.zeros(2, len(self._names), device=device) if self._sums is None else self._sums.to(device)

    def _start_window(self) -> None:
        self._sums = None
        self._items = self._images = 0
        self._started = time.perf_counter()

    def _spread(self) -> dict[str, float]:
        """Effective rank and uniformity of the last batch's candidates, or states, of this process."""
        seen = self._candidates if self._candidates is not None else self._states
        if seen is None or len(seen) < MIN_SPREAD_ROWS:
            return {}
        with torch.no_grad():
            vectors = torch.nn.functional.normalize(seen[:MAX_SPREAD_ROWS].detach().float(), dim=1)
            rank = effective_rank(vectors)
            spread = {"effective_rank": round(rank, 2), "uniformity": round(uniformity(vectors), 4)}
        highest = min(vectors.shape)
        if rank < max(COLLAPSED_SHARE * highest, COLLAPSED_RANK) and not self._collapsed:
            self._collapsed = True
            logger.warning(
                "The embeddings collapse: %d candidates have an effective rank of %.2f of at most %d, so nearly all "
                "point the same way. Lower learning_rate, warm up for longer, or look for rows that repeat.",
                len(vectors),
                rank,
                highest,
            )
        return spread


def _find_losses(loss: nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    """The losses that keep statistics, by log prefix; one alone has the prefix ""."""
    named = loss if isinstance(loss, Mapping) else {"": loss}
    found: dict[str, Any] = {}
    for name, module in named.items():
        # Its own attribute: a wrapper may show that of the loss inside.
        inner = [child for child in module.modules() if "statistics" in vars(child)]
        for index, child in enumerate(inner):
            if all(child is not known for known in found.values()):
                parts = [part for part in (name, str(index) if len(inner) > 1 else "") if part]
                found["".join(f"{part}_" for part in parts)] = child
    return dict(zip([""], found.values(), strict=True)) if len(found) == 1 else found
