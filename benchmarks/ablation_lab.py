"""What `ablation.py` runs: a model whose inputs are prepared once, its training stages, and the twins of the emoji."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from torch import Tensor, nn

from puma_hf import (
    MultimodalMACLoss,
    PumaDistillationTrainer,
    PumaTrainer,
    add_lora,
    load_mbeir,
    lora_config,
)
from puma_hf.data.items import load_mbeir_items
from puma_hf.trainer.lora import merge_adapter, save_base_fingerprint

BATCH_SIZE = 64
LORA_R = 16
LOSSES = ("InfoNCE", "InfoNCE, scheduled", "MAC, constant", "MAC, scheduled", "split 0.2 (ours)")
MORE_LOSSES = ("split 0.5 (ours)",)  # on the captioner only


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


class OneTemperature(MultimodalMACLoss):
    """InfoNCE with the schedule of MAC-Loss for every candidate: to it all candidates are of one modality."""

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], modality_ids: list[Tensor], content_ids: list[Tensor] | None = None
    ) -> Tensor:
        """MAC-Loss of a batch with one modality."""
        return super().compute_loss_from_embeddings(
            embeddings, [torch.zeros_like(ids) for ids in modality_ids], content_ids
        )


def make_loss(name: str, model: nn.Module, temperature: float, hard_temperature: float) -> MultimodalMACLoss:
    """One of `LOSSES` or `MORE_LOSSES`. All mask false negatives alike; what is scheduled falls to the end."""
    falling: dict[str, Any] = {"schedule": "cosine", "schedule_end": 1.0}
    if name == "InfoNCE":
        return MultimodalMACLoss(model, temperature, temperature, schedule="constant")
    if name == "InfoNCE, scheduled":
        return OneTemperature(model, temperature, hard_temperature, **falling)
    if name == "MAC, constant":
        return MultimodalMACLoss(model, temperature, hard_temperature, schedule="constant")
    if name == "MAC, scheduled":
        return MultimodalMACLoss(model, temperature, hard_temperature, **falling)
    weight = float(name.split()[1])
    return MultimodalMACLoss(model, temperature, hard_temperature, **falling, objective="split", split_weight=weight)


def concepts_of_rows(data: Path, rows: Dataset) -> list[str]:
    """The emoji that each row asks for: of an image its file's name, of a text the one with this name."""
    pool = (data / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl").read_text(encoding="utf-8")
    concepts = {}
    for candidate in map(json.loads, pool.splitlines()):
        source = candidate["src_content"]
        concepts[candidate["did"]] = json.loads(source)["emoji"] if source else Path(candidate["img_path"]).stem
    return [concepts[did] for did in rows["did"]]


def labelled_rows(data: Path, fraction: float) -> Dataset:
    """The rows of a share of the concepts, drawn once: every seed and every loss sees the same."""
    rows = load_mbeir(data, "train", with_ids=True)
    concepts = concepts_of_rows(data, rows)
    rows = rows.add_column("concept", concepts)
    names = sorted(set(concepts))
    kept = set(random.Random(0).sample(names, max(1, round(fraction * len(names)))))
    return rows.select([index for index, concept in enumerate(concepts) if concept in kept])


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
    pruned: Path,
    backbone: Path,
    output: Path,
    prepared: Prepared,
    *,
    data: Path,
    mode: str,
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Stage 1 with one of the teachers, merged."""
    model = open_student(pruned, prepared, seed, train_ret_token=True)
    adapter = output.with_name(f"{output.name}-lora")
    trainer = PumaDistillationTrainer(
        model=model,
        teacher=str(backbone),
        teacher_mode=mode,
        **({"teacher_cache": output.with_name("teacher-cache")} if mode == "cached" else {}),
        args=arguments(adapter, steps, learning_rate, seed),
        train_dataset=load_mbeir_items(data, "train", seed=0),
    )
    trainer.train()
    model.save_pretrained(str(adapter), create_model_card=False)
    save_base_fingerprint(model, adapter)
    merge_adapter(adapter, output, base=pruned, overwrite=True)


def contrast(
    start: Path,
    prepared: Prepared,
    rows: Dataset,
    *,
    loss: str,
    twins: bool,
    steps: int,
    learning_rate: float,
    temperature: float,
    hard_temperature: float,
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
        twins=rows["concept"] if twins else None,
        loss=make_loss(loss, model, temperature, hard_temperature),
    )
    trainer.train()
    return model
