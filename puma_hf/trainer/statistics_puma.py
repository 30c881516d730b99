"""What a training run logs beside its loss, averaged from one log line to the next and over all processes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from puma_hf.losses.progress_puma import add_to_logs, find_losses

logger = logging.getLogger(__name__)

# What a contrastive loss of ours keeps of each forward pass, as means per query.
LOSS_STATISTICS = (
    *("intra_negatives", "inter_negatives", "masked_negatives"),
    *("positive_similarity", "intra_similarity", "inter_similarity"),
)
# Embeddings that are looked at when logging: enough for a trend, and the time stays bounded.
MAX_SPREAD_ROWS, MIN_SPREAD_ROWS = 512, 4
# Steps after which a run is told that its batches make MAC-Loss plain InfoNCE: one batch may be so by chance.
WATCHED_STEPS = 20
# A batch whose effective rank is below this share of the largest possible one has collapsed. Unit vectors of
# pairwise cosine 0.95, a narrow cone, have 40 % of it; below 5 % the cosine is above 0.999.
COLLAPSED_SHARE = 0.05
# The same for small batches, where 5 % would be less than the 1.0 of equal vectors.
COLLAPSED_RANK = 1.5


def effective_rank(embeddings: Tensor) -> float:
    """How many directions a set of embeddings `(num, dim)` uses, from 1 (all on one line) to `min(num, dim)`.

    `exp` of the entropy of the normalised singular values: Roy and Vetterli, "The effective rank", EUSIPCO 2007; as a
    measure of collapse Garrido et al., "RankMe", arXiv 2210.02885.

    Example:
        >>> round(effective_rank(torch.eye(4)), 3), round(effective_rank(torch.ones(4, 4)), 3)
        (4.0, 1.0)
    """
    values = torch.linalg.svdvals(embeddings.float())
    return float(torch.special.entr(values / values.sum()).sum().exp())


def uniformity(embeddings: Tensor) -> float:
    """How evenly unit vectors `(num, dim)` cover the sphere, from 0 (all equal) down to about -4 (random directions).

    `log mean exp(-2 ||x - y||^2)` over all pairs: Wang and Isola, arXiv 2005.10242, with their t = 2.

    Example:
        >>> round(uniformity(torch.eye(4)), 3), uniformity(torch.ones(2, 1))
        (-4.0, 0.0)
    """
    cosines = embeddings.float() @ embeddings.float().T
    # ||x - y||^2 = 2 - 2 cos, of each pair once.
    pairs = cosines[torch.ones_like(cosines).triu(diagonal=1).bool()]
    return float(torch.logsumexp(4 * pairs - 4, dim=0) - math.log(len(pairs)))


class TrainingStatistics(TrainerCallback):
    """Adds to each training record what `PumaTrainer` names, without waiting for the device before a record is due.

    A callback sees neither the batches nor the losses, so the trainer calls `add` after each batch. `loss` is what a
    trainer holds: losses of ours are found inside wrappers too; of one in `MatryoshkaLoss` the last dimension's count.
    """

    def __init__(self, loss: nn.Module | Mapping[str, Any]) -> None:
        self.losses = find_losses(loss, "statistics")
        self._names = [f"{prefix}{name}" for prefix in self.losses for name in LOSS_STATISTICS] + ["teacher_cosine"]
        self._seen: Tensor | None = None  # embeddings of the last positives, or states of the last forward pass
        self._hook: Any = None
        self._collapsed = False
        # Whether MAC-Loss has had a candidate of another modality; InfoNCE does not ask for one.
        self._mixed = all(loss.temperature == loss.hard_temperature for loss in self.losses.values())
        self._start_window()

    def _start_window(self) -> None:
        self._sums: Tensor | None = None  # of each name's values, and how many there are
        self._items = self._images = 0
        self._started = time.perf_counter()

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Count the items and images of a collated batch, and add what the losses found in it."""
        for key, value in inputs.items():
            self._items += len(value) if key.endswith("input_ids") else 0
            self._images += len(value) if key.endswith("image_grid_thw") else 0
        for number, loss in enumerate(self.losses.values()):
            if loss.statistics is not None:
                values = torch.stack([loss.statistics[name].detach().float() for name in LOSS_STATISTICS])
                self._add(number * len(LOSS_STATISTICS), values)
                self._seen = loss.candidates_seen
                loss.statistics = None  # read: with several datasets only one loss is called in the next step

    def _add(self, offset: int, values: Tensor) -> None:
        """Sum values and count those that are numbers."""
        if self._sums is None:
            self._sums = torch.zeros(2, len(self._names), device=values.device)
        both = torch.stack([values.nan_to_num(0.0), (~values.isnan()).float()])
        self._sums[:, offset : offset + len(values)] += both.to(self._sums.device)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Watch the states that the model returns in training: `pooler_output`, and a `teacher_state` beside it."""
        self._hook = given["model"].register_forward_hook(self._see_states)
        self._start_window()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Stop watching the model."""
        self._hook.remove()
        self._seen = None

    def _see_states(self, module: nn.Module, args: Any, output: Any) -> None:
        if not module.training or not isinstance(output, Mapping) or "pooler_output" not in output:
            return
        teacher = output.get("teacher_state")
        # Those of several depths lie side by side where the model is wrapped, and come one by one elsewhere.
        for states in output["pooler_output"].detach().chunk(len(output.get("exit_depths", "1")), dim=1):
            self._seen = states
            if teacher is not None and teacher.shape == states.shape:  # a wider one has vectors of another space
                target = teacher.detach().to(states).float()
                cosine = torch.nn.functional.cosine_similarity(states.float(), target).mean()
                self._add(len(self._names) - 1, cosine.unsqueeze(0))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        """Add the means since the last record to a training record; a new window begins."""
        if logs is None or "loss" not in logs:
            return
        counted = torch.tensor([[self._items, self._images], [1.0, 1.0]], device=args.device)
        sums = torch.zeros(2, len(self._names)) if self._sums is None else self._sums
        total: Any = reduce(torch.cat([sums.to(args.device), counted], dim=1), reduction="sum")
        values, counts = total.tolist()
        # Names without a value are left out: a batch may have no candidate of a kind.
        means = zip(self._names, values, counts, strict=False)
        found = {name: round(value / count, 4) for name, value, count in means if count}
        self._mixed |= any(found.get(f"{prefix}inter_negatives", 0) > 0 for prefix in self.losses)
        if not self._mixed and state.global_step >= min(WATCHED_STEPS, state.max_steps):
            self._mixed = True  # said once
            logger.warning(
                "In the first steps no batch held a candidate of another modality than the target's, so MAC-Loss is "
                "InfoNCE at the hard temperature. If the data has several target modalities, mix them: train on one "
                "dataset, as load_mbeir returns it or datasets.concatenate_datasets joins it. A DatasetDict fills each "
                "batch from one of its datasets."
            )
        found |= self._spread()
        seconds = time.perf_counter() - self._started
        for name, value in zip(("items_per_second", "images_per_second"), values[-2:], strict=True):
            if value:
                found[name] = round(value / seconds, 2)
        self._start_window()
        add_to_logs(found, logs, state)

    def _spread(self) -> dict[str, float]:
        """Effective rank and uniformity of the last batch's candidates, or states, of this process."""
        if self._seen is None or len(self._seen) < MIN_SPREAD_ROWS:
            return {}
        vectors = torch.nn.functional.normalize(self._seen[:MAX_SPREAD_ROWS].float(), dim=1)
        rank, highest = effective_rank(vectors), min(vectors.shape)
        if rank < max(COLLAPSED_SHARE * highest, COLLAPSED_RANK) and not self._collapsed:
            self._collapsed = True
            logger.warning(
                "The embeddings collapse: %d candidates have an effective rank of %.2f of at most %d, so nearly all "
                "point the same way. Lower learning_rate, warm up for longer, or look for rows that repeat.",
                *(len(vectors), rank, highest),
            )
        return {"effective_rank": round(rank, 2), "uniformity": round(uniformity(vectors), 4)}
