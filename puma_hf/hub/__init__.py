"""The way to the Hub: a card from measured results, checks before the upload, and the upload."""

from puma_hf.configs import PushConfig
from puma_hf.hub.card import CardOptions, write_card
from puma_hf.hub.push import PushReport, push_to_hub

__all__ = ["CardOptions", "PushConfig", "PushReport", "push_to_hub", "write_card"]
