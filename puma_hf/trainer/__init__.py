"""Training: LoRA, the teacher, the trainers, and the two stages as functions."""

from __future__ import annotations

from puma_hf.trainer.distillation import PumaDistillationTrainer
from puma_hf.trainer.lora import add_lora, lora_config, merge_adapter
from puma_hf.trainer.puma import PumaTrainer
from puma_hf.trainer.teacher import FrozenTeacher

__all__ = ["FrozenTeacher", "PumaDistillationTrainer", "PumaTrainer", "add_lora", "lora_config", "merge_adapter"]
