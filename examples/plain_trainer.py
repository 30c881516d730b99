"""Train on pairs with MAC-Loss and the plain Trainer of transformers, which saves a complete PUMA directory.

    python examples/plain_trainer.py puma-2b puma-2b-mac --data M-BEIR --max-steps 1000

The start of a loop of your own. `puma-hf train` and `PumaTrainer` do more: LoRA, negatives from all devices, batches
without false negatives, checkpoints that are whole. With several GPUs, use `accelerate launch`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from puma_hf import MultimodalMACLoss, PumaModel, PumaProcessor, load_mbeir
from puma_hf.losses import TemperatureScheduleCallback
from puma_hf.modeling.content_ids_puma import content_ids

INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


class PairTrainer(Trainer):
    """A Trainer whose rows have several columns, each with its own features in a batch."""

    def __init__(self, model: PumaModel, processor: PumaProcessor, mac: MultimodalMACLoss, **kwargs: Any) -> None:
        callbacks = [TemperatureScheduleCallback(mac)]
        super().__init__(model, processing_class=processor, data_collator=self.collate, callbacks=callbacks, **kwargs)
        self.processor, self.mac = processor, mac

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
        columns = {name: dict(self.processor.process_inputs([row[name] for row in rows])) for name in rows[0]}
        # Equal inputs get equal ids: a copy of a query's right answer is then no negative of it.
        return {name: {**column, "content_ids": content_ids(column)} for name, column in columns.items()}

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        columns = list(inputs.values())
        embeddings = [model(**{name: each[name] for name in INPUTS if name in each}).embeddings for each in columns]
        ids = ([column[name] for column in columns] for name in ("modality_ids", "content_ids"))
        loss = self.mac.compute_loss_from_embeddings(embeddings, *ids)
        return (loss, {}) if return_outputs else loss


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory that puma-hf prune or merge has written")
    parser.add_argument("output", help="directory for the trained model")
    parser.add_argument("--data", required=True, help="folder in M-BEIR's layout")
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per step: the others are the negatives")
    args = parser.parse_args(arguments)
    model = PumaModel.from_pretrained(args.model, dtype=torch.float32)
    model.visual.requires_grad_(False)
    settings = TrainingArguments(
        args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=1e-5,
        save_strategy="no",
        remove_unused_columns=False,  # the columns are those of `collate`, not the model's
        report_to="none",
    )
    processor, rows = PumaProcessor.from_pretrained(args.model), load_mbeir(args.data)
    trainer = PairTrainer(model, processor, MultimodalMACLoss(model), args=settings, train_dataset=rows)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
