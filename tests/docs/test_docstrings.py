"""The examples in the docstrings run and print what they claim."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FENCE = re.compile(r"^[ \t]*```.*$", re.MULTILINE)

WITH_EXAMPLES = [
    path.relative_to(ROOT).with_suffix("").as_posix()
    for path in sorted((ROOT / "puma_hf").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


class FencedParser(doctest.DocTestParser):
    """Reads examples inside Markdown fences too: left in, the closing fence counts as expected output."""

    def parse(self, string: str, name: str = "<string>") -> list[str | doctest.Example]:
        return super().parse(FENCE.sub("", string), name)


def run_examples(module: object, name: str) -> tuple[int, str]:
    """Number of examples that ran, and a report of those that failed."""
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    ran = 0
    for test in doctest.DocTestFinder(parser=FencedParser()).find(module, name):
        result = runner.run(test, out=report.append)
        ran += result.attempted - getattr(result, "skipped", 0)  # Python 3.13 counts skipped ones as attempted
    return ran, "".join(report)


@pytest.mark.parametrize("source", WITH_EXAMPLES)
@pytest.mark.usefixtures("docs_directory")
def test_docstring_examples(source: str) -> None:
    name = source.replace("/", ".").removesuffix(".__init__")
    ran, report = run_examples(importlib.import_module(name), name)
    if report:
        pytest.fail(report, pytrace=False)
    if not ran:
        pytest.skip("every example in this file is marked +SKIP")
