"""MAC-Loss over batches larger than memory, by gradient caching that runs a frozen vision tower once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from sentence_transformers.base.losses import gradcache
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext
from torch import Tensor, nn

from .mac_puma import MultimodalMACLoss, read_ids

# Of each medium: the patches of all samples, their grids, and how many of these a sample has.
_MEDIA = {
    "image": ("pixel_values", "image_grid_thw", "num_images_per_sample"),
    "video": ("pixel_values_videos", "video_grid_thw", "num_videos_per_sample"),
}
# Features with one column per token, and so the only ones that lose the padding of a mini-batch.
_TOKEN_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids")
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


class _Batch(NamedTuple):
    """What belongs to the embeddings of a batch: ids of each column, and where its rows are sorted, their order."""

    modality_ids: list[Tensor]
    content_ids: list[Tensor] | None
    orders: list[list[int]]


class CachedMultimodalMACLoss(CachedLossMixin, MultimodalMACLoss):
    """[`MultimodalMACLoss`] whose batch may be far larger than what fits into memory at once.

    Gradient caching (Gao et al. 2021, arXiv 2101.06983), as sentence-transformers has it, embeds a batch twice: first
    without gradients, which gives the loss and its gradient with respect to every embedding, then once more, mini-batch
    by mini-batch, to carry these gradients into the model. Value and gradients are those of the plain loss but for the
    random numbers of dropout; memory is that of one mini-batch. The time of the first pass is added, so take the plain
    loss while the batch fits, and a large `per_device_train_batch_size` here: gradient accumulation gives no further
    negatives.

    For PUMA models a frozen vision tower runs once: what it returns in the first pass, `num_visual_tokens *
    hidden_size` numbers per image, less than its pixels, is kept for the second. Mini-batches hold samples of like
    length, so a text is not padded to the length of an image.

    Args:
        model: A SentenceTransformer.
        arguments: Those of [`MultimodalMACLoss`], in its order, or by name as `options`.
        mini_batch_size: Samples embedded at a time, of one column. It changes neither value nor gradients: take the
            largest that fits.
        mini_batch_num_tokens: Budget of tokens embedded at a time instead, padding and visual tokens included, so that
            mini-batches of large images are small and those of texts large. A sample that exceeds it is embedded alone.
            On several devices it needs sentence-transformers 6.2.
        keep_image_features: Run a frozen vision tower once. With False it runs in both passes, as a trainable one does.
        show_progress_bar: Show the progress over the mini-batches.
        options: See `arguments`.

    Example:
        >>> CachedMultimodalMACLoss(nn.Identity(), mini_batch_size=16).get_config_dict()["mini_batch_size"]
        16
    """

    citation = MultimodalMACLoss.citation + _GRADIENT_CACHING_CITATION

    def __init__(
        self,
        model: nn.Module,
        *arguments: Any,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        keep_image_features: bool = True,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, *arguments, **options)
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.keep_image_features = keep_image_features
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Embed the columns without gradients, compute the loss, and arrange for the second pass in its `backward()`.

        Arguments and errors are those of [`MultimodalMACLoss`]; the features stay as they are.
        """
        # Copies of the dicts, not of the tensors: what is cut and kept must not reach the caller's features.
        columns = [dict(features) for features in sentence_features]
        batch = _Batch(*read_ids(columns, labels), [])
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.mini_batch_num_tokens and distributed and not hasattr(gradcache, "_ddp_replay_context"):
            # The devices' numbers of mini-batches differ, and they would wait for each other for ever.
            raise ValueError("mini_batch_num_tokens on several devices needs sentence-transformers 6.2. Upgrade it.")
        if (puma := find_puma_model(self.model)) is not None:
            for index, features in enumerate(columns):
                cut = MiniBatches(features, self.mini_batch_size, self.mini_batch_num_tokens, puma.device.type)
                batch.orders.append(cut.order)
                # All that the mixin reads of a column to cut it is a cost per sample.
                columns[index] = {"attention_mask": cut.costs, "mini_batches": cut}
        self.warn_if_schedule_idles(training=self.model.training)
        # As labels of the mixin, which every wrapper hands on untouched.
        loss: Tensor = self.forward_cached(columns, batch)  # type: ignore[arg-type]
        return loss

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """The plain loss of embeddings that come in mini-batches, each `(num_samples, embedding_dim)`."""
        embeddings = [torch.cat(column) for column in reps]
        for index, order in enumerate(labels.orders):
            embeddings[index] = embeddings[index][torch.tensor(order).argsort().to(embeddings[index].device)]
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
        """Embed one mini-batch, in either pass, as the mixin does; the first pass asks for the random state."""
        cut: MiniBatches | None = sentence_feature.get("mini_batches")
        if cut is None:
            options = begin, end, with_grad, copy_random_state, random_state
            found: tuple[Tensor, RandContext | None] = super().embed_minibatch(sentence_feature, *options)
            return found
        features = cut.take(begin, end)
        keep = copy_random_state and self.keep_image_features and can_keep_image_features(self.model)
        keeping = cut.keeping(find_puma_model(self.model).visual, begin) if keep else nullcontext()
        with random_state or nullcontext(), torch.autocast(**cut.autocast), torch.set_grad_enabled(with_grad), keeping:
            state = RandContext(*features.values()) if copy_random_state else None
            embeddings: Tensor = self.model(features)["sentence_embedding"]
        return embeddings, state

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the model card shows."""
        names = ("mini_batch_size", "mini_batch_num_tokens", "keep_image_features")
        return {**super().get_config_dict(), **{name: getattr(self, name) for name in names}}


def find_puma_model(model: nn.Module) -> Any:
    """The `PumaModel` inside a SentenceTransformer, however a trainer has wrapped it; None if there is none."""
    # torch.compile and DistributedDataParallel each put a module around it.
    inner: Any = model
    while (wrapped := getattr(inner, "_orig_mod", getattr(inner, "module", None))) is not None:
        inner = wrapped
    first = inner[0] if isinstance(inner, nn.Sequential) and len(inner) else None
    backbone = getattr(first, "model", None)
    return backbone if str(getattr(getattr(backbone, "config", None), "model_type", "")).startswith("puma") else None


def runs_tower_once(puma: Any) -> bool:
    """Whether what the vision tower returns may be used twice: it is frozen."""
    return not any(parameter.requires_grad for parameter in puma.visual.parameters())


def can_keep_image_features(model: nn.Module) -> bool:
    """Whether they may be used twice, and are seen: compiled code passes hooks by."""
    compiled = any(hasattr(module, "_orig_mod") for module in model.modules())
    return not compiled and runs_tower_once(find_puma_model(model))


class MiniBatches:
    """The mini-batches of one column, the same in both passes, and the image features of the first pass.

    Rows are sorted by length, so that a mini-batch holds little padding, and those with images come last:
    gradients are exchanged between devices in the last mini-batch, which must reach a trained vision tower too. A
    single mini-batch keeps the order of the rows, `order`. `costs`, `(batch_size, 1)`, are such that the mixin, which
    packs rows up to a total of `num_tokens`, gets a budget of samples times the tokens of the longest of them.
    """

    def __init__(self, features: dict[str, Any], size: int, num_tokens: int | None, device_type: str) -> None:
        self._features = features
        self._media: dict[str, Sequence[Tensor]] = {}  # of each sample
        self._encoded: dict[int, list[Any]] = {}
        # Of the first pass; the second is usually called outside it, by `backward()`.
        enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if enabled else None
        self.autocast: dict[str, Any] = {"device_type": device_type, "dtype": dtype, "enabled": enabled}
        num_rows, width = features["input_ids"].shape
        budget = num_rows * width if num_tokens is None else num_tokens
        self.order = list(range(num_rows))
        self.costs = torch.ones(num_rows, 1, dtype=torch.long)
        if num_rows * width <= budget if num_tokens else num_rows <= size:
            return
        counts = [0] * num_rows
        for pixels, grid, count in _MEDIA.values():
            if features.get(pixels) is not None:
                per_sample = features[count].tolist()
                counts = [sum(both) for both in zip(counts, per_sample, strict=True)]
                patches = features[grid].cpu().prod(dim=1).split(per_sample)
                self._media[grid] = features[grid].split(per_sample)
                self._media[pixels] = features[pixels].split([int(part.sum()) for part in patches])
        lengths: list[int] = features["attention_mask"].sum(dim=1).tolist()
        self.order.sort(key=lambda row: (counts[row] > 0, lengths[row]))
        begin = widest = 0
        for end, row in enumerate(self.order if num_tokens else [], start=1):
            widest = max(widest, lengths[row])
            if (end - begin) * widest > budget and end - begin > 1:
                begin, widest = end - 1, lengths[row]
            # The others of its mini-batch cost 1 each.
            self.costs[begin] = max(budget - (end - begin - 1), 1)

    def take(self, begin: int, end: int) -> dict[str, Any]:
        """Features of one mini-batch, without padding that its rows do not need, with what was kept for it."""
        rows = self.order[begin:end]
        if len(rows) == len(self.order):
            features = dict(self._features)
        else:
            index, features = torch.tensor(rows), {}
            for key, value in self._features.items():
                # Pixels of all samples are one long tensor, without a dimension for the batch: the grids cut them.
                if key in self._media:
                    parts = [self._media[key][row] for row in rows]
                    features |= {key: torch.cat(parts)} if any(map(len, parts)) else {}
                elif isinstance(value, Tensor) and value.ndim and len(value) == len(self.order):
                    features[key] = value[index.to(value.device)]
                else:
                    features[key] = value
            first, last = features["attention_mask"].any(dim=0).nonzero().flatten()[[0, -1]].tolist()
            features |= {key: features[key][:, first : last + 1] for key in _TOKEN_KEYS if key in features}
        media = [medium for medium, (pixels, *_) in _MEDIA.items() if features.get(pixels) is not None]
        if media and len(self._encoded.get(begin, [])) == len(media):
            for medium in media:
                del features[_MEDIA[medium][0]]
            features["mm_encoder_outputs"] = dict(zip(media, self._encoded[begin], strict=True))
        return features

    @contextmanager
    def keeping(self, tower: nn.Module, begin: int) -> Iterator[None]:
        """Keep the image features that the tower gives for the mini-batch at `begin` in this context."""
        kept = self._encoded[begin] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            def whole(part: Any) -> Any:  # the model puts together what it may have cut by images
                return (part,) if isinstance(part, Tensor) else part

            # Without the states of all patches, which are as large and which nobody reads.
            deep = [whole(part) for part in getattr(output, "deepstack_features", None) or ()]  # Qwen3-VL's
            more = {"deepstack_features": deep} if deep else {}
            kept.append(type(output)(pooler_output=whole(output.pooler_output), **more))

        # The model runs its tower itself, under whatever wraps it: autocast, another device's shards.
        handle = tower.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()
