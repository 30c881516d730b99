"""Ask a searcher for the page: every error becomes words on it, and each answer can be the next query."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image

from puma_hf.app.cards import problem, readable, results
from puma_hf.modeling.image_inputs_puma import load_rgb_image
from puma_hf.search.config import Target
from puma_hf.search.query import MAX_QUERY_LENGTH, Query, Searcher

logger = logging.getLogger(__name__)

_WHERE = "picture"  # what errors call the picture of a query
_SHOWN_SIZE = 1024  # pixels of the longer side of a picture that goes back into the page

NOTHING = "Nothing to look for. Give words, a picture, or both."
GONE = "These answers are no longer remembered. Search, and choose again."
FAILED = "The search failed for a reason that is not yours. The program that serves this page has written it down."


@dataclass(frozen=True)
class Found:
    """What the page shows after a question.

    Args:
        html: The answers, or what went wrong.
        items: For each answer its text and the path of its picture, for the next question.
        name: Name of this search. The page sends it back with the place of an answer, as by then another search may
            have ended.
    """

    html: str
    items: tuple[tuple[str | None, str | None], ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Next:
    """An answer as the next query: what goes into the page's fields, and what it finds.

    Args:
        text: Its text, or an empty one.
        picture: Its picture, at most 1,024 pixels long, or None.
        found: What it finds.
    """

    text: str
    picture: Image.Image | None
    found: Found


def ask(
    searcher: Searcher, *, text: str | None, picture: Any, instruction: str | None, target: Target, top: int
) -> Found:
    """Search, and say in words what is wrong if it cannot be done.

    Args:
        searcher: Whom to ask.
        text: Words, or nothing.
        picture: Path of a picture's file, or None.
        instruction: What is asked for, or nothing.
        target: What answers may be.
        top: Answers to give.
    """
    if not (text and text.strip()) and picture is None:
        return Found(problem(NOTHING))
    try:
        image = None if picture is None else _read(picture)
        query = Query(text=text or None, image=image, instruction=(instruction or "").strip() or None)
        answers = searcher.search(query, target=target, top_k=top)
        items = tuple((answer.text and answer.text[:MAX_QUERY_LENGTH], answer.image) for answer in answers.answers)
        name = uuid4().hex
        return Found(results(answers, picture=image, name=name), items, name)
    except ValueError as error:
        return Found(problem(readable(error, searcher.index.folder)))
    except Exception:  # the page goes on for everybody else
        logger.exception("A search on the page failed")
        return Found(problem(FAILED))


def ask_again(
    searcher: Searcher,
    items: Sequence[tuple[str | None, str | None]],
    place: Any,
    *,
    instruction: str | None,
    target: Target,
    top: int,
) -> Next | None:
    """Search with an answer of the last search.

    Args:
        searcher: Whom to ask.
        items: What the last search has found.
        place: Place of the answer, from 0, as the browser says.
        instruction: As in `ask`.
        target: As in `ask`.
        top: As in `ask`.

    Returns:
        None if there is no such answer.
    """
    if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(items):
        return None
    text, path = items[place]
    found = ask(searcher, text=text, picture=path, instruction=instruction, target=target, top=top)
    return Next(text or "", None if path is None else _small(path), found)


def _read(picture: Any) -> Image.Image:
    """A picture, from the bytes of its file, so that no error names a path of the server."""
    try:
        content = Path(picture).read_bytes()
    except OSError as error:
        raise ValueError("The picture is gone. Choose it again.") from error
    try:
        return load_rgb_image(content, _WHERE)
    except ValueError as error:
        words = str(error).replace(f"{_WHERE}: a bytes object of length {len(content)}", "The picture")
        raise ValueError(words) from error


def _small(path: str) -> Image.Image | None:
    try:
        small = _read(path).copy()
    except ValueError:
        return None
    small.thumbnail((_SHOWN_SIZE, _SHOWN_SIZE))
    return small
