"""The SentenceTransformer input module of a PUMA model: any modality in, one normalised embedding out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from sentence_transformers.base.modules import Transformer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .content_ids_puma import content_ids


class PumaTransformer(Transformer):
    """Runs a PUMA processor and model inside a `SentenceTransformer`.

    `modules.json` of a PUMA directory names this class, so `SentenceTransformer(path,
    trust_remote_code=True)` finds it where puma_hf is not installed. It stamps `modality_ids` and `content_ids`,
    both `(batch_size,)`, on the features of every batch, which MAC-Loss reads, and adds to them:

    - `sentence_embedding` `(batch_size, embedding_dim)`: the L2-normalised `[RET]` state;
    - `pooler_output` `(batch_size, embedding_dim)`: the `[RET]` state after the final norm, before
      normalisation, which self-distillation compares.

    Example:

    ```python
    >>> from sentence_transformers import SentenceTransformer

    >>> model = SentenceTransformer("org/puma", trust_remote_code=True)  # doctest: +SKIP
    >>> model.encode(["a red apple", {"image": "apple.png", "text": "in green"}]).shape  # doctest: +SKIP
    (2, 1536)
    ```
    """

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        processing_kwargs: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Turn inputs of any mix of modalities into features.

        Args:
            inputs: The inputs of one batch; see `PumaProcessor.process_inputs` for what they may be.
            prompt: Instruction, placed before the text of every input that brings none of its own.
            processing_kwargs: `{"image": {"size": ...}, "text": {"max_length": ...,
                "split_special_tokens": ...}}`.
            kwargs: `max_length` overrides the longest sequence in tokens; the rest of what trainers pass is
                unused.

        Returns:
            The processor's batch as a dict, with `modality_ids` and `content_ids`, both `(batch_size,)`; equal
            inputs have equal content ids.
        """
        if not inputs:
            return {}
        options = self._merge_processing_kwargs(processing_kwargs)
        text_options = options.get("text", {})
        features = self.processor.process_inputs(
            list(inputs),
            prompt=prompt,
            max_length=kwargs.get("max_length") or text_options.get("max_length"),
            split_special_tokens=text_options.get("split_special_tokens", False),
            images_kwargs=options.get("image"),
        )
        return {**features, "content_ids": content_ids(features), "modality": "message"}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add `sentence_embedding` and `pooler_output`, both `(batch_size, embedding_dim)`, to `features`."""
        accepted = inspect.signature(self.model.forward).parameters
        inputs = {key: value for key, value in {**features, **kwargs}.items() if key in accepted}
        outputs = self.model(**inputs, return_dict=True)
        features["sentence_embedding"] = outputs.embeddings
        features["pooler_output"] = outputs.pooler_output
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save model, processor and module settings, with this module's source file beside them."""
        super().save(output_path, *args, **kwargs)
        if not type(self).__module__.startswith("transformers_modules."):
            # SentenceTransformer.save writes the class's module into modules.json. An installed package's
            # name would not load elsewhere; the class of the file that the processor saved beside it does.
            self.__class__ = get_class_from_dynamic_module(
                f"{__name__.rsplit('.', 1)[-1]}.PumaTransformer", output_path
            )
