"""Training losses of PUMA: modality-adaptive contrastive learning and self-distillation."""

from __future__ import annotations

from puma_hf.losses.multimodal_mac import MultimodalMACLoss, mac_loss
from puma_hf.losses.self_distillation import SelfDistillationLoss, self_distillation_loss
from puma_hf.losses.temperature import (
    ScheduledTemperatureLoss,
    TemperatureSchedule,
    TemperatureScheduleCallback,
    add_temperature_schedule,
    find_scheduled_losses,
)

__all__ = [
    "MultimodalMACLoss",
    "ScheduledTemperatureLoss",
    "SelfDistillationLoss",
    "TemperatureSchedule",
    "TemperatureScheduleCallback",
    "add_temperature_schedule",
    "find_scheduled_losses",
    "mac_loss",
    "self_distillation_loss",
]
