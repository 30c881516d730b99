"""MAC-Loss: contrastive learning with a sharper temperature for candidates of the wanted modality."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import (
    all_gather,
    all_gather_with_grad,
    cos_sim,
    get_rank,
    similarity_fct_name,
)
from torch import Tensor, nn

from puma_hf.losses.citation import PUMA_CITATION
from puma_hf.losses.temperature import ScheduledTemperatureLoss, ScheduleKind, check_temperature
from puma_hf.modeling.processing_puma import MODALITY_NAMES

ModalityGrouping = Literal["target", "query"]

_IDS_KEY = "modality_ids"


def mac_loss(
    similarities: Tensor,
    positive_index: Tensor,
    same_modality: Tensor,
    temperature: float,
    hard_temperature: float,
) -> Tensor:
    """Cross-entropy over candidates whose temperature depends on their modality.

    `- mean_i log( exp(s_ip / tau_ip) / sum_j exp(s_ij / tau_ij) )`, where `tau_ij` is `hard_temperature` if
    `same_modality[i, j]` and `temperature` otherwise: the MAC-Loss of PUMA (ACM MM 2025, arXiv 2507.08064).

    Args:
        similarities: `(batch_size, num_candidates)`.
        positive_index: Column of each query's positive, integers of shape `(batch_size,)`.
        same_modality: Booleans of shape `(batch_size, num_candidates)`.
        temperature: Temperature of the inter-modality candidates.
        hard_temperature: Temperature of the intra-modality candidates.

    Returns:
        The loss, a scalar in float32 (float64 for float64 similarities).

    Raises:
        ValueError: If a shape or dtype does not fit, or a temperature is not positive and finite.

    Example:
        >>> similarities = torch.zeros(1, 2)  # equal similarities, two candidates: log 2
        >>> same_modality = torch.tensor([[True, False]])
        >>> round(mac_loss(similarities, torch.tensor([0]), same_modality, 0.05, 0.04).item(), 4)
        0.6931
    """
    check_temperature("temperature", temperature)
    check_temperature("hard_temperature", hard_temperature)
    if (
        similarities.ndim != 2
        or positive_index.shape != similarities.shape[:1]
        or same_modality.shape != similarities.shape
        or positive_index.dtype != torch.int64
        or same_modality.dtype != torch.bool
    ):
        raise ValueError(
            f"similarities are {_shape(similarities)}, positive_index {_shape(positive_index)} and "
            f"same_modality {_shape(same_modality)}, but they must be floats (batch_size, num_candidates), "
            "int64 (batch_size,) and bool (batch_size, num_candidates). Pass one row per query and one "
            "column per candidate."
        )
    similarities = _at_least_float32(similarities)
    # The only matrices of this size beside the similarities: the scale and the logits.
    scale = torch.full_like(similarities, 1.0 / temperature).masked_fill_(same_modality, 1.0 / hard_temperature)
    logits = similarities * scale
    positive_logits = logits.gather(1, positive_index.unsqueeze(1)).squeeze(1)
    return (torch.logsumexp(logits, dim=1) - positive_logits).mean()


class MultimodalMACLoss(ScheduledTemperatureLoss):
    """Modality-adaptive contrastive loss, PUMA's second training stage.

    In a batch of mixed modalities most negatives are easy, because their modality alone gives them away. The
    MAC-Loss (ACM MM 2025, arXiv 2507.08064) therefore splits the candidates of query i by whether they have
    the modality of its positive: intra-modality candidates, the positive among them, get a temperature that
    falls during training and so weighs the most similar ones ever more; inter-modality candidates keep a
    fixed one.

    `tau_ij = hard temperature if m(c_j) == m(p(i)) else temperature` and
    `loss = - mean_i log( exp(s_ip / tau_ip) / sum_j exp(s_ij / tau_ij) )`, over all positives and explicit
    negatives of the batch, and of the other devices' when gathered.

    Args:
        model: A SentenceTransformer.
        temperature: Temperature of the inter-modality candidates. The paper's number is not readable; 0.05 is
            LamRA's, whose recipe it follows.
        hard_temperature: Temperature of the intra-modality candidates at the end of training. The paper's
            number is not readable either; 0.04 is this library's choice, not a reproduced value.
        schedule: How the hard temperature goes from `temperature` to `hard_temperature`: `"cosine"` (concave,
            as in the paper's figure), `"linear"`, or `"constant"` (`hard_temperature` from the start).
        grouping: `"target"` compares a candidate's modality with the positive's (the paper); `"query"` with
            the anchor's, in which case the positive of a cross-modal pair is inter-modality.
        similarity_fct: Similarity matrix of two sets of embeddings. It is called in float32 or float64,
            outside autocast, since a bfloat16 cosine divided by 0.04 is off by more than the differences that
            matter.
        gather_across_devices: Also use the other devices' candidates. All devices need equal batch sizes:
            train with `dataloader_drop_last=True`.

    Requirements:
        1. (anchor, positive) pairs or (anchor, positive, negative_1, ..., negative_n) tuples.
        2. Modality ids, indices into `MODALITY_NAMES`: a PUMA model adds them to the features of each column
           as `modality_ids`, `(batch_size,)`; with other models pass them as labels.
        3. `add_temperature_schedule(trainer)` after building the trainer: a plain SentenceTransformerTrainer
           gives a loss no access to its step count. Without it the schedule stays at its start, and a warning
           says so.

    Inputs:
        +------------------------------------------+--------------------------------------------------------+
        | Inputs                                   | Labels                                                 |
        +==========================================+========================================================+
        | n columns with `modality_ids` features   | none                                                   |
        +------------------------------------------+--------------------------------------------------------+
        | n columns without                        | modality ids, integers of shape `(batch_size, n)`      |
        +------------------------------------------+--------------------------------------------------------+

    Recommendations:
        - Use `BatchSamplers.NO_DUPLICATES`: a second copy of a positive in the batch counts as a negative.

    Relations:
        - With equal temperatures this is `MultipleNegativesRankingLoss(scale=1 / temperature)`.
        - With one modality in the batch it is the same at the hard temperature.

    Attributes:
        negative_counts: Intra- and inter-modality negatives of each query in the last forward pass, two
            integer tensors of shape `(batch_size,)`; None before the first one.

    Raises:
        ValueError: If a temperature is not positive and finite, or the schedule or grouping is unknown.

    Example:
        >>> loss = MultimodalMACLoss(nn.Identity(), temperature=0.05, hard_temperature=0.04, schedule="constant")
        >>> anchor = positive = torch.eye(2)
        >>> text, image = torch.tensor([0, 0]), torch.tensor([1, 1])
        >>> round(loss.compute_loss_from_embeddings([anchor, -positive], [text, image]).item(), 2)
        25.0
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 0.05,
        hard_temperature: float = 0.04,
        schedule: ScheduleKind = "cosine",
        grouping: ModalityGrouping = "target",
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(temperature, hard_temperature, schedule)
        groupings = get_args(ModalityGrouping)
        if grouping not in groupings:
            raise ValueError(f"grouping is {grouping!r}, but it must be one of {groupings}. Choose one of these.")
        self.model = model
        self.grouping: ModalityGrouping = grouping
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.negative_counts: tuple[Tensor, Tensor] | None = None

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Embed the columns and compute the loss.

        Args:
            sentence_features: One dict of model inputs per column: anchor, positive, negatives.
            labels: Modality ids, `(batch_size, num_columns)`; used only if the features have none.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: If there are no modality ids, or they do not fit the columns.
        """
        columns = list(sentence_features)
        modality_ids = _read_modality_ids(columns, labels)
        embeddings = embed_columns(self.model, columns)
        for features, ids in zip(columns, modality_ids, strict=True):
            # An input module may pop the ids; wrappers such as MatryoshkaLoss come back with the same dicts.
            features.setdefault(_IDS_KEY, ids)
        self.warn_if_schedule_idles(training=self.model.training)
        return self.compute_loss_from_embeddings(embeddings, modality_ids)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], modality_ids: list[Tensor]) -> Tensor:
        """Compute the loss of embedded columns at the current temperatures.

        Args:
            embeddings: Anchor, positive and negatives, each `(batch_size, embedding_dim)`.
            modality_ids: Modality ids of the same columns, each of integers `(batch_size,)`.

        Returns:
            The loss, a scalar in float32 (float64 for float64 embeddings).

        Raises:
            ValueError: If there are fewer than two columns, the shapes differ, or an id is not a modality.
        """
        _check_columns(embeddings, modality_ids)
        anchors, anchor_ids = embeddings[0], modality_ids[0].to(embeddings[0].device)
        candidates = embeddings[1:]
        candidate_ids = [ids.to(anchors.device) for ids in modality_ids[1:]]
        batch_size, offset = anchors.shape[0], 0
        reference_ids = candidate_ids[0] if self.grouping == "target" else anchor_ids
        if self.gather_across_devices:
            # Own anchors against everyone's candidates; gradients flow back to the devices that embedded
            # them.
            candidates = [all_gather_with_grad(column) for column in candidates]
            candidate_ids = [all_gather(ids) for ids in candidate_ids]
            offset = get_rank() * batch_size
        same_modality = reference_ids.unsqueeze(1) == torch.cat(candidate_ids).unsqueeze(0)
        positive_index = torch.arange(offset, offset + batch_size, device=anchors.device)
        self._count_negatives(same_modality, positive_index)

        # A trainer with bf16=True calls this under autocast, where the matrix product would be bfloat16
        # again.
        with torch.autocast(device_type=anchors.device.type, enabled=False):
            similarities = self.similarity_fct(_at_least_float32(anchors), _at_least_float32(torch.cat(candidates)))
            return mac_loss(
                similarities, positive_index, same_modality, self.temperature, self.current_hard_temperature
            )

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the model card shows."""
        return {
            "temperature": self.temperature,
            "hard_temperature": self.hard_temperature,
            "schedule": self.temperature_schedule.kind,
            "grouping": self.grouping,
            "similarity_fct": similarity_fct_name(self.similarity_fct),
            "gather_across_devices": self.gather_across_devices,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return PUMA_CITATION

    def _count_negatives(self, same_modality: Tensor, positive_index: Tensor) -> None:
        positive_is_intra = same_modality.gather(1, positive_index.unsqueeze(1)).squeeze(1).long()
        intra = same_modality.sum(dim=1) - positive_is_intra
        self.negative_counts = (intra, same_modality.shape[1] - 1 - intra)


def _read_modality_ids(columns: list[dict[str, Any]], labels: Tensor | None) -> list[Tensor]:
    missing = [index for index, features in enumerate(columns) if features.get(_IDS_KEY) is None]
    if not missing:
        return [features[_IDS_KEY] for features in columns]
    if labels is None:
        raise ValueError(
            f"the columns {missing} of {len(columns)} have no {_IDS_KEY!r} feature and labels is None, but "
            "MAC-Loss needs the modality of every input. Use a PUMA model, whose input module adds it, or "
            "add a label column with one modality id per column, (batch_size, num_columns)."
        )
    if len(missing) < len(columns):
        raise ValueError(
            f"only the columns {missing} of {len(columns)} lack the {_IDS_KEY!r} feature, but either all "
            "columns or none must have it. Use the same input module for all columns."
        )
    if labels.ndim != 2 or labels.shape[1] != len(columns) or not _is_integer(labels):
        raise ValueError(
            f"labels are {_shape(labels)}, but as modality ids of {len(columns)} columns they must be "
            f"integers (batch_size, {len(columns)}). Pass one id per column: anchor, positive, negatives."
        )
    return list(labels.unbind(1))


def _check_columns(embeddings: list[Tensor], modality_ids: list[Tensor]) -> None:
    if len(embeddings) < 2 or len(modality_ids) != len(embeddings):
        raise ValueError(
            f"got {len(embeddings)} columns of embeddings and {len(modality_ids)} of modality ids, but "
            "MAC-Loss needs at least an anchor and a positive, and ids for each. Pass both lists in the "
            "order of the columns."
        )
    shape = embeddings[0].shape
    if any(column.ndim != 2 or column.shape != shape for column in embeddings):
        raise ValueError(
            f"the columns of embeddings are {[tuple(column.shape) for column in embeddings]}, but all must "
            "be the same (batch_size, embedding_dim). Give every row an anchor, a positive and the same "
            "number of negatives."
        )
    if any(ids.shape != shape[:1] or not _is_integer(ids) for ids in modality_ids):
        raise ValueError(
            f"the columns of modality ids are {[_shape(ids) for ids in modality_ids]}, but all must be "
            f"integers ({shape[0]},), one per embedding. Pass one modality id per input."
        )
    # One host synchronisation for all columns.
    all_ids = torch.cat([ids.to(modality_ids[0].device) for ids in modality_ids])
    if all_ids.numel() == 0:
        raise ValueError("the batch is empty, but MAC-Loss needs at least one row. Drop empty batches.")
    lowest, highest = torch.stack(torch.aminmax(all_ids)).tolist()
    if lowest < 0 or highest >= len(MODALITY_NAMES):
        names = ", ".join(f"{index} = {name!r}" for index, name in enumerate(MODALITY_NAMES))
        raise ValueError(
            f"modality ids range from {lowest} to {highest}, but they must be in "
            f"0..{len(MODALITY_NAMES) - 1} ({names}). Map each input's modality with MODALITY_IDS."
        )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
