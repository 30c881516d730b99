"""Settings of the page."""

from __future__ import annotations

from typing import Any

import pytest

from puma_hf.app.config import AppConfig


def test_by_default_only_this_machine_sees_the_page() -> None:
    config = AppConfig(index="index")
    assert (config.host, config.port, config.top, config.max_upload_mb) == ("127.0.0.1", None, 24, 10)
    assert (config.space, config.open_browser, config.trust_remote_code) == (None, False, False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 70000}, "port=70000 must be at least 0 and at most 65535"),
        ({"top": 0}, "top=0 must be at least 1"),
        ({"max_upload_mb": 0}, r"max_upload_mb=0.* must be above 0"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AppConfig(index="index", **values)


def test_what_a_space_has_no_use_for_is_said() -> None:
    assert AppConfig(index="index", port=1, host="0.0.0.0").notes() == []
    assert AppConfig(index="index", space="space", instruction="Find it.").notes() == []
    notes = AppConfig(index="index", space="space", port=1, host="0.0.0.0", top=5).notes()
    ignored = "is ignored: a Space is written, nothing is served. Its app.py can set it."
    assert notes == [f"{name} {ignored}" for name in ("host", "port", "top")]
