"""Names of a package that are imported on first use, so that `import puma_hf` and `puma-hf --help` stay quick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def resolver(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """What a package assigns to its `__getattr__`.

    Args:
        package: Its name.
        names: For each public name the module that has it.

    Returns:
        A function from a name to its value; an `AttributeError` for others.

    Example:

    ```python
    >>> from puma_hf.lazy import resolver

    >>> resolver("shapes", {"pi": "math"})("pi")
    3.141592653589793
    ```
    """

    def resolve(name: str) -> Any:
        if name in names:
            return getattr(import_module(names[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return resolve
