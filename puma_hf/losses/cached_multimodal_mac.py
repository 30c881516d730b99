"""MAC-Loss over batches larger than memory, by gradient caching that runs a frozen vision tower once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import gradcache
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext, has_static_embedding_input
from sentence_transformers.util import cos_sim
from torch import Tensor, nn

from puma_hf.losses.contrastive import SPLIT_WEIGHT
from puma_hf.losses.image_features import MiniBatches, can_keep_image_features, find_puma_model
from puma_hf.losses.multimodal_mac import (
    MACObjective,
    ModalityGrouping,
    MultimodalMACLoss,
    read_content_ids,
    read_modality_ids,
)
from puma_hf.settings import HARD_TEMPERATURE, SCHEDULE, SCHEDULE_END, TEMPERATURE, Schedule

_MINI_BATCHES = "mini_batches"
_GRADIENT_CACHING_CITATION = """
@misc{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Gao, Luyu and Zhang, Yunyi and Han, Jiawei and Callan, Jamie},
    year={2021},
    eprint={2101.06983},
    archivePrefix={arXiv},
    url={https://arxiv.org/abs/2101.06983},
}
"""


class _Ids(NamedTuple):
    """Ids of each column, and where its mini-batches are in another order than its rows, that order."""

    modality_ids: list[Tensor]
    content_ids: list[Tensor] | None
    orders: list[list[int]]


class CachedMultimodalMACLoss(CachedLossMixin, MultimodalMACLoss):
    """[`MultimodalMACLoss`] whose batch may be far larger than what fits into memory at once.

    Contrastive learning lives on negatives, so on large batches, whose samples cannot be embedded one
    mini-batch after the other as usual: each needs all others. Gradient caching (Gao et al. 2021, arXiv
    2101.06983) embeds them twice: first without gradients, which gives the loss and its gradient with respect
    to every embedding, then once more, mini-batch by mini-batch, to carry these gradients into the model. Value
    and gradients are those of the plain loss; memory is that of one mini-batch. Only the time of the first pass
    is added.

    Three things beyond the mixin of sentence-transformers, for PUMA models:

    - A frozen vision tower runs once: what it returns in the first pass is kept for the second. That is
      `num_visual_tokens * hidden_size` numbers per image, less than its pixels.
    - Mini-batches hold samples of like length, so a text is not padded to the length of an image.
    - Both passes run under the same autocast, so the cached gradients fit the embeddings.

    With other models the mini-batches are those of sentence-transformers.

    Args:
        model: See [`MultimodalMACLoss`], as for the next ten.
        temperature: See there.
        hard_temperature: See there.
        schedule: See there.
        grouping: See there.
        similarity_fct: See there.
        gather_across_devices: See there.
        objective: See there.
        split_weight: See there.
        false_negative_margin: See there.
        schedule_end: See there.
        mini_batch_size: Samples embedded at a time, of one column. It changes neither value nor gradients: take the
            largest that fits.
        mini_batch_num_tokens: Budget of tokens embedded at a time instead, padding and visual tokens included, so
            that mini-batches of large images are small and those of texts large. A sample that exceeds it is
            embedded alone. On several devices it needs sentence-transformers 6.2.
        keep_image_features: Run a frozen vision tower once. With False it runs in both passes, as a trainable one
            does.
        show_progress_bar: Show the progress over the mini-batches.

    Requirements:
        As for [`MultimodalMACLoss`].

    Inputs:
        As for [`MultimodalMACLoss`].

    Recommendations:
        - A large `per_device_train_batch_size`. Gradient accumulation gives no further negatives; this does.
        - The plain loss while the batch fits into memory: it is faster by the first pass.

    Relations:
        - Equal to [`MultimodalMACLoss`] but for the random numbers of dropout.
        - Inside `MatryoshkaLoss` it embeds each mini-batch twice for all dimensions together.
        - With equal temperatures it is `CachedMultipleNegativesRankingLoss(scale=1 / temperature)`.

    Attributes:
        negative_counts: See [`MultimodalMACLoss`], as for the next two.
        statistics: See there.
        candidates_seen: See there.

    Raises:
        ValueError: As for [`MultimodalMACLoss`]; or if a mini-batch size or budget is not a positive integer, or the
            model is a `StaticEmbedding`.

    Example:

    ```python
    >>> from puma_hf.losses.cached_multimodal_mac import CachedMultimodalMACLoss

    >>> loss = CachedMultimodalMACLoss(nn.Identity(), mini_batch_size=16)
    >>> loss.get_config_dict()["mini_batch_size"]
    16
    ```

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, for the loss; arXiv 2101.06983 for the caching.
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
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        keep_image_features: bool = True,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__(
            model,
            temperature,
            hard_temperature,
            schedule,
            grouping,
            similarity_fct,
            gather_across_devices,
            objective=objective,
            split_weight=split_weight,
            false_negative_margin=false_negative_margin,
            schedule_end=schedule_end,
        )
        _check_positive("mini_batch_size", mini_batch_size, 32)
        if mini_batch_num_tokens is not None:
            _check_positive("mini_batch_num_tokens", mini_batch_num_tokens, "8192, or None to count samples")
        if isinstance(model, SentenceTransformer) and has_static_embedding_input(model):
            raise ValueError(
                "the model embeds its inputs with a StaticEmbedding, whose features cannot be cut into mini-batches. "
                "Use MultimodalMACLoss: such a model needs little memory."
            )
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.keep_image_features = keep_image_features
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Embed the columns without gradients, compute the loss, and arrange for the second pass.

        Args:
            sentence_features: One dict of model inputs per column: anchor, positive, negatives. They stay as they
                are.
            labels: Modality ids, `(batch_size, num_columns)`; used only if the features have none.

        Returns:
            The loss, a scalar; its `backward()` embeds the columns again.

        Raises:
            ValueError: If there are no modality ids, or they do not fit the columns.
        """
        columns = [dict(features) for features in sentence_features]
        ids: Any = _Ids(read_modality_ids(columns, labels), read_content_ids(columns), [])
        self._check_devices()
        puma = find_puma_model(self.model)
        if puma is not None:
            for index, features in enumerate(columns):
                batches = MiniBatches(features, self.mini_batch_size, self.mini_batch_num_tokens, puma.device.type)
                ids.orders.append(batches.order)
                # What the mixin cuts into mini-batches: all that it reads of a column is a cost per sample.
                columns[index] = {"attention_mask": batches.costs, _MINI_BATCHES: batches}
        self.warn_if_schedule_idles(training=self.model.training)
        # As labels of the mixin, which every wrapper hands on untouched.
        return self.forward_cached(columns, ids)

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """The plain loss of embeddings that come in mini-batches.

        Args:
            reps: For each column the embeddings of its mini-batches, each `(num_samples, embedding_dim)`.
            labels: The ids of the rows and their order in the mini-batches, from `forward`.
            with_backward: Propagate back to the embeddings, and return the loss detached.

        Returns:
            The loss, a scalar.
        """
        embeddings = [torch.cat(column) for column in reps]
        for index, order in enumerate(labels.orders):
            places = torch.tensor(order).argsort().to(embeddings[index].device)
            embeddings[index] = embeddings[index][places]
        loss = self.compute_loss_from_embeddings(embeddings, labels.modality_ids, labels.content_ids)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Any],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """Embed one mini-batch, in either pass.

        Args:
            sentence_feature: The column, as `forward` made it.
            begin: First sample of the mini-batch, in the order of the mini-batches.
            end: One after the last.
            with_grad: Whether this is the second pass.
            copy_random_state: Return the state of the random numbers, for the second pass to use again.
            random_state: The state of the first pass.

        Returns:
            Embeddings `(end - begin, embedding_dim)`, and the state if it was asked for.
        """
        batches: MiniBatches | None = sentence_feature.get(_MINI_BATCHES)
        puma = find_puma_model(self.model)
        if batches is None or puma is None:
            embedded: tuple[Tensor, RandContext | None] = super().embed_minibatch(
                sentence_feature, begin, end, with_grad, copy_random_state, random_state
            )
            return embedded
        features = batches.take(begin, end)
        keep = copy_random_state and self.keep_image_features and can_keep_image_features(self.model, puma)
        with (
            random_state or nullcontext(),
            batches.autocast(),
            torch.set_grad_enabled(with_grad),
            batches.keeping(puma, features, begin) if keep else nullcontext(),
        ):
            state = RandContext(*features.values()) if copy_random_state else None
            embeddings: Tensor = self.model(features)["sentence_embedding"]
        return embeddings, state

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the model card shows."""
        return {
            **super().get_config_dict(),
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
            "keep_image_features": self.keep_image_features,
        }

    @property
    def citation(self) -> str:
        """BibTeX of both papers, for the model card."""
        return super().citation + _GRADIENT_CACHING_CITATION

    def _check_devices(self) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        size = torch.distributed.get_world_size() if distributed else 1
        if self.mini_batch_num_tokens is not None and size > 1 and not hasattr(gradcache, "_ddp_replay_context"):
            raise ValueError(
                f"mini_batch_num_tokens is {self.mini_batch_num_tokens} on {size} devices, whose numbers of "
                "mini-batches differ then; before sentence-transformers 6.2 they would wait for each other forever. "
                "Upgrade sentence-transformers, or set mini_batch_size instead."
            )


def _check_positive(name: str, value: Any, example: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{name} is {value!r}, but it must be an integer of at least 1. Use a value such as {example}."
        )
