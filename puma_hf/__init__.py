"""Cut a multimodal LLM to its first k layers and make it a retrieval embedder (PUMA, arXiv 2507.08064)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puma_hf.lazy import resolver

__version__ = "0.1.0"

# Name -> module. Resolved on first use, so that `import puma_hf` stays light.
_PUBLIC_NAMES = {
    "PumaConfig": "puma_hf.modeling",
    "PumaModel": "puma_hf.modeling",
    "PumaProcessor": "puma_hf.modeling",
    "prune": "puma_hf.pruning",
    "CachedMultimodalMACLoss": "puma_hf.losses",
    "JointDistillationLoss": "puma_hf.losses",
    "MultimodalMACLoss": "puma_hf.losses",
    "SelfDistillationLoss": "puma_hf.losses",
    "PumaDistillationTrainer": "puma_hf.trainer",
    "PumaTrainer": "puma_hf.trainer",
    "add_lora": "puma_hf.trainer",
    "lora_config": "puma_hf.trainer",
    "load_mbeir": "puma_hf.data",
    "embed": "puma_hf.embedding.embed",
    "evaluate_mbeir": "puma_hf.evaluation",
}

__all__ = [
    "CachedMultimodalMACLoss",
    "JointDistillationLoss",
    "MultimodalMACLoss",
    "PumaConfig",
    "PumaDistillationTrainer",
    "PumaModel",
    "PumaProcessor",
    "PumaTrainer",
    "SelfDistillationLoss",
    "__version__",
    "add_lora",
    "embed",
    "evaluate_mbeir",
    "load_mbeir",
    "lora_config",
    "prune",
]


__getattr__ = resolver(__name__, _PUBLIC_NAMES)


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from puma_hf.data import load_mbeir
    from puma_hf.embedding.embed import embed
    from puma_hf.evaluation import evaluate_mbeir
    from puma_hf.losses import (
        CachedMultimodalMACLoss,
        JointDistillationLoss,
        MultimodalMACLoss,
        SelfDistillationLoss,
    )
    from puma_hf.modeling import PumaConfig, PumaModel, PumaProcessor
    from puma_hf.pruning import prune
    from puma_hf.trainer import PumaDistillationTrainer, PumaTrainer, add_lora, lora_config
