"""The README's Python blocks run, top to bottom in one namespace, as a reader would paste them.

A block that cannot run here (it downloads, or needs a GPU) has the line `<!-- not run: why -->` before its
fence; it must still compile. Blocks run beside a copy of demo/ and configs/, so that relative paths hold.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.markdown_blocks import Block, blocks_of

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks(markdown: str) -> list[Block]:
    return [block for block in blocks_of(markdown) if block.language == "python"]


def test_blocks_are_found_with_their_lines() -> None:
    markdown = (
        "# T\n\n```python\na = 1\n```\n\n```bash\nls\n```\n<!-- not run: downloads -->\n```python\nb = 2\nc = 3\n```\n"
    )
    assert python_blocks(markdown) == [
        Block(4, "python", "a = 1\n", True),
        Block(12, "python", "b = 2\nc = 3\n", False),
    ]


def test_every_block_compiles() -> None:
    for block in python_blocks(README):
        block.compiled("README.md")


@pytest.mark.usefixtures("docs_directory")
def test_blocks_run() -> None:
    blocks = [block for block in python_blocks(README) if block.runs]
    assert blocks, "README.md shows no Python that runs"
    namespace: dict[str, object] = {"__name__": "__readme__"}
    for block in blocks:
        exec(block.compiled("README.md"), namespace)


def slug(heading: str) -> str:
    """The anchor that GitHub and the site make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if not link.startswith("https://")]
    assert len(links) > 10
    for path, _, anchor in (link.partition("#") for link in links):
        target = ROOT / (path or "README.md")
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{path}#{anchor}"


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    assert re.search(r"^make test$", README, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
