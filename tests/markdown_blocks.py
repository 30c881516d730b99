"""Code blocks of Markdown, for the tests that run them.

A block that cannot run here has the line `<!-- not run: why -->` before its fence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import CodeType

_BLOCK = re.compile(
    r"(?P<mark><!-- not run: [^\n]+ -->\n+)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    code: str
    runs: bool

    def compiled(self, name: str) -> CodeType:
        # Blank lines before the code make the line numbers of a traceback those of the page.
        return compile("\n" * (self.line - 1) + self.code, name, "exec")


def blocks_of(markdown: str) -> list[Block]:
    return [
        Block(markdown.count("\n", 0, found.start("code")) + 1, found["language"], found["code"], found["mark"] is None)
        for found in _BLOCK.finditer(markdown)
    ]
