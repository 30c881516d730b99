"""The SentenceTransformer input module of a PUMA model: any modality in, one normalised embedding out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .content_ids_puma import content_ids
from .fast_path_puma import FastPath, can_pack, packed_states
from .modeling_puma import last_token_state
from .packing_puma import PackedBatch, Packer

try:  # transformers asks of a processor's code that all it imports is installed, but for what stands in a try
    from sentence_transformers.base.modules import Transformer
except ImportError as error:
    problem = f"PUMA as a SentenceTransformer needs sentence-transformers 6 or newer ({error})"
    raise ImportError(f"{problem}: pip install -U it.") from error

# Given by teachers and losses that have computed a part already, or want several depths; the fast path starts from
# tokens and pixels.
_MODEL_INPUTS = {"position_ids", "inputs_embeds", "mm_encoder_outputs", "exit_depths"}
# Tokens that are computed at once by default. A GPU is busy only with many; a CPU is with few, and its caches hold no
# more: passages embed 1.2 times as fast as in parts of 8,192.
CUDA_TOKENS = 16_384
CPU_TOKENS = 2_048


class PumaTransformer(Transformer):
    """Runs a PUMA processor and model inside a `SentenceTransformer`.

    `modules.json` of a PUMA directory names this class, so `SentenceTransformer(path, trust_remote_code=True)` finds it
    where puma_hf is not installed. It stamps `modality_ids` and `content_ids`, both `(batch_size,)`, on the features of
    every batch, which MAC-Loss reads, and adds to them:

    - `sentence_embedding` `(batch_size, embedding_dim)`: the L2-normalised `[RET]` state;
    - `pooler_output` `(batch_size, embedding_dim)`: the `[RET]` state after the final norm, before
      normalisation, which self-distillation compares;
    - `all_layer_embeddings`, for each kept layer `(batch_size, sequence_length, hidden_size)`, if the model's
      configuration has `output_hidden_states`, as AdaptiveLayerLoss and Matryoshka2dLoss set it.

    `encode(..., output_value="token_embeddings")` gives the states of an input's tokens after the final norm,
    `(num_tokens, hidden_size)`, in a second pass.

    Attributes:
        fast_path (`FastPath`, *optional*): The savings made in evaluation mode without gradients, as in `encode`: no
            padding, shared instructions computed once, the last layer for `[RET]` alone. The vectors are the same to
            rounding. `None` runs the plain forward pass of the model, as training does.

    Example:

    ```python
    >>> from sentence_transformers import SentenceTransformer

    >>> model = SentenceTransformer("org/puma", trust_remote_code=True)  # doctest: +SKIP
    >>> model.encode(["a red apple", {"image": "apple.png", "text": "in green"}]).shape  # doctest: +SKIP
    (2, 1536)
    ```
    """

    fast_path: FastPath | None = FastPath()

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, processing_kwargs: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Turn inputs of any mix of modalities into features.

        Args:
            inputs: The inputs of one batch; see `PumaProcessor.process_inputs` for what they may be.
            prompt: Instruction, placed before the text of every input that brings none of its own.
            processing_kwargs: `{"image": {"size": ...}, "text": {"max_length": ..., "split_special_tokens": ...}}`.
            kwargs: `max_length` in tokens; the rest of what trainers pass is unused.

        Returns:
            The processor's batch as a dict, with `content_ids`, `(batch_size,)`, which `encode` leaves out.
        """
        if not inputs:
            return {}
        packer = self.packer(prompt, processing_kwargs=processing_kwargs, max_length=kwargs.get("max_length"))
        features = {**packer.process(inputs), "modality": "message"}
        # Hashing pixels costs 2 % of embedding an image, and only losses read the ids; `encode` infers.
        return features if torch.is_inference_mode_enabled() else {**features, "content_ids": content_ids(features)}

    def packer(
        self, prompt: str | None = None, *, processing_kwargs: Any = None, max_length: int | None = None
    ) -> Packer:
        """A function from a list of inputs to what `embed_batch` takes, without the weights: for other processes.

        Its options are those of `preprocess`.
        """
        options = self._merge_processing_kwargs(processing_kwargs)
        text_options = options.get("text", {})
        reading = {
            "prompt": prompt,
            "max_length": max_length or text_options.get("max_length"),
            "split_special_tokens": text_options.get("split_special_tokens", False),
            "images_kwargs": options.get("image"),
        }
        model: Any = self.model
        if self.fast_path is None or not can_pack(model):
            return Packer(self.processor, reading, None)
        layout = {
            "image_token_id": model.config.image_token_id,
            "merge_size": model.config.vision_config.spatial_merge_size,
            "dtype": model.visual.dtype,
            "sequential": model.config.positions == "sequential",
            "max_tokens": self.fast_path.max_tokens or (CUDA_TOKENS if model.device.type == "cuda" else CPU_TOKENS),
        }
        return Packer(self.processor, reading, layout)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add `sentence_embedding` and `pooler_output`, both `(batch_size, embedding_dim)`, to `features`."""
        is_plain = self.fast_path is None or self.model.training or torch.is_grad_enabled() or bool(kwargs)
        is_plain = is_plain or self._unwrapped().config.output_hidden_states
        if is_plain or not _MODEL_INPUTS.isdisjoint(features):
            features.update(self._plain(features, **kwargs))
        else:
            features.update(self._packed(features))
        return features if torch.is_grad_enabled() else _Features(features, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; after AdaptiveLayerLoss the embedding is that of the layer whose states it has put there."""
        features = super().__call__(*args, **kwargs)
        if "all_layer_embeddings" in features and "token_embeddings" in features:
            # Elsewhere a pooling module would come after this one.
            state = last_token_state(features["token_embeddings"], features.get("attention_mask"))
            pooled = self._unwrapped().language_model.norm(state)
            features.update(sentence_embedding=normalize(pooled.float(), dim=-1), pooler_output=pooled)
        return features

    @torch.compiler.disable  # NumPy lays a batch out, which cannot be traced; compiled code would serve one layout only
    def _packed(self, features: dict[str, Any]) -> dict[str, Any]:
        return self.embed_batch(self.packer().pack(features))

    def embed_batch(self, batch: PackedBatch | dict[str, Any], num_kept_layers: int | None = None) -> dict[str, Any]:
        """Embed what a `packer` made, or features on the model's device, in evaluation mode and without gradients.

        With `num_kept_layers` only the first so many layers are run, as a model cut to these would.

        Returns:
            `sentence_embedding` and `pooler_output`, both `(batch_size, embedding_dim)`, in the order of the inputs.
        """
        if isinstance(batch, dict):
            return self._plain(batch if num_kept_layers is None else {**batch, "exit_depths": (num_kept_layers,)})
        device = self.model.device
        states = [packed_states(self.model, part, num_kept_layers) for part in batch.to(device).parts]
        order = torch.tensor([row for part in batch.parts for row in part.rows]).argsort()
        pooled = torch.cat(states)[order.to(device, non_blocking=True)]  # else the host would wait here for all of it
        return {"sentence_embedding": normalize(pooled.float(), dim=-1), "pooler_output": pooled}

    def _plain(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        options = {"output_hidden_states": True} if self._unwrapped().config.output_hidden_states else {}
        outputs = self._run({**features, **kwargs}, **options)
        # Those of several depths lie side by side.
        found = {"sentence_embedding": outputs.embeddings.flatten(1), "pooler_output": outputs.pooler_output.flatten(1)}
        # Without the first, which is [RET]'s own row of the vocabulary whatever the input.
        return {**found, "all_layer_embeddings": outputs.hidden_states[1:]} if options else found

    def _run(self, features: dict[str, Any], **options: Any) -> Any:
        accepted = inspect.signature(self._unwrapped().forward).parameters
        inputs = {name: value for name, value in features.items() if name in accepted}
        return self.model(**inputs, **options, return_dict=True)

    def _unwrapped(self) -> Any:
        """The model within what torch.compile, or PEFT's `get_peft_model`, put around it."""
        model: Any = getattr(self.model, "_orig_mod", self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save model, processor and module settings; the processor brings this module's source file along."""
        super().save(output_path, *args, **kwargs)
        if not type(self).__module__.startswith("transformers_modules."):
            # SentenceTransformer.save writes the class's module into modules.json. An installed package's
            # name would not load elsewhere; the class of the file that the processor saved beside it does.
            self.__class__ = get_class_from_dynamic_module(
                f"{__name__.rsplit('.', 1)[-1]}.PumaTransformer", output_path
            )


class _Features(dict[str, Any]):
    """What `forward` returns; `encode` asks it for the states of all tokens, and does not say so before."""

    def __init__(self, features: dict[str, Any], module: PumaTransformer | None = None) -> None:
        # In mixed precision accelerate makes a copy of what a model returns, by the features alone.
        super().__init__(features)
        self._module = module

    def __missing__(self, name: str) -> Any:
        if name != "token_embeddings" or self._module is None:
            raise KeyError(name)
        masks = self["attention_mask"].bool()
        states = zip(self._module._run(self).last_hidden_state, masks, strict=True)
        # `encode` cuts each row after its last token: padding must not stand before the first.
        self["attention_mask"] = pad_sequence([mask[mask].long() for mask in masks], batch_first=True)
        self[name] = pad_sequence([row[mask] for row, mask in states], batch_first=True)
        return self[name]
