"""Cut a multimodal LLM to its first k layers and make it a retrieval embedder (PUMA, arXiv 2507.08064)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Module -> names. Resolved on first use, so that `import puma_hf` stays light.
_MODULES = {
    "puma_hf.modeling": ("PumaConfig", "PumaModel", "PumaProcessor"),
    "puma_hf.pruning": ("prune",),
    "puma_hf.losses": (
        *("CachedMultimodalMACLoss", "ElasticDepthLoss", "JointDistillationLoss"),
        *("MultimodalMACLoss", "SelfDistillationLoss"),
    ),
    "puma_hf.trainer": ("PumaDistillationTrainer", "PumaTrainer", "add_lora", "lora_config"),
    "puma_hf.data": ("load_mbeir",),
    "puma_hf.embedding.embed": ("embed",),
    "puma_hf.evaluation": ("evaluate_mbeir",),
}
_PUBLIC_NAMES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted([*_PUBLIC_NAMES, "__version__"])


def resolver(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """What a package assigns to its `__getattr__`: a name's module is imported when the name is first asked for."""

    def resolve(name: str) -> Any:
        if name in names:
            return getattr(import_module(names[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return resolve


__getattr__ = resolver(__name__, _PUBLIC_NAMES)


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from puma_hf.data import load_mbeir as load_mbeir
    from puma_hf.embedding.embed import embed as embed
    from puma_hf.evaluation import evaluate_mbeir as evaluate_mbeir
    from puma_hf.losses import CachedMultimodalMACLoss as CachedMultimodalMACLoss
    from puma_hf.losses import ElasticDepthLoss as ElasticDepthLoss
    from puma_hf.losses import JointDistillationLoss as JointDistillationLoss
    from puma_hf.losses import MultimodalMACLoss as MultimodalMACLoss
    from puma_hf.losses import SelfDistillationLoss as SelfDistillationLoss
    from puma_hf.modeling import PumaConfig as PumaConfig
    from puma_hf.modeling import PumaModel as PumaModel
    from puma_hf.modeling import PumaProcessor as PumaProcessor
    from puma_hf.pruning import prune as prune
    from puma_hf.trainer import PumaDistillationTrainer as PumaDistillationTrainer
    from puma_hf.trainer import PumaTrainer as PumaTrainer
    from puma_hf.trainer import add_lora as add_lora
    from puma_hf.trainer import lora_config as lora_config
