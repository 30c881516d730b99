"""Configurations of PUMA models: those of their backbones, which know how many decoder layers were kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

# To mypy the mixin is a configuration. If it really were one, the fields of PreTrainedConfig would come with it, and
# their defaults would win over a backbone's own.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _MixinBase
else:
    _MixinBase = object


POSITIONS = ("mrope", "sequential")


def check_num_kept_layers(num_kept_layers: Any, num_hidden_layers: int) -> int:
    """Return `num_kept_layers` if it is an integer between 1 and `num_hidden_layers`, else raise.

    Raises:
        ValueError: If the value is not an integer or lies outside the range.
    """
    remedy = f"Choose an integer from 1 to {num_hidden_layers} (half of the layers is a good start)."
    if isinstance(num_kept_layers, bool) or not isinstance(num_kept_layers, int):
        raise ValueError(
            f"num_kept_layers must be an integer, got {num_kept_layers!r} ({type(num_kept_layers).__name__}). {remedy}"
        )
    if not 1 <= num_kept_layers <= num_hidden_layers:
        raise ValueError(
            f"num_kept_layers={num_kept_layers} is outside the decoder's 1 to {num_hidden_layers} layers. {remedy}"
        )
    return num_kept_layers


def chosen_layers(num_kept_layers: Any, keep_layers: Any, num_hidden_layers: int) -> list[int]:
    """Which of `num_hidden_layers` decoder layers to keep: the first `num_kept_layers`, or those of `keep_layers`.

    Args:
        num_kept_layers: Number of layers, counted from the input.
        keep_layers: Rising numbers of layers, the first being 0, as a list or as text such as "0-10,27".
        num_hidden_layers: Number of layers to choose from.

    Raises:
        ValueError: If both are given, or neither, or what is given is no such number or list.
    """
    if num_kept_layers is None and keep_layers is None:
        raise ValueError(
            f"Say which layers to keep: num_kept_layers (--num-kept-layers), from 1 to {num_hidden_layers} of them, or "
            "keep_layers (--keep-layers), such as '0-2,5'."
        )
    if keep_layers is None:
        return list(range(check_num_kept_layers(num_kept_layers, num_hidden_layers)))
    if num_kept_layers is not None:
        raise ValueError(
            f"num_kept_layers={num_kept_layers!r} and keep_layers={keep_layers!r} both say which layers to keep. Leave "
            "one of them out."
        )
    layers = _numbers_in(keep_layers)
    wrong = [layer for layer in layers if type(layer) is not int or not 0 <= layer < num_hidden_layers]
    wrong = wrong or [later for layer, later in pairwise(layers) if later <= layer]
    if wrong or not layers:
        raise ValueError(
            f"keep_layers={keep_layers!r} must be rising numbers from 0 to {num_hidden_layers - 1}, each once, but "
            + (f"{wrong[0]!r} is out of range or out of order" if layers else "it is empty")
            + ". Write them like '0-3,7' or [0, 1, 2, 3, 7], with the deepest layer last."
        )
    return layers


def _numbers_in(keep_layers: Any) -> list[Any]:
    """The numbers in a list, or in text; what is no number stays as it is."""
    if not isinstance(keep_layers, str):
        return list(keep_layers) if isinstance(keep_layers, Iterable) else [keep_layers]
    layers: list[Any] = []
    for part in keep_layers.split(",") if keep_layers.strip() else ():
        ends = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
        layers += range(first, last + 1) or [part]
    return layers


def named_layers(layers: Sequence[int]) -> str:
    """Layers in words, runs of them by their ends.

    Example:

    ```python
    >>> from puma_hf.modeling.configuration_puma import named_layers

    >>> named_layers([0, 1, 2, 27]), named_layers([5])
    ('decoder layers 0 to 2 and 27', 'decoder layer 5')
    ```
    """
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    runs = [str(start) if start == end else f"{start} to {end}" for start, end in zip(starts, ends, strict=True)]
    return f"decoder layer{'s' * (len(layers) > 1)} " + " and ".join(filter(None, (", ".join(runs[:-1]), runs[-1])))


@dataclass(kw_only=True, repr=False)
class PumaConfigMixin(_MixinBase):
    """What pruning adds to a backbone's configuration; see [`PumaConfig`] for the fields."""

    # How messages call the backbone, its model_type, and an original checkpoint of it.
    source_name = ""
    source_model_type = ""
    source_example = ""

    num_kept_layers: int | None = None
    original_num_hidden_layers: int | None = None
    kept_layers: list[int] | None = None
    positions: str = "mrope"
    source_name_or_path: str | None = None
    source_revision: str | None = None
    ret_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        keep_layers = kwargs.pop("keep_layers", None)
        super().__post_init__(**kwargs)
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r} must be one of {POSITIONS}. Restore it in config.json.")
        self._cut_decoder_layers(keep_layers)

    def _cut_decoder_layers(self, keep_layers: Any) -> None:
        text_config: Any = self.text_config
        available = text_config.num_hidden_layers
        if self.original_num_hidden_layers is None:
            self.original_num_hidden_layers = available
        if keep_layers is None and self.num_kept_layers is None:
            self.num_kept_layers = available
        layers = chosen_layers(None if keep_layers is not None else self.num_kept_layers, keep_layers, available)
        there = list(range(available)) if self.kept_layers is None else self.kept_layers
        if len(there) != available:
            raise ValueError(
                f"kept_layers={self.kept_layers} names {len(there)} layers, and the configuration has {available}. It "
                "tells which ones are left of the original: to cut layers pass keep_layers."
            )
        kept = [there[layer] for layer in layers]
        self._check_deepstack(kept)
        first = list(range(len(kept)))
        self.kept_layers = None if kept == first else kept
        # The numbers that the weights have in the checkpoint that is cut.
        self._loaded_layers = None if layers == first else layers
        self.num_kept_layers = text_config.num_hidden_layers = len(layers)
        # A reload validates that the two agree, so they are always cut together. Qwen3-VL has no types.
        if getattr(text_config, "layer_types", None) is not None:
            text_config.layer_types = [text_config.layer_types[layer] for layer in layers]
            if self.kept_layers is not None and "sliding_attention" in text_config.layer_types:
                text_config.max_window_layers = text_config.layer_types.index("sliding_attention")

    def _check_deepstack(self, kept: list[int]) -> None:
        """Raise a ValueError if features of the vision tower would be added after other layers than in the original."""
        count = self.num_deepstack_layers
        if kept[:count] != list(range(len(kept[:count]))):
            raise ValueError(
                f"A cut to {named_layers(kept)} lacks some of {named_layers(range(count))}; after these "
                f"{self.source_name} adds features of its vision tower (DeepStack). Keep these, and any deeper ones."
            )

    @property
    def num_deepstack_layers(self) -> int:
        """After how many of the first decoder layers features of the vision tower are added."""
        return len(getattr(self.vision_config, "deepstack_visual_indexes", None) or ())

    @property
    def layers_of_original(self) -> list[int]:
        """Which decoder layer of the original each of the model's is."""
        return list(range(self.num_kept_layers or 0)) if self.kept_layers is None else list(self.kept_layers)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the numbers of a checkpoint's layers, and what is as in every older file."""
        usual = {"_loaded_layers": self._loaded_layers, "kept_layers": None, "positions": "mrope"}
        return {key: value for key, value in super().to_dict().items() if key not in usual or value != usual[key]}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from `config_dict`, letting `num_kept_layers` or `keep_layers` in `kwargs` cut it.

        transformers would set keyword arguments as attributes after the configuration is complete, where
        cutting has already happened; here they are part of the construction.
        """
        config_dict = dict(config_dict)
        cls._check_model_type(config_dict.get("model_type", cls.model_type))
        config_dict["model_type"] = cls.model_type
        if "kept_layers" in kwargs:
            raise ValueError("kept_layers tells which layers are left of the original: to cut layers pass keep_layers.")
        number, layers = kwargs.pop("num_kept_layers", None), kwargs.pop("keep_layers", None)
        if number is not None or layers is not None:
            config_dict["keep_layers"] = chosen_layers(number, layers, cls._num_hidden_layers(config_dict))
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """Read a configuration file; an original's is taken for the PUMA configuration that it becomes."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        cls._check_model_type(config_dict.get("model_type"))
        if config_dict.get("model_type") == cls.source_model_type:
            config_dict = {**config_dict, "model_type": cls.model_type}
        return config_dict, kwargs

    @classmethod
    def _check_model_type(cls, model_type: Any) -> None:
        if model_type in cls.readable_model_types():
            return
        better = [other.__name__ for other in CONFIG_CLASSES if model_type in other.readable_model_types()]
        raise ValueError(
            f"The checkpoint has model_type={model_type!r}, but PUMA prunes {cls.source_name} checkpoints with "
            f"{cls.__name__} ({', '.join(cls.readable_model_types())}). Choose a {cls.source_name} checkpoint such as "
            f"{cls.source_example!r}" + "".join(f", or {name} for this one" for name in better) + "."
        )

    @classmethod
    def readable_model_types(cls) -> tuple[str, ...]:
        """The `model_type` of an original checkpoint and of a PUMA directory, both of which it reads."""
        return (cls.source_model_type, cls.model_type)

    @classmethod
    def _num_hidden_layers(cls, config_dict: dict[str, Any]) -> int:
        """Number of decoder layers in a configuration file, which is flat in Qwen2-VL's original checkpoints."""
        text_config: Any = config_dict.get("text_config") or config_dict
        if not isinstance(text_config, dict):
            text_config = text_config.to_dict()
        default: Any = cls().text_config
        return int(text_config.get("num_hidden_layers", default.num_hidden_layers))


class PumaConfig(PumaConfigMixin, Qwen2VLConfig):
    r"""Configuration of a [`PumaModel`].

    Every field of `Qwen2VLConfig` is kept. A plain Qwen2-VL `config.json` loads too: with `num_kept_layers=k`
    its text configuration is cut to the first k decoder layers (`num_hidden_layers` and `layer_types`
    together).

    Args:
        num_kept_layers (`int`, *optional*):
            Number k of decoder layers that remain, counted from the input. `None` keeps all of them.
        original_num_hidden_layers (`int`, *optional*):
            Number of decoder layers of the checkpoint that was pruned. Filled in when the layers are cut.
        kept_layers (`list[int]`, *optional*):
            Which layers of that checkpoint remain, where they are not its first ones. Filled in when the layers are cut
            with `keep_layers`, which takes a list such as `[0, 1, 27]` or text such as "0-10,27".
        positions (`str`, defaults to `"mrope"`):
            "mrope" for positions in time, height and width, "sequential" for tokens one after another, those of images
            too: part of how the model reads, see `puma_hf.modeling.processing_puma`.
        source_name_or_path (`str`, *optional*):
            Hub id or folder name of the checkpoint that was pruned.
        source_revision (`str`, *optional*):
            Hub commit of that checkpoint, where known.
        ret_token_id (`int`, *optional*):
            Token id of `[RET]`, the last token of every prompt, at which the embedding is read.

    Raises:
        ValueError: If `num_kept_layers` is not an integer from 1 to the number of decoder layers, `keep_layers` is not
            a rising list of them, or the loaded configuration does not describe a Qwen2-VL model.

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


CONFIG_CLASSES: tuple[Any, ...] = (PumaConfig, PumaQwen25VLConfig, PumaQwen3VLConfig)


def config_class_of(model_type: Any) -> Any:
    """The configuration class that reads a checkpoint of this `model_type`, original or pruned.

    Raises:
        ValueError: If there is none.

    Example:

    ```python
    >>> from puma_hf.modeling.configuration_puma import config_class_of

    >>> config_class_of("qwen3_vl").__name__
    'PumaQwen3VLConfig'
    ```
    """
    for config_class in CONFIG_CLASSES:
        if model_type in config_class.readable_model_types():
            return config_class
    readable = ", ".join(name for config_class in CONFIG_CLASSES for name in config_class.readable_model_types())
    raise ValueError(
        f"The checkpoint has model_type={model_type!r}, but PUMA prunes Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints "
        f"({readable}). Choose one of these, such as {PumaConfig.source_example!r}."
    )
