"""A page of answers in one file: nothing is fetched, nothing runs, and every text is shown as it is."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

from puma_hf.modeling.image_inputs_puma import load_rgb_image
from puma_hf.search.answers import KINDS, Answer, Answers, shorten

THUMBNAIL_SIZE = 320  # pixels of the longer side
_ICON_SIZE = 128  # pixels of the longer side; JPEG would leave clouds around the lines of an icon, and save little
_TEXT_LENGTH = 600  # characters of a text

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font-family: system-ui, sans-serif; line-height: 1.4; margin: 1.5rem auto; max-width: 72rem; padding: 0 1rem; }}
h1 {{ font-size: 1.25rem; overflow-wrap: anywhere; }}
header img {{ max-height: 10rem; max-width: 100%; }}
ol {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(14rem, 45%), 1fr));
  list-style: none; padding: 0; }}
li {{ border: 1px solid #8886; border-radius: .5rem; overflow-wrap: anywhere; padding: .75rem; }}
li img {{ background: #fff; display: block; height: 11rem; margin-bottom: .5rem; object-fit: contain; width: 100%; }}
p {{ margin: .25rem 0; }}
.note {{ font-size: .85rem; opacity: .75; }}
</style>
</head>
<body>
<header>
<h1>{title}</h1>
{head}
</header>
<ol>
{answers}
</ol>
</body>
</html>
"""


def to_html(answers: Answers, *, picture: Any = None) -> str:
    """A page of answers, with small copies of the pictures inside.

    Args:
        answers: What was found.
        picture: The picture that was looked for: PIL, path or bytes.

    Returns:
        An HTML document that needs no other file.

    Example:

    ```python
    >>> from puma_hf.search.answers import Answer, Answers
    >>> from puma_hf.search.html import to_html

    >>> found = (Answer(1, 0.5, "a", "text", "<b>red</b>", None),)
    >>> "&lt;b&gt;red&lt;/b&gt;" in to_html(Answers("red", None, None, "any", 1, found))
    True
    ```
    """
    title = f"“{_shown(answers.query)}”" if answers.query and answers.query.strip() else "Answers to a picture"
    notes = [f"The best {len(answers.answers):,} of {answers.num_candidates:,} {KINDS[answers.target]}"]
    if answers.instruction:
        notes.insert(0, _shown(answers.instruction))
    head = [_image(picture, answers.image or "picture")] if picture is not None else []
    head += [f'<p class="note">{note}</p>' for note in notes]
    items = "\n".join(map(_item, answers.answers))
    return _PAGE.format(title=title, head="\n".join(head), answers=items)


def thumbnail(image: Any, size: int = THUMBNAIL_SIZE) -> str:
    """A small copy of a picture as a data URI.

    Args:
        image: PIL, path or bytes.
        size: Pixels of its longer side; a smaller picture stays as it is.

    Raises:
        ValueError: If it cannot be read as a picture.
        FileNotFoundError: If there is no such file.
    """
    small = load_rgb_image(image, "picture").copy()
    kind = "png" if max(small.size) <= _ICON_SIZE else "jpeg"
    small.thumbnail((size, size))
    buffer = io.BytesIO()
    small.save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _item(answer: Answer) -> str:
    parts = [_image(answer.image, answer.text or answer.id)] if answer.image is not None else []
    if answer.text is not None:
        parts.append(f"<p>{_shown(answer.text)}</p>")
    parts.append(f'<p class="note">{answer.rank}. {_shown(answer.id)} · {answer.score:.4f}</p>')
    return f"<li>{''.join(parts)}</li>"


def _image(image: Any, description: str) -> str:
    try:
        source = thumbnail(image)
    except (OSError, ValueError):  # it may have been moved since it was indexed
        return f'<p class="note">This picture cannot be read: {_shown(str(image))}</p>'
    return f'<img src="{source}" alt="{_shown(description)}">'


def _shown(text: str) -> str:
    """The beginning of a text, safe inside HTML and inside an attribute."""
    return escape(shorten(text, _TEXT_LENGTH))
