"""The site that mkdocs builds: every page and name is in it, and nothing from elsewhere; docs/hooks.py has its part."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

import puma_hf
from puma_hf import cli

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


class Requests(HTMLParser):
    """What a browser would fetch by itself when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("canonical", "next", "prev"):
            return
        address = values.get("src") or (values.get("href") if tag == "link" else None)
        if address is not None:
            self.found.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning is an error, and so is a link or an anchor that leads nowhere."""
    if "BUILT_SITE" in os.environ:  # `make docs` has just built it so
        return Path(os.environ["BUILT_SITE"])
    mkdocs = pytest.importorskip("mkdocs.commands.build", reason="pip install 'puma-hf[docs]'")
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    mkdocs.build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    built = {path.relative_to(site).with_suffix(".md").as_posix() for path in site.rglob("*.html")}
    assert built - {"404.md"} == set(PAGES)
    assert not (site / "hooks.py").exists()


def test_a_page_requests_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        requests = Requests()
        requests.feed(path.read_text(encoding="utf-8"))
        assert requests.found
        assert [address for address in requests.found if re.match(r"(\w+:)?//", address)] == [], path
    assert not re.search(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//", "".join(styles(site)))


def styles(site: Path) -> Iterator[str]:
    yield from (path.read_text(encoding="utf-8") for path in site.rglob("*.css"))


def test_docstrings_are_shown_as_they_are_meant(site: Path) -> None:
    pages = [path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html")]
    examples = 0
    for page in pages:
        prose = re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL)
        assert "&gt;&gt;&gt;" not in prose, "an example is not shown as code"
        assert not re.search(r"\[<code>", prose), "a name stands in brackets"
        assert not re.search(r">(?:option|required)</span>", page), "a field is shown with the call that makes it"
        examples += page.count("<strong>Example:</strong>")
    assert examples > 50


def test_every_public_name_is_in_the_reference_once() -> None:
    listed = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", read(page), re.MULTILINE)]
    assert len(listed) == len(set(listed))
    names = {name.rpartition(".")[2] for name in listed}
    packages = [
        f"puma_hf.{name}" for name in ("losses", "trainer", "data", "evaluation", "embedding", "search", "modeling")
    ]
    public = {name for package in ("puma_hf", *packages) for name in import_module(package).__all__}
    assert public - names == {"__version__"}
    assert {f"puma_hf.{name}" for name in puma_hf.__all__} - set(listed) == {"puma_hf.__version__"}


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for name in cli.app.commands:
        assert f'id="{name}"' in page
    assert "--num-kept-layers" in page
    assert "--hard-temperature" in page
