"""Training: LoRA, the teachers, the trainers, and the stages as functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puma_hf import resolver

# Name -> module. Resolved on first use: the command reads `config` for its options, and --help is to be quick.
_NAMES = {
    "FrozenTeacher": "puma_hf.trainer.teachers",
    "PumaDistillationTrainer": "puma_hf.trainer.distillation",
    "PumaTrainer": "puma_hf.trainer.trainer_puma",
    "add_lora": "puma_hf.trainer.lora_puma",
    "lora_config": "puma_hf.trainer.lora_puma",
    "merge_adapter": "puma_hf.trainer.merge",
}

__all__ = ["FrozenTeacher", "PumaDistillationTrainer", "PumaTrainer", "add_lora", "lora_config", "merge_adapter"]


__getattr__ = resolver(__name__, _NAMES)


if TYPE_CHECKING:
    from puma_hf.trainer.distillation import PumaDistillationTrainer
    from puma_hf.trainer.lora_puma import add_lora, lora_config
    from puma_hf.trainer.merge import merge_adapter
    from puma_hf.trainer.teachers import FrozenTeacher
    from puma_hf.trainer.trainer_puma import PumaTrainer
