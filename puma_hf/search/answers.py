"""What a search has found: as lines, as plain values for JSON; `puma_hf.search.html` makes a page of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

_SHOWN = 100  # characters of a text in a line
KINDS = {"any": "items", "text": "texts", "image": "pictures"}  # what answers to each target are called


@dataclass(frozen=True)
class Answer:
    """One item that was found.

    Args:
        rank: Its place, from 1.
        score: Cosine similarity of its embedding and the query's.
        id: Its id.
        modality: text, image, or image,text.
        text: Its text, or None.
        image: Path of its picture, or None.
    """

    rank: int
    score: float
    id: str
    modality: str
    text: str | None
    image: str | None

    def __str__(self) -> str:
        content = [shorten(self.text, _SHOWN) if self.text is not None else "", one_line(self.image or "")]
        words = [f"{self.rank:>3}", f"{self.score:.4f}", f"{self.modality:<10}", one_line(self.id), *content]
        return "  ".join(word for word in words if word)


@dataclass(frozen=True)
class Answers:
    """What a search has found, best first; `str()` has a line for each.

    Args:
        query: The words that were looked for, or None.
        image: Name of the picture that was looked for, or None.
        instruction: What was asked for, or None.
        target: What answers could be: any, text, or image.
        num_candidates: Items that could be found.
        answers: What was found.
    """

    query: str | None
    image: str | None
    instruction: str | None
    target: str
    num_candidates: int
    answers: tuple[Answer, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.answers))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, texts in full."""
        return asdict(self)


def one_line(text: str) -> str:
    """A text without line breaks, and without characters that would steer a terminal."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def shorten(text: str, length: int) -> str:
    """The beginning of a text in one line."""
    shown = one_line(text[: 2 * length])
    return shown if len(shown) <= length and len(text) <= 2 * length else shown[: length - 1].rstrip() + "…"
