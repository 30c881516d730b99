"""From inputs to a batch for the fast path, without the weights, so that other processes can do it ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .packing_puma import PackedBatch, pack


@dataclass(frozen=True)
class Packer:
    """Prepares inputs; `PumaTransformer.packer` makes it.

    Args:
        processor: A `PumaProcessor`.
        image_token_id: The token that stands for a part of an image.
        merge_size: Patches along each side of what becomes one token.
        dtype: Data type of the pixels.
        prompt: Instruction, placed before the text of every input that brings none of its own.
        max_length: Longest sequence in tokens.
        split_special_tokens: Whether special tokens in a text are read as plain text.
        images_kwargs: Overrides for the image processor.
        packing: Whether to take the padding out.
        shared_prefix: Whether first tokens that inputs share are computed once.
        sequential: Whether positions count every token, instead of M-RoPE.

    Example:

    ```python
    >>> model = SentenceTransformer("puma-demo", trust_remote_code=True)  # doctest: +SKIP
    >>> batch = model[0].packer("Find the drawing.")(["a red apple", "a green one"])  # doctest: +SKIP
    >>> with torch.inference_mode():  # doctest: +SKIP
    ...     model[0].embed_batch(batch)["sentence_embedding"].shape
    torch.Size([2, 1536])
    ```
    """

    processor: Any
    image_token_id: int
    merge_size: int
    dtype: torch.dtype
    prompt: str | None = None
    max_length: int | None = None
    split_special_tokens: bool = False
    images_kwargs: dict[str, Any] | None = None
    packing: bool = True
    shared_prefix: bool = True
    sequential: bool = False

    def __call__(self, inputs: Sequence[Any]) -> PackedBatch | dict[str, Any]:
        """A batch of inputs; see `PumaProcessor.process_inputs` for what they may be, and for errors."""
        return self.pack(self.process(inputs))

    def process(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """The processor's features of a batch, padded; see `PumaProcessor.process_inputs`."""
        return dict(
            self.processor.process_inputs(
                list(inputs),
                prompt=self.prompt,
                max_length=self.max_length,
                split_special_tokens=self.split_special_tokens,
                images_kwargs=self.images_kwargs,
            )
        )

    def pack(self, features: dict[str, Any]) -> PackedBatch | dict[str, Any]:
        """The batch without padding; the features themselves where that cannot be, as with videos."""
        if not self.packing or features.get("pixel_values_videos") is not None:
            return features
        mask = features.get("attention_mask")
        mask = None if mask is None else mask.cpu()  # read twice, and brought from the device once
        if mask is not None and _has_holes(mask):
            return features
        return pack(
            {**features, "attention_mask": mask},
            image_token_id=self.image_token_id,
            merge_size=self.merge_size,
            dtype=self.dtype,
            shared_prefix=self.shared_prefix,
            sequential=self.sequential,
        )


def _has_holes(mask: torch.Tensor) -> bool:
    """Whether tokens are masked between others, or all of an input's: positions count those, packing would not."""
    kept = mask.bool()
    runs = kept[:, 0] + (kept[:, 1:] & ~kept[:, :-1]).sum(dim=1)
    return bool((runs != 1).any())


__all__ = ["Packer"]
