"""Training losses of PUMA: modality-adaptive contrastive learning and self-distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puma_hf import resolver

# Resolved on first use: the command reads the defaults in `schedule_puma`, and its --help is to be quick.
_MODULES = {
    "cached_mac_puma": ["CachedMultimodalMACLoss"],
    "distillation_puma": ["JointDistillationLoss", "SelfDistillationLoss", "self_distillation_loss"],
    "mac_puma": ["MultimodalMACLoss", "mac_loss", "split_loss"],
    "progress_puma": [
        "ScheduledTemperatureLoss",
        "TemperatureScheduleCallback",
        "add_temperature_schedule",
        "find_scheduled_losses",
    ],
    "schedule_puma": ["TemperatureSchedule"],
}
_NAMES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

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
__getattr__ = resolver(__name__, _NAMES)

if TYPE_CHECKING:
    from .cached_mac_puma import CachedMultimodalMACLoss
    from .distillation_puma import JointDistillationLoss, SelfDistillationLoss, self_distillation_loss
    from .mac_puma import MultimodalMACLoss, mac_loss, split_loss
    from .progress_puma import (
        ScheduledTemperatureLoss,
        TemperatureScheduleCallback,
        add_temperature_schedule,
        find_scheduled_losses,
    )
    from .schedule_puma import TemperatureSchedule
