"""The page's answers as HTML: every text is shown as it is, and pictures are small copies inside."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image

from puma_hf.search.answers import KINDS, Answer, Answers, one_line, shorten
from puma_hf.search.html import thumbnail

TITLE = "Search by words and pictures"

_TEXT_LENGTH = 280  # characters of a text in a card
_ID_LENGTH = 80
_KEPT_THUMBNAILS = 1000  # of some ten kilobytes each
_MODALITIES = {
    "image": ("picture", "pictures"),
    "image,text": ("picture with a text", "pictures with a text"),
    "text": ("text", "texts"),
}

# Gradio fills the page by a template, for which these begin commands.
_TEMPLATE_LETTERS = str.maketrans({"$": "&#36;", "{": "&#123;", "}": "&#125;", "`": "&#96;"})


def shown(text: str) -> str:
    """A text that is safe inside HTML, inside an attribute, and inside a template."""
    visible = text.encode("utf-8", "backslashreplace").decode()
    return escape(visible, quote=True).translate(_TEMPLATE_LETTERS)


def welcome(note: str) -> str:
    """What is there before anything was asked."""
    return f'<p class="ph-empty">{shown(note)}</p>'


def problem(message: str) -> str:
    """What went wrong, in one box."""
    return f'<div class="ph-problem" role="alert">{shown(message)}</div>'


def results(answers: Answers, *, picture: Image.Image | None = None, name: str = "") -> str:
    """What was asked, and a grid of what was found.

    Args:
        answers: What was found.
        picture: The picture that was asked for.
        name: Name of this search, as in `Found`.

    Returns:
        HTML. The button of each answer has its place, from 0, in `data-place`; the list has the name in `data-search`.
    """
    asked = []
    if picture is not None:
        asked.append(f'<img src="{thumbnail(picture, 96)}" alt="The picture that was asked for">')
    title = f"“{shown(shorten(answers.query, 120))}”" if answers.query and answers.query.strip() else "This picture"
    count = f"{len(answers.answers):,} of {answers.num_candidates:,} {KINDS[answers.target]}, best first"
    asked.append(f'<div><h2>{title}</h2><p class="ph-note">{count}</p></div>')
    cards = "".join(map(_card, answers.answers))
    grid = f'<ol class="ph-grid" data-search="{shown(name)}">{cards}</ol>'
    return f'<div class="ph-asked" role="status">{"".join(asked)}</div>{grid}'


def count_line(counts: dict[str, int], model: str) -> str:
    """One line of an index: how many of what it has, and the model that made it."""
    total = sum(counts.values())
    parts = [f"{count:,} {_MODALITIES[modality][count != 1]}" for modality, count in counts.items()]
    of = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    head = f"{total:,} items{of}" if len(parts) != 1 else parts[0]
    return f"{head} · {_last_name(model)}"


def readable(error: Exception, index: Path) -> str:
    """The words of an error in one line; where on the server an index lies is cut down to its name."""
    place = index.resolve()
    paths = "|".join(re.escape(str(path)) for path in (place, index) if path.name)
    words = one_line(re.sub(rf"(?<![\w./-])({paths})(?![\w.-])", lambda _: place.name, str(error)))
    return words[:1].upper() + words[1:]


def _last_name(model: str) -> str:
    return os.path.basename(model.rstrip("/")) if os.path.isabs(model) else model


def _card(answer: Answer) -> str:
    name = shown(shorten(answer.id, _ID_LENGTH) or "?")
    parts = []
    if answer.image is not None:
        parts.append(_picture(answer))
    if answer.text is not None:
        alone = "" if answer.image is not None else " ph-alone"
        parts.append(f'<p class="ph-text{alone}">{shown(shorten(answer.text, _TEXT_LENGTH))}</p>')
    place = f'data-place="{answer.rank - 1}" aria-label="Search with {name}"'
    again = f'<button type="button" {place}>Search with this</button>'
    parts.append(
        f'<div class="ph-foot"><div class="ph-line"><span class="ph-score">{answer.score:.3f}</span>'
        f'<span class="ph-id" title="{name}">{name}</span></div>{again}</div>'
    )
    return f'<li class="ph-card">{"".join(parts)}</li>'


def _picture(answer: Answer) -> str:
    path = answer.image or ""
    try:
        source = _kept_thumbnail(path, os.stat(path).st_mtime_ns)
    except (OSError, ValueError):  # it may have been moved since it was indexed
        return '<p class="ph-gone">This picture is gone, or cannot be read.</p>'
    return f'<img src="{source}" alt="{shown(shorten(answer.text or answer.id, 120))}" loading="lazy">'


@lru_cache(_KEPT_THUMBNAILS)
def _kept_thumbnail(path: str, _changed: int) -> str:
    return thumbnail(path)
