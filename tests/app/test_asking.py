"""Questions of the page, without the page."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from puma_hf.app.asking import FAILED, NOTHING, ask, ask_again
from puma_hf.search.query import Query, Searcher
from tests.app.conftest import LONG
from tests.search.small_corpus import write_picture

NONE: dict[str, Any] = {"text": "", "picture": None, "instruction": "", "target": "any", "top": 3}


def ids(html: str) -> list[str]:
    return re.findall(r'ph-id" title="(.*?)"', html)


def test_it_finds_what_the_searcher_finds(searcher: Searcher, tmp_path: Path) -> None:
    picture = write_picture(tmp_path / "a.png", 2)
    asked = {"text": "a table", "picture": picture, "instruction": " Find it. ", "target": "text", "top": 2}
    found = ask(searcher, **asked)  # type: ignore[arg-type]
    wanted = searcher.search(Query(text="a table", image=picture, instruction="Find it."), target="text", top_k=2)
    assert len(ids(found.html)) == 2
    assert found.items == tuple((answer.text, answer.image) for answer in wanted.answers)


@pytest.mark.parametrize("text", ["", None, " \n"])
def test_nothing_to_look_for(searcher: Searcher, text: str | None) -> None:
    found = ask(searcher, **{**NONE, "text": text})
    assert NOTHING in found.html
    assert found.items == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "x" * 10**6}, "Text of a query has 1,000,000 characters, must be at most 100,000."),
        ({"text": "x", "instruction": "x" * 10**6}, "Instruction of a query has 1,000,000 characters"),
        ({"text": "\ud83d"}, "The query cannot be embedded: "),
        ({"text": "x", "target": "video"}, "Target is &#x27;video&#x27;, must be one of"),
        ({"picture": "gone.png"}, "The picture is gone. Choose it again."),
    ],
)
def test_what_is_wrong_is_said(searcher: Searcher, values: dict[str, Any], message: str) -> None:
    found = ask(searcher, **{**NONE, **values})
    assert message in found.html
    assert 'role="alert"' in found.html
    assert found.items == ()


def test_a_picture_that_cannot_be_read(searcher: Searcher, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    found = ask(searcher, **{**NONE, "picture": str(tmp_path / "a.png")})
    assert "The picture cannot be read as an image (cannot identify image file). It may be cut off" in found.html
    assert str(tmp_path) not in found.html
    assert "0x" not in found.html


def test_another_error_is_written_down_and_not_shown(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(searcher, "search", broken)
    with caplog.at_level(logging.ERROR):
        found = ask(searcher, **{**NONE, "text": "a table"})
    assert FAILED in found.html
    assert "secret" not in found.html
    assert "RuntimeError: secret" in caplog.text


# --- an answer as the next query


def again(searcher: Searcher, items: Any, place: Any) -> Any:
    return ask_again(searcher, items, place, instruction="", target="any", top=3)


def test_an_answer_is_the_next_query(searcher: Searcher) -> None:
    first = ask(searcher, **{**NONE, "text": "a red picture", "top": 9})
    both, picture, text = (ids(first.html).index(name) for name in ("b", "i0", "t1"))
    for place, name in ((both, "b"), (picture, "i0"), (text, "t1")):
        found = again(searcher, first.items, place)
        assert ids(found.found.html)[0] == name
        assert (found.picture is None) == (name == "t1")
        assert found.text == {"b": "a red picture", "i0": "", "t1": "a table"}[name]


def test_a_large_picture_goes_back_smaller(searcher: Searcher, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "a.png")
    found = again(searcher, [(None, str(tmp_path / "a.png"))], 0)
    assert found.picture.size == (1024, 512)


def test_a_picture_that_is_gone_by_then(searcher: Searcher, tmp_path: Path) -> None:
    found = again(searcher, [("words", str(tmp_path / "gone.png"))], 0)
    assert (found.text, found.picture) == ("words", None)
    assert "The picture is gone" in found.found.html


@pytest.mark.parametrize("place", [-1, 1, None, "0", 0.0, True, [0], {}])
def test_what_is_no_answer(searcher: Searcher, place: Any) -> None:
    assert again(searcher, [(LONG, None)], place) is None
