"""A page to search an index from a browser, and the same page as a Space on the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puma_hf.lazy import resolver

# `launch`, the function of an AppConfig, is in `puma_hf.app.launch`: here it would have the module's own name.
_NAMES = {"AppConfig": "puma_hf.configs", "serving": "puma_hf.app.launch", "write_space": "puma_hf.app.space"}

__all__ = ["AppConfig", "serving", "write_space"]

__getattr__ = resolver(__name__, _NAMES)


if TYPE_CHECKING:
    from puma_hf.app.launch import serving
    from puma_hf.app.space import write_space
    from puma_hf.configs import AppConfig
