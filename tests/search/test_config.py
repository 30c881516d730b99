"""The settings of an index and of a search."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from puma_hf.embedding.config import EmbedConfig
from puma_hf.search.config import AppConfig, IndexConfig, SearchConfig


def test_an_index_takes_what_embed_takes() -> None:
    names = [entry.name for entry in fields(IndexConfig)]
    assert names == [*(entry.name for entry in fields(EmbedConfig)), "ann"]
    config = IndexConfig(data="d", model="m", output="o")
    assert config.on_error == "skip"
    assert EmbedConfig(data="d", model="m", output="o").on_error == "raise"


def test_zeros_are_refused() -> None:
    with pytest.raises(ValueError, match=r"on_error='zero' would put zeros into the index.* Choose skip, or raise"):
        IndexConfig(data="d", model="m", output="o", on_error="zero")


def test_what_an_index_does_not_use() -> None:
    given: Any = {"data": "d", "model": "m", "output": "o"}
    assert IndexConfig(**given, format="safetensors").notes() == ["format='safetensors': not used by an index."]
    with pytest.raises(
        ValueError, match=r"precision='int8' must be 'float32' or 'float16' in an index. Choose ann='int8'"
    ):
        IndexConfig(**given, precision="int8")
    with pytest.raises(ValueError, match="shard_size=10000 must be at least 1 and at most 4096"):
        IndexConfig(**given, shard_size=10_000)


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
    assert note == "rescore_multiplier=3: not used with backend='exact'."
    assert SearchConfig(index="i", query="a", rescore_multiplier=3, backend="ann").notes() == []
    with pytest.raises(ValueError, match="rescore_multiplier=0 must be at least 1"):
        SearchConfig(index="i", query="a", rescore_multiplier=0)


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
def test_values_of_the_page_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AppConfig(index="index", **values)


def test_what_a_space_has_no_use_for_is_said() -> None:
    assert AppConfig(index="index", port=1, host="0.0.0.0").notes() == []
    assert AppConfig(index="index", space="space", instruction="Find it.").notes() == []
    notes = AppConfig(index="index", space="space", port=1, host="0.0.0.0", top=5).notes()
    ignored = "is ignored: a Space is written, nothing is served. Its app.py can set it."
    assert notes == [f"{name} {ignored}" for name in ("host", "port", "top")]
