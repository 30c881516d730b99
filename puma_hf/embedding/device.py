"""Run prepared batches through the model and bring the rows back, without waiting for each."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from puma_hf.embedding.loader import num_tokens

# Batches on the device at a time: one computes while the next one waits, so the device never does.
_IN_FLIGHT = 2

Rows = tuple[tuple[int, ...], Tensor]


class Runner:
    """Embeds batches one after another; on CUDA rows arrive some batches later.

    Args:
        model: A SentenceTransformer whose first module is a `PumaTransformer`, in evaluation mode.
        truncate_dim: Keep the first so many dimensions, and scale them to unit length.
    """

    def __init__(self, model: Any, truncate_dim: int | None = None) -> None:
        self._modules, self._device = list(model), torch.device(model.device)
        self._truncate_dim = truncate_dim
        self._in_flight: deque[tuple[tuple[int, ...], Tensor, Any]] = deque()

    def put(self, indices: tuple[int, ...], batch: Any) -> list[Rows]:
        """Start a batch.

        Args:
            indices: Positions of its inputs in the corpus.
            batch: What a packer made of them.

        Returns:
            What has arrived: the indices and float32 rows `(num_inputs, embedding_dim)` of earlier batches.
        """
        try:
            rows = self._embed(_to_device(batch, self._device))
        except torch.OutOfMemoryError as error:
            error.add_note(f"This batch has {num_tokens(batch)} tokens: lower max_batch_tokens.")
            raise
        if self._device.type != "cuda":
            return [(indices, rows.cpu().clone())]  # a clone, made outside inference mode, is a tensor like any other
        self._in_flight.append((indices, *_copy_back(rows)))
        return self.take(_IN_FLIGHT)

    def take(self, left: int = 0) -> list[Rows]:
        """Wait until no more than `left` batches are on the device.

        Returns:
            Their indices and rows.
        """
        arrived = []
        while len(self._in_flight) > left:
            indices, rows, event = self._in_flight.popleft()
            event.synchronize()
            arrived.append((indices, rows.clone()))  # pinned memory goes back, to be used again
        return arrived

    @torch.inference_mode()
    def _embed(self, batch: Any) -> Tensor:
        features = self._modules[0].embed_batch(batch)
        for module in self._modules[1:]:
            features = module(features)
        rows: Tensor = features["sentence_embedding"].float()
        return rows if self._truncate_dim is None else normalize(rows[:, : self._truncate_dim], dim=1)


def _to_device(batch: Any, device: torch.device) -> Any:
    if not isinstance(batch, dict):
        return batch.to(device, non_blocking=True)
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _copy_back(rows: Tensor) -> tuple[Tensor, Any]:
    """Rows in pinned memory, complete when the event has happened."""
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(rows.device))  # by default that of the current device
    return host, event
