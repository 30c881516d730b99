"""Training losses of PUMA: modality-adaptive contrastive learning and self-distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puma_hf import resolver

# Resolved on first use: the command reads the defaults in `schedule_puma`, and its --help is to be quick.
_MODULES = {
    "cached_mac_puma": ["CachedMultimodalMACLoss"],
    "distillation_puma": ["JointDistillationLoss", "SelfDistillationLoss", "self_distillation_loss"],
    "elastic_puma": ["ElasticDepthLoss"],
    "mac_puma": ["MultimodalMACLoss", "mac_loss", "split_loss"],
    "progress_puma": [
        *("ScheduledTemperatureLoss", "TemperatureScheduleCallback"),
        *("add_temperature_schedule", "find_scheduled_losses"),
    ],
    "schedule_puma": ["TemperatureSchedule"],
}
_NAMES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
__all__ = sorted(_NAMES)
__getattr__ = resolver(__name__, _NAMES)

if TYPE_CHECKING:
    from .cached_mac_puma import CachedMultimodalMACLoss as CachedMultimodalMACLoss
    from .distillation_puma import JointDistillationLoss as JointDistillationLoss
    from .distillation_puma import SelfDistillationLoss as SelfDistillationLoss
    from .distillation_puma import self_distillation_loss as self_distillation_loss
    from .elastic_puma import ElasticDepthLoss as ElasticDepthLoss
    from .mac_puma import MultimodalMACLoss as MultimodalMACLoss
    from .mac_puma import mac_loss as mac_loss
    from .mac_puma import split_loss as split_loss
    from .progress_puma import ScheduledTemperatureLoss as ScheduledTemperatureLoss
    from .progress_puma import TemperatureScheduleCallback as TemperatureScheduleCallback
    from .progress_puma import add_temperature_schedule as add_temperature_schedule
    from .progress_puma import find_scheduled_losses as find_scheduled_losses
    from .schedule_puma import TemperatureSchedule as TemperatureSchedule
