"""What every depth of a model would answer, from one forward pass of the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from tqdm.auto import tqdm

from puma_hf.flops import plain_forward
from puma_hf.modeling.modeling_puma import last_token_state


def decoder_of(model: SentenceTransformer) -> Any:
    """The decoder of a PUMA model: what has the `layers` and the final `norm`.

    Args:
        model: A `SentenceTransformer` of a PUMA directory.

    Returns:
        Its `language_model`.

    Raises:
        ValueError: If it is another kind of model, or has modules after the PUMA model.
    """
    decoder = getattr(getattr(model[0], "model", None), "language_model", None)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList) or len(model) > 1:
        names = [type(module).__name__ for module in model]
        raise ValueError(
            f"The model is made of {names}, must be a PUMA model alone, whose decoder layers are known. Make one with "
            "`puma-hf prune`, or pass the original checkpoint."
        )
    return decoder


def keep_last_depths(model: SentenceTransformer) -> range:
    """Each k below the number of layers at which a model may keep its first k - 1 layers and the last.

    Where DeepStack adds features after the first layers, those stay.

    Raises:
        ValueError: If the last layer's attention is of another type than that of layers before it.
    """
    decoder, config = decoder_of(model), cast(Any, model[0]).model.config
    depths = range(config.num_deepstack_layers + 1, len(decoder.layers))
    if len(types := set(getattr(decoder.config, "layer_types", None) or ())) > 1:
        raise ValueError(
            f"keep_last takes each state through the last layer, but the layers' kinds of attention, {sorted(types)}, "
            "have masks of their own. Leave it out, and evaluate such models one by one."
        )
    return depths


class _Watch:
    """Hooks that keep the last token's state after each decoder layer, and nothing else."""

    def __init__(self, model: SentenceTransformer, joined: Sequence[int] = ()) -> None:
        self.model = model
        self.decoder = decoder_of(model)
        self.joined = joined
        self.mask: Tensor | None = None
        self.states: list[Tensor] = []
        self.joined_states: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [
            self.model[0].register_forward_pre_hook(self._begin),
            *(layer.register_forward_hook(self._keep) for layer in self.decoder.layers),
            *(self.decoder.layers[k - 1].register_forward_pre_hook(self._join, with_kwargs=True) for k in self.joined),
            self.model[0].register_forward_hook(self._finish),
        ]
        try:
            with plain_forward(self.model):  # the fast path calls no layer as a whole
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self.mask, self.states, self.joined_states = None, [], []

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.mask, self.states, self.joined_states = args[0].get("attention_mask"), [], []

    def _join(self, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Take what comes into a layer through the last one; not as a call, which the hooks would count."""
        output = self.decoder.layers[-1].forward(*args, **options)
        self.joined_states.append(last_token_state(output[0] if isinstance(output, tuple) else output, self.mask))

    def _keep(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Picking rows copies them, so a layer's other positions are free to go.
        self.states.append(last_token_state(output[0] if isinstance(output, tuple) else output, self.mask))

    def _finish(self, module: nn.Module, args: tuple[Any, ...], features: dict[str, Any]) -> dict[str, Any]:
        norm: nn.Module = self.decoder.norm
        device = next(norm.parameters()).device
        normed = norm(torch.stack([state.to(device) for state in [*self.states, *self.joined_states]], dim=1))
        embeddings = nn.functional.normalize(normed.float(), dim=-1)
        return {**features, "sentence_embedding": embeddings.flatten(start_dim=1)}


def encode_all_layers(
    model: SentenceTransformer,
    inputs: Sequence[Any],
    *,
    prompt: str | None = None,
    batch_size: int = 32,
    processing_kwargs: Mapping[str, Any] | None = None,
    keep_last: bool = False,
) -> Tensor:
    """Embed inputs as every model pruned to k = 1 .. L layers would, in one forward pass of all L.

    The embedding at depth k is `L2(final_norm(h_k)[RET])`, where h_k is what layer k hands on: pruning drops the deeper
    layers and changes nothing else. Of each layer only the last unmasked token's state is kept, so memory grows by
    `L * hidden_size` numbers an input, not by the length of the sequence.

    Args:
        model: A `SentenceTransformer` of a PUMA directory of L layers.
        inputs: Inputs of `model.encode`.
        prompt: Their instruction; None for none.
        batch_size: Inputs per forward pass.
        processing_kwargs: As in `model.encode`.
        keep_last: Whether to embed as the models of the first k - 1 layers and the last would, too: one more call of
            the last layer for each.

    Returns:
        `(L, len(inputs), hidden_size)`, float32, on the CPU, each row of length 1; row k - 1 is that of k layers. With
        `keep_last` a row for each of `keep_last_depths` comes after these.

    Raises:
        ValueError: If the model is no PUMA model, or an embedding is not finite.

    Example:
        >>> encode_all_layers(model, ["a red apple", {"image": "apple.png"}]).shape  # doctest: +SKIP
        torch.Size([28, 2, 1536])

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, layer-pruned self-distillation, for the embedding.
    """
    num_layers, joined = len(decoder_of(model).layers), keep_last_depths(model) if keep_last else range(0)
    truncate_dim, model.truncate_dim = model.truncate_dim, None  # it would cut the layers, which lie side by side
    try:
        with _Watch(model, joined).watching():
            # The empty prompt, unlike None, keeps a SentenceTransformer's default prompt away.
            encoded = model.encode(
                list(inputs),
                prompt=prompt or "",
                batch_size=batch_size,
                show_progress_bar=False,
                processing_kwargs=processing_kwargs,
            )
    finally:
        model.truncate_dim = truncate_dim
    embeddings: Tensor = torch.as_tensor(encoded).unflatten(1, (num_layers + len(joined), -1)).transpose(0, 1)
    places = [f"layer {k} of {num_layers}" for k in range(1, num_layers + 1)]
    _check_finite(embeddings, places + [f"the first {k - 1} layers and the last" for k in joined])
    return embeddings


def _check_finite(embeddings: Tensor, places: Sequence[str]) -> None:
    spoilt = (~torch.isfinite(embeddings).all(dim=2)).sum(dim=1)
    if spoilt.any():
        first = int(spoilt.nonzero()[0])
        raise ValueError(
            f"After {places[first]}, {int(spoilt[first])} of {embeddings.shape[1]} embeddings "
            "hold NaN or infinity. Look at their inputs, or use float32 or bfloat16 instead of float16."
        )


def progress_bar(total: int, name: str, *, show: bool) -> Any:
    """A bar over inputs, with the time left.

    Args:
        total: Number of inputs.
        name: What is encoded.
        show: Whether to show it.

    Returns:
        The bar, a context manager.
    """
    return tqdm(total=total, desc=name, unit="input", disable=not show)
