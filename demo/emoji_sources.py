"""Read the raw inputs of the emoji demo dataset: the list of emoji, their names and keywords, the drawings.

A *concept* is one emoji (its code points without the invisible U+FE0F).  People come in families: the same
activity or job with several skin tones and genders.  A concept is used only if it has a CLDR name and a
drawing by both artists, Noto and Twemoji.
"""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ARTISTS = ("noto", "twemoji")
IMAGE_SIZE = 48
COLOURS = 24  # 600 bytes a drawing; twice as near to the original as WebP of that size
NOTO_SIZE = 109  # the only size at which Noto Color Emoji has bitmaps
NOTO_ADVANCE = 140  # one glyph is 136 pixels wide; anything wider is an emoji the font draws in pieces
FULLY_QUALIFIED = 2
TONES = ("default", "light", "medium-light", "medium", "medium-dark", "dark")
TONE_MARKS = tuple(chr(0x1F3FB + i) for i in range(5))
PERSON, MAN, WOMAN = "person", "man", "woman"
ZWJ = "\u200d"
HEADS = {"\U0001f9d1": PERSON, "\U0001f468": MAN, "\U0001f469": WOMAN}
SIGNS = {"\u2642": MAN, "\u2640": WOMAN}
PAIRS = frozenset("\U0001f46f\U0001f93c")  # two people at once: their gender is not changed in an edit
# Families whose members have no common code point.
ODD_FAMILIES = {
    "child": {"\U0001f9d2": PERSON, "\U0001f466": MAN, "\U0001f467": WOMAN},
    "older": {"\U0001f9d3": PERSON, "\U0001f474": MAN, "\U0001f475": WOMAN},
    "crown": {"\U0001fac5": PERSON, "\U0001f934": MAN, "\U0001f478": WOMAN},
    "claus": {"\U0001f9d1\u200d\U0001f384": PERSON, "\U0001f385": MAN, "\U0001f936": WOMAN},
    "pregnant": {"\U0001fac4": PERSON, "\U0001fac3": MAN, "\U0001f930": WOMAN},
    "dance": {"\U0001f57a": MAN, "\U0001f483": WOMAN},
}


class InputError(Exception):
    """A raw input is missing or is not what the script expects."""


@dataclass(frozen=True)
class Concept:
    """One emoji: `family` is what is left when tone and gender are taken away."""

    key: str
    name: str
    keywords: tuple[str, ...]
    family: str
    tone: int
    gender: str | None
    group: str


@dataclass(frozen=True)
class Sources:
    """Where the raw inputs are."""

    font: Path
    cldr: Path
    twemoji: Path
    emoji: Path


def code(key: str) -> str:
    """The file name of an emoji: its code points in hexadecimal, joined by '-'."""
    return "-".join(f"{ord(c):x}" for c in key)


def split_person(key: str) -> tuple[str, int, str | None]:
    """Take an emoji apart into (family, tone number, gender or None)."""
    tone = next((TONE_MARKS.index(c) + 1 for c in key if c in TONE_MARKS), 0)
    bare = "".join(c for c in key if c not in TONE_MARKS)
    for family, members in ODD_FAMILIES.items():
        if bare in members:
            return family, tone, members[bare]
    head, _joined, tail = bare.partition(ZWJ)
    if tail in SIGNS and head not in PAIRS:
        return code(head), tone, SIGNS[tail]
    # A job, hair or wheelchair follows the head; more joiners mean several people (kisses, families).
    if head in HEADS and tail.count(ZWJ) == 0 and not set(tail) & set(HEADS):
        return "adult-" + code(tail), tone, HEADS[head]
    return code(bare), tone, None


def read_cldr(folder: Path) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Names and keywords of CLDR, by emoji without U+FE0F."""
    names: dict[str, str] = {}
    words: dict[str, tuple[str, ...]] = {}
    for part in ("annotations", "annotationsDerived"):
        path = folder / part / "en.xml"
        if not path.is_file():
            raise InputError(f"--cldr: {path} is missing; give the folder 'common' of unicode-cldr-core")
        for item in ElementTree.parse(path).getroot().iter("annotation"):
            key, text = item.get("cp", ""), item.text or ""
            if item.get("type") == "tts":
                names[key] = text.strip()
            else:
                words[key] = tuple(w.strip() for w in text.split("|"))
    return names, words


def read_groups(folder: Path) -> dict[str, str]:
    """The second-level label of CLDR ('animal-bird') of each emoji that has one."""
    path = folder / "properties" / "labels.txt"
    if not path.is_file():
        raise InputError(f"--cldr: {path} is missing; give the folder 'common' of unicode-cldr-core")
    groups: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("["):
            continue
        members, _, label = (field.strip() for field in line.split(";"))
        for member in expand_set(members[1:-1]):
            groups[member.replace("\ufe0f", "")] = label
    return groups


def expand_set(text: str) -> Iterator[str]:
    """The members of a simple Unicode set: single characters, a-b ranges and {sequences}."""
    for found in re.finditer(r"\{(.*?)\}|(.)-(.)|\\?(.)", text):
        sequence, first, last, single = found.groups()
        if sequence:
            yield sequence
        elif first:
            yield from (chr(n) for n in range(ord(first), ord(last) + 1))
        elif not single.isspace():
            yield single


def read_concepts(sources: Sources) -> list[Concept]:
    """Every usable concept, in the order of its code points."""
    names, words = read_cldr(sources.cldr)
    groups = read_groups(sources.cldr)
    listing = json.loads(sources.emoji.read_text(encoding="utf-8"))
    concepts = {}
    for emoji, facts in listing.items():
        key = emoji.replace("\ufe0f", "")
        flag = 0x1F1E6 <= ord(key[0]) <= 0x1F1FF or key.startswith("\U0001f3f4\U000e0067")
        several_tones = sum(c in TONE_MARKS for c in key) > 1
        if facts["status"] != FULLY_QUALIFIED or flag or several_tones or key not in names:
            continue
        family, tone, gender = split_person(key)
        bare = "".join(c for c in key if c not in TONE_MARKS)
        group = groups.get(bare) or groups.get(bare.split(ZWJ)[0]) or "other"
        concepts[key] = Concept(key, names[key], words.get(key, ()), family, tone, gender, group)
    return settle_families([concepts[key] for key in sorted(concepts)])


def settle_families(concepts: list[Concept]) -> list[Concept]:
    """Give members of one family one group, and those without a sign of gender the gender 'person'."""
    families: dict[str, list[Concept]] = {}
    for concept in concepts:
        families.setdefault(concept.family, []).append(concept)
    settled = []
    for concept in concepts:
        mates = families[concept.family]
        # CLDR 41 has no labels for the newest members; they fall back to those of a plain person.
        labels = Counter(c.group for c in mates)
        best = min(labels, key=lambda label: (label in ("other", "person"), -labels[label], label))
        gendered = any(c.gender for c in mates)
        settled.append(replace(concept, group=best, gender=concept.gender or (PERSON if gendered else None)))
    return settled


def to_palette(picture: Image.Image) -> Image.Image:
    """Put a drawing on white, at the size of the dataset, with few colours (so that the file is small)."""
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    flat = flat.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    return flat.quantize(COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


class Drawer:
    """Draws a concept as either artist does; None if that artist has no drawing of it."""

    def __init__(self, sources: Sources) -> None:
        try:
            self.font = ImageFont.truetype(str(sources.font), NOTO_SIZE, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            raise InputError(f"--font: cannot open {sources.font}: {error}") from error
        if not sources.twemoji.is_dir():
            raise InputError(f"--twemoji: {sources.twemoji} is not a folder of 72x72 PNG files")
        self.files = {path.stem.replace("-fe0f", ""): path for path in sorted(sources.twemoji.glob("*.png"))}

    def draw(self, artist: str, key: str) -> Image.Image | None:
        return self.noto(key) if artist == "noto" else self.twemoji(key)

    def noto(self, key: str) -> Image.Image | None:
        # Some sequences are listed in the font only with U+FE0F, some only without.
        for text in (key, key + "\ufe0f"):
            if self.font.getlength(text) <= NOTO_ADVANCE:
                picture = Image.new("RGBA", (136, 128), (0, 0, 0, 0))
                ImageDraw.Draw(picture).text((0, 0), text, font=self.font, embedded_color=True)
                box = picture.getbbox()
                if box is None:
                    return None
                square = Image.new("RGBA", (136, 136), (0, 0, 0, 0))
                square.paste(picture, (0, 4))
                return to_palette(square)
        return None

    def twemoji(self, key: str) -> Image.Image | None:
        path = self.files.get(code(key))
        return None if path is None else to_palette(Image.open(path))


def encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # Lossless: a palette picture comes back as it was, an eighth smaller than as PNG.
    picture.convert("RGB").save(buffer, format="WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))
