from __future__ import annotations

from dataclasses import fields

import pytest

from puma_hf.parity.config import CheckConfig
from puma_hf.recipes import load_config


def test_every_field_has_help_and_only_one_must_be_given() -> None:
    assert all(entry.metadata["help"] for entry in fields(CheckConfig))
    with pytest.raises(ValueError, match="directory is missing"):
        load_config(CheckConfig)
    assert CheckConfig(directory="a").merged is None


def test_wrong_seed() -> None:
    with pytest.raises(ValueError, match=r"seed=-1 must be at least 0\. Leave it out for the default, 0\."):
        CheckConfig(directory="a", seed=-1)
