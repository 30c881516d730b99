"""Choose the concepts of the emoji demo dataset and decide what training may see of each.

State of a concept:
  train     both drawings and the name are for training
  drawing   the name and one artist's drawing are for training, the other drawing is held out
  unseen    both drawings and the name are held out
A held-out concept belongs to val or to test.  Every choice is a hash of what is chosen.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from emoji_sources import ARTISTS, Concept

Item = TypeVar("Item")
SEED = "puma-hf emoji 1"
SHARE_OF_FAMILIES = 0.75  # the others are left out, to keep the dataset small
BIG_FAMILY = 6  # tones of one person, or tones x genders
# Root mean square difference at 16x16 (of 255): below it two drawings can hardly be told apart.
TOO_NEAR = 5.0
BLANK = 200  # a drawing whose darkest value is above this is white on white
SMALL_WORDS = frozenset(["a", "an", "and", "at", "in", "of", "on", "or", "the", "with", "s", "no"])
TONE_WORDS = frozenset(["light", "medium", "dark", "skin", "tone"])
GENDER_WORDS = frozenset(["man", "men", "woman", "women", "person", "people", "boy", "girl", "child"])


def share(*parts: str) -> float:
    """A number in [0, 1) that depends only on the seed and `parts`."""
    digest = hashlib.sha256("|".join((SEED, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def shuffled(items: Iterable[Item], label: str, name: Callable[[Item], str]) -> list[Item]:
    """The items in an order that only the seed, `label` and each item's `name(item)` decide."""
    return sorted(items, key=lambda item: (share(label, name(item)), name(item)))


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower().replace("’", ""))


def content_words(name: str) -> set[str]:
    """The words of a name that say what it is, without skin tone and gender."""
    return set(words(name)) - SMALL_WORDS - TONE_WORDS - GENDER_WORDS


@dataclass
class Holding:
    """What training may see of one concept."""

    concept: Concept
    state: str = "train"
    split: str = "train"
    held_artist: str = ARTISTS[0]  # state 'drawing': the held-out drawing
    kind: str | None = None  # how a held-out concept is unseen: drawing, composition or concept
    twin: bool = False  # state 'unseen': one drawing (held_artist) is only ever shown as a query

    @property
    def key(self) -> str:
        return self.concept.key

    @property
    def name_in_training(self) -> bool:
        return self.state != "unseen"

    def in_training(self, artist: str) -> bool:
        return self.state == "train" or (self.state == "drawing" and artist != self.held_artist)

    def held_artists(self) -> list[str]:
        return [artist for artist in ARTISTS if not self.in_training(artist)]

    def answers(self) -> list[str]:
        """The artists whose drawing may be an image candidate of val and test."""
        held = self.held_artists()
        return [artist for artist in held if artist != self.held_artist] if self.twin else held


@dataclass
class Split:
    """All concepts with what training may see of them."""

    all: dict[str, Holding] = field(default_factory=dict)

    def of(self, split: str, state: str | None = None) -> list[Holding]:
        return [h for h in self.all.values() if h.split == split and state in (None, h.state)]

    def visible(self) -> list[Holding]:
        return [h for h in self.all.values() if h.name_in_training]


def thumbnail(drawing: np.ndarray) -> np.ndarray:
    """The drawing at 16x16, as one row of numbers."""
    blocks = drawing.astype(np.float32).reshape(16, 3, 16, 3, 3)
    row: np.ndarray = blocks.mean((1, 3)).reshape(-1)
    return row


def choose_concepts(concepts: Sequence[Concept], drawings: dict[tuple[str, str], np.ndarray]) -> list[Concept]:
    """Leave out concepts that look like an earlier one in either artist's hand, blank ones and some families.

    Artists reuse drawings (the tones of a snowboarder are one picture); with such copies a candidate pool
    would hold a wrong answer that looks right, and a held-out drawing might be in training under another
    code point.
    """
    sizes = Counter(c.family for c in concepts)
    kept: list[Concept] = []
    rows = np.empty((2 * len(concepts), 768), dtype=np.float32)
    filled = 0
    for concept in concepts:
        large = sizes[concept.family] >= BIG_FAMILY
        if large and share("family is used", concept.family) >= SHARE_OF_FAMILIES:
            continue
        pair = [drawings[artist, concept.key] for artist in ARTISTS]
        if any(drawing.min() > BLANK for drawing in pair):
            continue
        new = np.stack([thumbnail(drawing) for drawing in pair])
        gaps = [float(np.sqrt(((rows[:filled] - row) ** 2).mean(1)).min(initial=np.inf)) for row in new]
        gaps.append(float(np.sqrt(((new[0] - new[1]) ** 2).mean())))
        if min(gaps) >= TOO_NEAR:
            rows[filled : filled + 2] = new
            filled += 2
            kept.append(concept)
    return kept


def make_split(concepts: Sequence[Concept]) -> Split:
    families: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        families[concept.family].append(concept)
    split = Split()
    for family, members in families.items():
        if len(members) >= BIG_FAMILY:
            hold_family(family, members, split)
        else:
            for concept in members:
                hold_single(concept, split)
    split.all = dict(sorted(split.all.items()))
    repair(split)
    name_kinds(split)
    return split


def hold_single(concept: Concept, split: Split) -> None:
    """A concept without a family: one hash decides."""
    luck = share("single", concept.key)
    artist = ARTISTS[share("held artist", concept.family) < 0.5]
    twin = share("twin", concept.key) < 0.6
    for edge, state, part in (
        (0.17, "unseen", "test"),
        (0.22, "unseen", "val"),
        (0.32, "drawing", "test"),
        (0.36, "drawing", "val"),
    ):
        if luck < edge:
            split.all[concept.key] = Holding(concept, state, part, artist, twin=twin and state == "unseen")
            return
    split.all[concept.key] = Holding(concept)


def hold_family(family: str, members: list[Concept], split: Split) -> None:
    """A family of people: rarely all unseen; else a sixth unseen, a sixth with one drawing (and some val)."""
    artist = ARTISTS[share("held artist", family) < 0.5]
    luck = share("family", family)
    order = shuffled(members, "member", lambda c: c.key)
    plan: list[tuple[str, str]] = []
    if luck < 0.09:
        plan = [("unseen", "test" if luck < 0.06 else "val")] * len(members)
    else:
        sixth = round(len(members) / 6)
        extra = len(members) >= 2 * BIG_FAMILY or share("val", family) < 0.4
        plan += [("unseen", "test"), ("drawing", "test")] * sixth + [
            ("unseen", "val"),
            ("drawing", "val"),
        ] * extra
    plan += [("train", "train")] * (len(order) - len(plan))
    for concept, (state, part) in zip(order, plan, strict=True):
        twin = state == "unseen" and share("twin", concept.key) < 0.6
        split.all[concept.key] = Holding(concept, state, part, artist, twin=twin)


def repair(split: Split) -> None:
    """Give back to training what would leave a tone or a gender of a family without an example there."""
    for holding in split.all.values():
        mates = [h for h in split.all.values() if h.concept.family == holding.concept.family]
        if holding.state != "unseen" or not any(h.state == "train" for h in mates):
            continue
        seen = [h.concept for h in mates if h.name_in_training]
        gender_seen = any(c.gender == holding.concept.gender for c in seen)
        has_genders = len({h.concept.gender for h in mates}) > 1
        tone_seen = any(c.tone == holding.concept.tone for c in seen)
        if not gender_seen or (has_genders and not tone_seen):
            holding.state, holding.split, holding.twin = "train", "train", False


def name_kinds(split: Split) -> None:
    """Say of each held-out concept how it is unseen.

    An unseen concept is a composition if its family is in training with another tone or gender, or if its
    name has several words and each of them is in at least two names of training ("green heart").  Otherwise
    it is new.
    """
    trained = [h.concept for h in split.all.values() if h.state == "train"]
    families = {c.family for c in trained}
    counts = Counter(word for c in trained for word in content_words(c.name))
    for holding in split.all.values():
        if holding.state == "drawing":
            holding.kind = "drawing"
        elif holding.state == "unseen":
            parts = content_words(holding.concept.name)
            parts_seen = len(parts) > 1 and all(counts[word] >= 2 for word in parts)
            composed = holding.concept.family in families or parts_seen
            holding.kind = "composition" if composed else "concept"
