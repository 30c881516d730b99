"""The site that mkdocs builds: every page and name is in it, and nothing from elsewhere; docs/hooks.py has its part."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path

import pytest

import puma_hf

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def requests_of(page: str) -> list[str]:
    """What a browser would fetch by itself when it opens a page."""
    tags = re.findall(r"<(?:link|script|img|iframe|source)\b[^>]*>", page)
    fetched = [tag for tag in tags if not re.search(r'rel="?(canonical|next|prev)', tag)]
    return [found[1] for tag in fetched if (found := re.search(r'\s(?:src|href)="?([^"\s>]+)', tag))]


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
        requests = requests_of(path.read_text(encoding="utf-8"))
        assert requests
        assert [address for address in requests if re.match(r"(\w+:)?//", address)] == [], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = [(DOCS / page).read_text(encoding="utf-8") for page in PAGES]
    listed = [name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
    assert len(listed) == len(set(listed))
    names = {name.rpartition(".")[2] for name in listed}
    packages = [
        f"puma_hf.{name}" for name in ("losses", "trainer", "data", "evaluation", "embedding", "search", "modeling")
    ]
    public = {name for package in ("puma_hf", *packages) for name in import_module(package).__all__}
    assert public - names == {"__version__"}
    assert {f"puma_hf.{name}" for name in puma_hf.__all__} - set(listed) == {"puma_hf.__version__"}
