"""The two training stages as functions: distil without labels, then train with MAC-Loss or InfoNCE."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from puma_hf.data.items import load_mbeir_items
from puma_hf.data.mbeir import load_mbeir
from puma_hf.files import is_puma_directory
from puma_hf.losses import MultimodalMACLoss, SelfDistillationLoss
from puma_hf.losses.temperature import check_temperature
from puma_hf.trainer.distillation import PumaDistillationTrainer
from puma_hf.trainer.lora import add_lora, lora_config, puma_model, save_base_fingerprint
from puma_hf.trainer.puma import PumaTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageSettings:
    """What both stages have in common. The defaults are LamRA's where it states them.

    Attributes:
        batch_size: Rows per step and device.
        gradient_accumulation_steps: Batches per optimizer step. In-batch negatives stay those of one batch.
        max_length: Longest sequence in tokens; only text is cut.
        max_pixels: Images are scaled down to so many pixels (LamRA's 300 visual tokens of 28 x 28).
        num_train_epochs: Passes over the dataset, unless `max_steps` is positive.
        max_steps: Optimizer steps.
        learning_rate: Peak of the cosine schedule.
        warmup: Fraction of the steps that warm up.
        lora_r: Rank of the adapter; alpha is twice as much.
        lora_dropout: Dropout of the adapter.
        train_ret_token: Whether to train the embedding row of `[RET]` too.
        seed: Seed of order, dropout and the choice of wordings.
        bf16: Train in bfloat16 autocast.
        dataloader_num_workers: Processes that prepare batches.
        logging_steps: Steps between two log lines.
        save_steps: Steps between two checkpoints, of which the last two are kept; 0 for none.
    """

    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    max_length: int = 480
    max_pixels: int = 300 * 28 * 28
    num_train_epochs: float = 1.0
    max_steps: int = -1
    learning_rate: float = 1e-4
    warmup: float = 0.03
    lora_r: int = 64
    lora_dropout: float = 0.05
    train_ret_token: bool = False
    seed: int = 0
    bf16: bool = False
    dataloader_num_workers: int = 0
    logging_steps: int = 10
    save_steps: int = 500

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps", "max_length", "lora_r", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1. Leave it out for the default.")
        if self.max_pixels < 28 * 28:
            raise ValueError(f"max_pixels={self.max_pixels} must hold one visual token of 28 x 28 pixels at least.")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1, or -1 for whole epochs.")
        if self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs} must be above 0.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must be in [0, 1). LamRA takes 0.05.")
        if self.dataloader_num_workers < 0:
            raise ValueError(f"dataloader_num_workers={self.dataloader_num_workers} must be 0 (none) or more.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0. LamRA takes 1e-4 to 2e-4.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} is a fraction of the steps and must be in [0, 1).")
        if self.save_steps < 0:
            raise ValueError(f"save_steps={self.save_steps} must be 0 (no checkpoints) or more.")


# LamRA's rank and learning rate of either stage.
DISTILL_SETTINGS = StageSettings(lora_r=64, learning_rate=2e-4, train_ret_token=True)
TRAIN_SETTINGS = StageSettings(lora_r=128, learning_rate=1e-4)


def distill(
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    data: str | Path,
    teacher: str | Path | None = None,
    metric: Literal["mse", "cosine"] = "mse",
    settings: StageSettings | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Stage 1: distil the full model into the pruned one on single items, without labels.

    The items are the queries (with their instructions) and candidates of the train split, each on its own:
    which query belongs to which candidate is never looked at.

    Args:
        model_dir: Pruned PUMA directory.
        output_dir: Where the adapter goes, and checkpoints while training.
        data: Folder in M-BEIR's layout.
        teacher: Checkpoint that was pruned; by default the one that the model names.
        metric: "mse" (the paper's) or "cosine".
        settings: Training settings, by default `DISTILL_SETTINGS`, which also trains the row of `[RET]`.
        resume: Continue from the last checkpoint in `output_dir`.
        overwrite: Allow an `output_dir` that is not empty; checkpoints in it are removed.

    Returns:
        `output_dir`, which holds the adapter.

    Raises:
        FileExistsError: If `output_dir` is not empty and neither `resume` nor `overwrite` is given.
        ValueError: If the teacher is not the checkpoint that was pruned, `output_dir` is the model, or the
            dataset has no full batch.

    Example:

    ```python
    >>> from puma_hf.trainer.stages import distill

    >>> distill("puma-k4", "puma-k4-lora", data="demo/emoji", teacher="demo/backbone")  # doctest: +SKIP
    ```
    """
    settings = settings or DISTILL_SETTINGS
    checkpoint = _prepare_output(model_dir, output_dir, resume, overwrite)
    model = _load_with_lora(model_dir, settings)
    trainer = PumaDistillationTrainer(
        model=model,
        teacher=teacher,
        args=_training_arguments(output_dir, settings),
        train_dataset=load_mbeir_items(data, "train", seed=settings.seed),
        loss=SelfDistillationLoss(model, metric),
    )
    return _run(trainer, output_dir, checkpoint)


def train(
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    data: str | Path,
    loss: Literal["mac", "infonce"] = "mac",
    temperature: float = 0.05,
    hard_temperature: float = 0.04,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    num_negatives: int = 0,
    settings: StageSettings | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Stage 2: train on labelled pairs with MAC-Loss, or with InfoNCE to compare.

    No two rows of a batch share a right answer.

    Args:
        model_dir: PUMA directory, as a rule the distilled and merged one.
        output_dir: Where the adapter goes, and checkpoints while training.
        data: Folder in M-BEIR's layout.
        loss: "mac" or "infonce".
        temperature: Temperature of InfoNCE, and of candidates of another modality than the target's.
        hard_temperature: Where the temperature of candidates of the target's modality ends.
        schedule: How it gets there.
        num_negatives: Hard negatives per query.
        settings: Training settings, by default `TRAIN_SETTINGS`.
        resume: Continue from the last checkpoint in `output_dir`.
        overwrite: Allow an `output_dir` that is not empty; checkpoints in it are removed.

    Returns:
        `output_dir`, which holds the adapter.

    Raises:
        FileExistsError: If `output_dir` is not empty and neither `resume` nor `overwrite` is given.
        ValueError: If `loss` or a temperature is out of range, `output_dir` is the model, or the dataset has
            no full batch.

    Example:

    ```python
    >>> from puma_hf.trainer.stages import train

    >>> train("puma-k4-distilled", "puma-k4-mac-lora", data="demo/emoji")  # doctest: +SKIP
    ```
    """
    if loss not in ("mac", "infonce"):
        raise ValueError(f"loss={loss!r} is unknown. Choose 'mac' or 'infonce'.")
    check_temperature("temperature", temperature)
    check_temperature("hard_temperature", hard_temperature)
    settings = settings or TRAIN_SETTINGS
    checkpoint = _prepare_output(model_dir, output_dir, resume, overwrite)
    model = _load_with_lora(model_dir, settings)
    objective: nn.Module = (
        MultimodalMACLoss(model, temperature=temperature, hard_temperature=hard_temperature, schedule=schedule)
        if loss == "mac"
        else MultipleNegativesRankingLoss(model, scale=1 / temperature)
    )
    rows = load_mbeir(
        data,
        "train",
        num_negatives=num_negatives,
        missing_negatives="drop",
        seed=settings.seed,
        with_ids=True,
    )
    trainer = PumaTrainer(
        model=model,
        args=_training_arguments(output_dir, settings),
        train_dataset=rows.remove_columns(["qid", "did", "positives"]),
        positives=rows["positives"],
        loss=objective,
    )
    return _run(trainer, output_dir, checkpoint)


def _prepare_output(model_dir: str | Path, output_dir: str | Path, resume: bool, overwrite: bool) -> str | None:
    """The checkpoint to continue from, if any. What a former run left must not be taken for this one's."""
    folder = Path(output_dir)
    if Path(model_dir).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"output_dir {str(output_dir)!r} is, or holds, the model itself. Choose another directory.")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir {str(output_dir)!r} is a file. Choose a directory.")
    checkpoint: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if resume and checkpoint is not None:
        return checkpoint
    if resume and folder.is_dir() and any(folder.iterdir()):
        raise FileNotFoundError(
            f"output_dir {str(output_dir)!r} holds no checkpoint to continue from: the run may have finished. Choose "
            "another directory, or start again with overwrite=True (--overwrite)."
        )
    if resume:
        logger.warning("No checkpoint in %s: starting from the beginning.", folder)
    # Other processes may come here after the first has begun to write.
    if PartialState().is_main_process and folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"output_dir {str(output_dir)!r} is not empty. Continue it with resume=True (--resume), or pass "
            "overwrite=True (--overwrite)."
        )
    if not PartialState().is_main_process:
        return None
    for stale in folder.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", stale.name) and stale.is_dir():
            shutil.rmtree(stale)
    return None


def _load_with_lora(model_dir: str | Path, settings: StageSettings) -> SentenceTransformer:
    # A model with LoRA is initialised at random: seeded, so that a run can be repeated.
    torch.manual_seed(settings.seed)
    if Path(model_dir, "adapter_config.json").is_file():
        raise ValueError(f"{str(model_dir)!r} is an adapter. Merge it first (puma-hf merge), and train the result.")
    if not is_puma_directory(Path(model_dir)):
        raise ValueError(
            f"{str(model_dir)!r} is no PUMA directory. Make one from a Qwen2-VL checkpoint first: puma-hf prune "
            "SOURCE OUTPUT --num-kept-layers K."
        )
    model = SentenceTransformer(str(model_dir), trust_remote_code=True)
    first: Any = model[0]
    shortest = first.processor.image_processor.size["shortest_edge"]
    first.processing_kwargs = {
        "text": {"max_length": settings.max_length},
        "image": {"size": {"shortest_edge": shortest, "longest_edge": max(settings.max_pixels, shortest)}},
    }
    ret_token_id = puma_model(model).config.ret_token_id if settings.train_ret_token else None
    add_lora(model, lora_config(r=settings.lora_r, dropout=settings.lora_dropout, ret_token_id=ret_token_id))
    return model


def _training_arguments(output_dir: str | Path, settings: StageSettings) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        bf16=settings.bf16,
        seed=settings.seed,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=settings.dataloader_num_workers,
        logging_steps=settings.logging_steps,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        report_to="none",
    )


def _run(trainer: PumaTrainer, output_dir: str | Path, checkpoint: str | None) -> Path:
    rows: Any = trainer.train_dataset
    batch_size = trainer.args.train_batch_size
    if len(rows) >= batch_size:
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step == 0:
        # The trainer itself only logs this, and an untrained adapter looks like a trained one.
        raise ValueError(
            f"The {len(rows)} rows fill no batch of {batch_size}, so nothing was trained. Choose a smaller "
            "batch_size (--batch-size)."
        )
    if trainer.state.global_step < trainer.state.max_steps:
        logger.warning(
            "Training ended after %d of %d steps: too many rows share a right answer to fill every batch. Choose a "
            "smaller batch_size (--batch-size).",
            trainer.state.global_step,
            trainer.state.max_steps,
        )
    if trainer.is_world_process_zero():
        # A generated card would show rows of the dataset, with the paths that its images have here.
        trainer.model.save_pretrained(str(output_dir), create_model_card=False)
        save_base_fingerprint(trainer.model, output_dir)
        logger.info("Saved the adapter to %s", output_dir)
    trainer.accelerator.wait_for_everyone()
    return Path(output_dir)
