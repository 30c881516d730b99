from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from puma_hf.checkpoint import check_truncate_dim, open_sentence_transformer


def test_a_local_models_code_is_run(puma_dir: Path) -> None:
    model: Any = open_sentence_transformer(str(puma_dir), device="cpu", truncate_dim=4)
    assert model.truncate_dim == 4
    assert type(model[0].model).__name__ == "PumaModel"


def test_a_model_that_is_nowhere() -> None:
    message = r"model='no/model' is no folder here, and the Hub has no such model.*unless HF_HUB_OFFLINE is meant"
    with pytest.raises(FileNotFoundError, match=message):
        open_sentence_transformer("no/model", device="cpu")


def test_more_dimensions_than_there_are(sentence_transformer: SentenceTransformer) -> None:
    dim = sentence_transformer.get_embedding_dimension()
    assert dim is not None
    check_truncate_dim(sentence_transformer, "m", dim)
    message = rf"truncate_dim={dim + 1}, but the embeddings of 'm' have {dim} dimensions\. Choose fewer"
    with pytest.raises(ValueError, match=message):
        check_truncate_dim(sentence_transformer, "m", dim + 1)
