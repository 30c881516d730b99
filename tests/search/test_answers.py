"""What was found, as lines, as plain values and as a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from puma_hf.search.answers import Answer, Answers, shorten, small_copy, to_html


@pytest.mark.parametrize(
    ("text", "expected"),
    [("abcde", "abcde"), ("abcdef", "abcd…"), ("a" * 10**6, "aaaa…"), ("a \x1b\r\n\u202ed", "a d")],
)
def test_shortened_and_no_terminal_is_steered(text: str, expected: str) -> None:
    assert shorten(text, 5) == expected


# --- a page

EVIL = "<script>alert(1)</script>\" onerror='alert(2)' {title} &amp;"


class Page(HTMLParser):
    """The tags with their attributes, and the text, of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def sources(self) -> list[str]:
        return [str(values["src"]) for tag, values in self.tags if tag == "img"]


def test_every_text_is_escaped() -> None:
    answers = Answers(EVIL, None, EVIL, "any", 9, (Answer(1, 0.5, EVIL, "text", EVIL, None),))
    parsed = Page(to_html(answers))
    assert "script" not in [tag for tag, _ in parsed.tags]
    assert parsed.text.count(EVIL) == 5  # title, heading, instruction, text, id
    assert not [name for _, values in parsed.tags for name in values if name.startswith("on")]


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    for name, size in (("a.png", (4, 4)), ("q.png", (400, 4))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    found = (Answer(1, 0.5, "a", "image", None, str(tmp_path / "a.png")),)
    page = to_html(Answers("red", "q.png", None, "any", 9, found), picture=tmp_path / "q.png")
    parsed = Page(page)
    assert [source.partition(",")[0] for source in parsed.sources()] == ["data:image/webp;base64"] * 2
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|url\(|<link|@import", page)
    assert "The best 1 of 9 items" in parsed.text


def test_a_picture_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"no picture")
    found = tuple(Answer(1, 0.5, name, "image", None, str(tmp_path / f"{name}.png")) for name in ("<a>", "b"))
    parsed = Page(to_html(Answers("red", None, None, "any", 9, found)))
    assert parsed.sources() == []
    for name in ("<a>.png", "b.png"):
        assert f"This picture cannot be read: {tmp_path / name}" in parsed.text


@pytest.mark.parametrize(("size", "expected"), [((640, 320), (100, 50)), ((10, 20), (10, 20))])
def test_a_small_copy(size: tuple[int, int], expected: tuple[int, int]) -> None:
    original = Image.new("RGBA", size, (255, 0, 0, 0))
    small = small_copy(original, 100)
    assert small is not None
    assert small.size == expected
    assert small.getpixel((5, 5)) == (255, 255, 255)  # transparent is white
    assert original.size == size
