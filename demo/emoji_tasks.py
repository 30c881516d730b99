"""Queries, their positives and hard negatives, and the candidate pools of the emoji demo dataset.

A candidate is (modality, concept key, artist); a text candidate has artist "".  Val and test share one
world of candidates: a held-out concept answers with its held-out drawings only, and the drawing of it that
training has seen is in no pool, so that every right answer in a pool is listed as one, in the local pool
and in the global one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from emoji_sources import ARTISTS, PERSON, Concept
from emoji_split import Holding, Split, content_words, share, shuffled, words
from emoji_texts import TASKS, caption, edit_text, keyword_query

Candidate = tuple[str, str, str]
TEXT, IMAGE, BOTH = "text", "image", "image,text"
SPLITS = ("train", "val", "test")
TRAIN_LIMIT = 2000
# Test queries of each kind of unseen, at most; val has a third of them.
TEST_LIMITS = {"drawing": 120, "composition": 120, "concept": 50}
ONE_TO_ONE_LIMITS = {"drawing": 0, "composition": 160, "concept": 160}  # tasks 1 and 4 need unseen concepts
VAL_SHARE = 0.34
LOCAL_POOL = 500
LEAST_DISTRACTORS = 120
CAPTION_SHARERS = 6  # candidates of a pool that share a caption, at least
NEAR_SHARE = 0.6  # of the distractors, this share is from the families of the answers
ORDER_OF_KINDS = ("concept", "composition", "drawing")  # from the most to the least unseen


@dataclass
class Query:
    task: int
    split: str
    key: str  # the concept that is asked for
    text: str | None = None
    image: tuple[str, str] | None = None  # (concept key, artist)
    kind: str | None = None
    positives: list[Candidate] = field(default_factory=list)
    negatives: list[Candidate] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "|".join((str(self.task), self.key, self.text or "", *(self.image or ())))


def train_candidates(holding: Holding, modality: str) -> list[Candidate]:
    """The candidates of a concept that training may see."""
    if modality == TEXT:
        return [(TEXT, holding.key, "")] if holding.name_in_training else []
    return [(modality, holding.key, a) for a in ARTISTS if holding.in_training(a)]


def held_candidates(holding: Holding, modality: str) -> list[Candidate]:
    """The right answers of val and test for a held-out concept."""
    if modality == TEXT:
        return [(TEXT, holding.key, "")]
    artists = holding.answers() if modality == IMAGE else holding.held_artists()
    return [(modality, holding.key, a) for a in artists]


def candidates_of(holding: Holding, split: str, modality: str) -> list[Candidate]:
    return (train_candidates if split == "train" else held_candidates)(holding, modality)


def drawings_for(holding: Holding, split: str) -> list[str]:
    """The artists whose drawing of the concept may be shown as a query of this split."""
    if split == "train":
        return [a for a in ARTISTS if holding.in_training(a)]
    return holding.held_artists()


def members(split: Split, part: str) -> list[Holding]:
    """The concepts that queries of this split ask for."""
    return split.visible() if part == "train" else split.of(part)


def name_queries(split: Split, task: int, part: str) -> list[Query]:
    return [Query(task, part, h.key, text=h.concept.name, kind=h.kind) for h in members(split, part)]


def drawing_queries(split: Split, part: str) -> list[Query]:
    return [
        Query(3, part, h.key, image=(h.key, artist), kind=h.kind)
        for h in members(split, part)
        for artist in drawings_for(h, part)
    ]


def artist_queries(split: Split, part: str) -> list[Query]:
    """Task 4.  In val and test the query is a drawing that is in no image pool: that of a twin."""
    queries = []
    for h in members(split, part):
        shown = [h.held_artist] if h.twin else []
        if part == "train":
            shown = list(ARTISTS) if h.state == "train" else []
        queries += [Query(4, part, h.key, image=(h.key, artist), kind=h.kind) for artist in shown]
    return queries


def same_person(one: Concept, other: Concept) -> bool:
    """Whether tone and gender are the same; no gender is the same as any gender."""
    return one.tone == other.tone and (one.gender or PERSON) == (other.gender or PERSON)


def keyword_queries(split: Split, part: str) -> list[Query]:
    """Task 1.  Val and test ask for names that training has not seen, with words that it has seen."""
    texts = {key: keyword_query(h.concept) for key, h in split.all.items()}
    parts = {key: frozenset((text or "").split(", ")) for key, text in texts.items()}
    uses = Counter(parts.values())
    holders: dict[str, set[str]] = defaultdict(set)
    for h in split.all.values():
        for word in h.concept.keywords:
            holders[word].add(h.key)
    known = Counter(word for h in split.visible() for word in words(h.concept.name + " " + (texts[h.key] or "")))
    queries = []
    for h in members(split, part):
        text = texts[h.key]
        if text is None or uses[parts[h.key]] > 1:
            continue
        # Keywords that another emoji has as well (and more) would have a second right answer.  Where tone or
        # gender is not among them, the emoji without is asked for; so only emoji with the same ones count.
        owners = set.intersection(*(holders[word] for word in parts[h.key]))
        twins = [key for key in owners if same_person(split.all[key].concept, h.concept)]
        if part != "train" and twins != [h.key]:
            continue
        asked = words(text)
        feasible = 2 * sum(known[w] > 0 for w in asked) >= len(asked)
        feasible = feasible and any(known[w] > 0 for w in content_words(h.concept.name))
        if part == "train" or (h.state == "unseen" and feasible):
            queries.append(Query(1, part, h.key, text=text, kind=h.kind))
    return queries


def edit_queries(split: Split, task: int, part: str) -> list[Query]:
    """A drawing and a change.  In val and test both ends are held out; in training one end is fully trained.

    So a pair of concepts whose held-out drawings are an edit of the test is never an edit of training, not
    even in the drawings of the other artist.
    """
    families: dict[str, list[Holding]] = defaultdict(list)
    for h in members(split, part):
        families[h.concept.family].append(h)
    queries = []
    for source, target in ((s, t) for mates in families.values() for s in mates for t in mates):
        if part == "train" and "train" not in (source.state, target.state):
            continue
        for artist in drawings_for(source, part):
            text = edit_text(source.concept, target.concept, f"{task} {source.key} {artist} {target.key}")
            if text:
                kind = next((k for k in ORDER_OF_KINDS if k in (source.kind, target.kind)), None)
                queries.append(Query(task, part, target.key, text=text, image=(source.key, artist), kind=kind))
    return queries


def all_queries(split: Split, task: int, part: str) -> list[Query]:
    if task in (0, 2):
        return name_queries(split, task, part)
    if task == 1:
        return keyword_queries(split, part)
    if task == 3:
        return drawing_queries(split, part)
    return artist_queries(split, part) if task == 4 else edit_queries(split, task, part)


def limited(queries: list[Query], task: int, part: str) -> list[Query]:
    """A stable choice of the queries, not more than the limits allow."""
    order = shuffled(queries, "choice", lambda q: q.name)
    if part == "train":
        return order[:TRAIN_LIMIT]
    limits = ONE_TO_ONE_LIMITS if task in (1, 4) else TEST_LIMITS
    scale = VAL_SHARE if part == "val" else 1.0
    chosen = []
    for kind, limit in limits.items():
        chosen += [q for q in order if q.kind == kind][: round(limit * scale)]
    # Where one kind is short, the others fill up.
    others = [q for q in order if q not in chosen]
    chosen += others[: round(sum(limits.values()) * scale) - len(chosen)]
    return shuffled(chosen, "order", lambda q: q.name)


def make_queries(split: Split, task: int, part: str) -> list[Query]:
    queries = limited(all_queries(split, task, part), task, part)
    groups: dict[str, list[Holding]] = defaultdict(list)
    families: dict[str, list[Holding]] = defaultdict(list)
    for h in split.visible():
        groups[h.concept.group].append(h)
        families[h.concept.family].append(h)
    for query in queries:
        holding = split.all[query.key]
        found = candidates_of(holding, part, TASKS[task][1])
        # A drawing is never its own counterpart.
        query.positives = [c for c in found if task != 4 or (c[1], c[2]) != query.image]
        if part == "train":
            query.negatives = negatives(query, holding, families, groups)
    return queries


def negatives(
    query: Query, holding: Holding, families: dict[str, list[Holding]], groups: dict[str, list[Holding]]
) -> list[Candidate]:
    """Two to four wrong answers that look right: relatives, and now and then the right concept as text."""
    modality = TASKS[query.task][1]
    luck = share("negatives", query.name)
    near = [h for h in families[holding.concept.family] if h.key != query.key]
    wide = [h for h in groups[holding.concept.group] if h.concept.family != holding.concept.family]
    if not near and len(wide) < 2:  # a small group: anything else will do
        wide = [h for mates in groups.values() for h in mates if h.concept.family != holding.concept.family]
    chosen: list[Candidate] = []
    for mates, number in ((near, 2 if luck < 0.5 else 1), (wide, 1 if near else 2)):
        for mate in draw(mates, query.name, number):
            options = train_candidates(mate, modality)
            chosen.append(options[int(share("option", query.name, mate.key) * len(options))])
    if query.task in (7, 8) and share("unedited", query.name) < 0.3 and query.image:
        chosen.append((modality, *query.image))  # the drawing without the change
    if share("wrong modality", query.name) < 0.2 or len(set(chosen)) < 2:
        # Never the drawing of a positive in another form: names for drawings, drawings for names.
        wrong = train_candidates(holding, IMAGE if modality == TEXT else TEXT)
        chosen.append(wrong[int(share("wrong", query.name) * len(wrong))])
    return list(dict.fromkeys(chosen))[:4]


def draw(mates: Sequence[Holding], salt: str, number: int) -> list[Holding]:
    """`number` different members, chosen by the hash of `salt`."""
    if len(mates) <= number:
        return list(mates)
    start = int(share("mates", salt) * len(mates))
    step = max(1, len(mates) // (number + 1))
    return [mates[(start + i * step) % len(mates)] for i in range(number)]


def local_pool(split: Split, task: int, queries: Iterable[Query]) -> list[Candidate]:
    """The answers of val and test, and distractors: half-right relatives first, then anything."""
    modality = TASKS[task][1]
    answers = {c for q in queries for c in q.positives}
    families = {split.all[key].concept.family for _, key, _ in answers}
    world: list[Candidate] = []
    for h in split.all.values():
        world += train_candidates(h, modality) if h.state == "train" else held_candidates(h, modality)
    others = shuffled((c for c in world if c not in answers), f"pool {task}", "|".join)
    number = max(LOCAL_POOL - len(answers), LEAST_DISTRACTORS)
    near = [c for c in others if split.all[c[1]].concept.family in families][: round(NEAR_SHARE * number)]
    chosen = answers | set(near)
    if modality == BOTH:
        chosen |= caption_mates(split, chosen, others)
    for candidate in others:
        if len(chosen) >= len(answers) + number:
            break
        chosen.add(candidate)
    return sorted(chosen)


def caption_mates(split: Split, chosen: set[Candidate], others: Sequence[Candidate]) -> set[Candidate]:
    """Distractors that bring every caption of the chosen candidates to CAPTION_SHARERS candidates."""
    counts = Counter(caption(split.all[key].concept, artist) for _, key, artist in chosen)
    mates = set()
    for candidate in others:
        text = caption(split.all[candidate[1]].concept, candidate[2])
        if 0 < counts[text] < CAPTION_SHARERS and candidate not in chosen:
            mates.add(candidate)
            counts[text] += 1
    return mates


def build_queries(split: Split) -> dict[tuple[int, str], list[Query]]:
    return {(task, part): make_queries(split, task, part) for task in TASKS for part in SPLITS}
