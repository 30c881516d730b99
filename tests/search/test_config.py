"""The settings of an index and of a search."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from puma_hf.embedding.config import EmbedConfig
from puma_hf.search.config import IndexConfig, SearchConfig


def test_an_index_takes_what_embed_takes() -> None:
    names = [entry.name for entry in fields(IndexConfig)]
    assert names == [*(entry.name for entry in fields(EmbedConfig)), "ann"]
    config = IndexConfig(data="d", model="m", output="o")
    assert config.on_error == "skip"
    assert EmbedConfig(data="d", model="m", output="o").on_error == "raise"


def test_zeros_are_refused() -> None:
    with pytest.raises(ValueError, match=r"on_error='zero' would put zeros into the index.* Choose skip, or raise"):
        IndexConfig(data="d", model="m", output="o", on_error="zero")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "query=None and image=None: nothing to look for"),
        ({"query": " \n"}, "nothing to look for. Give words, a picture \\(--image\\), or both"),
        ({"query": "a", "top": 0}, "top=0 must be at least 1"),
        ({"query": "a", "target": "video"}, "target \\(--for\\)='video' must be one of 'any', 'text', 'image'"),
        ({"query": "a", "backend": "annoy"}, "backend='annoy' must be one of"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(index="i", **values)


def test_a_page_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a directory, must be a file. Name one, such as answers.html"):
        SearchConfig(index="i", query="a", html=tmp_path)


def test_a_picture_alone_is_a_query() -> None:
    assert SearchConfig(index="i", image="a.png").query is None


def test_what_only_approximate_search_uses() -> None:
    (note,) = SearchConfig(index="i", query="a", rescore_multiplier=3).notes()
    assert note == "rescore_multiplier=3: not used with backend='torch'."
    assert SearchConfig(index="i", query="a", rescore_multiplier=3, backend="ann").notes() == []
    with pytest.raises(ValueError, match="rescore_multiplier=0 must be at least 1"):
        SearchConfig(index="i", query="a", rescore_multiplier=0)
