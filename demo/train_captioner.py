"""Train the demo's tiny Qwen2-VL to caption emoji, and to do nothing else, as published backbones begin.

`make demo` does not need it. `benchmarks/ablation.py` starts from it: a backbone that never saw a retrieval task leaves
the training stages more to do than `demo/backbone/`, which was trained as a retriever.

    .venv/bin/python demo/train_captioner.py --output captioner
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from train_backbone import (
    DEMO,
    IMAGE_TOKENS,
    PATCH,
    SIDE,
    Emoji,
    build_model,
    build_tokenizer,
    patches,
    save_stock,
    train_texts,
    vary,
)

PROMPT = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>\n{question}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = (
    "What does the drawing show?",
    "Describe the drawing.",
    "Name this emoji.",
    "Summarize above image in one word: ",
)
IGNORED = -100


def captioned_drawings(emoji: Emoji) -> list[tuple[int, list[str]]]:
    """Every drawing of the train pool whose emoji's name is in it too, with what can be said of it."""
    drawings = []
    for item in emoji.candidates.values():
        if item.text and item.image is not None and (name := emoji.names.get(item.emoji)):
            captions = [name, f"{name}: {item.text}", f"{item.text}: {name}"]
            if item.emoji in emoji.keywords:
                captions.append(f"{name}: {emoji.keywords[item.emoji]}")
            drawings.append((item.image, captions))
    return drawings


class Captions(Dataset[dict[str, Any]]):
    """Drawings, each a little changed, and one caption each, drawn anew with every reading."""

    def __init__(self, emoji: Emoji, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.emoji, self.tokenizer = emoji, tokenizer
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = captioned_drawings(emoji)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawing, captions = self.rows[index]
        image = "<|image_pad|>" * IMAGE_TOKENS
        prompt = self.tokenizer.encode(PROMPT.format(image=image, question=self.random.choice(QUESTIONS)))
        answer = self.tokenizer.encode(self.random.choice(captions) + "<|im_end|>")
        return {"drawing": drawing, "prompt": prompt, "answer": answer}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Right-padded batch; the loss counts the captions alone."""
        width = max(len(row["prompt"]) + len(row["answer"]) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = [row["prompt"] + row["answer"] for row in rows]
        labels = [[IGNORED] * len(row["prompt"]) + row["answer"] for row in rows]
        input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
        drawings = torch.tensor([row["drawing"] for row in rows])
        pixels = vary(self.emoji.drawings(drawings), self.emoji.mirrored[drawings], self.generator)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
            "labels": torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
            "mm_token_type_ids": (input_ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int(),
            "pixel_values": patches(pixels),
            "image_grid_thw": torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]]).repeat(len(rows), 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO / "emoji", help="dataset in M-BEIR's layout")
    parser.add_argument("--output", type=Path, required=True, help="new directory for the checkpoint")
    parser.add_argument("--work", type=Path, default=DEMO / "work", help="checkpoints; run again to resume")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=64, help="drawings a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more than one only on idle cores")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists. Choose another --output.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(train_texts(args.data), vocabulary_size=1536)
    model = build_model(tokenizer, hidden_size=128, num_layers=8)
    captions = Captions(Emoji(args.data), tokenizer, args.seed)
    trainer = Trainer(
        model=model,
        train_dataset=captions,
        data_collator=captions.collate,
        args=TrainingArguments(
            output_dir=str(args.work / "captioner-checkpoints"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            weight_decay=0.05,
            warmup_steps=args.steps // 20,
            lr_scheduler_type="cosine",
            logging_steps=50,
            save_steps=500,
            save_total_limit=1,
            report_to="none",
            seed=args.seed,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        ),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(trainer.args.output_dir))
    save_stock(model, tokenizer, args.output)


if __name__ == "__main__":
    main()
