"""The page, in a browser. Its fixture sees to it that no request leaves this machine and no script of a text runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from puma_hf.app.asking import GONE, NOTHING
from puma_hf.search.index import Index
from puma_hf.search.query import Searcher
from tests.app.conftest import LONG, SCRIPT, TEMPLATE

pytest.importorskip("gradio")

if TYPE_CHECKING:
    from playwright.sync_api import Page

WORDS = "#ph-words textarea"
PICTURE = "#ph-picture input[type=file]"


def ids(page: Page) -> list[str]:
    return page.locator(".ph-id").all_inner_texts()


def search(page: Page, heading: str) -> None:
    """Press the button, and wait for new answers, to what `heading` names; those before may have had the same."""
    name = "document.querySelector('[data-search]')?.dataset.search"
    before = page.evaluate(name)
    page.click("#ph-search")
    page.wait_for_function(f"before => {name} && {name} !== before", arg=before)
    page.locator(".ph-asked h2", has_text=heading).wait_for()


def wait_for_words(page: Page, words: str) -> None:
    """The page fills its fields one after another."""
    page.wait_for_function("words => document.querySelector('#ph-words textarea').value === words", arg=words)


def choose(page: Page, path: Path) -> None:
    page.set_input_files(PICTURE, path)
    page.wait_for_selector("#ph-picture img")


def test_words_and_an_instruction(page: Page) -> None:
    assert page.title() == "Search by words and pictures"
    assert "9 items (2 pictures, 1 picture with a text, 6 texts) · tiny-puma" in page.locator("#ph-head").inner_text()
    page.fill(WORDS, "a table")
    page.press(WORDS, "Enter")
    page.locator(".ph-asked h2", has_text="“a table”").wait_for()
    assert ids(page)[0] == "t1"
    assert page.locator(".ph-score").first.inner_text() == "1.000"
    assert page.locator(".ph-card").count() == 9
    assert page.locator(".ph-card img").count() == 3
    page.check("#ph-target input[value=image]")
    page.click("#ph-search")
    page.locator(".ph-note", has_text="3 of 3 pictures").wait_for()
    assert sorted(ids(page)) == ["b", "i0", "i1"]
    before = page.locator(".ph-score").all_inner_texts()
    page.click("#ph-instruction button")
    page.get_by_role("textbox", name="Instruction").fill("Find a picture.")
    page.click("#ph-search")
    page.wait_for_function("before => document.querySelector('.ph-score')?.innerText != before", arg=before[0])
    assert page.locator(".ph-score").all_inner_texts() != before


def test_a_picture_then_both(page: Page, index_dir: Path) -> None:
    choose(page, index_dir.parent / "i1.png")
    search(page, "This picture")
    assert ids(page)[0] == "i1"
    assert page.locator(".ph-asked img").count() == 1
    page.fill(WORDS, "a red picture")
    search(page, "“a red picture”")
    assert page.locator(".ph-asked img").count() == 1
    assert page.locator(".ph-card").count() == 9


def test_nothing_then_too_much_then_something(page: Page) -> None:
    page.click("#ph-search")
    problem = page.locator(".ph-problem")
    problem.wait_for()
    assert problem.inner_text() == NOTHING
    page.fill(WORDS, "x" * 10**6)
    page.click("#ph-search")
    page.locator(".ph-problem", has_text="Text of a query has 1,000,000 characters, must be at most").wait_for()
    page.fill(WORDS, "a table")
    search(page, "“a table”")
    assert problem.count() == 0


def test_a_file_that_cannot_be_read_then_one_that_is_too_large(page: Page, tmp_path: Path, index_dir: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    choose(page, tmp_path / "a.png")
    page.click("#ph-search")
    page.locator(".ph-problem", has_text="The picture cannot be read as an image (cannot identify").wait_for()
    assert "Traceback" not in page.content()
    page.get_by_label("Remove Image").click()
    choose(page, index_dir.parent / "i0.png")
    search(page, "This picture")
    assert ids(page)[0] == "i0"
    page.get_by_label("Remove Image").click()
    (tmp_path / "big.png").write_bytes(os.urandom(300_000))
    page.set_input_files(PICTURE, tmp_path / "big.png")
    page.locator(".toast-body", has_text='exceed the maximum allowed size of 256.0 Kb: "big.png"').wait_for()
    page.fill(WORDS, "a table")
    search(page, "“a table”")
    assert page.locator(".ph-asked img").count() == 0


def test_a_script_is_a_text(page: Page) -> None:
    page.fill(WORDS, SCRIPT)
    search(page, SCRIPT)
    check_that_texts_are_shown(page, SCRIPT)
    for text in (TEMPLATE, SCRIPT):
        page.locator(".ph-card", has_text=text).locator("button").first.click()
        page.locator(".ph-asked h2", has_text=text).wait_for()
        check_that_texts_are_shown(page, text)
    page.fill(WORDS, TEMPLATE)
    search(page, TEMPLATE)
    check_that_texts_are_shown(page, TEMPLATE)


def check_that_texts_are_shown(page: Page, asked: str) -> None:
    wait_for_words(page, asked)
    assert page.locator(".ph-asked h2").inner_text() == f"“{asked}”"
    assert SCRIPT in ids(page)
    shown = page.locator(".ph-text").all_inner_texts()
    assert {SCRIPT, TEMPLATE} <= set(shown)
    assert any(len(words) == 280 and words.endswith("…") and LONG.startswith(words[:279]) for words in shown)
    assert page.locator(".ph-card img").count() == 3


def test_an_answer_is_the_next_query(page: Page) -> None:
    page.fill(WORDS, "an apple")
    search(page, "“an apple”")
    with_text, without, words = (page.locator(f".ph-card:has([title={name}]) button") for name in ("b", "i0", "t1"))
    with_text.click()
    page.locator(".ph-asked h2", has_text="“a red picture”").wait_for()
    assert ids(page)[0] == "b"
    wait_for_words(page, "a red picture")
    page.wait_for_selector("#ph-picture img")
    without.click()
    page.locator(".ph-asked h2", has_text="This picture").wait_for()
    assert ids(page)[0] == "i0"
    wait_for_words(page, "")
    page.wait_for_selector("#ph-picture img")
    search(page, "This picture")  # what is in the fields now is the same query
    assert ids(page)[0] == "i0"
    assert page.locator(".ph-score").first.inner_text() == "1.000"
    words.click()
    page.locator(".ph-asked h2", has_text="“a table”").wait_for()
    wait_for_words(page, "a table")
    page.wait_for_selector("#ph-picture img", state="detached")
    page.evaluate("document.querySelector('[data-search]').dataset.search = 'earlier'")
    words.click()
    page.locator(".toast-body", has_text=GONE).wait_for()
    assert ids(page)[0] == "t1"


def test_a_narrow_page(page: Page) -> None:
    page.set_viewport_size({"width": 375, "height": 700})
    page.fill(WORDS, SCRIPT)
    page.click("#ph-search")
    page.wait_for_selector(".ph-card")
    wide = (
        "[...document.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > 376).map(e => e.className)"
    )
    assert page.evaluate(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.wait_for_function("document.querySelector('.ph-asked').getBoundingClientRect().top < 500")
    lefts = page.evaluate("[...document.querySelectorAll('.ph-card')].map(e => e.getBoundingClientRect().left)")
    assert len(set(lefts)) == 2


# --- without a browser


def page_of(
    searcher: Searcher, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **settings: Any
) -> Any:
    from puma_hf.app.config import AppConfig
    from puma_hf.app.page import make_page

    monkeypatch.setattr(Index, "counts", counts)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return make_page(searcher, AppConfig(index="index", **settings), tmp_path)


@pytest.mark.parametrize(
    ("counts", "choices"),
    [
        ({"text": 3}, ["any"]),
        ({"image": 3}, ["any"]),
        ({"image,text": 3, "text": 1}, ["any", "image", "text"]),
        ({"image,text": 3, "text": 0}, ["any"]),
    ],
)
def test_only_what_the_index_has_can_be_chosen(
    searcher: Searcher, counts: dict[str, int], choices: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gradio as gr

    made = page_of(searcher, counts, monkeypatch, tmp_path)
    (radio,) = (block for block in made.blocks.values() if isinstance(block, gr.Radio))
    assert [value for _, value in radio.choices] == choices
    assert radio.visible == (len(choices) > 1)
    assert radio.value == ("image" if "image" in choices else "any")


@pytest.mark.parametrize("words", [None, "Find a picture."])
def test_the_page_may_begin_with_an_instruction(
    searcher: Searcher, words: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gradio as gr

    made = page_of(searcher, {"text": 3}, monkeypatch, tmp_path, instruction=words)
    texts = (block for block in made.blocks.values() if isinstance(block, gr.Textbox))
    (field,) = (text for text in texts if text.label == "Instruction")
    (folded,) = (block for block in made.blocks.values() if isinstance(block, gr.Accordion))
    assert (field.value, folded.open) == (words, words is not None)


def test_the_queue_is_bounded_and_uploads_end(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = page_of(searcher, {"text": 3}, monkeypatch, tmp_path)
    assert made._queue.max_size == 32
    assert made.delete_cache == (900, 3600)
    assert {(fn.concurrency_id, fn.concurrency_limit) for fn in made.fns.values()} == {("model", 1)}
    assert not made.api_open
