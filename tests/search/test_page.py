"""The page, asked by HTTP as a browser asks it."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from puma_hf.search import AppConfig, Searcher
from puma_hf.search.page import launch, make_page
from tests.search.conftest import SCRIPT
from tests.search.visitor import Visitor, request, upload

gr = pytest.importorskip("gradio")


def shown(message: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """The note, the captions of the pictures and the rows of the table that the page shows after a question."""
    assert message["success"], message
    note, gallery, table, _ = message["output"]["data"][-4:]
    rows = table["value"]["data"]
    assert (gallery["visible"], table["visible"]) == (bool(gallery["value"]), rows != [[""] * 4])
    return note, [card["caption"] for card in gallery["value"]], rows


def test_words(url: str) -> None:
    note, captions, rows = shown(Visitor(url).ask("a table"))
    assert note == "7 of 7 items, best first"
    assert rows[0] == ["1", "1.000", "t1", "a table"]
    assert sorted(row[3] for row in rows) == sorted(["a red apple", "a table", "on", SCRIPT])
    assert sorted(caption.split(" · ")[2] for caption in captions) == ["a red picture", "i0", "i1"]
    ranks = [int(caption.split()[0]) for caption in captions] + [int(row[0]) for row in rows]
    assert sorted(ranks) == list(range(1, 8))
    note, captions, rows = shown(Visitor(url).ask("a table", target="image"))
    assert (note, len(captions), rows) == ("3 of 3 pictures, best first", 3, [[""] * 4])


def test_a_picture_that_was_uploaded_then_an_answer_as_the_next_query(url: str, page_index: Path) -> None:
    status, answer = upload(url, "a.png", (page_index.parent / "i1.png").read_bytes())
    assert status == 200
    visitor = Visitor(url)
    _, captions, rows = shown(visitor.ask(image=json.loads(answer)[0]))
    assert captions[0] == "1 · 1.000 · i1"
    chosen = visitor.choose("gallery", captions.index(next(one for one in captions if "a red picture" in one)))
    text, picture, *_ = chosen["output"]["data"]
    assert text == "a red picture"
    assert request(url, "GET", f"/gradio_api/file={picture['path']}")[0] == 200
    assert "1 · 1.000 · a red picture" in shown(chosen)[1]
    rows = shown(chosen)[2]
    chosen = visitor.choose("dataframe", [[row[2] for row in rows].index("t1"), 3], "text")
    assert chosen["output"]["data"][:2] == ["a table", None]
    assert shown(chosen)[2][0] == ["1", "1.000", "t1", "a table"]


def test_pictures_that_cannot_be_read_name_no_path_of_the_server(url: str) -> None:
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"  # Pillow would start Ghostscript
    message = Visitor(url).ask(image=json.loads(upload(url, "a.png", content)[1])[0])
    assert not message["success"]
    assert "/" not in str(message["output"]["error"]).replace("image/", "")


def test_no_file_but_what_was_uploaded(url: str, page_index: Path) -> None:
    files = ["/etc/passwd", "pyproject.toml", page_index.parent / "secret.txt", page_index.parent / "i0.png"]
    files += sorted(page_index.glob("items.lance/data/*"))[:1]
    for file in map(str, files):
        for form in (file, file.replace("/", "%2f"), "".join(f"%{ord(letter):02x}" for letter in file)):
            status, body = request(url, "GET", f"/gradio_api/file={form}")
            assert status in (400, 403, 404), (form, status)
            assert b"not to be seen" not in body
        assert not Visitor(url).ask(image=str(Path(file).resolve()))["success"]


def test_a_file_that_is_too_large(url: str) -> None:
    assert upload(url, "big.png", os.urandom(300_000))[0] == 413


def test_only_this_machine_is_answered(url: str) -> None:
    assert url.startswith("http://127.0.0.1:")
    with socket.socket() as other, pytest.raises(OSError, match="refused"):
        other.connect(("127.0.0.2", int(url.rpartition(":")[2])))


# --- what is built


@pytest.mark.parametrize(
    ("counts", "choices"),
    [
        ({"image": 2, "image,text": 1}, ["any"]),
        ({"image,text": 3, "text": 1}, ["any", "image", "text"]),
    ],
)
def test_only_what_the_index_has_can_be_chosen(
    page_searcher: Searcher, counts: dict[str, int], choices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_searcher.index, "counts", counts)
    page = make_page(page_searcher, AppConfig(index="index"))
    (radio,) = (block for block in page.blocks.values() if isinstance(block, gr.Radio))
    assert [value for _, value in radio.choices] == choices
    assert (radio.visible, radio.value) == (len(choices) > 1, "image" if len(choices) > 1 else "any")
    assert {(fn.concurrency_id, fn.concurrency_limit) for fn in page.fns.values()} == {("model", 1)}


# --- the command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_stopped(
    page_searcher: Searcher, page_index: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    said: list[str] = []

    def ask_and_stop(url: str) -> None:
        said.extend((url, Visitor(url).ask("a table")["output"]["data"][0]))
        os.kill(os.getpid(), number)

    opened: dict[str, Any] = {}
    monkeypatch.setattr("puma_hf.search.page.open_searcher", lambda *_, **given: opened.update(given) or page_searcher)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what it runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(number)
    is_error = number == signal.SIGTERM  # which schedulers and containers send
    with pytest.raises(SystemExit) if is_error else nullcontext():
        launch(AppConfig(index=page_index, port=0, num_kept_layers=1), started=ask_and_stop)
    assert opened["num_kept_layers"] == 1
    assert said[1] == "7 of 7 items, best first"
    assert signal.getsignal(number) is before
    with pytest.raises(ConnectionRefusedError):
        request(said[0], "GET", "/config")
