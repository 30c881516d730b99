"""The texts of the emoji demo dataset: captions, wordings of an edit, keyword queries and instructions."""

from __future__ import annotations

from emoji_sources import MAN, PERSON, TONES, WOMAN, Concept
from emoji_split import content_words, share, shuffled, words

# What a drawing shows, roughly, by the first part of the CLDR label.  Many candidates share each caption,
# and its words are in no name, so a caption alone never gives the answer away.
ROUGH = {
    "person-role": "somebody at work",
    "person-activity": "somebody moving",
    "person-sport": "somebody exercising",
    "person-gesture": "somebody reacting",
    "person-fantasy": "somebody from tales",
    "person": "a human being",
    "family": "a human being",
    "body": "an anatomical detail",
    "animal": "flora or fauna",
    "plant": "flora or fauna",
    "food": "something edible",
    "drink": "something edible",
    "dishware": "something edible",
    "place": "scenery",
    "hotel": "scenery",
    "transport": "traffic",
    "sky": "scenery",
    "time": "an implement",
    "face": "a mood",
    "emotion": "a mood",
    "cat-face": "flora or fauna",
    "monkey-face": "flora or fauna",
    "alphanum": "a pictogram",
    "keycap": "a pictogram",
    "arrow": "a pictogram",
    "av-symbol": "a pictogram",
    "geometric": "a pictogram",
    "other-symbol": "a pictogram",
    "religion": "a pictogram",
    "warning": "a pictogram",
    "zodiac": "a pictogram",
    "flag": "a pictogram",
    "event": "leisure",
    "game": "leisure",
    "sport": "leisure",
    "award-medal": "leisure",
    "arts & crafts": "leisure",
    "other": "miscellany",
}
VAGUE_WORDS = frozenset(["adult", "gender", "neutral", "unspecified", "young", "hair"])
DEFAULT_ROUGH = "an implement"
MANNERS = {"noto": "in the Noto manner", "twemoji": "in the Twemoji manner"}

TONE_EDITS = (
    "with {tone} skin tone",
    "change to {tone} skin tone",
    "the same with {tone} skin",
    "make the skin tone {tone}",
)
DEFAULT_TONE_EDITS = ("with the default yellow skin", "without a skin tone", "change the skin back to yellow")
GENDER_EDITS = ("as {who}", "change to {who}", "the same but {who}", "make it {who}")
WHO = {PERSON: "a person of any gender", MAN: "a man", WOMAN: "a woman"}
WHO_YOUNG = {PERSON: "a child of any gender", MAN: "a boy", WOMAN: "a girl"}

# (query modality, candidate modality) of each task.
TASKS = {
    0: ("text", "image"),
    1: ("text", "text"),
    2: ("text", "image,text"),
    3: ("image", "text"),
    4: ("image", "image"),
    6: ("image,text", "text"),
    7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}
INSTRUCTIONS = {
    0: (
        "Find a drawing of the emoji with this name.",
        "Retrieve the emoji drawing that matches the name.",
        "Show me what the emoji with this name looks like.",
        "Which drawing shows the emoji called so?",
    ),
    1: (
        "Find the name of the emoji that these keywords describe.",
        "Retrieve the emoji name that fits the keywords.",
        "Which emoji name do these keywords belong to?",
        "Match the keywords with the name of an emoji.",
    ),
    2: (
        "Find a captioned drawing of the emoji with this name.",
        "Retrieve the drawing with caption that shows the emoji of this name.",
        "Which drawing together with its caption shows the emoji called so?",
        "Match the emoji name with a drawing and its caption.",
    ),
    3: (
        "Find the name of the emoji in this drawing.",
        "Retrieve the name that describes this emoji drawing.",
        "What is the emoji in the drawing called?",
        "Match this emoji drawing with its name.",
    ),
    4: (
        "Find the drawing of the same emoji by another artist.",
        "Retrieve another artist's version of this emoji drawing.",
        "Which drawing shows the same emoji in another style?",
        "Match this emoji drawing with its counterpart in another style.",
    ),
    6: (
        "Find the name of the emoji that this drawing becomes after the change.",
        "Retrieve the emoji name for the drawing changed as described.",
        "What is the emoji called once the drawing is edited as the text says?",
        "Match the drawing and the change with the name of the resulting emoji.",
    ),
    7: (
        "Find a drawing, by any artist, of the emoji after the change.",
        "Retrieve the drawing, in any style, that shows this emoji changed as described.",
        "Which drawing, whoever drew it, shows the emoji edited as the text says?",
        "Match the drawing and the change with a drawing of the resulting emoji in any style.",
    ),
    8: (
        "Find a captioned drawing, by any artist, of the emoji after the change.",
        "Retrieve the drawing with caption, in any style, that shows this emoji changed as described.",
        "Which captioned drawing, whoever drew it, shows the emoji edited as the text says?",
        "Match the drawing and the change with a captioned drawing of the resulting emoji in any style.",
    ),
}


def caption(concept: Concept, artist: str) -> str:
    group = concept.group
    rough = ROUGH.get(group) or ROUGH.get(group.split("-")[0]) or ROUGH.get(group.split(" ")[0]) or DEFAULT_ROUGH
    return f"{rough}, {MANNERS[artist]}"


def tone_edit(target: Concept, salt: str) -> str:
    forms = TONE_EDITS if target.tone else DEFAULT_TONE_EDITS
    return forms[int(share("tone edit", salt) * len(forms))].format(tone=TONES[target.tone])


def gender_edit(target: Concept, salt: str) -> str:
    assert target.gender is not None
    form = GENDER_EDITS[int(share("gender edit", salt) * len(GENDER_EDITS))]
    who = WHO_YOUNG if target.family == "child" else WHO
    return form.format(who=who[target.gender])


def edit_text(source: Concept, target: Concept, salt: str) -> str | None:
    """The change from source to target in words, if exactly one thing changes; else None."""
    if source.family != target.family or (source.tone == target.tone) == (source.gender == target.gender):
        return None
    return tone_edit(target, salt) if source.tone != target.tone else gender_edit(target, salt)


def meanings(keyword: str) -> set[str]:
    """The stems of a keyword's words that say what is meant ("adult" and "unspecified gender" do not)."""
    return {stem(word) for word in content_words(keyword) - VAGUE_WORDS}


def stem(word: str) -> str:
    for ending in ("ing", "es", "ed", "s"):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            return word[: -len(ending)]
    return word


def keyword_query(concept: Concept) -> str | None:
    """The CLDR keywords that do not give the name away: never all words of the name together."""
    name = "".join(words(concept.name))
    name_stems = {stem(word) for word in content_words(concept.name)}
    kept = [w for w in concept.keywords if words(w) and "".join(words(w)) != name]
    for keyword in shuffled(kept, concept.key, str):
        covered = {stem(part) for w in kept for part in content_words(w)}
        # While every word of the name is among the keywords, take one of those words away.
        if name_stems <= covered and name_stems & {stem(part) for part in content_words(keyword)}:
            kept.remove(keyword)
    covered = {stem(part) for w in kept for part in content_words(w)}
    if len(kept) < 2 or name_stems <= covered or not any(meanings(w) for w in kept):
        return None
    return ", ".join(shuffled(kept, "order " + concept.key, str))
