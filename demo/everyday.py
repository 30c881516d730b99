"""What a person types first: a table of all drawings by their names to search in, and twenty everyday words to try.

    .venv/bin/python demo/everyday.py [demo/output/index]

Words and right answers were fixed before the first look at an answer.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
from pathlib import Path

from puma_hf.data.mbeir import MBEIR
from puma_hf.search import Query, open_searcher

DEMO = Path(__file__).resolve().parent
INSTRUCTION = "Find a drawing of the emoji with this name."  # as in training
# Each with a pattern of the names that are right.
WORDS = {
    "smiling cat": r"(grinning|smiling) cat.*|cat with (tears of joy|wry smile)",
    "brown heart": r"brown heart",
    "pizza": r"pizza",
    "dog": r"((guide|service) )?dog( face)?|poodle",
    "car": r"(oncoming )?(automobile|police car|taxi)|racing car|sport utility vehicle",
    "tree": r".* tree",
    "rain": r".*\brain\b.*",
    "birthday cake": r"birthday cake",
    "football": r"soccer ball|(american|rugby) football",
    "airplane": r"(small )?airplane.*",
    "house": r".*\bhouses?\b.*",
    "book": r".* book|books",
    "fish": r"(tropical )?fish|blowfish",
    "flower": r".* flower|rose|tulip|hibiscus|sunflower|blossom|cherry blossom|hyacinth|lotus|bouquet",
    "fire": r"fire|heart on fire",
    "moon": r".*\bmoon( face)?",
    "coffee": r"hot beverage",
    "guitar": r"guitar",
    "thumbs up": r"thumbs up.*",
    "crying face": r"(loudly )?crying face",
}


def copy_drawings(data: Path, folder: Path) -> Path:
    """Copy all drawings, with a table for `puma-hf index` that has each by its name and says if training has seen it.

    Args:
        data: The emoji.
        folder: Where the copies go; a table may only name pictures of its own folder.

    Returns:
        The table, which has the names as texts, too.
    """
    with (data / "concepts.tsv").open(encoding="utf-8", newline="") as file:
        names = {row["emoji"]: row["name"] for row in csv.DictReader(file, delimiter="\t")}
    shutil.copytree(data / "mbeir_images" / "emoji_images", folder, dirs_exist_ok=True)
    rows: dict[str, tuple[str, str | None, str | None]] = {}
    for split, note in (("train", "seen"), ("test", "unseen")):  # what is in both was seen
        for candidate in MBEIR(data).global_pool(split).values():
            if candidate.modality == "image":
                path = Path(candidate.image or "")
                shown = f"{names[path.stem]} ({path.parent.name.capitalize()}, {note} in training)"
                rows.setdefault(str(path), (shown, None, f"{path.parent.name}/{path.name}"))
            elif candidate.modality == "text":
                name = candidate.text or ""
                rows.setdefault(name, (f"the name {name} ({note} in training)", name, None))
    table = folder / "drawings.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "text", "image"), *rows.values()])
    return table


def try_words(index: Path) -> int:
    """Ask for each of the words, print the first answer, and count the right ones."""
    searcher = open_searcher(index)
    count = 0
    for word, pattern in WORDS.items():
        answer = searcher.search(Query(text=word, instruction=INSTRUCTION), target="image", top_k=1).answers[0]
        right = re.fullmatch(pattern, answer.id.rpartition(" (")[0]) is not None
        count += right
        print(f"  {'right' if right else 'wrong'}  {word}: {answer.id}")
    print(f"{count} of {len(WORDS)} everyday words found a right drawing first.")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, nargs="?", default=DEMO / "output" / "index", help="made by demo/run.py")
    try_words(parser.parse_args().index)


if __name__ == "__main__":
    main()
