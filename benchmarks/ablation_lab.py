"""What `ablation.py` runs: a model whose inputs are prepared once, and its training stages."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from torch import nn

from puma_hf import (
    JointDistillationLoss,
    MultimodalMACLoss,
    PumaDistillationTrainer,
    PumaTrainer,
    add_lora,
    load_mbeir,
    lora_config,
)
from puma_hf.data.items import load_mbeir_items
from puma_hf.trainer.lora_puma import save_base_fingerprint
from puma_hf.trainer.merge import merge_adapter

BATCH_SIZE = 64
LORA_R = 16
RELEASED: dict[str, Any] = {
    "temperature": 0.03,
    "hard_temperature": 0.018,
    "schedule": "exponential",
    "schedule_end": 0.5,
}
# All mask false negatives alike. At equal temperatures MAC-Loss is InfoNCE.
LOSSES: dict[str, dict[str, Any]] = {
    "InfoNCE 0.05": {"temperature": 0.05, "hard_temperature": 0.05, "schedule": "constant"},
    "InfoNCE 0.03": {"temperature": 0.03, "hard_temperature": 0.03, "schedule": "constant"},
    "MAC 0.05 to 0.04": {"temperature": 0.05, "hard_temperature": 0.04, "schedule": "cosine", "schedule_end": 1.0},
    "MAC 0.018 throughout": {**RELEASED, "schedule": "constant"},
    "MAC as released": RELEASED,
    "split 0.2 (ours)": {**RELEASED, "objective": "split", "split_weight": 0.2},
}


class Prepared:
    """Stands in for a processor and a frozen vision tower: what each input becomes is computed once and kept.

    Neither changes during training, and the images are not augmented, so the vectors are those of the real ones.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        self.module: Any = model[0]
        self.preprocess = self.module.preprocess
        self.pad = self.module.processor.tokenizer.pad_token_id
        self.known: dict[str, dict[str, Any]] = {}

    def attach(self, model: SentenceTransformer) -> None:
        """Give the prepared inputs to a model with the same processor and vision tower."""
        module: Any = model[0]
        module.preprocess = self.batch

    @torch.no_grad()
    def learn(self, item: Any, prompt: str | None) -> dict[str, Any]:
        features = self.preprocess([item], prompt=prompt)
        states = []
        if features.get("pixel_values") is not None:
            grid = features["image_grid_thw"]
            states = list(self.module.model.get_image_features(features["pixel_values"], grid).pooler_output)
        return {
            "input_ids": features["input_ids"][0],
            "grid": features.get("image_grid_thw"),
            "states": states,
            "modality_id": int(features["modality_ids"][0]),
            "content_id": len(self.known),
        }

    def batch(self, inputs: list[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """The features of a batch, padded on the right."""
        rows = []
        for item in inputs:
            key = json.dumps([item, prompt], sort_keys=True)
            if key not in self.known:
                self.known[key] = self.learn(item, prompt)
            rows.append(self.known[key])
        input_ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], True, self.pad)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        features: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "modality_ids": torch.tensor([row["modality_id"] for row in rows]),
            "content_ids": torch.tensor([row["content_id"] for row in rows]),
            "modality": "message",
        }
        if states := [state for row in rows for state in row["states"]]:
            features["image_grid_thw"] = torch.cat([row["grid"] for row in rows if row["grid"] is not None])
            features["mm_encoder_outputs"] = {"image": SimpleNamespace(pooler_output=states)}
        return features


def labelled_rows(data: Path, share: float) -> Dataset:
    """The rows of a share of the positives' emoji, drawn once: every seed and every loss sees the same."""
    rows = load_mbeir(data, "train", with_ids=True)
    emoji = _emoji_of_candidates(data)
    names = sorted({emoji[did] for did in rows["did"]})
    kept = set(random.Random(0).sample(names, max(1, round(share * len(names)))))
    return rows.select([index for index, did in enumerate(rows["did"]) if emoji[did] in kept])


def _emoji_of_candidates(data: Path) -> dict[str, str]:
    """Of each candidate: a drawing's emoji is its file's name, a text's is in its source."""
    pool = (data / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl").read_text(encoding="utf-8")
    found = {}
    for candidate in map(json.loads, pool.splitlines()):
        source = candidate["src_content"]
        found[candidate["did"]] = json.loads(source)["emoji"] if source else Path(candidate["img_path"]).stem
    return found


def text_rows(rows: Dataset) -> Dataset:
    """The pairs of two texts, which stand for the NLI pairs of the released stage 1."""
    pairs = zip(rows["anchor"], rows["positive"], strict=True)
    return rows.select([index for index, pair in enumerate(pairs) if not any(item["image"] for item in pair)])


def arguments(output: Path, steps: int, learning_rate: float, seed: int) -> SentenceTransformerTrainingArguments:
    """What all runs have in common."""
    return SentenceTransformerTrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        dataloader_drop_last=True,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )


def open_student(folder: Path, prepared: Prepared, seed: int, train_ret_token: bool) -> SentenceTransformer:
    """A pruned model with a fresh adapter, fed with prepared inputs."""
    torch.manual_seed(seed)
    model = SentenceTransformer(str(folder), trust_remote_code=True)
    module: Any = model[0]
    ret_token_id = module.model.config.ret_token_id if train_ret_token else None
    add_lora(model, lora_config(r=LORA_R, dropout=0.0, ret_token_id=ret_token_id))
    prepared.attach(model)
    return model


def distil(
    start: Path,
    teacher: Path,
    output: Path,
    prepared: Prepared,
    rows: Dataset | None,
    *,
    data: Path,
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Stage 1, merged: label-free on all inputs if there are no `rows`, else as released, on their pairs of texts."""
    model = open_student(start, prepared, seed, train_ret_token=rows is None)
    adapter = output.with_name(f"{output.name}-lora")
    options: dict[str, Any] = {"train_dataset": load_mbeir_items(data, "train", seed=0)}
    if rows is not None:
        pairs = text_rows(rows)
        infonce = MultimodalMACLoss(model, **LOSSES["InfoNCE 0.05"])
        options = {
            "train_dataset": pairs.select_columns(["anchor", "positive"]),
            "positives": pairs["positives"],
            "loss": JointDistillationLoss(model, infonce, "mse-mean", 0.9, 0.01),
        }
    trainer = PumaDistillationTrainer(
        model=model, teacher=str(teacher), args=arguments(adapter, steps, learning_rate, seed), **options
    )
    trainer.train()
    model.save_pretrained(str(adapter), create_model_card=False)
    save_base_fingerprint(model, adapter)
    merge_adapter(adapter, output, base=start, overwrite=True)


def contrast(
    start: Path,
    prepared: Prepared,
    rows: Dataset,
    *,
    loss: str,
    steps: int,
    learning_rate: float,
    seed: int,
    work: Path,
) -> SentenceTransformer:
    """Stage 2; the adapter stays unmerged, which changes no vector."""
    model = open_student(start, prepared, seed, train_ret_token=False)
    trainer = PumaTrainer(
        model=model,
        args=arguments(work / "run", steps, learning_rate, seed),
        train_dataset=rows.select_columns(["anchor", "positive"]),
        positives=rows["positives"],
        loss=MultimodalMACLoss(model, **LOSSES[loss]),
    )
    trainer.train()
    return model
