"""The way to the Hub: a card from measured results, checks before the upload, and the upload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puma_hf.lazy import resolver

_NAMES = {
    "CardOptions": "puma_hf.hub.card",
    "PushConfig": "puma_hf.configs",
    "PushReport": "puma_hf.hub.push",
    "push_to_hub": "puma_hf.hub.push",
    "write_card": "puma_hf.hub.card",
}

__all__ = ["CardOptions", "PushConfig", "PushReport", "push_to_hub", "write_card"]

__getattr__ = resolver(__name__, _NAMES)


if TYPE_CHECKING:
    from puma_hf.configs import PushConfig
    from puma_hf.hub.card import CardOptions, write_card
    from puma_hf.hub.push import PushReport, push_to_hub
