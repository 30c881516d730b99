"""Which columns of a table are the anchor, the positive and the negatives."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from puma_hf.modeling.image_inputs_puma import is_image_name
from puma_hf.values import cut, nearest, shown

Kind = Literal["text", "image", "both"]
Given: TypeAlias = str | Mapping[str, str]

# What others call them, the likeliest first.
ANCHOR_NAMES = ("anchor", "query", "question", "sent0", "sentence1")
POSITIVE_NAMES = ("positive", "pos", "answer", "sent1", "sentence2", "document", "passage")
IMAGE_NAMES = ("image", "file_name", "filename", "image_path", "img_path", "path", "filepath", "img")
CAPTION_NAMES = ("caption", "captions", "text", "title", "description", "sentence", "sentences")
INSTRUCTION_NAME = "instruction"
# Beside two texts these may say that a row is no right pair, as in collections for classifiers.
SCORE_NAMES = ("label", "score", "relevance", "similarity")
_NEGATIVE = re.compile(r"((?:negative|hard_negative|hard_neg|neg)(?:_?(\d+))?)(?:_(?:text|image|image_path))?")
_IMAGE_NAME = re.compile(r"(?:.*_)?(?:image|img|file_?name|(?:image|img)_(?:path|file)|filepath|path)")
_ANOTHER_IMAGE = re.compile(r".+_(?:image|img)(?:_path|_file)?|(?:image|img)_?\d+")


@dataclass(frozen=True, slots=True)
class Part:
    """Where one side of a pair stands: a column of texts, one of images, or one of structs with both.

    Args:
        text: Column of its text.
        image: Column of its image.
        both: Column of structs `{"text": ..., "image": ...}`.
    """

    text: str | None = None
    image: str | None = None
    both: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns it is read from."""
        return [name for name in (self.text, self.image, self.both) if name is not None]

    @property
    def kind(self) -> str:
        """What it may hold: "text", "image" or "both"."""
        if self.both is not None or (self.text is not None and self.image is not None):
            return "both"
        return "text" if self.image is None else "image"

    def __str__(self) -> str:
        named = (("text", self.text), ("image", self.image), ("text and image", self.both))
        return ", ".join(f"{name} ({kind})" for kind, name in named if name is not None)


@dataclass(frozen=True, slots=True)
class PairColumns:
    """Where everything stands; see `find_columns`.

    Args:
        anchor: The side that asks.
        positive: The right answer.
        negatives: Wrong answers.
        instruction: Column of the anchor's instruction.
        ignored: The other columns.
    """

    anchor: Part
    positive: Part
    negatives: tuple[Part, ...] = ()
    instruction: str | None = None
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        sides = [("anchor", self.anchor), ("positive", self.positive)]
        sides += [(f"negative {number}", part) for number, part in enumerate(self.negatives, start=1)]
        text = "; ".join(f"{name}: {part}" for name, part in sides)
        text += f"; instruction: {self.instruction}" if self.instruction is not None else ""
        return text + (f"; ignored: {', '.join(self.ignored)}" if self.ignored else "")


def find_columns(
    rows: Sequence[Mapping[str, Any]],
    *,
    anchor: Given | None = None,
    positive: Given | None = None,
    negatives: Sequence[Given] | Given | None = None,
    instruction: str | None = None,
) -> PairColumns:
    """What is given, and for the rest what the columns' names and first values tell.

    Args:
        rows: The first rows of the table.
        anchor: A column, or columns by what they hold: `{"text": ..., "image": ...}`, in a command
            "text=...,image=...".
        positive: Likewise.
        negatives: One of these for each negative; an empty sequence for none.
        instruction: Column of instructions; by default the one of that name.

    Returns:
        The columns.

    Raises:
        ValueError: If a given column is not there, or one that is needed is neither given nor found; if both sides
            are guessed, and a column such as `label` may say that some rows are wrong pairs, or there are images
            that may belong to either side.

    Example:

    ```python
    >>> from puma_hf.data.pair_columns import find_columns

    >>> print(find_columns([{"file_name": "1.png", "caption": "a shoe", "id": 7}]))
    anchor: caption (text); positive: file_name (image); ignored: id
    ```
    """
    kinds = {name: _kind_of(name, rows) for name in dict.fromkeys(name for row in rows for name in row)}
    first = None if anchor is None else _given(anchor, "anchor", kinds)
    second = None if positive is None else _given(positive, "positive", kinds)
    first = first or _guess(ANCHOR_NAMES, kinds)
    second = second or _guess(POSITIVE_NAMES, kinds)
    if anchor is None and positive is None and first is not None and second is not None:
        _check_no_scores(second, kinds)
    taken = set((first or Part()).columns + (second or Part()).columns)
    caption = _first(CAPTION_NAMES, "text", kinds, taken)
    image = _first(IMAGE_NAMES, "image", kinds, taken) or _only_image(kinds, taken)
    # Of an image with a caption the caption asks, unless it is the answer.
    first = first or caption or image
    second = second or next((part for part in (image, caption) if part not in (first, None)), None)
    if first is None or second is None:
        raise ValueError(_none_found("anchor" if first is None else "positive", kinds))
    if first == second:
        raise ValueError(f"anchor and positive are both {first}. Name two different columns.")
    if instruction is None and INSTRUCTION_NAME in kinds:
        instruction = INSTRUCTION_NAME
    wrong = _negatives(negatives, kinds)
    if anchor is None and positive is None:
        _check_other_images(rows, kinds, first, second)
    used = {name for part in (first, second, *wrong) for name in part.columns} | {instruction}
    return PairColumns(first, second, wrong, instruction, tuple(name for name in kinds if name not in used))


def _check_other_images(rows: Iterable[Mapping[str, Any]], kinds: Mapping[str, Kind], *sides: Part) -> None:
    """Refuse to guess if there are images of which the names do not tell the side.

    They may be half of a composed query: image, question, answer; or image, caption, target_image.
    """
    used = {name for part in sides for name in part.columns}
    has_image = any(part.kind != "text" for part in sides)
    for name, kind in kinds.items():
        # Of an image that is taken there may be the name in other columns as well.
        doubtful = not has_image or _ANOTHER_IMAGE.fullmatch(name.lower())
        if kind != "image" or name in used or _NEGATIVE.fullmatch(name) or not doubtful:
            continue
        if any(_is_image(row.get(name)) for row in rows):
            raise ValueError(
                f"The column {shown(name)} holds images, but its name does not tell whose: anchor {sides[0]}; positive "
                f"{sides[1]}. Name the columns of each side, such as anchor={{'text': ..., 'image': {name!r}}} and "
                "positive=... (in a command --anchor text=...,image=... --positive ...)."
            )


def _is_image(value: Any) -> bool:
    if isinstance(value, str):
        return is_image_name(value) and "://" not in value
    return value is not None


def _check_no_scores(positive: Part, kinds: Mapping[str, Kind]) -> None:
    found = [name for name in SCORE_NAMES if name in kinds]
    if found and not positive.columns[0].startswith("pos"):  # "positive" leaves no doubt
        raise ValueError(
            f"There is a column {found[0]!r}, which may say that some rows are no right pairs, and every row is taken "
            "for one. Leave wrong pairs out and remove the column, or name the columns (anchor=..., positive=..., in a "
            "command --anchor, --positive)."
        )


def _kind_of(name: str, rows: Iterable[Mapping[str, Any]]) -> Kind:
    values = [value for row in rows if (value := row.get(name)) is not None and value != ""]
    if values and isinstance(values[0], Mapping):
        return "both" if {"text", "image"} & set(values[0]) else "image"
    if values and all(isinstance(value, str) and is_image_name(value) for value in values):
        return "image"
    return "image" if _IMAGE_NAME.fullmatch(name.lower()) else "text"


def _given(value: Given, role: str, kinds: Mapping[str, Kind]) -> Part:
    if isinstance(value, str) and value not in kinds and "=" in value:
        entries = [entry.partition("=") for entry in value.split(",")]
        value = {key.strip(): name.strip() for key, _, name in entries}
    if isinstance(value, str):
        _check_column(value, role, kinds)
        return Part(**{kinds[value]: value})
    if not isinstance(value, Mapping) or not value or not set(value) <= {"text", "image"}:
        raise ValueError(
            f"{role}={shown(value)} must be a column, or name columns of text and image: {{'text': ..., "
            "'image': ...}, in a command text=...,image=...."
        )
    for name in value.values():
        _check_column(name, role, kinds)
    return Part(**value)


def _check_column(name: Any, role: str, kinds: Mapping[str, Kind]) -> None:
    if name not in kinds:
        raise ValueError(
            f"{role}: there is no column {shown(name)}; the columns are {cut(', '.join(kinds))}.{nearest(name, kinds)}"
        )


def _guess(bases: Iterable[str], kinds: Mapping[str, Kind]) -> Part | None:
    """The columns of the first of these names: the name itself, or with `_text` and `_image` behind it."""
    for base in bases:
        parts: dict[str, str] = {}
        for name in (base, f"{base}_text", f"{base}_image", f"{base}_image_path", f"{base}_img_path"):
            if name in kinds:
                parts.setdefault(kinds[name], name)
        if "both" in parts:
            return Part(both=parts["both"])
        if parts:
            return Part(**parts)
    return None


def _first(names: Iterable[str], kind: Kind, kinds: Mapping[str, Kind], taken: set[str]) -> Part | None:
    found = next((name for name in names if kinds.get(name) == kind and name not in taken), None)
    return None if found is None else Part(**{kind: found})


def _only_image(kinds: Mapping[str, Kind], taken: set[str]) -> Part | None:
    """The only column of images, whatever it is called."""
    images = [name for name, kind in kinds.items() if kind == "image" and name not in taken]
    return Part(image=images[0]) if len(images) == 1 else None


def _negatives(given: Sequence[Given] | Given | None, kinds: Mapping[str, Kind]) -> tuple[Part, ...]:
    if given is not None:
        several = [given] if isinstance(given, str | Mapping) else given
        return tuple(_given(one, "negatives", kinds) for one in several)
    bases: dict[str, int] = {}
    for name in kinds:
        if match := _NEGATIVE.fullmatch(name):
            bases[match[1]] = int(match[2] or 0)
    # A base may itself end in _image: then `_guess` would take it twice.
    parts = [_guess([base], kinds) for base in sorted(bases, key=lambda base: bases[base])]
    return tuple(part for part in parts if part is not None)


def _none_found(role: str, kinds: Mapping[str, Kind]) -> str:
    names = (*(ANCHOR_NAMES if role == "anchor" else POSITIVE_NAMES), *CAPTION_NAMES, *IMAGE_NAMES)
    return (
        f"No column for the {role}: the columns are {cut(', '.join(kinds)) or 'none'}. Name it ({role}=..., in a "
        f"command --{role}), or call it one of {', '.join(names)}."
    )
