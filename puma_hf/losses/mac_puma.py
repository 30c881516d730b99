"""MAC-Loss: contrastive learning with a sharper temperature for candidates of the wanted modality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import all_gather, all_gather_with_grad, cos_sim, get_rank, similarity_fct_name
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .progress_puma import ScheduledTemperatureLoss
from .schedule_puma import (
    HARD_TEMPERATURE,
    SCHEDULE,
    SCHEDULE_END,
    SPLIT_WEIGHT,
    TEMPERATURE,
    MACObjective,
    ModalityGrouping,
    Schedule,
    check_choice,
    check_range,
)

MODALITY_KEY = "modality_ids"
CONTENT_KEY = "content_ids"
PUMA_CITATION = """
@inproceedings{lyu2025puma,
    title={PUMA: Layer-Pruned Language Model for Efficient Unified Multimodal Retrieval with Modality-Adaptive
           Learning},
    author={Lyu, Yibo and Shao, Rui and Chen, Gongwei and Zhu, Yijie and Guan, Weili and Nie, Liqiang},
    booktitle={Proceedings of the 33rd ACM International Conference on Multimedia},
    pages={7653--7662},
    year={2025},
    eprint={2507.08064},
    archivePrefix={arXiv},
    url={https://arxiv.org/abs/2507.08064},
}
"""


def mac_loss(
    similarities: Tensor,
    positive_index: Tensor,
    same_modality: Tensor,
    temperature: float,
    hard_temperature: float,
    false_negatives: Tensor | None = None,
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
        false_negatives: Booleans of the same shape: candidates left out of the sum, see `find_false_negatives`.
            The positive's own column must not be among them.

    Returns:
        The loss, a scalar in float32 (float64 for float64 similarities).

    Raises:
        ValueError: If a temperature is not positive and finite, or a mask has another shape than `similarities`.

    Example:
        >>> similarities = torch.zeros(1, 2)  # equal similarities, two candidates: log 2
        >>> same_modality = torch.tensor([[True, False]])
        >>> round(mac_loss(similarities, torch.tensor([0]), same_modality, 0.05, 0.04).item(), 4)
        0.6931
    """
    similarities = _checked(similarities, temperature, hard_temperature, same_modality, false_negatives)
    # A matrix of its own, beside the similarities and the logits: two numbers a candidate would save it, and cost
    # a second pass over the masks.
    tau = torch.full_like(similarities, temperature).masked_fill_(same_modality, hard_temperature)
    return _cross_entropy(similarities / tau, positive_index, false_negatives)


def split_loss(
    similarities: Tensor,
    positive_index: Tensor,
    same_modality: Tensor,
    temperature: float,
    hard_temperature: float,
    split_weight: float = SPLIT_WEIGHT,
    false_negatives: Tensor | None = None,
) -> Tensor:
    """Weighted mean of InfoNCE over all candidates and InfoNCE within the intra-modality group.

    This library's own, not the paper's: `(1 - split_weight) * InfoNCE(all candidates, temperature) + split_weight *
    InfoNCE(intra-modality candidates and the positive, hard_temperature)`. In the MAC-Loss a low hard temperature also
    takes weight from the inter-modality negatives; here they keep theirs. All else is as for `mac_loss`; `split_weight`
    must be in [0, 1].

    Example:
        >>> similarities = torch.zeros(1, 4)  # four candidates, two of them in the group
        >>> same_modality = torch.tensor([[True, True, False, False]])
        >>> loss = split_loss(similarities, torch.tensor([0]), same_modality, 0.05, 0.04, split_weight=0.5)
        >>> round(loss.item(), 4)  # (log 4 + log 2) / 2
        1.0397
    """
    check_range(most=1, zero=True, split_weight=split_weight)
    similarities = _checked(similarities, temperature, hard_temperature, same_modality, false_negatives)
    # The positive belongs to the group even where the grouping is by the query's modality and it has another.
    outside = (~same_modality).scatter_(1, positive_index.unsqueeze(1), False)
    if false_negatives is not None:
        outside |= false_negatives
    everything = _cross_entropy(similarities / temperature, positive_index, false_negatives)
    group = _cross_entropy(similarities / hard_temperature, positive_index, outside)
    return (1 - split_weight) * everything + split_weight * group


def _checked(similarities: Tensor, temperature: float, hard_temperature: float, *masks: Tensor | None) -> Tensor:
    """The similarities in float32 at least; a ValueError if a temperature or the shape of a mask is wrong."""
    check_range(temperature=temperature, hard_temperature=hard_temperature)
    # Torch would spread a mask of one row, or of one column, over all of them.
    if wrong := [tuple(mask.shape) for mask in masks if mask is not None and mask.shape != similarities.shape]:
        raise ValueError(f"a mask is {wrong[0]}, but must have the shape of similarities, {tuple(similarities.shape)}.")
    return at_least_float32(similarities)


def _cross_entropy(logits: Tensor, positive_index: Tensor, left_out: Tensor | None) -> Tensor:
    """`- mean_i log softmax(logits)_ip` over the candidates that are not left out; `logits` are overwritten."""
    return cross_entropy(logits if left_out is None else logits.masked_fill_(left_out, -torch.inf), positive_index)


def find_false_negatives(
    similarities: Tensor,
    positive_index: Tensor,
    candidate_content: Tensor | None = None,
    positive_content: Tensor | None = None,
    margin: float | None = None,
) -> Tensor | None:
    """Mark the candidates that must not count as negatives: copies of the positive, and suspiciously good ones.

    Args:
        similarities: `(batch_size, num_candidates)`.
        positive_index: Column of each query's positive, integers of shape `(batch_size,)`.
        candidate_content: Content ids of the candidates, `(num_candidates,)`; `None` compares no contents.
        positive_content: Content ids of the queries' positives, `(batch_size,)`.
        margin: A candidate more similar to the query than the positive by more than this is left out.

    Returns:
        Booleans `(batch_size, num_candidates)`, never true for a positive's own column; `None` if nothing was compared.
    """
    found: Tensor | None = None
    column = positive_index.unsqueeze(1)
    if candidate_content is not None and positive_content is not None:
        found = positive_content.unsqueeze(1) == candidate_content
    if margin is not None:
        # Which candidates are left out is a decision, not a quantity to learn from.
        too_good = similarities.detach() > similarities.detach().gather(1, column) + margin
        found = too_good if found is None else found | too_good
    return None if found is None else found.scatter_(1, column, False)


class MultimodalMACLoss(ScheduledTemperatureLoss):
    """Modality-adaptive contrastive loss, PUMA's second training stage.

    In a batch of mixed modalities most negatives are easy, because their modality alone gives them away. The MAC-Loss
    (ACM MM 2025, arXiv 2507.08064) therefore splits the candidates of query i by whether they have the modality of its
    positive: intra-modality candidates, the positive among them, get a temperature that falls during training and so
    weighs the most similar ones ever more; inter-modality candidates keep a fixed one.

    `tau_ij = hard temperature if m(c_j) == m(p(i)) else temperature` and
    `loss = - mean_i log( exp(s_ip / tau_ip) / sum_j exp(s_ij / tau_ij) )`, over all positives and explicit negatives of
    the batch, and of the other devices' when gathered. All defaults are those of the code that the authors released.

    Args:
        model: A SentenceTransformer.
        temperature: Temperature of the inter-modality candidates.
        hard_temperature: Temperature of the intra-modality candidates once the schedule has ended.
        schedule: How the hard temperature goes from `temperature` to `hard_temperature`, see `TemperatureSchedule`.
        grouping: `"target"` compares a candidate's modality with the positive's (the paper); `"query"` with the
            anchor's, in which case the positive of a cross-modal pair is inter-modality.
        similarity_fct: Similarity matrix of two sets of embeddings. It is called in float32 or float64, outside
            autocast, since a bfloat16 cosine divided by 0.04 is off by more than the differences that matter.
        gather_across_devices: Also use the other devices' candidates. All devices need equal batch sizes: train with
            `dataloader_drop_last=True`.
        objective: `"mac"`, the paper's, or `"split"`, see `split_loss`: for a pool of all modalities, where MAC's low
            hard temperature takes the weight from the inter-modality negatives.
        split_weight: Share of the second sum in `"split"`, in [0, 1].
        false_negative_margin: Candidates whose similarity exceeds the positive's by more than this do not count as
            negatives: they are likely to be unlabelled positives. Qwen3-Embedding uses 0.1; `None`, the paper's, leaves
            out none.
        schedule_end: Share of the training after which the hard temperature stays, in (0, 1].

    Requirements:
        1. (anchor, positive) pairs or (anchor, positive, negative_1, ..., negative_n) tuples.
        2. Modality ids, indices into `MODALITY_NAMES`: a PUMA model adds them to the features of each column as
           `modality_ids`, `(batch_size,)`; with other models pass them as labels, `(batch_size, num_columns)`.
        3. `add_temperature_schedule(trainer)` after building the trainer: a plain SentenceTransformerTrainer gives a
           loss no access to its step count. Without it the schedule stays at its start, and a warning says so.
        4. Optional: content ids, equal for equal inputs, which a PUMA model adds as `content_ids`, `(batch_size,)`.
           Copies of a query's positive then never count as its negatives, whether they are another row's positive or
           an explicit negative, here or on another device. Without them use `BatchSamplers.NO_DUPLICATES`.

    Relations:
        With equal temperatures, or one modality in the batch, this is `MultipleNegativesRankingLoss(scale=1 /
        hard_temperature)`. It takes at most 5 float32 matrices of queries by candidates, 1.3 GB for 8,192 of both.

    Attributes:
        negative_counts: Intra- and inter-modality negatives of each query in the last forward pass, two integer tensors
            of shape `(batch_size,)`; None before the first one, as are the others.
        statistics: Scalar tensors of the last forward pass in training, for logs: `"intra_negatives"`,
            `"inter_negatives"` and `"masked_negatives"` (left out as false) are means per query;
            `"positive_similarity"`, `"intra_similarity"` and `"inter_similarity"` are mean similarities, nan for none.
        candidates_seen: Embeddings of this device's positives in that pass, `(batch_size, embedding_dim)`, detached.

    Example:
        >>> loss = MultimodalMACLoss(nn.Identity(), temperature=0.05, hard_temperature=0.04, schedule="constant")
        >>> anchor = positive = torch.eye(2)
        >>> text, image = torch.tensor([0, 0]), torch.tensor([1, 1])
        >>> round(loss.compute_loss_from_embeddings([anchor, -positive], [text, image]).item(), 2)
        25.0
    """

    citation = PUMA_CITATION

    def __init__(
        self,
        model: nn.Module,
        temperature: float = TEMPERATURE,
        hard_temperature: float = HARD_TEMPERATURE,
        schedule: Schedule = SCHEDULE,
        grouping: ModalityGrouping = "target",
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        *,
        objective: MACObjective = "mac",
        split_weight: float = SPLIT_WEIGHT,
        false_negative_margin: float | None = None,
        schedule_end: float = SCHEDULE_END,
    ) -> None:
        super().__init__(temperature, hard_temperature, schedule, schedule_end)
        check_choice("grouping", grouping, ModalityGrouping)
        check_choice("objective", objective, MACObjective)
        check_range(most=1, zero=True, split_weight=split_weight)
        check_range(zero=True, false_negative_margin=false_negative_margin or 0)
        self.model = model
        self.grouping = grouping
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.objective = objective
        self.split_weight = split_weight
        self.false_negative_margin = false_negative_margin
        self.negative_counts: tuple[Tensor, Tensor] | None = None
        self.statistics: dict[str, Tensor] | None = None
        self.candidates_seen: Tensor | None = None

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Embed the columns (anchor, positive, negatives), each a dict of model inputs, and compute the loss, a scalar.

        `labels` are modality ids, `(batch_size, num_columns)`, and used only if the features have none. A ValueError
        tells if there are no modality ids, they do not fit, or only some columns have content ids.
        """
        columns = list(sentence_features)
        modality_ids, content_ids = read_ids(columns, labels)
        embeddings = embed_columns(self.model, columns)
        restore_ids(columns, modality_ids, content_ids)
        self.warn_if_schedule_idles(training=self.model.training)
        return self.compute_loss_from_embeddings(embeddings, modality_ids, content_ids)

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], modality_ids: Sequence[Tensor], content_ids: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Compute the loss of embedded columns at the current temperatures.

        Args:
            embeddings: Anchor, positive and negatives, each `(batch_size, embedding_dim)`.
            modality_ids: Modality ids of the same columns, each of integers `(batch_size,)`.
            content_ids: Content ids of the same columns, likewise; `None` masks no copies of positives.

        Returns:
            The loss, a scalar in float32 (float64 for float64 embeddings).
        """
        ids = [*modality_ids, *(content_ids or modality_ids)]
        lengths = {len(column) for column in (*embeddings, *ids)}
        if len(embeddings) < 2 or len(ids) != 2 * len(embeddings) or len(lengths) > 1:
            raise ValueError(
                f"embeddings are {[tuple(column.shape) for column in embeddings]} and ids {[len(c) for c in ids]}, but "
                "MAC-Loss needs an anchor, a positive and any negatives of equally many rows, and ids for each."
            )
        anchors, device = embeddings[0], embeddings[0].device
        # Ids are compared on the device of the embeddings: nothing here waits for it.
        modalities, contents = ([ids.to(device) for ids in columns or ()] for columns in (modality_ids, content_ids))
        wanted = modalities[1 if self.grouping == "target" else 0]
        # Own anchors against everyone's candidates; gradients flow back to the devices that embedded them.
        candidates = self._candidates(embeddings, all_gather_with_grad)
        same_modality = wanted.unsqueeze(1) == self._candidates(modalities, all_gather)
        all_contents = self._candidates(contents, all_gather) if contents else None
        own_content = contents[1] if contents else None
        first = get_rank() * len(anchors) if self.gather_across_devices else 0
        positive_index = torch.arange(first, first + len(anchors), device=device)

        # A trainer with bf16=True calls this under autocast, where the matrix product would be bfloat16 again.
        with torch.autocast(device_type=device.type, enabled=False):
            similarities = self.similarity_fct(at_least_float32(anchors), at_least_float32(candidates))
            margin = self.false_negative_margin
            masked = find_false_negatives(similarities, positive_index, all_contents, own_content, margin)
            self._count(similarities.detach(), positive_index, same_modality, masked)
            if self.model.training:
                self.candidates_seen = embeddings[1].detach()
            arguments = similarities, positive_index, same_modality, self.temperature, self.current_hard_temperature
            if self.objective == "mac":
                return mac_loss(*arguments, masked)
            return split_loss(*arguments, self.split_weight, masked)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the model card shows."""
        names = ["grouping", "similarity_fct", "gather_across_devices", "objective", "false_negative_margin"]
        names += ["split_weight"] if self.objective == "split" else []
        return {
            "temperature": self.temperature,
            "hard_temperature": self.hard_temperature,
            "schedule": self.temperature_schedule.kind,
            "schedule_end": self.temperature_schedule.schedule_end,
            **{name: getattr(self, name) for name in names},
            "similarity_fct": similarity_fct_name(self.similarity_fct),
        }

    def _candidates(self, columns: Sequence[Tensor], gather: Callable[[Tensor], Tensor]) -> Tensor:
        """What the columns after the anchors hold, one below the other: each of all devices, if they are gathered."""
        # Columns of a label matrix are strided, which collectives refuse.
        candidates = [column.contiguous() for column in columns[1:]]
        return torch.cat([gather(column) for column in candidates] if self.gather_across_devices else candidates)

    @torch.no_grad()
    def _count(
        self, similarities: Tensor, positive_index: Tensor, same_modality: Tensor, masked: Tensor | None
    ) -> None:
        column = positive_index.unsqueeze(1)
        negatives = (torch.ones_like(same_modality) if masked is None else ~masked).scatter_(1, column, False)
        counts, totals = dict[str, Tensor](), dict[str, Tensor]()
        for kind, of_kind in (("intra", same_modality), ("inter", ~same_modality)):
            group = (negatives & of_kind).to(similarities.dtype)  # which a CPU adds up in half the time
            counts[kind] = group.sum(dim=1)
            totals[kind] = group.mul_(similarities).sum()
        self.negative_counts = counts["intra"].long(), counts["inter"].long()
        if self.model.training:
            counts["masked"] = similarities.shape[1] - 1 - counts["intra"] - counts["inter"]
            self.statistics = {f"{kind}_negatives": count.mean() for kind, count in counts.items()}
            self.statistics["positive_similarity"] = similarities.gather(1, column).mean()
            for kind, total in totals.items():
                self.statistics[f"{kind}_similarity"] = total / counts[kind].sum()  # nan where there are none


def read_ids(columns: list[dict[str, Any]], labels: Tensor | None = None) -> tuple[list[Tensor], list[Tensor] | None]:
    """Modality ids and, if the model adds any, content ids of each column, all `(batch_size,)`, of its features.

    Columns that have no modality ids take them from the labels, `(batch_size, num_columns)`.
    """
    found: list[list[Tensor]] = []
    for key in (MODALITY_KEY, CONTENT_KEY):
        found.append([features[key] for features in columns if features.get(key) is not None])
        if len(found[-1]) not in (0, len(columns)):
            raise ValueError(f"only {len(found[-1])} of {len(columns)} columns have the {key!r} feature, not all.")
    modality_ids, content_ids = found
    if not modality_ids:
        if labels is None or labels.ndim != 2 or labels.shape[1] != len(columns) or labels.is_floating_point():
            given = None if labels is None else f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(
                f"the {len(columns)} columns have no {MODALITY_KEY!r} feature and labels are {given}, but MAC-Loss "
                "needs the modality of every input. Use a PUMA model, or labels of one integer per column."
            )
        modality_ids = list(labels.unbind(1))
    return modality_ids, content_ids or None


def restore_ids(
    columns: list[dict[str, Any]], modality_ids: Sequence[Tensor], content_ids: Sequence[Tensor] | None
) -> None:
    """Put ids that an input module popped back: wrappers such as `MatryoshkaLoss` come again with the same dicts."""
    for key, values in ((MODALITY_KEY, modality_ids), (CONTENT_KEY, content_ids)):
        for features, ids in zip(columns, values or [], strict=values is not None):
            features.setdefault(key, ids)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Itself in float64, anything else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
