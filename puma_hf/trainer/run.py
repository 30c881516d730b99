"""One run of a stage: what may be in its output folder, how it begins, goes on and ends."""

from __future__ import annotations

import logging
import os
import shutil
from difflib import unified_diff
from pathlib import Path
from typing import Any

from accelerate import PartialState
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from puma_hf.configs import RECIPES, DistillConfig, StageConfig, TrainConfig
from puma_hf.settings import config_text, save_config
from puma_hf.trainer.checkpoints import (
    CHECKPOINT_NAME,
    UNFINISHED,
    explain_full_disk,
    last_whole_checkpoint,
    written_whole,
)
from puma_hf.trainer.lora import save_base_fingerprint
from puma_hf.trainer.puma import PumaTrainer
from puma_hf.trainer.sharding import whole_weights

logger = logging.getLogger(__name__)

# What an interrupted run leaves besides checkpoints; "runs" is a reporter's.
_LEFTOVERS = {*RECIPES.values(), "teacher_cache", "runs", UNFINISHED}


def prepare_output(config: StageConfig) -> str | None:
    """The checkpoint to continue from, if any; nothing is written or removed yet.

    Args:
        config: The settings of the stage.

    Raises:
        ValueError: If the output is the model.
        NotADirectoryError: If it is a file.
        FileExistsError: If it is not empty, and the run is neither to go on nor to start again.
        FileNotFoundError: If the run is to go on, but holds other files and no whole checkpoint.
    """
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
    return None


def begin(config: StageConfig, checkpoint: str | None, num_rows: int) -> None:
    """See that there is enough to train on, and remove what must not be taken for a part of this run.

    Args:
        config: The settings of the stage.
        checkpoint: What `prepare_output` has returned.
        num_rows: Rows of the training data.

    Raises:
        ValueError: If the rows do not fill one batch.
    """
    if num_rows < _rows_per_batch(config) and not _is_finished(config, checkpoint):
        raise _no_batch(config, num_rows)
    if checkpoint is not None or not PartialState().is_main_process:
        return
    folder = Path(config.output)
    for stale in folder.glob("checkpoint-*"):
        if CHECKPOINT_NAME.fullmatch(stale.name) and stale.is_dir():
            shutil.rmtree(stale)


def check_sharding(config: StageConfig, arguments: SentenceTransformerTrainingArguments) -> None:
    """Raise a ValueError if FSDP is to hold in pieces what the stage calls on its own.

    Args:
        config: The settings of the stage.
        arguments: Those of its trainer.
    """
    if not arguments.fsdp and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    cached = isinstance(config, TrainConfig) and config.cached
    if cached or isinstance(config, DistillConfig) or getattr(config, "joint", False):
        what = "gradient caching (mini_batch_size, mini_batch_num_tokens)" if cached else "a teacher"
        raise ValueError(
            f"{what} calls parts of the model on their own, which FSDP holds in pieces. Launch without FSDP: plain "
            "DDP, as accelerate launch and torchrun do by default."
        )


def run(trainer: PumaTrainer, config: StageConfig, checkpoint: str | None) -> Path:
    """Train, or go on from a checkpoint, and save the adapter and its recipe, whole or not at all.

    Args:
        trainer: The trainer of the stage.
        config: Its settings.
        checkpoint: What `prepare_output` has returned.

    Returns:
        `config.output`.

    Raises:
        ValueError: If no batch could be filled, or the weights are not finite.
        OSError: If the disk is full.
    """
    rows: Any = trainer.train_dataset
    finished = _is_finished(config, checkpoint)
    trainer.accelerator.wait_for_everyone()  # all have read the recipe before it is written anew
    if finished:
        logger.info("%s is of the last step: saving its weights", checkpoint)
        trainer.state = TrainerState.load_from_json(str(Path(str(checkpoint), TRAINER_STATE_NAME)))
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        if trainer.is_world_process_zero():
            with explain_full_disk(config.output, config.output):
                _keep_recipe(config, checkpoint)
        devices = PartialState().num_processes
        shape = (len(rows), devices, config.batch_size, config.gradient_accumulation_steps)
        logger.info("Training on %d rows; a step is %d device(s) x %d rows x %d batch(es)", *shape)
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step == 0:
        # The trainer itself only logs this, and an untrained adapter looks like a trained one.
        raise _no_batch(config, len(rows))
    if trainer.state.global_step < trainer.state.max_steps:
        logger.warning(
            "Training ended after %d of %d steps: too many rows share a right answer to fill every batch. Choose a "
            "smaller batch_size (--batch-size).",
            trainer.state.global_step,
            trainer.state.max_steps,
        )
    trainer.check_weights()
    _save_adapter(trainer, Path(config.output))
    return Path(config.output)


def _save_adapter(trainer: PumaTrainer, output: Path) -> None:
    with whole_weights(trainer.model):
        if trainer.is_world_process_zero():
            with explain_full_disk(output, output), written_whole(output) as folder:
                # A generated card would show rows of the dataset, with the paths that its images have here.
                trainer.model.save_pretrained(str(folder), create_model_card=False)
                save_base_fingerprint(trainer.model, folder)
            logger.info("Saved the adapter to %s", output)
    trainer.accelerator.wait_for_everyone()


def _rows_per_batch(config: StageConfig) -> int:
    """Over all devices."""
    return config.batch_size * int(PartialState().num_processes)


def _no_batch(config: StageConfig, num_rows: int) -> ValueError:
    return ValueError(
        f"The {num_rows} rows fill no batch of {_rows_per_batch(config)}, so nothing was trained. Choose a smaller "
        "batch_size (--batch-size)."
    )


def _keep_recipe(config: StageConfig, checkpoint: str | None) -> None:
    file = Path(config.output, RECIPES[type(config)])
    file.parent.mkdir(parents=True, exist_ok=True)
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
