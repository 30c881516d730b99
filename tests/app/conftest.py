"""An index with texts and ids that try to be something else, its page, and a browser."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.patience import PATIENCE
from tests.search.small_corpus import TEXTS, write_picture

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page
    from sentence_transformers import SentenceTransformer

    from puma_hf.search.query import Searcher

MARK = "window.ran = 1"
SCRIPT = f"<script>{MARK}</script><img src=x onerror='{MARK}'>"
TEMPLATE = f"${{{MARK}}} {{{{#if 1}}}}ran{{{{/if}}}} `${{{MARK}}}` \" ' </li>"
LONG = "a red apple on a table " * 500
MAX_UPLOAD_MB = 0.25


@pytest.fixture(scope="session")
def index_dir(puma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine items: six of text, two pictures, and a picture with a text. Read only."""
    from puma_hf.search.build import build_index
    from puma_hf.search.config import IndexConfig

    folder = tmp_path_factory.mktemp("app-corpus")
    lines: list[dict[str, Any]] = [{"id": f"t{row}", "text": text} for row, text in enumerate(TEXTS[:3])]
    lines += [
        {"id": SCRIPT, "text": SCRIPT},
        {"id": "template", "text": TEMPLATE},
        {"id": "long", "text": LONG},
        {"id": "i0", "image": write_picture(folder / "i0.png", 0).name},
        {"id": "i1", "image": write_picture(folder / "i1.png", 2).name},
        {"id": "b", "text": "a red picture", "image": write_picture(folder / "b.png", 1).name},
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "secret.txt").write_text("not to be seen")
    build_index(IndexConfig(data=folder / "corpus.jsonl", model=str(puma_dir), output=folder / "index"))
    return folder / "index"


@pytest.fixture(scope="session")
def searcher(index_dir: Path, sentence_transformer: SentenceTransformer) -> Searcher:
    """Its searcher. Read only."""
    from puma_hf.search.index import open_index
    from puma_hf.search.query import Searcher

    return Searcher(open_index(index_dir), sentence_transformer)


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the served page puts what it makes; other modules' tests have the system's directory again."""
    import tempfile

    folder = tmp_path_factory.mktemp("app-temporary")
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    yield folder
    tempfile.tempdir = before


@pytest.fixture(scope="module")
def url(searcher: Searcher, temporary: Path) -> Iterator[str]:
    """Where the page is served."""
    pytest.importorskip("gradio")
    from puma_hf.app import AppConfig, serving

    config = AppConfig(index=searcher.index.folder, port=0, top=9, max_upload_mb=MAX_UPLOAD_MB)
    with serving(searcher, config) as address:
        yield address


@pytest.fixture(scope="module")
def browser(temporary: Path) -> Iterator[BrowserContext]:
    """Debian's Chromium without a window, whose pages share what it has fetched and compiled of Gradio.

    It has an event loop running, so it ends with its module.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        reason = "there is no chromium on the PATH"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{reason}: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened.new_context(viewport={"width": 1100, "height": 800})
        opened.close()


@pytest.fixture
def page(browser: BrowserContext, url: str) -> Iterator[Page]:
    """The page, opened anew, looking for anything.

    Whatever is done with it, it asks nobody but its own server, which refuses nothing, and nothing breaks.
    """
    opened = browser.new_page()
    opened.set_default_timeout(PATIENCE * 1000)
    asked: list[str] = []
    broken: list[str] = []
    refused: list[str] = []
    opened.on("response", lambda answer: refused.append(answer.url) if answer.status in (403, 404) else None)
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: broken.append(str(error)))
    opened.goto(url)
    opened.wait_for_selector("#ph-words textarea")
    opened.wait_for_selector("#ph-target input[value=image]:checked", state="attached")
    opened.check("#ph-target input[value=any]")
    yield opened
    ran = opened.evaluate("window.ran")
    opened.close()
    assert [address for address in asked if not address.startswith((f"{url}/", "data:", "blob:"))] == []
    assert asked
    assert broken == []
    # Gradio has no progress to tell of a file that is refused.
    assert [address for address in refused if "/upload_progress" not in address] == []
    assert ran is None
