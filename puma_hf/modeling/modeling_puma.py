"""PUMA models: the first k decoder layers of a Qwen2-VL, 2.5, 3 or 3.5, read as an embedder at the last token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLModel, Qwen2VLModel, Qwen3_5Model, Qwen3VLModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_puma import PumaConfig, PumaQwen3VLConfig, PumaQwen25VLConfig, PumaQwen35Config

# To mypy the mixin is a model; methods that it does not define are the backbone's.
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _MixinBase
else:
    _MixinBase = object

# The three layouts in which checkpoints of these families are found, mapped to this model's own names
# (`language_model.*`, `visual.*`). Without a mapping a foreign layout loads as random weights.
CHECKPOINT_KEY_MAPPING = {
    r"^model\.language_model\.": "language_model.",
    r"^model\.visual\.": "visual.",
    r"^model\.layers\.": "language_model.layers.",
    r"^model\.embed_tokens\.": "language_model.embed_tokens.",
    r"^model\.norm\.": "language_model.norm.",
}


@dataclass
class PumaModelOutput(ModelOutput):
    """Output of [`PumaModel`].

    Args:
        last_hidden_state: `(batch_size, sequence_length, hidden_size)`, after the last kept layer and the final norm.
        pooler_output: `(batch_size, hidden_size)`, the row of `last_hidden_state` at the last unmasked token, `[RET]`:
            the state that self-distillation compares between student and teacher.
        embeddings: `(batch_size, hidden_size)`, `pooler_output` scaled to unit L2 norm, in float32: for retrieval.
        hidden_states: With `output_hidden_states=True`, `(batch_size, sequence_length, hidden_size)` for the input
            embeddings and each layer.
        attentions: With `output_attentions=True` and eager attention, `(batch_size, num_heads, sequence_length,
            sequence_length)` for each layer.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def last_token_state(hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Each sequence's state `(batch_size, hidden_size)` at its last unmasked token, padded on either side.

    Args:
        hidden_states: `(batch_size, sequence_length, hidden_size)`.
        attention_mask: `(batch_size, sequence_length)` of 0 and 1, or `None` when nothing is padded.

    Example:

    ```python
    >>> import torch
    >>> from puma_hf.modeling.modeling_puma import last_token_state

    >>> states = torch.arange(6.0).reshape(2, 3, 1)
    >>> last_token_state(states, torch.tensor([[1, 1, 0], [0, 1, 1]])).squeeze(-1).tolist()
    [1.0, 5.0]
    ```
    """
    if attention_mask is None:
        return hidden_states[:, -1]
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask.to(torch.long) * positions).argmax(dim=1).to(hidden_states.device)
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), last]


@contextmanager
def running_layers(model: Any, layers: Sequence[Any]) -> Iterator[None]:
    """Within the block a model's decoder runs these layers, fewer or more than its own, each of its own kind."""
    decoder: Any = model.language_model
    if len(layers) == len(decoder.layers):
        yield
        return
    # What a decoder goes by, where its family has it: Qwen3-VL has one kind of attention, and no types.
    parts = [(decoder, "layers"), (decoder, "has_sliding_layers")]
    parts += [(decoder.config, "layer_types"), (decoder.config, "num_hidden_layers")]
    # At the first request for hidden states, which could be now, transformers hooks the layers that it sees, once.
    maybe_install_capturing_hooks(decoder)
    before = [(part, name, getattr(part, name)) for part, name in parts if hasattr(part, name)]
    try:
        decoder.layers = nn.ModuleList(layers)
        decoder.config.num_hidden_layers = len(layers)
        if hasattr(decoder.config, "layer_types"):
            # Each layer is told its kind of attention here, though it knows it, or, but in Qwen3.5, its attention does.
            types = [getattr(layer, "block_type", None) or layer.self_attn.layer_type for layer in layers]
            decoder.config.layer_types = types
            decoder.has_sliding_layers = "sliding_attention" in types
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


# Whether a model that is made has the numbers that its layers have in the checkpoint that is read, so that dropped
# ones are never read, whichever they are. No argument of the model, as a subclass may take a configuration alone.
_of_checkpoint = ContextVar("of_checkpoint", default=False)


class PumaModelMixin(_MixinBase):
    """What makes a backbone a PUMA model: loading without the dropped layers, and the `[RET]` embedding."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Not inherited: a class of the user's may be in a notebook, whose code no save can copy.
        cls._auto_class = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers = config._loaded_layers if _of_checkpoint.get() else None
        if layers is not None:
            decoder: Any = self.language_model
            decoder.layers._modules = dict(zip(map(str, layers), decoder.layers, strict=True))
        # What pruning drops is expected in an original checkpoint: neither read nor reported.
        kept, end = layers or range(config.num_kept_layers), config.original_num_hidden_layers
        dropped = "|".join(str(layer) for layer in range(end) if layer not in kept)
        self._keys_to_ignore_on_load_unexpected = {r"lm_head\.", r"^mtp\."}
        self._keys_to_ignore_on_load_unexpected |= {rf"layers\.({dropped})\."} if dropped else set()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a PUMA directory, or the first `num_kept_layers` layers of an original checkpoint.

        Takes every argument of `PreTrainedModel.from_pretrained`, and `num_kept_layers`, or `keep_layers` for layers
        that are not the first, as `[0, 1, 27]` or "0-1,27". Only safetensors files are read: pickled checkpoints can
        run code when opened.
        """
        # A subclass does not inherit the renames that transformers knows for the stock class.
        kwargs.setdefault("key_mapping", CHECKPOINT_KEY_MAPPING)
        asked = {name: kwargs[name] for name in ("num_kept_layers", "keep_layers") if kwargs.get(name) is not None}
        # AutoModel and SentenceTransformer have read the configuration already, and pass that.
        if asked and hasattr(kwargs.get("config"), "cut"):
            kwargs["config"] = deepcopy(kwargs["config"])
            kwargs["config"].cut(**asked)
            kwargs = {name: value for name, value in kwargs.items() if name not in asked}
        return_loading_info = kwargs.pop("output_loading_info", False)
        always = {"use_safetensors": True, "output_loading_info": True}
        before = _of_checkpoint.set(True)
        try:
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs | always)
        finally:
            _of_checkpoint.reset(before)
        model, info = loaded
        # With an adapter the information is about its tensors, those of the base having been checked before.
        wrong = info["missing_keys"] or {name for name in info["unexpected_keys"] if "lora_" in name}
        if model._hf_peft_config_loaded:
            # AutoModel passes the base, and the adapter's own place among the options.
            options = {**kwargs, **(kwargs.get("adapter_kwargs") or {})}
            adapter = str(options.get("_adapter_model_path") or pretrained_model_name_or_path)
            if wrong:
                raise ValueError(
                    f"{len(wrong)} tensors of the adapter {adapter!r} were not loaded (first: {min(wrong)}). It is "
                    "incomplete or of another base; if it is a DoRA, which transformers cannot load, run puma-hf merge."
                )
            _note_training(model.config, adapter, options)
        # Saved files carry this model's own names and numbers, whatever layout was read.
        model._weight_conversions = []
        if model.config._loaded_layers is not None:
            model.language_model.layers = torch.nn.ModuleList(model.language_model.layers)
            model.config._loaded_layers = None
        return (model, info) if return_loading_info else model

    @staticmethod
    def _load_pretrained_model(model: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which would tell of an adapter's tensors whose layers were cut away as asked for."""
        info, more = super()._load_pretrained_model(model, *args, **kwargs)
        if (kept := model.config._loaded_layers) is not None:
            layers = {name: re.search(r"\blayers\.(\d+)\.", name) for name in info.unexpected_keys}
            info.unexpected_keys = {name for name, layer in layers.items() if not layer or int(layer[1]) in kept}
        return info, more

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """As in transformers, but a ValueError for tensors it would initialise at random, and tell of in a log.

        Those that a subclass adds, such as a head, may be new.
        """
        if (wrong := sorted(loading_info.mismatched_keys)) and not load_config.ignore_mismatched_sizes:
            name, found, needed = wrong[0]
            first = f"{name}, {tuple(found)} instead of {tuple(needed)}"
            has = f"{len(wrong)} tensors of another shape than its config.json says (first: {first})"
            raise ValueError(f"{model.name_or_path!r} has {has}. Download it again.")
        loading_info = super()._finalize_model_loading(model, load_config, loading_info)
        if missing := set(loading_info.missing_keys):
            with torch.device("meta"):
                missing &= set(_source_class(model)(model.config).state_dict())
        if missing:
            needed = f"tensors that a {model.config.source_name} with {model.config.num_kept_layers} layers needs"
            found = f"{model.name_or_path!r} lacks {len(missing)} of the {needed} (first: {min(missing)})"
            raise ValueError(f"{found}. Download it again, or choose another checkpoint.")
        return loading_info

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model as `PreTrainedModel.save_pretrained` does, with the code that opens it.

        A subclass that was not given to `register_for_auto_class` is saved with the code of the class it is made
        from, and `AutoModel` opens it as that; its own tensors are saved too.
        """
        if self._auto_class is None:
            source_class = _source_class(self)
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            custom_object_save(source_class, save_directory)
            name = f"{source_class.__module__.rpartition('.')[2]}.{source_class.__name__}"
            config: Any = self.config
            config.auto_map = {**(getattr(config, "auto_map", None) or {}), "AutoModel": name}
        super().save_pretrained(save_directory, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        exit_depths: Sequence[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> PumaModelOutput | tuple[Tensor, ...]:
        """Embed a batch.

        Args:
            input_ids: `(batch_size, sequence_length)` token ids; the last unmasked one of each row is `[RET]`.
            attention_mask: `(batch_size, sequence_length)` of 0 and 1, padded on either side.
            position_ids: `(3, batch_size, sequence_length)`; computed when absent, as `config.positions` says.
            inputs_embeds: `(batch_size, sequence_length, hidden_size)`, instead of `input_ids`.
            pixel_values: `(num_patches, patch_dim)`, the patches of all images one after another.
            pixel_values_videos: `(num_patches, patch_dim)`, likewise for videos.
            image_grid_thw: `(num_images, 3)` time, height and width of each image in patches.
            video_grid_thw: `(num_videos, 3)` likewise for videos.
            mm_token_type_ids: `(batch_size, sequence_length)`, 0 text, 1 image, 2 video; computed when absent.
            mm_encoder_outputs: `{"image": model.get_image_features(...)}`, instead of `pixel_values`.
            exit_depths: Embed after each of these numbers of layers, such as `(4, 8)`, as models cut to so many would:
                one forward pass of the last of them.
            return_dict: `False` returns a tuple.
            kwargs: Passed on, for example `output_hidden_states`.

        Returns:
            A [`PumaModelOutput`] with `embeddings` of shape `(batch_size, hidden_size)`; with `exit_depths` they and
            the `pooler_output` are `(batch_size, num_depths, hidden_size)`.
        """
        config: Any = self.config
        if mm_token_type_ids is None and input_ids is not None:
            is_image = (input_ids == config.image_token_id).int()
            mm_token_type_ids = is_image + 2 * (input_ids == config.video_token_id).int()
        kwargs.setdefault("use_cache", False)  # the default builds a cache that no embedder reads
        tokens: Any = inputs_embeds if input_ids is None else input_ids
        if position_ids is None and tokens is not None and config.positions == "sequential":
            position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand(3, tokens.shape[0], -1)
        decoder: Any = self.language_model
        layers = decoder.layers
        if exit_depths is not None:
            config.check_depths(exit_depths)
            layers = layers[: exit_depths[-1]]
            if len(exit_depths) > 1:  # in training autograd keeps the states anyway
                kwargs["output_hidden_states"] = True
        with running_layers(self, layers):
            outputs = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                pixel_values=pixel_values,
                pixel_values_videos=pixel_values_videos,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                mm_token_type_ids=mm_token_type_ids,
                mm_encoder_outputs=mm_encoder_outputs,
                return_dict=True,
                **kwargs,
            )
        # embedding = L2(final_norm(h_k)[last token]); the backbone has applied the norm to the last of the states.
        pooled = last_token_state(outputs.last_hidden_state, attention_mask)
        if exit_depths is not None:
            inner = [last_token_state(outputs.hidden_states[depth], attention_mask) for depth in exit_depths[:-1]]
            pooled = torch.stack([*map(decoder.norm, inner), pooled], dim=1)
        result = PumaModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=pooled,
            embeddings=torch.nn.functional.normalize(pooled.float(), dim=-1),
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )
        return result.to_tuple() if return_dict is False else result


class PumaModel(PumaModelMixin, Qwen2VLModel):
    """A Qwen2-VL cut to its first `config.num_kept_layers` decoder layers that embeds text, images and video.

    Kept: the vision tower, the token embedding, the first k decoder layers, the final norm. Dropped: the
    deeper layers and the language-model head. `embedding = L2(final_norm(h_k)[last token])`, and every prompt
    of `PumaProcessor` ends in `[RET]`.

    `from_pretrained` opens a PUMA directory or an original Qwen2-VL checkpoint, whose dropped tensors are
    never read. `attn_implementation` takes "eager", "sdpa" or "flash_attention_2" as in any transformers model.

    Raises (from `from_pretrained`):
        ValueError: If the checkpoint is not a Qwen2-VL, or lacks a tensor.

    Example:

    ```python
    >>> from puma_hf import PumaModel

    >>> model = PumaModel.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", num_kept_layers=14)  # doctest: +SKIP
    >>> model.config.num_kept_layers, model.config.original_num_hidden_layers  # doctest: +SKIP
    (14, 28)
    ```

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, layer-pruned self-distillation.
    """

    config_class = PumaConfig
    config: PumaConfig


class PumaQwen25VLModel(PumaModelMixin, Qwen2_5_VLModel):
    """A [`PumaModel`] whose backbone is a Qwen2.5-VL."""

    config_class = PumaQwen25VLConfig
    config: PumaQwen25VLConfig


class PumaQwen3VLModel(PumaModelMixin, Qwen3VLModel):
    """A [`PumaModel`] whose backbone is a Qwen3-VL.

    DeepStack stays as it is: the first decoder layers add features of inner layers of the vision tower to the states
    of image tokens. transformers records `hidden_states` before that addition, so those are a layer's own output;
    the state of `[RET]` is the same before and after.
    """

    config_class = PumaQwen3VLConfig
    config: PumaQwen3VLConfig


class PumaQwen35Model(PumaModelMixin, Qwen3_5Model):
    """A [`PumaModel`] whose backbone is a Qwen3.5: three decoder layers of four have linear attention.

    Linear attention would carry padding on to what follows it, so the attention mask, which silences it, must be given;
    with it a padded row is the row alone, on either side. A checkpoint's heads for several tokens (`mtp`) are dropped.
    """

    config_class = PumaQwen35Config
    config: PumaQwen35Config


MODEL_CLASSES: dict[Any, Any] = {
    model_class.config_class: model_class
    for model_class in (PumaModel, PumaQwen25VLModel, PumaQwen3VLModel, PumaQwen35Model)
}


def _note_training(config: Any, adapter: str, options: dict[str, Any]) -> None:
    """Put into the configuration, in place of what the base has, what the training of its adapter has noted."""
    hub = {name: options[name] for name in ("cache_dir", "revision", "token") if name in options}
    missing = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    file = cached_file(adapter, "puma_base.json", **hub, **missing)
    noted = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    config.teacher_fingerprint, config.trained_depths = noted.get("teacher"), noted.get("trained_depths")
    config.keep_trained(config._loaded_layers)


def _source_class(model: Any) -> Any:
    """The class of this file that a model is of, or that its class is made from."""
    return next(base for base in type(model).__mro__ if base in MODEL_CLASSES.values())
