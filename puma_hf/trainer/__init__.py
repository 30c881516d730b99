"""Training: LoRA, the teachers, the trainers, the settings of the stages, and the stages as functions."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Name -> module. Resolved on first use: the command reads `config` for its options, and --help is to be quick.
_NAMES = {
    "FrozenTeacher": "puma_hf.trainer.teacher",
    "PumaDistillationTrainer": "puma_hf.trainer.distillation",
    "PumaTrainer": "puma_hf.trainer.puma",
    "add_lora": "puma_hf.trainer.lora",
    "lora_config": "puma_hf.trainer.lora",
    "merge_adapter": "puma_hf.trainer.lora",
}

__all__ = ["FrozenTeacher", "PumaDistillationTrainer", "PumaTrainer", "add_lora", "lora_config", "merge_adapter"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'puma_hf.trainer' has no attribute {name!r}")


if TYPE_CHECKING:
    from puma_hf.trainer.distillation import PumaDistillationTrainer
    from puma_hf.trainer.lora import add_lora, lora_config, merge_adapter
    from puma_hf.trainer.puma import PumaTrainer
    from puma_hf.trainer.teacher import FrozenTeacher
