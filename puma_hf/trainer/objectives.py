"""The loss of a stage on labelled pairs, made from its settings."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn

from puma_hf.configs import TrainConfig
from puma_hf.losses import CachedMultimodalMACLoss, JointDistillationLoss, MultimodalMACLoss


def training_loss(model: SentenceTransformer, config: TrainConfig, *, num_devices: int = 1) -> nn.Module:
    """MAC-Loss, its split form or InfoNCE, plain or cached, alone or with distillation, nested in Matryoshka or not.

    InfoNCE is MAC-Loss at equal temperatures, so that a comparison of the two is one of temperatures alone:
    copies of positives, `false_negative_margin` and the logs are the same.

    Args:
        model: The model to train.
        config: Settings of the stage.
        num_devices: Number of processes; on one nothing is gathered.

    Raises:
        ValueError: If a Matryoshka size is larger than the embedding.

    Example:

    ```python
    >>> from puma_hf.trainer.objectives import training_loss

    >>> loss = training_loss(model, config)  # doctest: +SKIP
    ```
    """
    gather = config.gather_across_devices and num_devices > 1
    loss: nn.Module = _contrastive_loss(model, config, gather)
    if config.joint:
        names = ("contrastive_weight", "distillation_weight", "contrastive_weight_start", "distillation_weight_start")
        loss = JointDistillationLoss(model, loss, config.metric, **{name: getattr(config, name) for name in names})
    if config.matryoshka_dims:
        dim = int(model.get_embedding_dimension() or 0)
        if dim < max(config.matryoshka_dims):
            raise ValueError(
                f"matryoshka_dims={list(config.matryoshka_dims)} must not exceed the embedding's {dim} dimensions. "
                "Leave out the larger ones."
            )
        return MatryoshkaLoss(model, loss, sorted(config.matryoshka_dims, reverse=True))
    return loss


def _contrastive_loss(model: SentenceTransformer, config: TrainConfig, gather: bool) -> Any:
    cache: dict[str, Any] = {}
    if config.cached:
        cache = {"mini_batch_num_tokens": config.mini_batch_num_tokens}
        if config.mini_batch_size is not None:
            cache["mini_batch_size"] = config.mini_batch_size
    infonce = config.loss == "infonce"
    mac = CachedMultimodalMACLoss if cache else MultimodalMACLoss
    return mac(
        model,
        temperature=config.temperature,
        hard_temperature=config.temperature if infonce else config.hard_temperature,
        schedule="constant" if infonce else config.schedule,
        schedule_end=config.schedule_end,
        grouping=config.grouping,
        gather_across_devices=gather,
        objective="split" if config.loss == "mac-split" else "mac",
        split_weight=config.split_weight,
        false_negative_margin=config.false_negative_margin,
        **cache,
    )
