"""Training losses of PUMA: modality-adaptive contrastive learning and self-distillation."""

from __future__ import annotations

from puma_hf.losses.cached_multimodal_mac import CachedMultimodalMACLoss
from puma_hf.losses.contrastive import mac_loss, split_loss
from puma_hf.losses.joint import JointDistillationLoss
from puma_hf.losses.multimodal_mac import MultimodalMACLoss
from puma_hf.losses.self_distillation import SelfDistillationLoss, self_distillation_loss
from puma_hf.losses.temperature import (
    ScheduledTemperatureLoss,
    TemperatureSchedule,
    TemperatureScheduleCallback,
    add_temperature_schedule,
    find_scheduled_losses,
)

__all__ = [
    "CachedMultimodalMACLoss",
    "JointDistillationLoss",
    "MultimodalMACLoss",
    "ScheduledTemperatureLoss",
    "SelfDistillationLoss",
    "TemperatureSchedule",
    "TemperatureScheduleCallback",
    "add_temperature_schedule",
    "find_scheduled_losses",
    "mac_loss",
    "self_distillation_loss",
    "split_loss",
]
