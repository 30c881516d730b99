"""What a search has found: as lines, as plain values for JSON, and as a page in one file."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from PIL import Image

from puma_hf.modeling.inputs_puma import load_rgb_image

_SHOWN = 100  # characters of a text in a line
KINDS = {"any": "items", "text": "texts", "image": "pictures"}  # what answers to each target are called

_ICON_SIZE = 128  # pixels of the longer side; JPEG would leave clouds around the lines of an icon, and save little
_TEXT_LENGTH = 600  # characters of a text

# A page that fetches nothing and runs nothing.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font-family: system-ui, sans-serif; margin: 1.5rem auto; max-width: 72rem; padding: 0 1rem; }}
h1, li {{ overflow-wrap: anywhere; }} header img {{ max-height: 10rem; max-width: 100%; }}
ol {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(14rem, 45%), 1fr));
  list-style: none; padding: 0; }}
li {{ border: 1px solid #8886; border-radius: .5rem; padding: .75rem; }}
li img {{ background: #fff; display: block; height: 11rem; object-fit: contain; width: 100%; }}
.note {{ font-size: .85rem; opacity: .75; }}
</style></head>
<body><header><h1>{title}</h1>{head}</header><ol>{answers}</ol></body>
</html>
"""


@dataclass(frozen=True)
class Answer:
    """One item that was found."""

    rank: int  # its place, from 1
    score: float  # cosine similarity of its embedding and the query's
    id: str
    modality: str  # text, image, or image,text
    text: str | None
    image: str | None  # path of its picture

    def __str__(self) -> str:
        content = [shorten(self.text, _SHOWN) if self.text is not None else "", one_line(self.image or "")]
        words = [f"{self.rank:>3}", f"{self.score:.4f}", f"{self.modality:<10}", one_line(self.id), *content]
        return "  ".join(word for word in words if word)


@dataclass(frozen=True)
class Answers:
    """What a search has found, best first; `str()` has a line for each."""

    query: str | None  # the words that were looked for
    image: str | None  # name of the picture that was looked for
    instruction: str | None
    target: str  # what answers could be: any, text, or image
    num_candidates: int  # items that could be found
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


def to_html(answers: Answers, *, picture: Any = None) -> str:
    """A page of answers, with small copies of the pictures inside, that needs no other file."""
    title = f"“{_shown(answers.query)}”" if answers.query and answers.query.strip() else "Answers to a picture"
    notes = [f"The best {len(answers.answers):,} of {answers.num_candidates:,} {KINDS[answers.target]}"]
    if answers.instruction:
        notes.insert(0, _shown(answers.instruction))
    head = [_image(picture, answers.image or "picture")] if picture is not None else []
    head += [f'<p class="note">{note}</p>' for note in notes]
    items = "\n".join(map(_item, answers.answers))
    return _PAGE.format(title=title, head="\n".join(head), answers=items)


def small_copy(image: Any, size: int) -> Image.Image:
    """A copy of a picture (PIL, path or bytes), at most so many pixels long, without what its file says besides.

    Raises:
        ValueError: If it cannot be read as a picture.
        FileNotFoundError: If there is no such file.
    """
    small = load_rgb_image(image, "picture").copy()
    small.thumbnail((size, size))
    return small


def _item(answer: Answer) -> str:
    parts = [_image(answer.image, answer.text or answer.id)] if answer.image is not None else []
    if answer.text is not None:
        parts.append(f"<p>{_shown(answer.text)}</p>")
    parts.append(f'<p class="note">{answer.rank}. {_shown(answer.id)} · {answer.score:.4f}</p>')
    return f"<li>{''.join(parts)}</li>"


def _image(image: Any, description: str) -> str:
    try:
        small = small_copy(image, 320)
    except (OSError, ValueError):  # it may have been moved since it was indexed
        return f'<p class="note">This picture cannot be read: {_shown(str(image))}</p>'
    kind = "png" if max(small.size) <= _ICON_SIZE else "jpeg"
    buffer = io.BytesIO()
    small.save(buffer, kind, quality=85)
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img src="{source}" alt="{_shown(description)}">'


def _shown(text: str) -> str:
    """The beginning of a text, safe inside HTML and inside an attribute."""
    return escape(shorten(text, _TEXT_LENGTH))
