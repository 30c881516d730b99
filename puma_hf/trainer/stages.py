"""The two training stages and the merge as functions of one configuration each."""

from __future__ import annotations

import logging
import random
import shutil
from dataclasses import fields
from difflib import unified_diff
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from puma_hf.data.items import load_items
from puma_hf.data.mbeir import load_mbeir
from puma_hf.data.nli import load_nli
from puma_hf.data.twins import twin_keys
from puma_hf.files import is_puma_directory
from puma_hf.losses import SelfDistillationLoss
from puma_hf.recipes import config_text, save_config
from puma_hf.trainer.checkpoints import CHECKPOINT_NAME, last_whole_checkpoint
from puma_hf.trainer.config import DistillConfig, MergeConfig, StageConfig, TrainConfig
from puma_hf.trainer.distillation import PumaDistillationTrainer
from puma_hf.trainer.lora import add_lora, lora_config, merge_adapter, puma_model, save_base_fingerprint
from puma_hf.trainer.objectives import training_loss
from puma_hf.trainer.puma import PumaTrainer
from puma_hf.trainer.quantization import quantization_config
from puma_hf.trainer.sharding import whole_weights
from puma_hf.values import nearest

logger = logging.getLogger(__name__)

# Written beside the adapter, so that a run can be repeated: puma-hf distill --config OUTPUT/distill.yaml.
RECIPES = {DistillConfig: "distill.yaml", TrainConfig: "train.yaml"}
# What an interrupted run leaves besides checkpoints; "runs" is a reporter's.
_LEFTOVERS = {*RECIPES.values(), "teacher_cache", "runs"}
# Columns of the training rows that the model is not to see.
_ID_COLUMNS = ("qid", "did", "positives")


def distill(config: DistillConfig) -> Path:
    """Stage 1: distil the full model into the pruned one on single items, without labels.

    Of a folder in M-BEIR's layout the items are the queries (with their instructions) and candidates of the train
    split, each on its own: which query belongs to which candidate is never looked at. Any other corpus of texts and
    images will do as well.

    Args:
        config: What to train, on what, and how; see `DistillConfig`.

    Returns:
        `config.output`, which holds the adapter and `distill.yaml`, the settings it was made with.

    Raises:
        FileExistsError: If the output is not empty and neither `resume` nor `overwrite` is set.
        ValueError: If the teacher does not fit, the output is the model, or the dataset has no full batch.

    Example:

    ```python
    >>> from puma_hf.trainer.config import DistillConfig
    >>> from puma_hf.trainer.stages import distill

    >>> config = DistillConfig(model="puma-k4", output="puma-k4-lora", data="demo/emoji", teacher="demo/backbone")
    >>> distill(config)  # doctest: +SKIP
    ```
    """
    arguments, loading = _training_arguments(config), _check_model(config)
    checkpoint = _prepare_output(config)
    model = _load_with_lora(config, loading)
    trainer = PumaDistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=load_items(config.data, split=config.split, seed=config.seed),
        loss=SelfDistillationLoss(model, config.metric),
        **_teacher_arguments(config),
    )
    return _run(trainer, config, checkpoint)


def train(config: TrainConfig) -> Path:
    """Stage 2: train on labelled pairs with MAC-Loss, or with InfoNCE to compare.

    No two rows of a batch share a right answer.

    Args:
        config: What to train, on what, and how; see `TrainConfig`.

    Returns:
        `config.output`, which holds the adapter and `train.yaml`, the settings it was made with.

    Raises:
        FileExistsError: If the output is not empty and neither `resume` nor `overwrite` is set.
        ValueError: If the output is the model, or the dataset has no full batch.

    Example:

    ```python
    >>> from puma_hf.trainer.config import TrainConfig
    >>> from puma_hf.trainer.stages import train

    >>> config = TrainConfig(model="puma-k4-distilled", output="puma-k4-mac-lora", data="demo/emoji")
    >>> train(config)  # doctest: +SKIP
    ```
    """
    for note in config.notes():
        logger.warning(note)
    arguments, loading = _training_arguments(config), _check_model(config)
    checkpoint = _prepare_output(config)
    model = _load_with_lora(config, loading)
    rows = _labelled_rows(config)
    joint = config.distillation_weight > 0
    trainer_class = PumaDistillationTrainer if joint else PumaTrainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=rows.select_columns([name for name in rows.column_names if name not in _ID_COLUMNS]),
        positives=rows["positives"] if "positives" in rows.column_names else None,
        twins=twin_keys(rows) if config.batches == "twin" else None,
        loss=training_loss(model, config, num_devices=PartialState().num_processes),
        **(_teacher_arguments(config) if joint else {}),
    )
    return _run(trainer, config, checkpoint)


def merge(config: MergeConfig) -> float:
    """Merge a trained adapter into its base, checked; `puma_hf.merge_adapter` with its settings in one object.

    Args:
        config: What to merge; see `MergeConfig`.

    Returns:
        The largest distance of an embedding before merging to the one after it.

    Raises:
        FileNotFoundError: If there is no adapter, or its base cannot be found.
        ValueError: If the adapter does not fit its base, or merging moved an embedding by more than 1e-4.
    """
    return merge_adapter(config.adapter, config.output, base=config.base, overwrite=config.overwrite)


def _labelled_rows(config: TrainConfig) -> Dataset:
    if Path(config.data).is_file():
        if config.num_negatives > 1:
            raise ValueError(f"num_negatives={config.num_negatives} must be 0 or 1: {config.data} has one per pair.")
        rows = load_nli(config.data)
        rows = rows if config.num_negatives else rows.remove_columns("negative_1")
    else:
        rows = load_mbeir(
            config.data,
            config.split,
            num_negatives=config.num_negatives,
            missing_negatives="drop",
            seed=config.seed,
            with_ids=True,
        )
    if config.train_fraction == 1:
        return rows
    count = max(1, round(config.train_fraction * len(rows)))
    return rows.select(sorted(random.Random(config.seed).sample(range(len(rows)), count)))


def _teacher_arguments(config: DistillConfig | TrainConfig) -> dict[str, Any]:
    return {
        "teacher": config.teacher,
        "teacher_mode": config.teacher_mode,
        "teacher_cache": config.teacher_cache,
    }


def _training_arguments(config: StageConfig) -> SentenceTransformerTrainingArguments:
    known = {entry.name for entry in fields(SentenceTransformerTrainingArguments) if entry.init}
    for name in config.training_arguments:
        if name not in known:
            raise ValueError(
                f"training_arguments has {name!r}, which is no argument of SentenceTransformerTrainingArguments."
                f"{nearest(name, known)}"
            )
    arguments: dict[str, Any] = {
        "output_dir": str(config.output),
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup,
        "bf16": config.bf16,
        "seed": config.seed,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": config.dataloader_num_workers,
        # Every weight of the adapter takes part in every step: nothing to look for.
        "ddp_find_unused_parameters": False,
        "logging_steps": config.logging_steps,
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "save_total_limit": 2,
        "report_to": list(config.report_to) or "none",
    }
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it, and warns of the old name.
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        arguments[name] = True
    return SentenceTransformerTrainingArguments(**{**arguments, **config.training_arguments})


def _prepare_output(config: StageConfig) -> str | None:
    """The checkpoint to continue from, if any. What a former run left must not be taken for this one's."""
    folder = Path(config.output)
    if Path(config.model).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"output {str(folder)!r} is, or holds, the model itself. Choose another directory.")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output {str(folder)!r} is a file. Choose a directory.")
    if config.resume and (checkpoint := last_whole_checkpoint(folder)) is not None:
        return checkpoint
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # A run that was killed before its first checkpoint was whole: there is nothing to lose.
    begun = {name for name in found if name in _LEFTOVERS or CHECKPOINT_NAME.fullmatch(name)}
    if config.resume and found - begun:
        raise FileNotFoundError(
            f"output {str(folder)!r} holds no whole checkpoint to continue from: the run may have finished. Choose "
            "another directory, or start again with overwrite=True (--overwrite)."
        )
    if config.resume:
        logger.warning("No whole checkpoint in %s: starting from the beginning.", folder)
    # Other processes may come here after the first has begun to write.
    if not PartialState().is_main_process:
        return None
    if found - set(RECIPES.values()) and not (config.resume or config.overwrite):
        raise FileExistsError(
            f"output {str(folder)!r} is not empty. Continue it with resume=True (--resume), or pass overwrite=True "
            "(--overwrite)."
        )
    for stale in folder.glob("checkpoint-*"):
        if CHECKPOINT_NAME.fullmatch(stale.name) and stale.is_dir():
            shutil.rmtree(stale)
    return None


def _check_model(config: StageConfig) -> dict[str, Any]:
    """How to load the model, once it is seen to be one: before anything in the output is touched."""
    folder = Path(config.model)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{str(folder)!r} is an adapter. Merge it first (puma-hf merge), and train the result.")
    if not is_puma_directory(folder):
        raise ValueError(
            f"{str(folder)!r} is no PUMA directory. Make one from a Qwen2-VL checkpoint first: puma-hf prune "
            "SOURCE OUTPUT --num-kept-layers K."
        )
    return {"quantization_config": quantization_config()} if config.load_in_4bit else {}


def _load_with_lora(config: StageConfig, loading: dict[str, Any]) -> SentenceTransformer:
    # A model with LoRA is initialised at random: seeded, so that a run can be repeated.
    torch.manual_seed(config.seed)
    model = SentenceTransformer(str(config.model), trust_remote_code=True, model_kwargs=loading)
    first: Any = model[0]
    shortest = first.processor.image_processor.size["shortest_edge"]
    first.processing_kwargs = {
        "text": {"max_length": config.max_length},
        "image": {"size": {"shortest_edge": shortest, "longest_edge": max(config.max_pixels, shortest)}},
    }
    ret_token_id = puma_model(model).config.ret_token_id if config.train_ret_token else None
    lora = lora_config(r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout, ret_token_id=ret_token_id)
    add_lora(model, lora)
    return model


def _keep_recipe(config: StageConfig, checkpoint: str | None) -> None:
    file = Path(config.output, RECIPES[type(config)])
    if checkpoint is not None and (changed := _changed(config)):
        logger.warning("Continuing with other settings than the run began with: %s", "; ".join(changed))
    save_config(config, file)


def _changed(config: StageConfig) -> list[str]:
    """What differs from the recipe in the output, if there is one."""
    file = Path(config.output, RECIPES[type(config)])
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    lines = unified_diff(before.splitlines(), config_text(config).splitlines(), n=0, lineterm="")
    return [line for line in lines if line[:2] not in ("--", "++", "@@")]


def _is_finished(config: StageConfig, checkpoint: str | None) -> bool:
    """Whether a checkpoint is that of the last step: the trainer would go on for one more."""
    if checkpoint is None:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    if config.max_steps == -1 and _changed(config):
        return False  # then the number of steps is another, and known to the trainer alone
    last: int = state.max_steps if config.max_steps == -1 else config.max_steps
    return bool(state.global_step >= last)


def _check_sharding(trainer: PumaTrainer, config: StageConfig) -> None:
    cached = isinstance(config, TrainConfig) and config.cached
    if trainer.is_fsdp_enabled and (cached or isinstance(trainer, PumaDistillationTrainer)):
        what = "gradient caching (mini_batch_size, mini_batch_num_tokens)" if cached else "a teacher"
        raise ValueError(
            f"{what} calls parts of the model on their own, which FSDP holds in pieces. Launch without FSDP: plain "
            "DDP, as accelerate launch and torchrun do by default."
        )


def _run(trainer: PumaTrainer, config: StageConfig, checkpoint: str | None) -> Path:
    _check_sharding(trainer, config)
    rows: Any = trainer.train_dataset
    devices = PartialState().num_processes
    batch_size = config.batch_size * devices
    finished = _is_finished(config, checkpoint)
    trainer.accelerator.wait_for_everyone()  # all have read the recipe before it is written anew
    if finished:
        logger.info("%s is of the last step: saving its weights", checkpoint)
        trainer.state = TrainerState.load_from_json(str(Path(str(checkpoint), TRAINER_STATE_NAME)))
        trainer._load_from_checkpoint(str(checkpoint))
    elif len(rows) >= batch_size:
        if trainer.is_world_process_zero():
            _keep_recipe(config, checkpoint)
        shape = (len(rows), devices, config.batch_size, config.gradient_accumulation_steps)
        logger.info("Training on %d rows; a step is %d device(s) x %d rows x %d batch(es)", *shape)
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
    with whole_weights(trainer.model):
        if trainer.is_world_process_zero():
            # A generated card would show rows of the dataset, with the paths that its images have here.
            trainer.model.save_pretrained(str(config.output), create_model_card=False)
            save_base_fingerprint(trainer.model, config.output)
            logger.info("Saved the adapter to %s", config.output)
    trainer.accelerator.wait_for_everyone()
    return Path(config.output)
