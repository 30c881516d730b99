from __future__ import annotations

import sys

import pytest

from puma_hf.lazy import resolver


def test_a_name_is_imported_on_first_use() -> None:
    sys.modules.pop("this", None)
    resolve = resolver("some.package", {"walk": "os", "s": "this"})
    assert resolve("walk") is __import__("os").walk
    assert "this" not in sys.modules


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'some\.package' has no attribute 'os'$"):
        resolver("some.package", {"walk": "os"})("os")
