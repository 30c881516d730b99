"""Training: LoRA, the teachers, the trainers, and the stages as functions."""

from puma_hf.trainer.distillation import PumaDistillationTrainer
from puma_hf.trainer.lora_puma import add_lora, lora_config
from puma_hf.trainer.merge import merge_adapter
from puma_hf.trainer.teachers import FrozenTeacher
from puma_hf.trainer.trainer_puma import PumaTrainer

__all__ = ["FrozenTeacher", "PumaDistillationTrainer", "PumaTrainer", "add_lora", "lora_config", "merge_adapter"]
