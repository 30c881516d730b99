"""Configurations of PUMA models: those of their backbones, which know how many decoder layers were kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

# To mypy the mixin is a configuration. If it really were one, the fields of PreTrainedConfig would come with it, and
# their defaults would win over a backbone's own.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _MixinBase
else:
    _MixinBase = object


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


@dataclass(kw_only=True, repr=False)
class PumaConfigMixin(_MixinBase):
    """What pruning adds to a backbone's configuration; see [`PumaConfig`] for the fields."""

    # How messages call the backbone, its model_type, and an original checkpoint of it.
    source_name = ""
    source_model_type = ""
    source_example = ""

    num_kept_layers: int | None = None
    original_num_hidden_layers: int | None = None
    source_name_or_path: str | None = None
    source_revision: str | None = None
    ret_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._cut_decoder_layers()

    def _cut_decoder_layers(self) -> None:
        text_config: Any = self.text_config
        available = text_config.num_hidden_layers
        if self.num_kept_layers is None:
            self.num_kept_layers = available
        kept = check_num_kept_layers(self.num_kept_layers, available)
        if self.original_num_hidden_layers is None:
            self.original_num_hidden_layers = available
        text_config.num_hidden_layers = kept
        # A reload validates that the two agree, so they are always cut together. Qwen3-VL has no types.
        if getattr(text_config, "layer_types", None) is not None:
            text_config.layer_types = text_config.layer_types[:kept]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from `config_dict`, letting `num_kept_layers` in `kwargs` cut the layers.

        transformers would set keyword arguments as attributes after the configuration is complete, where
        cutting has already happened; here they are part of the construction.
        """
        config_dict = dict(config_dict)
        cls._check_model_type(config_dict.get("model_type", cls.model_type))
        config_dict["model_type"] = cls.model_type
        if "num_kept_layers" in kwargs and (kept := kwargs.pop("num_kept_layers")) is not None:
            config_dict["num_kept_layers"] = check_num_kept_layers(kept, cls._num_hidden_layers(config_dict))
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
        source_name_or_path (`str`, *optional*):
            Hub id or folder name of the checkpoint that was pruned.
        source_revision (`str`, *optional*):
            Hub commit of that checkpoint, where known.
        ret_token_id (`int`, *optional*):
            Token id of `[RET]`, the last token of every prompt, at which the embedding is read.

    Raises:
        ValueError: If `num_kept_layers` is not an integer from 1 to the number of decoder layers, or if the
            loaded configuration does not describe a Qwen2-VL model.

    Example:

    ```python
    >>> from puma_hf import PumaConfig

    >>> config = PumaConfig(text_config={"num_hidden_layers": 28, "hidden_size": 3584}, num_kept_layers=8)
    >>> config.text_config.num_hidden_layers, config.original_num_hidden_layers
    (8, 28)
    ```

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, layer-pruned self-distillation. k is not stated there in
    readable form: "3B" from Qwen2-VL-7B means k = 8 of 28.
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
