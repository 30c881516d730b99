"""MAC-Loss: contrastive learning with a sharper temperature for candidates of the wanted modality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from puma_hf.losses.contrastive import (
    SPLIT_WEIGHT,
    at_least_float32,
    check_split_weight,
    describe,
    mac_loss,
    split_loss,
)
from puma_hf.losses.negatives import NegativeSurvey, check_margin, find_false_negatives, survey_negatives
from puma_hf.losses.temperature import ScheduledTemperatureLoss
from puma_hf.modeling.messages_puma import MODALITY_NAMES
from puma_hf.settings import HARD_TEMPERATURE, SCHEDULE, SCHEDULE_END, TEMPERATURE, Schedule

ModalityGrouping = Literal["target", "query"]
MACObjective = Literal["mac", "split"]

MODALITY_KEY = "modality_ids"
CONTENT_KEY = "content_ids"


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
        temperature: Temperature of the inter-modality candidates. All defaults are those of the code that PUMA's
            authors released.
        hard_temperature: Temperature of the intra-modality candidates once the schedule has ended.
        schedule: How the hard temperature goes from `temperature` to `hard_temperature`: `"exponential"` (as
            released), `"cosine"`, `"linear"`, or `"constant"` (`hard_temperature` from the start), see
            `TemperatureSchedule`.
        grouping: `"target"` compares a candidate's modality with the positive's (the paper); `"query"` with
            the anchor's, in which case the positive of a cross-modal pair is inter-modality.
        similarity_fct: Similarity matrix of two sets of embeddings. It is called in float32 or float64,
            outside autocast, since a bfloat16 cosine divided by 0.04 is off by more than the differences that
            matter.
        gather_across_devices: Also use the other devices' candidates. All devices need equal batch sizes:
            train with `dataloader_drop_last=True`.
        objective: `"mac"` is the paper's loss. `"split"` is this library's own and not in the paper: the sum
            over all candidates keeps `temperature`, and a second sum over the intra-modality candidates alone
            takes the scheduled hard temperature; see `split_loss`. It is meant for a pool of all modalities,
            where MAC's low hard temperature takes the weight from the inter-modality negatives.
        split_weight: Share of the second sum in `"split"`, in [0, 1]. 0.2 is chosen on the
            emoji's validation split, see benchmarks/ablation.py.
        false_negative_margin: Candidates whose similarity exceeds the positive's by more than this do not
            count as negatives: they are likely to be unlabelled positives. Qwen3-Embedding uses 0.1; `None`,
            the default and the paper's, leaves out none.
        schedule_end: Share of the training after which the hard temperature stays, in (0, 1].

    Requirements:
        1. (anchor, positive) pairs or (anchor, positive, negative_1, ..., negative_n) tuples.
        2. Modality ids, indices into `MODALITY_NAMES`: a PUMA model adds them to the features of each column
           as `modality_ids`, `(batch_size,)`; with other models pass them as labels.
        3. `add_temperature_schedule(trainer)` after building the trainer: a plain SentenceTransformerTrainer
           gives a loss no access to its step count. Without it the schedule stays at its start, and a warning
           says so.
        4. Optional: content ids, equal for equal inputs, which a PUMA model adds as `content_ids`,
           `(batch_size,)`. Copies of a query's positive then never count as its negatives, whether they are
           another row's positive or an explicit negative, here or on another device.

    Inputs:
        +------------------------------------------+--------------------------------------------------------+
        | Inputs                                   | Labels                                                 |
        +==========================================+========================================================+
        | n columns with `modality_ids` features   | none                                                   |
        +------------------------------------------+--------------------------------------------------------+
        | n columns without                        | modality ids, integers of shape `(batch_size, n)`      |
        +------------------------------------------+--------------------------------------------------------+

    Recommendations:
        - With a model that adds no `content_ids` use `BatchSamplers.NO_DUPLICATES`: a second copy of a positive
          in the batch then counts as a negative.

    Relations:
        - With equal temperatures this is `MultipleNegativesRankingLoss(scale=1 / temperature)`.
        - With one modality in the batch it is the same at the hard temperature.
        - `objective="split"` is `MultipleNegativesRankingLoss` at `split_weight=0`, and with one modality in
          the batch also at `split_weight=1`, there at the hard temperature.

    Attributes:
        negative_counts: Intra- and inter-modality negatives of each query in the last forward pass, two
            integer tensors of shape `(batch_size,)`; None before the first one.
        statistics: Scalar tensors of the last forward pass in training, for logs: `"intra_negatives"`,
            `"inter_negatives"` and `"masked_negatives"` (left out as false) are means per query;
            `"positive_similarity"`, `"intra_similarity"` and `"inter_similarity"` are mean similarities, nan
            where there are none. None before the first one.
        candidates_seen: Embeddings of this device's positives in that pass, `(batch_size, embedding_dim)`,
            detached, from which the spread of the embeddings can be read. None before the first one.

    Raises:
        ValueError: If a temperature is not positive and finite, the schedule, grouping or objective is unknown,
            or the split weight, the margin or the schedule's end is out of range.

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
        for name, value, known in (("grouping", grouping, ModalityGrouping), ("objective", objective, MACObjective)):
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}, but it must be one of {get_args(known)}. Choose one of these.")
        check_split_weight(split_weight)
        check_margin(false_negative_margin)
        self.model = model
        self.grouping: ModalityGrouping = grouping
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.objective: MACObjective = objective
        self.split_weight = split_weight
        self.false_negative_margin = false_negative_margin
        self.negative_counts: tuple[Tensor, Tensor] | None = None
        self.statistics: dict[str, Tensor] | None = None
        self.candidates_seen: Tensor | None = None

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Embed the columns and compute the loss.

        Args:
            sentence_features: One dict of model inputs per column: anchor, positive, negatives.
            labels: Modality ids, `(batch_size, num_columns)`; used only if the features have none.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: If there are no modality ids, they do not fit the columns, or only some columns have
                content ids.
        """
        columns = list(sentence_features)
        modality_ids, content_ids = read_modality_ids(columns, labels), read_content_ids(columns)
        embeddings = embed_columns(self.model, columns)
        restore_ids(columns, modality_ids, content_ids)
        self.warn_if_schedule_idles(training=self.model.training)
        return self.compute_loss_from_embeddings(embeddings, modality_ids, content_ids)

    def compute_loss_from_embeddings(
        self,
        embeddings: list[Tensor],
        modality_ids: Sequence[Tensor],
        content_ids: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Compute the loss of embedded columns at the current temperatures.

        Args:
            embeddings: Anchor, positive and negatives, each `(batch_size, embedding_dim)`.
            modality_ids: Modality ids of the same columns, each of integers `(batch_size,)`.
            content_ids: Content ids of the same columns, likewise; `None` masks no copies of positives.

        Returns:
            The loss, a scalar in float32 (float64 for float64 embeddings).

        Raises:
            ValueError: If there are fewer than two columns, the shapes differ, or an id is not a modality.
        """
        _check_columns(embeddings, modality_ids, content_ids)
        anchors, device = embeddings[0], embeddings[0].device
        candidates, positives = embeddings[1:], embeddings[1]
        # Columns of a label matrix are strided, which collectives refuse.
        candidate_ids = [ids.to(device).contiguous() for ids in modality_ids[1:]]
        contents = None if content_ids is None else [ids.to(device).contiguous() for ids in content_ids[1:]]
        positive_content = None if contents is None else contents[0]
        reference_ids = candidate_ids[0] if self.grouping == "target" else modality_ids[0].to(device)
        offset = 0
        if self.gather_across_devices:
            # Own anchors against everyone's candidates; gradients flow back to the devices that embedded
            # them.
            candidates = [all_gather_with_grad(column) for column in candidates]
            candidate_ids = [all_gather(ids) for ids in candidate_ids]
            contents = None if contents is None else [all_gather(ids) for ids in contents]
            offset = get_rank() * len(anchors)
        positive_index = torch.arange(offset, offset + len(anchors), device=device)
        all_contents = None if contents is None else torch.cat(contents)
        # One row per modality, then that of each query: faster than comparing all pairs.
        kinds = torch.arange(len(MODALITY_NAMES), device=device).unsqueeze(1)
        same_modality = (kinds == torch.cat(candidate_ids)).index_select(0, reference_ids.long())

        # A trainer with bf16=True calls this under autocast, where the matrix product would be bfloat16
        # again.
        with torch.autocast(device_type=device.type, enabled=False):
            similarities = self.similarity_fct(at_least_float32(anchors), at_least_float32(torch.cat(candidates)))
            masked = find_false_negatives(
                similarities, positive_index, all_contents, positive_content, self.false_negative_margin
            )
            self._remember(survey_negatives(similarities.detach(), positive_index, same_modality, masked), positives)
            temperatures = self.temperature, self.current_hard_temperature
            if self.objective == "mac":
                return mac_loss(similarities, positive_index, same_modality, *temperatures, masked)
            return split_loss(similarities, positive_index, same_modality, *temperatures, self.split_weight, masked)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the model card shows."""
        return {
            "temperature": self.temperature,
            "hard_temperature": self.hard_temperature,
            "schedule": self.temperature_schedule.kind,
            "schedule_end": self.temperature_schedule.schedule_end,
            "grouping": self.grouping,
            "similarity_fct": similarity_fct_name(self.similarity_fct),
            "gather_across_devices": self.gather_across_devices,
            "objective": self.objective,
            **({"split_weight": self.split_weight} if self.objective == "split" else {}),
            "false_negative_margin": self.false_negative_margin,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return PUMA_CITATION

    def _remember(self, survey: NegativeSurvey, positives: Tensor) -> None:
        self.negative_counts = (survey.intra_counts, survey.inter_counts)
        if self.model.training:
            self.statistics = {
                "intra_negatives": survey.intra_counts.float().mean(),
                "inter_negatives": survey.inter_counts.float().mean(),
                "masked_negatives": survey.false_counts.float().mean(),
                "positive_similarity": survey.positive_similarity,
                "intra_similarity": survey.intra_similarity,
                "inter_similarity": survey.inter_similarity,
            }
            self.candidates_seen = positives.detach()


def read_modality_ids(columns: list[dict[str, Any]], labels: Tensor | None) -> list[Tensor]:
    """Modality ids of each column, `(batch_size,)`: its own, or of the labels if no column has any.

    Args:
        columns: The features of each column, before a model has seen them.
        labels: `(batch_size, num_columns)`, or `None`.

    Returns:
        One tensor of integers per column.

    Raises:
        ValueError: If there are none, only some columns have them, or the labels do not fit.
    """
    if (own := _read_ids(columns, MODALITY_KEY)) is not None:
        return own
    if labels is None:
        raise ValueError(
            f"the columns {list(range(len(columns)))} of {len(columns)} have no {MODALITY_KEY!r} feature and labels is "
            "None, but MAC-Loss needs the modality of every input. Use a PUMA model, whose input module adds it, or "
            "add a label column with one modality id per column, (batch_size, num_columns)."
        )
    if labels.ndim != 2 or labels.shape[1] != len(columns) or not _is_integer(labels):
        raise ValueError(
            f"labels are {describe(labels)}, but as modality ids of {len(columns)} columns they must be "
            f"integers (batch_size, {len(columns)}). Pass one id per column: anchor, positive, negatives."
        )
    return list(labels.unbind(1))


def read_content_ids(columns: list[dict[str, Any]]) -> list[Tensor] | None:
    """Content ids of each column, `(batch_size,)`, or `None` if the model adds none.

    Args:
        columns: The features of each column, before a model has seen them.

    Returns:
        One tensor of integers per column, or `None`.

    Raises:
        ValueError: If only some of the columns have them.
    """
    return _read_ids(columns, CONTENT_KEY)


def restore_ids(
    columns: list[dict[str, Any]], modality_ids: Sequence[Tensor], content_ids: Sequence[Tensor] | None
) -> None:
    """Put ids that an input module popped back: wrappers such as `MatryoshkaLoss` come again with the same dicts.

    Args:
        columns: The features of each column, after the model has seen them.
        modality_ids: What was read from them before.
        content_ids: Likewise.
    """
    for key, values in ((MODALITY_KEY, modality_ids), (CONTENT_KEY, content_ids)):
        for features, ids in zip(columns, values or [], strict=values is not None):
            features.setdefault(key, ids)


def _read_ids(columns: list[dict[str, Any]], key: str) -> list[Tensor] | None:
    missing = [index for index, features in enumerate(columns) if features.get(key) is None]
    if not missing:
        return [features[key] for features in columns]
    if len(missing) < len(columns):
        raise ValueError(
            f"only the columns {missing} of {len(columns)} lack the {key!r} feature, but either all columns or none "
            "must have it. Use the same input module for all columns."
        )
    return None


def _check_columns(
    embeddings: list[Tensor], modality_ids: Sequence[Tensor], content_ids: Sequence[Tensor] | None
) -> None:
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
    for name, columns in (("modality", modality_ids), ("content", content_ids)):
        if columns is not None and any(ids.shape != shape[:1] or not _is_integer(ids) for ids in columns):
            raise ValueError(
                f"the columns of {name} ids are {[describe(ids) for ids in columns]}, but all must be "
                f"integers ({shape[0]},), one per embedding. Pass one {name} id per input."
            )
    if content_ids is not None and len(content_ids) != len(embeddings):
        raise ValueError(
            f"got {len(embeddings)} columns of embeddings and {len(content_ids)} of content ids, but there must be one "
            "of each per column. Pass the ids of all columns, the anchor's too, or None."
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


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
