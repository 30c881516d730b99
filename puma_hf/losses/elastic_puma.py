"""One checkpoint of any depth: a loss after several numbers of layers, from one forward pass of the deepest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from torch import Tensor, nn

from .cached_mac_puma import find_puma_model
from .mac_puma import PUMA_CITATION
from .schedule_puma import DEPTH_WEIGHTS, DepthWeights, check_choice

# Where the model is told after which layers to embed.
DEPTHS_KEY = "exit_depths"


class ElasticDepthLoss(nn.Module):
    """Train a model to embed after each of several depths, so that k is chosen when it is loaded.

    `sum_k w_k loss(norm(h_k)[RET])`: the loss inside is computed of what each depth embeds, all from one forward pass
    of the deepest. Each of these exits costs the final norm of one token, and no layer. A model cut at one of them
    embeds as the exit does: `from_pretrained(directory, num_kept_layers=k)`. The depths are noted in the model's
    configuration as `trained_depths`.

    With self-distillation inside, every depth aims at the same states, those of the full model, and all embed into
    one space: the queries of 4 layers can search the candidates of 12.

    Args:
        model: A SentenceTransformer that holds a PUMA model.
        loss: A loss of the same model: MAC-Loss, plain or cached, self-distillation, both joined, or a
            `MatryoshkaLoss` of one, which then must be inside: depth by width.
        depths: After how many layers to embed, such as `(4, 8, 12)`. The last is the number of layers that the model
            has: prune it to that.
        depth_weights: `"equal"`: each depth has the weight 1. `"linear"`: as deep as it is. `"last"`: the deepest
            twice as much as all others together. These sum to the number of depths. `"sampled"`: one depth a batch,
            drawn evenly and the same on all devices; no layer above it is computed, and launched on several devices it
            needs `ddp_find_unused_parameters=True`.

    Raises:
        ValueError: If the depths are none that the model has, or `MatryoshkaLoss` is around this loss.

    Example:
        >>> loss = ElasticDepthLoss(model, SelfDistillationLoss(model), depths=(4, 8, 12))  # doctest: +SKIP

    Source: ours. PUMA, ACM MM 2025, arXiv 2507.08064, trains one depth. For text encoders sentence-transformers has
    AdaptiveLayerLoss, after 2D Matryoshka sentence embeddings (Li et al., arXiv 2402.14776).
    """

    citation = PUMA_CITATION

    def __init__(
        self, model: nn.Module, loss: nn.Module, depths: Sequence[int], depth_weights: DepthWeights = DEPTH_WEIGHTS
    ) -> None:
        super().__init__()
        check_choice("depth_weights", depth_weights, DepthWeights)
        config: Any = getattr(find_puma_model(model), "config", None)
        if config is None or len([*model.children()]) > 1:
            problem = "The model is not a PUMA model alone, as `puma-hf prune` has it"
            raise ValueError(f"{problem}: make one to train depths.")
        config.check_depths(depths)
        if (deepest := depths[-1]) != config.num_kept_layers:
            problem = f"depths={tuple(depths)} must end in the model's own {config.num_kept_layers} layers"
            raise ValueError(f"{problem}. Add that depth, or cut the model first: puma-hf prune, to {deepest}.")
        self.model = model
        self.loss = loss
        self.depths, self.depth_weights = tuple(depths), depth_weights
        self._dim: int = config.text_config.hidden_size
        self._exits: list[tuple[int, float]] = self._weighted()
        config.trained_depths = list(depths)
        if uses_gradient_cache(loss):
            cached: Any = loss
            while not hasattr(cached, "calculate_loss"):  # inside of wrappers
                cached = cached.loss
            cached.calculate_loss = self._of_cached(cached.calculate_loss)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Any:
        """Embed every column after all depths and sum the losses: what the loss inside returns, a scalar or terms."""
        draws = self.depth_weights == "sampled" and self.model.training  # an evaluation is of all depths
        self._exits = self._drawn() if draws else self._weighted()
        depths = tuple(depth for depth, _ in self._exits)
        columns = [{**features, DEPTHS_KEY: depths} for features in sentence_features]
        if uses_gradient_cache(self.loss):
            return self.loss(columns, labels)
        model: Any = self.model
        exits = _Exits(model.forward, self._of_exit)
        total: Any = 0.0
        had_own = "forward" in vars(model)
        before, model.forward = model.forward, exits
        try:
            for exits.number, (_, weight) in enumerate(self._exits):
                exits.column = 0
                total = total + weight * self.loss([dict(features) for features in columns], labels)
        finally:
            model.forward = before
            if not had_own:
                del model.forward
        return total

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the model card shows."""
        inner: dict[str, Any] = getattr(self.loss, "get_config_dict", dict)()
        own = {"depths": list(self.depths), "depth_weights": self.depth_weights}
        return {"loss": type(self.loss).__name__, **inner, **own}

    def _weighted(self) -> list[tuple[int, float]]:
        depths, number = self.depths, len(self.depths)
        weights = [1.0] * number
        if self.depth_weights == "linear":
            weights = [number * depth / sum(depths) for depth in depths]
        elif self.depth_weights == "last" and number > 1:
            weights = [number / (3 * (number - 1))] * (number - 1) + [2 * number / 3]
        return list(zip(depths, weights, strict=True))

    def _drawn(self) -> list[tuple[int, float]]:
        # From torch's generator, whose state a checkpoint holds; other devices' has gone another way by then.
        drawn = torch.randint(len(self.depths), (1,))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            drawn = drawn.to(next(self.model.parameters()).device)
            torch.distributed.broadcast(drawn, src=0)
        return [(self.depths[int(drawn)], 1.0)]

    def _of_cached(self, calculate_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`calculate_loss` of embeddings `(num_samples, num_depths * embedding_dim)`, side by side, in mini-batches."""

        def calculate(reps: list[list[Tensor]], *args: Any, **options: Any) -> Tensor:
            total = torch.zeros(())
            for number, (_, weight) in enumerate(self._exits):
                rows = [[self._of_exit(part, number) for part in column] for column in reps]
                # The loss propagates to these leaves itself; from there on it goes weighted, exit by exit.
                leaves: Any = [[part.detach().requires_grad_(torch.is_grad_enabled()) for part in one] for one in rows]
                loss = calculate_loss(leaves, *args, **options)
                total = total.to(loss) + weight * loss
                for column, propagated in zip(rows, leaves, strict=True) if torch.is_grad_enabled() else ():
                    for part, leaf in zip(column, propagated, strict=True):
                        part.backward(weight * leaf.grad)
            return total

        return calculate

    def _of_exit(self, rows: Tensor, number: int) -> Tensor:
        """What one exit has of `(batch_size, num_exits * embedding_dim)`."""
        rows = rows.flatten(1)  # the code beside older models leaves exits apart
        if rows.shape[1] != len(self._exits) * self._dim:  # cut to the first dimensions of all exits together
            raise ValueError("A loss is around ElasticDepthLoss. Take ElasticDepthLoss(model, MatryoshkaLoss(...)).")
        return rows[:, number * self._dim : (number + 1) * self._dim]


class _Exits:
    """Stands for the model's `forward`: the first exit's loss embeds the columns, the others get the rest of it."""

    def __init__(self, forward: Callable[..., Any], of_exit: Callable[[Tensor, int], Tensor]) -> None:
        self.forward, self.of_exit = forward, of_exit
        self.number = self.column = 0
        self.outputs: list[dict[str, Any]] = []

    def __call__(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        if self.number == 0:
            self.outputs.append(self.forward(features, **options))
        output = self.outputs[self.column]
        self.column += 1
        names = ("sentence_embedding", "pooler_output")
        one = {DEPTHS_KEY: output[DEPTHS_KEY][self.number :][:1]}
        return {**output, **one, **{name: self.of_exit(output[name], self.number) for name in names}}
