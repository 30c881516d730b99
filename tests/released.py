"""The losses of PUMA's two stages as its authors released them, worked out row by row in float64.

The states are those after the final norm, `(batch_size, hidden_size)`, of all devices. Nothing here is shared with the
package.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

# The settings of `puma-hf train` that mean the same. Ours is the mean of the two columns' distances, hence twice 0.005.
STAGE_1 = {
    "loss": "infonce",
    "temperature": 0.05,
    "contrastive_weight": 0.9,
    "distillation_weight": 0.01,
    "metric": "mse-mean",
}
STAGE_1_GROWING = {**STAGE_1, "contrastive_weight_start": 0.5, "distillation_weight_start": 0.05}


class InFloat64(nn.Module):
    """The last module of a model in float64: embeddings as precise as the states, which the first rounds to float32."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Replace `sentence_embedding` `(batch_size, hidden_size)`."""
        return {**features, "sentence_embedding": nn.functional.normalize(features["pooler_output"], dim=1)}


def infonce(queries: Tensor, candidates: Tensor, temperatures: list[list[float]]) -> Tensor:
    """The mean over queries of -log softmax, where candidate i is the right one of query i."""
    rows = []
    for i, query in enumerate(queries):
        logits = []
        for j, candidate in enumerate(candidates):
            cosine = (query * candidate).sum() / (query.square().sum().sqrt() * candidate.square().sum().sqrt())
            logits.append(cosine / temperatures[i][j])
        rows.append(torch.logsumexp(torch.stack(logits), dim=0) - logits[i])
    return torch.stack(rows).mean()


def mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    """Over rows and dimensions."""
    return sum(((a - b) ** 2).sum() for a, b in zip(student, teacher, strict=True)) / student.numel()  # type: ignore[return-value]


def stage_1(students: list[Tensor], teachers: list[Tensor], share: float | None = None) -> Tensor:
    """0.9 InfoNCE + 0.1 * 0.05 * (mse + mse); with the share of the training that is done, the variant that grows."""
    weight = 0.9 if share is None else 0.5 + 0.4 * share
    count = len(students[0])
    contrast = infonce(students[0], students[1], [[0.05] * count] * count)
    distance = mean_square(students[0], teachers[0]) + mean_square(students[1], teachers[1])
    return weight * contrast + (1 - weight) * 0.05 * distance


def stage_2(students: list[Tensor], modalities: list[int], share: float, decay: float) -> Tensor:
    """MAC-Loss: what has the modality of a query's right answer is divided by a temperature that falls."""
    hard = 0.03 * math.exp(-decay * 2 * min(0.5, share))
    rows = [[hard if other == mine else 0.03 for other in modalities] for mine in modalities]
    return infonce(students[0], students[1], rows)
