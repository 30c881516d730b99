"""Configurations of PUMA models, one for each family of backbones: those know how many decoder layers were kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3_5Config, Qwen3VLConfig
from transformers.utils import logging

# To mypy the mixin is a configuration. If it really were one, the fields of PreTrainedConfig would come with it, and
# their defaults would win over a backbone's own.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _MixinBase
else:
    _MixinBase = object

logger = logging.get_logger(__name__)

POSITIONS = ("mrope", "sequential")


def chosen_layers(num_kept_layers: Any, keep_layers: Any, num_hidden_layers: int) -> list[int]:
    """Which of `num_hidden_layers` decoder layers to keep: the first `num_kept_layers`, or those of `keep_layers`.

    Raises:
        ValueError: If both are given, or neither, or `num_kept_layers` is no number of layers, or `keep_layers` no
            rising numbers of layers, as a list or as text such as "0-10,27".
    """
    if (num_kept_layers is None) == (keep_layers is None):
        given = f"num_kept_layers={num_kept_layers!r} and keep_layers={keep_layers!r}"
        raise ValueError(f"{given}: one of them must say which layers to keep, such as --num-kept-layers 14.")
    if keep_layers is None:
        if type(num_kept_layers) is not int or not 1 <= num_kept_layers <= num_hidden_layers:
            raise ValueError(f"num_kept_layers={num_kept_layers!r} must be an integer from 1 to {num_hidden_layers}.")
        return list(range(num_kept_layers))
    layers = list(keep_layers) if isinstance(keep_layers, Iterable) else []
    if isinstance(keep_layers, str):
        parts = [re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part) for part in keep_layers.split(",")]
        ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts if part]
        layers = [layer for numbers in ranges for layer in numbers] if all(parts) and all(ranges) else []
    are_layers = bool(layers) and all(type(layer) is int and 0 <= layer < num_hidden_layers for layer in layers)
    if not are_layers or layers != sorted(set(layers)):
        known = f"rising numbers from 0 to {num_hidden_layers - 1}, each once, like '0-3,7' or [0, 1, 2, 3, 7]"
        raise ValueError(f"keep_layers={keep_layers!r} must be {known}.")
    return layers


def named_layers(layers: Sequence[int]) -> str:
    """Layers in words, runs of them by their ends, such as "decoder layers 0 to 2 and 27"."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    runs = [str(start) if start == end else f"{start} to {end}" for start, end in zip(starts, ends, strict=True)]
    return f"decoder layer{'s' * (len(layers) > 1)} " + " and ".join(filter(None, (", ".join(runs[:-1]), runs[-1])))


@dataclass(kw_only=True, repr=False)
class PumaConfigMixin(_MixinBase):
    """What pruning adds to a backbone's configuration; see [`PumaConfig`] for the fields."""

    # The row of a family in the table of backbones.
    source_name = ""  # how messages call it
    source_model_type = ""
    source_example = ""  # an original checkpoint
    takes_video = False
    has_linear_attention = False  # in some decoder layers, which then differ; `packed_states` does not know them

    num_kept_layers: int | None = None
    original_num_hidden_layers: int | None = None
    kept_layers: list[int] | None = None
    positions: str = "mrope"
    source_name_or_path: str | None = None
    source_revision: str | None = None
    ret_token_id: int | None = None
    teacher_fingerprint: str | None = None
    trained_depths: list[int] | None = None
    # Which layers of the checkpoint that is read a cut has left, for the time of loading; None if all.
    _loaded_layers = None

    def __post_init__(self, **kwargs: Any) -> None:
        keep_layers = kwargs.pop("keep_layers", None)
        super().__post_init__(**kwargs)
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r} must be one of {POSITIONS}. Restore it in config.json.")
        text_config: Any = self.text_config
        available = text_config.num_hidden_layers
        if self.original_num_hidden_layers is None:
            self.original_num_hidden_layers = available
        number = available if self.num_kept_layers is None else self.num_kept_layers
        self.cut(number if keep_layers is None else None, keep_layers)

    def cut(self, num_kept_layers: int | None = None, keep_layers: Any = None) -> None:
        """Keep the first `num_kept_layers` of the layers that are there, or `keep_layers` of them, else a ValueError.

        An exit that was trained stays one, and in the space that it was trained for, while all of its layers stay.
        """
        text_config: Any = self.text_config
        available = text_config.num_hidden_layers
        layers = chosen_layers(num_kept_layers, keep_layers, available)
        there = list(range(available)) if self.kept_layers is None else self.kept_layers
        kept, first = [there[layer] for layer in layers], list(range(len(layers)))
        # Features of the vision tower must be added after the same layers as in the original.
        deepest = self.num_deepstack_layers
        if kept[:deepest] != first[:deepest]:
            raise ValueError(
                f"A cut to {named_layers(kept)} lacks some of {named_layers(range(deepest))}; after these "
                f"{self.source_name} adds features of its vision tower (DeepStack). Keep these, and any deeper ones."
            )
        self.kept_layers = None if kept == first else kept
        if len(layers) < available:  # the numbers that the weights have in the checkpoint that is read
            stored = self._loaded_layers or range(available)
            self._loaded_layers = [stored[layer] for layer in layers]
        self.num_kept_layers = text_config.num_hidden_layers = len(layers)
        self.keep_trained(layers if len(layers) < available else None)
        # A reload validates that the two agree, so they are always cut together. Qwen3-VL has no types.
        if getattr(text_config, "layer_types", None) is not None:
            text_config.layer_types = [text_config.layer_types[layer] for layer in layers]
            if self.kept_layers is not None and "sliding_attention" in text_config.layer_types:
                text_config.max_window_layers = text_config.layer_types.index("sliding_attention")

    def keep_trained(self, layers: Sequence[int] | None) -> None:
        """After a cut to these layers, None for all, forget the exits that lack one, and the space if it is no exit."""
        self.warn_if_untrained(self.num_kept_layers or 0)
        if layers is not None:
            whole = [depth for depth in self.trained_depths or () if layers[:depth] == list(range(depth))]
            if len(layers) not in whole:  # it was distilled with the layers that go
                self.teacher_fingerprint = None
            self.trained_depths = whole or None

    def check_depths(self, depths: Sequence[int]) -> None:
        """ValueError unless these are rising numbers of layers after which the model can embed, one at least."""
        least, most = max(1, self.num_deepstack_layers), self.num_kept_layers or 0
        are_depths = bool(depths) and all(type(depth) is int and least <= depth <= most for depth in depths)
        if not are_depths or list(depths) != sorted(set(depths)):
            known = f"rising numbers of layers from {least} to {most}, which the model has"
            raise ValueError(f"depths={tuple(depths)} must be {known}.")

    def warn_if_untrained(self, depth: int) -> None:
        """Warn once if the model was trained to embed after other numbers of layers than this one."""
        if self.trained_depths and depth not in self.trained_depths:
            trained = ", ".join(map(str, self.trained_depths))
            told = "num_kept_layers=%s is no depth that the model was trained at, which are %s: take one of these"
            logger.warning_once(told, depth, trained)

    @property
    def num_deepstack_layers(self) -> int:
        """After how many of the first decoder layers features of the vision tower are added."""
        return len(getattr(self.vision_config, "deepstack_visual_indexes", None) or ())

    @property
    def layers_of_original(self) -> list[int]:
        """Which decoder layer of the original each of the model's is."""
        return list(range(self.num_kept_layers or 0)) if self.kept_layers is None else list(self.kept_layers)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the numbers of a checkpoint's layers."""
        return {name: value for name, value in super().to_dict().items() if name != "_loaded_layers"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from `config_dict`, letting `num_kept_layers` or `keep_layers` in `kwargs` cut it.

        transformers would set keyword arguments as attributes after the configuration is complete, where
        cutting has already happened; here they are part of the construction.
        """
        cuts = {name: kwargs.pop(name, None) for name in ("num_kept_layers", "keep_layers")}
        given = {name: value for name, value in cuts.items() if value is not None}
        if len(given) > 1 or "kept_layers" in kwargs:
            raise ValueError(f"{given or kwargs['kept_layers']}: to cut layers pass num_kept_layers or keep_layers.")
        return super().from_dict({**config_dict, **given}, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """Read a configuration file; an original's is taken for the PUMA configuration that it becomes."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        config_class_of(config_dict.get("model_type"), (cls,))
        return {**config_dict, "model_type": cls.model_type}, kwargs


class PumaConfig(PumaConfigMixin, Qwen2VLConfig):
    r"""Configuration of a [`PumaModel`].

    Every field of `Qwen2VLConfig` is kept. A plain Qwen2-VL `config.json` loads too: with `num_kept_layers=k`
    its text configuration is cut to the first k decoder layers (`num_hidden_layers` and `layer_types` together), with
    `keep_layers`, a list such as `[0, 1, 27]` or text such as "0-10,27", to others.

    Args:
        num_kept_layers (`int`, *optional*):
            Number k of decoder layers that remain, counted from the input. `None` keeps all of them.
        original_num_hidden_layers (`int`, *optional*):
            Number of decoder layers of the checkpoint that was pruned. Filled in when the layers are cut.
        kept_layers (`list[int]`, *optional*):
            Which layers of that checkpoint remain, where they are not its first ones. Filled in likewise.
        positions (`str`, defaults to `"mrope"`):
            "mrope" for positions in time, height and width, "sequential" for tokens one after another, those of images
            too: part of how the model reads, see `READINGS` in `readings_puma`.
        source_name_or_path (`str`, *optional*):
            Hub id or folder name of the checkpoint that was pruned.
        source_revision (`str`, *optional*):
            Hub commit of that checkpoint, where known.
        ret_token_id (`int`, *optional*):
            Token id of `[RET]`, the last token of every prompt, at which the embedding is read.
        teacher_fingerprint (`str`, *optional*):
            Of a model that was distilled towards another, and not trained since: the vector space that both share.
        trained_depths (`list[int]`, *optional*):
            After how many layers it was trained to embed, if after several: each of these is a `num_kept_layers` to
            load. Another depth is loaded with a warning.

    Raises:
        ValueError: If the layers to keep are none that the checkpoint has, or it is no Qwen2-VL model.

    Example:

    ```python
    >>> from puma_hf import PumaConfig

    >>> config = PumaConfig(text_config={"num_hidden_layers": 28, "hidden_size": 3584}, num_kept_layers=8)
    >>> config.text_config.num_hidden_layers, config.original_num_hidden_layers
    (8, 28)
    ```

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, layer-pruned self-distillation. The released code keeps k = 12 of
    Qwen2-VL-7B's 28 layers, and remarks that layers 0 to 10 and 27 do better where k is small.
    """

    model_type = "puma"
    source_name = "Qwen2-VL"
    source_model_type = "qwen2_vl"
    source_example = "Qwen/Qwen2-VL-2B-Instruct"
    takes_video = True  # the later families tell the time of frames in other ways


class PumaQwen25VLConfig(PumaConfigMixin, Qwen2_5_VLConfig):
    """Configuration of a [`PumaQwen25VLModel`]: `Qwen2_5_VLConfig` with the fields of [`PumaConfig`]."""

    model_type = "puma_qwen2_5_vl"
    source_name = "Qwen2.5-VL"
    source_model_type = "qwen2_5_vl"
    source_example = "Qwen/Qwen2.5-VL-3B-Instruct"


class PumaQwen3VLConfig(PumaConfigMixin, Qwen3VLConfig):
    """Configuration of a [`PumaQwen3VLModel`]: `Qwen3VLConfig` with the fields of [`PumaConfig`]."""

    model_type = "puma_qwen3_vl"
    source_name = "Qwen3-VL"
    source_model_type = "qwen3_vl"
    source_example = "Qwen/Qwen3-VL-2B-Instruct"


class PumaQwen35Config(PumaConfigMixin, Qwen3_5Config):
    """Configuration of a [`PumaQwen35Model`]: `Qwen3_5Config` with the fields of [`PumaConfig`]."""

    model_type = "puma_qwen3_5"
    source_name = "Qwen3.5"
    source_model_type = "qwen3_5"
    source_example = "Qwen/Qwen3.5-4B"
    has_linear_attention = True


# The table of backbones. A new family is a configuration above and a model in MODEL_CLASSES of modeling_puma.
CONFIG_CLASSES: tuple[Any, ...] = (PumaConfig, PumaQwen25VLConfig, PumaQwen3VLConfig, PumaQwen35Config)


def config_class_of(model_type: Any, classes: tuple[Any, ...] = CONFIG_CLASSES) -> Any:
    """The one of these classes that reads a checkpoint of this `model_type`, original or pruned, or a ValueError."""
    for config_class in classes:
        if model_type in (config_class.source_model_type, config_class.model_type):
            return config_class
    names = ", ".join(f"{config_class.source_name} ({config_class.source_model_type})" for config_class in classes)
    message = f"The checkpoint has model_type={model_type!r}, but PUMA prunes {names} here."
    raise ValueError(f"{message} Choose one of these, such as {classes[0].source_example!r}.")
