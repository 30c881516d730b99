"""Answers as HTML."""

from __future__ import annotations

import os
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from puma_hf.app.cards import count_line, problem, readable, results, shown, welcome
from puma_hf.search.answers import Answer, Answers
from tests.app.conftest import SCRIPT, TEMPLATE
from tests.search.small_corpus import write_picture


class Tags(HTMLParser):
    """Names of the tags of a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.append(tag)


def answers(*found: Answer, query: str | None = "red") -> Answers:
    return Answers(query, None, None, "any", 8, found)


@pytest.mark.parametrize("text", [SCRIPT, TEMPLATE, "a & b", "\ud800"])
def test_texts_are_shown_as_they_are(text: str) -> None:
    safe = shown(text)
    assert not re.search(r"[<>\"'`${}]", safe)
    assert unescape(safe) == text.encode("utf-8", "backslashreplace").decode()
    assert Tags(problem(text)).found == ["div"]
    assert Tags(welcome(text)).found == ["p"]


def test_no_text_of_an_answer_becomes_a_tag(tmp_path: Path) -> None:
    path = str(write_picture(tmp_path / "a.png", 0))
    page = results(answers(Answer(1, 0.5, SCRIPT, "image,text", SCRIPT, path), query=SCRIPT))
    tags = Tags(page).found
    assert set(tags) == {"div", "h2", "p", "ol", "li", "img", "span", "button"}
    assert tags.count("img") == 1
    assert page.count('src="data:image/') == 1


def test_a_card_has_score_id_and_place() -> None:
    page = results(
        answers(Answer(1, 0.51239, "first", "text", "x", None), Answer(2, -0.1, "second", "text", "y", None))
    )
    assert re.findall(r'ph-score">(.*?)<', page) == ["0.512", "-0.100"]
    assert re.findall(r'data-place="(\d)" aria-label="Search with (\w+)"', page) == [("0", "first"), ("1", "second")]
    assert "2 of 8 items, best first" in page
    assert "“red”" in page


def test_the_picture_that_was_asked_for_is_shown() -> None:
    page = results(answers(query=None), picture=Image.new("RGB", (400, 300), "red"))
    assert "This picture" in page
    assert page.count("data:image/") == 1


def test_long_texts_are_cut() -> None:
    page = results(answers(Answer(1, 0.5, "i" * 500, "text", "t" * 10**6, None), query="q" * 10**6))
    assert len(page) < 2000
    assert f"{'t' * 279}…" in page
    assert f"{'i' * 79}…" in page


def test_a_picture_that_is_gone_leaves_the_others(tmp_path: Path) -> None:
    there = str(write_picture(tmp_path / "a.png", 0))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    names = [there, str(tmp_path / "broken.png"), str(tmp_path / "gone.png")]
    page = results(answers(*(Answer(n, 0.5, str(n), "image", None, name) for n, name in enumerate(names, 1))))
    assert page.count("This picture is gone, or cannot be read.") == 2
    assert page.count("<img") == 1
    assert str(tmp_path) not in page


def test_a_picture_that_has_changed_is_shown_as_it_is_now(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", 0)
    found = answers(Answer(1, 0.5, "a", "image", None, str(path)))
    before = results(found)
    write_picture(path, 1)
    os.utime(path, ns=(1, 1))  # the clock of a file system may not have moved on
    assert results(found) != before


@pytest.mark.parametrize(
    ("counts", "model", "line"),
    [
        ({"text": 1234}, "org/model", "1,234 texts · org/model"),
        ({"text": 2, "image": 1}, "/home/me/puma-k4", "3 items (2 texts, 1 picture) · puma-k4"),
        ({"image,text": 2}, "/home/me/puma-k4/", "2 pictures with a text · puma-k4"),
    ],
)
def test_one_line_of_an_index(counts: dict[str, int], model: str, line: str) -> None:
    assert count_line(counts, model) == line


@pytest.mark.parametrize("index", ["index", "here/index", "{cwd}/here/index"])
def test_words_of_an_error_do_not_say_where_the_index_lies(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(index.format(cwd=tmp_path))
    error = ValueError(f"the file '{folder.resolve()}/items.parquet' of {str(folder)!r}\nis gone.")
    assert readable(error, folder) == "The file 'index/items.parquet' of 'index' is gone."


def test_other_words_of_an_error_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = ValueError("Look at '../photos', 'data/index', or 'a/index-2'.")
    for index in (".", "index", "a/index"):
        assert readable(error, Path(index)) == str(error)
