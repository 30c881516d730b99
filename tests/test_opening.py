from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from puma_hf.checkpoint import open_sentence_transformer


def test_a_local_models_code_is_run(puma_dir: Path) -> None:
    model: Any = open_sentence_transformer(str(puma_dir), device="cpu", truncate_dim=4)
    assert model.truncate_dim == 4
    assert type(model[0].model).__name__ == "PumaModel"


def test_a_model_that_is_nowhere() -> None:
    message = r"model='no/model' is no folder here, and the Hub has no such model.*unless HF_HUB_OFFLINE is meant"
    with pytest.raises(FileNotFoundError, match=message):
        open_sentence_transformer("no/model", device="cpu")
