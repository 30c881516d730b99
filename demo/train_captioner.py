"""Train the demo's tiny Qwen2-VL to caption emoji, and to do nothing else, as published backbones begin.

`make demo` does not need it. `benchmarks/ablation.py` starts from it: a backbone that never saw a retrieval task leaves
the training stages more to do than `demo/backbone/`, which was trained as a retriever.

    .venv/bin/python demo/train_captioner.py --output captioner
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from train_backbone import DEMO, build_model, build_tokenizer, save_stock

PROMPT = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>\n{question}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = (
    "What does the drawing show?",
    "Describe the drawing.",
    "Name this emoji.",
    "Summarize above image in one word: ",
)
IGNORED = -100


def captioned_drawings(data: Path) -> list[tuple[Path, list[str]]]:
    """Every drawing of the train pool whose emoji's name is in it too, with what can be said of it."""
    pool = (data / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in pool.splitlines()]
    names = {json.loads(row["src_content"])["emoji"]: row["txt"] for row in rows if row["modality"] == "text"}
    drawings = []
    for row in rows:
        if row["modality"] == "image,text" and (name := names.get(Path(row["img_path"]).stem)):
            drawings.append((data / row["img_path"], [name, f"{name}: {row['txt']}", f"{row['txt']}: {name}"]))
    return drawings


class Captions(Dataset[dict[str, Any]]):
    """Drawings as patches and one caption each, drawn anew with every reading."""

    def __init__(self, data: Path, stock: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(stock)
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self.rows = []
        for path, captions in captioned_drawings(data):
            with Image.open(path) as image:
                patches = processor(images=image.convert("RGB"), return_tensors="pt")
            self.rows.append((patches["pixel_values"], patches["image_grid_thw"], captions))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        patches, grid, captions = self.rows[index]
        image = "<|image_pad|>" * (int(grid.prod()) // 4)
        prompt = self.tokenizer.encode(PROMPT.format(image=image, question=self.random.choice(QUESTIONS)))
        answer = self.tokenizer.encode(self.random.choice(captions) + "<|im_end|>")
        return {"patches": patches, "grid": grid, "prompt": prompt, "answer": answer}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Right-padded batch; the loss counts the captions alone."""
        width = max(len(row["prompt"]) + len(row["answer"]) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = [row["prompt"] + row["answer"] for row in rows]
        labels = [[IGNORED] * len(row["prompt"]) + row["answer"] for row in rows]
        input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
        return {
            "input_ids": input_ids,
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
            "labels": torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
            "mm_token_type_ids": (input_ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int(),
            "pixel_values": torch.cat([row["patches"] for row in rows]),
            "image_grid_thw": torch.cat([row["grid"] for row in rows]),
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
    tokenizer = build_tokenizer(args.data, vocabulary_size=1536)
    model = build_model(tokenizer, hidden_size=128, num_layers=8)
    save_stock(model, tokenizer, args.work / "random-captioner")
    captions = Captions(args.data, args.work / "random-captioner", tokenizer, args.seed)
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
