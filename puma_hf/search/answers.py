"""What a search has found: as lines, as plain values for JSON, and as a page in one file."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from PIL import Image

from puma_hf.modeling.inputs_puma import load_rgb_image

KINDS = {"any": "items", "text": "texts", "image": "pictures"}  # what answers to each target are called

# A page that fetches nothing and runs nothing: what an item holds is not to be trusted.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font-family: system-ui, sans-serif; margin: 1.5rem auto; max-width: 72rem; overflow-wrap: anywhere; }}
ol {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); padding: 0; }}
li {{ border: 1px solid #8886; border-radius: .5rem; list-style: none; padding: .75rem; }}
img {{ background: #fff; display: block; height: 11rem; max-width: 100%; object-fit: contain; }}
.note {{ font-size: .85rem; opacity: .75; }}
</style></head>
<body><h1>{title}</h1>{head}<ol>{answers}</ol></body>
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
        words = [f"{self.rank:>3}", f"{self.score:.4f}", f"{self.modality:<10}", shorten(self.id)]
        return "  ".join(word for word in (*words, shorten(self.text or "", 100), shorten(self.image or "")) if word)


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


def shorten(text: str, length: int = 1000) -> str:
    """The beginning of a text in one line, without characters that would steer a terminal."""
    # Of a text of a million characters only the beginning is looked at.
    shown = " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 2 * length]).split())
    return shown if len(shown) <= length and len(text) <= 2 * length else shown[: length - 1].rstrip() + "…"


def to_html(answers: Answers, *, picture: Any = None) -> str:
    """A page of answers, with small copies of the pictures inside, that needs no other file."""
    # Every text of a user or of an item goes through `escape`, in attributes, too.
    title = f"“{_shown(answers.query)}”" if answers.query and answers.query.strip() else "Answers to a picture"
    head = "" if picture is None else _image(picture, answers.image or "picture")
    head += f'<p class="note">{_shown(answers.instruction)}</p>' if answers.instruction else ""
    counts = f"The best {len(answers.answers):,} of {answers.num_candidates:,} {KINDS[answers.target]}"
    items = []
    for one in answers.answers:
        image = "" if one.image is None else _image(one.image, one.text or one.id)
        text = "" if one.text is None else f"<p>{_shown(one.text)}</p>"
        items.append(f'<li>{image}{text}<p class="note">{one.rank}. {_shown(one.id)} · {one.score:.4f}</p></li>')
    return _PAGE.format(title=title, head=f'{head}<p class="note">{counts}</p>', answers="\n".join(items))


def _image(image: Any, description: str) -> str:
    if (small := small_copy(image, 320)) is None:
        return f'<p class="note">This picture cannot be read: {_shown(str(image))}</p>'
    buffer = io.BytesIO()
    small.save(buffer, "webp", quality=85)
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img src="{source}" alt="{_shown(description)}">'


def small_copy(image: Any, size: int) -> Image.Image | None:
    """A copy of a picture (PIL, path or bytes), at most so many pixels long; None if it cannot be read, as it is gone.

    What its file says besides, such as the place that a camera wrote into it, is left out.
    """
    try:
        small = load_rgb_image(image, "picture").copy()
    except (OSError, ValueError):
        return None
    small.thumbnail((size, size))
    return small


def _shown(text: str) -> str:
    """The beginning of a text, safe inside HTML and inside an attribute."""
    return escape(shorten(text, 600))
