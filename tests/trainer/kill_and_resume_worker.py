"""A training run that notes each loss and may kill itself; as a script, several of them, so that kills are real."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Value
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from torch import Tensor

from puma_hf import ElasticDepthLoss, MultimodalMACLoss, PumaTrainer, lora_config
from puma_hf.trainer.lora_puma import add_lora, puma_model
from tests.forks import exit_signal, in_a_fork

NUM_ROWS = 24
# Many rows share the first answer and never meet in a batch: epochs end early, in the middle of an accumulation.
POSITIVES = [["common"] if row % 4 == 0 else [f"answer {row % 8}"] for row in range(NUM_ROWS)]


def rows(image: Path) -> Dataset:
    """Pairs whose target is a text or an image."""
    string = Value("string")
    cell = {"text": string, "image": string}
    anchors = [{"text": f"query {row}", "image": None} for row in range(NUM_ROWS)]
    answers = [
        {"text": POSITIVES[row][0] if row % 2 else None, "image": None if row % 2 else str(image)}
        for row in range(NUM_ROWS)
    ]
    return Dataset.from_dict({"anchor": anchors, "positive": answers}, Features({"anchor": cell, "positive": cell}))


class Recorder(PumaTrainer):
    """Appends every loss to a file, and kills its own process where it is told to."""

    record: Path
    kill_in_step = kill_in_save = -1

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        rows = self.model.tokenizer.batch_decode(inputs["anchor_input_ids"])
        loss = super().training_step(model, inputs, *args, **kwargs)
        with self.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps([self.state.global_step, str(rows), float(loss)]) + "\n")
        if self.state.global_step == self.kill_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.state.global_step == self.kill_in_save:
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    base: Path, image: Path, folder: Path, weights: Any, *, resume: bool = False, step: int = -1, save: int = -1
) -> Recorder:
    """Train four epochs with a checkpoint every third step, with `weights` at two depths."""
    torch.manual_seed(0)
    model = SentenceTransformer(str(base), trust_remote_code=True, device="cpu")
    add_lora(model, lora_config(r=4, dropout=0.2, ret_token_id=puma_model(model).config.ret_token_id))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    loss: Any = MultimodalMACLoss(model, temperature=0.05, hard_temperature=0.02)
    loss = ElasticDepthLoss(model, loss, (1, 2), weights) if weights else loss
    trainer = Recorder(model=model, args=arguments, train_dataset=rows(image), loss=loss, positives=POSITIVES)
    trainer.record, trainer.kill_in_step, trainer.kill_in_save = folder.with_suffix(".jsonl"), step, save
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def die(*paths: Any, **options: Any) -> None:
    """The same run in a process of its own, which must not survive."""
    if exit_signal(in_a_fork(lambda: run(*paths, **options))) != signal.SIGKILL:
        raise SystemExit(f"The run with {options} was not killed.")


if __name__ == "__main__":
    for several in json.loads(sys.argv[5]):
        die(*map(Path, sys.argv[1:4]), sys.argv[4], **several)
