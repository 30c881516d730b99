"""Distillation and contrastive learning on one forward pass of each column."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from torch import Tensor, nn

from puma_hf.losses.citation import PUMA_CITATION
from puma_hf.losses.multimodal_mac import MultimodalMACLoss, read_content_ids, read_modality_ids, restore_ids
from puma_hf.losses.self_distillation import SelfDistillationLoss
from puma_hf.losses.temperature import ScheduledTemperatureLoss
from puma_hf.settings import DistillationMetric


class LossTerms(dict[str, Tensor]):
    """Named terms of a loss, which a sentence-transformers trainer sums and logs one by one.

    Unlike a plain dict they can be weighted and added up term by term, as `MatryoshkaLoss` does.

    Example:
        >>> import torch
        >>> terms = 0.0 + 2 * LossTerms(a=torch.tensor(1.0), b=torch.tensor(3.0))
        >>> {name: value.item() for name, value in (terms + terms).items()}
        {'a': 4.0, 'b': 12.0}
    """

    def __mul__(self, weight: float) -> LossTerms:
        return LossTerms({name: value * weight for name, value in self.items()})

    __rmul__ = __mul__

    def __add__(self, other: LossTerms | float) -> LossTerms:
        if isinstance(other, LossTerms):
            names = [*self, *(name for name in other if name not in self)]
            return LossTerms({name: self.get(name, 0) + other.get(name, 0) for name in names})
        # What a sum starts from.
        return self if other == 0 else NotImplemented

    __radd__ = __add__


class JointDistillationLoss(nn.Module):
    """Self-distillation and a contrastive loss together: the model embeds each column once for both.

    `contrastive_weight * contrastive + distillation_weight * distillation`, where the distillation is the mean over
    the columns. The first stage of PUMA (ACM MM 2025, arXiv 2507.08064), as its authors released it, is InfoNCE at 0.05
    with the weight 0.9, and `0.1 * 0.05 * (mse(query) + mse(candidate))`, averaged over the dimensions: here the weight
    0.01 of `"mse-mean"`, as a sum of two columns is twice their mean. In its variant both weights move with the share
    of the training that is done, from 0.5 to 0.9 and from 0.5 to 0.1. With MAC-Loss, which is this library's addition,
    the second stage need not forget what the full model knew.

    On several devices the loss is the mean over all rows, and so is the gradient that DistributedDataParallel averages:
    that of one device with the whole batch. The released code leaves each device the part of its own rows, and the
    average of these is the same gradient divided by the number of devices.

    Args:
        model: A SentenceTransformer whose input module returns `pooler_output`, `(batch_size, hidden_size)`.
        contrastive: A `MultimodalMACLoss` or `MultipleNegativesRankingLoss` of the same model.
        metric: `"mse"`, `"mse-mean"` or `"cosine"`, see `self_distillation_loss`.
        contrastive_weight: Weight of the contrastive term. The two terms differ in size: the `"mse"` grows with the
            hidden size, so look at both in the log before choosing.
        distillation_weight: Weight of the distillation term.
        contrastive_weight_start: Where the weight begins, if it is to move in a straight line over the training to
            `contrastive_weight`. It needs a contrastive loss that is told the progress: a `MultimodalMACLoss`.
        distillation_weight_start: Likewise for `distillation_weight`.

    Requirements:
        1. (anchor, positive) pairs or (anchor, positive, negative_1, ..., negative_n) tuples.
        2. The teacher's states as `teacher_state` features, where `PumaDistillationTrainer` puts them.

    Relations:
        - With a weight of 0 the other term is what its own loss computes.
        - Inside `MatryoshkaLoss` both terms are computed at every width, and summed term by term.

    Raises:
        ValueError: If the metric is unknown, a weight is negative or not finite, or the contrastive loss has no
            `compute_loss_from_embeddings`, caches gradients, or does not know the progress that weights move with.

    Example:
        >>> from puma_hf import MultimodalMACLoss
        >>> infonce = MultimodalMACLoss(model, 0.05, 0.05)  # doctest: +SKIP
        >>> loss = JointDistillationLoss(model, infonce, "mse-mean", 0.9, 0.01)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        contrastive: nn.Module,
        metric: DistillationMetric = "mse",
        contrastive_weight: float = 1.0,
        distillation_weight: float = 1.0,
        *,
        contrastive_weight_start: float | None = None,
        distillation_weight_start: float | None = None,
    ) -> None:
        super().__init__()
        self.weights = {"contrastive_weight": contrastive_weight, "distillation_weight": distillation_weight}
        starts = {
            "contrastive_weight_start": contrastive_weight_start,
            "distillation_weight_start": distillation_weight_start,
        }
        self.weights |= {name: weight for name, weight in starts.items() if weight is not None}
        for name, weight in self.weights.items():
            if not math.isfinite(weight) or weight < 0:
                raise ValueError(f"{name} is {weight}, but a weight must be 0 or more and finite. Choose 1.0 to start.")
        if uses_gradient_cache(contrastive) or not hasattr(contrastive, "compute_loss_from_embeddings"):
            raise ValueError(
                f"contrastive is a {type(contrastive).__name__}, but it must compute its loss from embeddings of one "
                "forward pass. Pass a MultimodalMACLoss or a MultipleNegativesRankingLoss."
            )
        self._moves = len(self.weights) > 2
        if self._moves and not isinstance(contrastive, ScheduledTemperatureLoss):
            raise ValueError(
                f"{', '.join(list(self.weights)[2:])} with a {type(contrastive).__name__}, which is not told how much "
                "of the training is done. Pass a MultimodalMACLoss; at equal temperatures it is InfoNCE."
            )
        self.model = model
        self.contrastive: Any = contrastive
        self.distillation = SelfDistillationLoss(model, metric)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> LossTerms:
        """Embed every column once and compute both terms.

        Args:
            sentence_features: One dict of model inputs per column: anchor, positive, negatives.
            labels: What the contrastive loss makes of labels.

        Returns:
            `{"distillation": ..., "contrastive": ...}`, both weighted scalars.

        Raises:
            ValueError: If the teacher's states, `pooler_output` or modality ids are missing.
        """
        columns, mac = list(sentence_features), isinstance(self.contrastive, MultimodalMACLoss)
        if mac:
            modality_ids, content_ids = read_modality_ids(columns, labels), read_content_ids(columns)
        outputs = [self.model(features) for features in columns]
        embeddings = [output["sentence_embedding"] for output in outputs]
        if mac:
            restore_ids(columns, modality_ids, content_ids)
            self.contrastive.warn_if_schedule_idles(training=self.model.training, moves=self._moves)
            contrastive = self.contrastive.compute_loss_from_embeddings(embeddings, modality_ids, content_ids)
        else:
            contrastive = self.contrastive.compute_loss_from_embeddings(embeddings, labels)
        return LossTerms(
            distillation=self.weight("distillation_weight") * self.distillation.compute_loss_from_outputs(outputs),
            contrastive=self.weight("contrastive_weight") * contrastive,
        )

    def weight(self, name: str) -> float:
        """The weight `"contrastive_weight"` or `"distillation_weight"` at the present progress."""
        end = self.weights[name]
        start = self.weights.get(f"{name}_start", end)
        return end if start == end else start + (end - start) * self.contrastive.progress

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the model card shows."""
        config: dict[str, Any] = getattr(self.contrastive, "get_config_dict", dict)()
        return {
            "contrastive": type(self.contrastive).__name__,
            **config,
            "metric": self.distillation.metric,
            **self.weights,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return PUMA_CITATION
