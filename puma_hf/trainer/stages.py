"""The two training stages and the merge as functions of one configuration each, and the run that they share."""

from __future__ import annotations

import logging
import os
import random
import shutil
from difflib import unified_diff
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from accelerate import PartialState
from datasets import Dataset
from pyarrow import compute  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from puma_hf.configs import FIRST_LAYER, RECIPES, DistillConfig, MergeConfig, StageConfig, TrainConfig
from puma_hf.data.items import load_items, load_mbeir
from puma_hf.data.mbeir import is_mbeir
from puma_hf.data.pairs import load_pairs
from puma_hf.files import ADAPTER_CONFIG, is_puma_directory
from puma_hf.losses import CachedMultimodalMACLoss, JointDistillationLoss, MultimodalMACLoss, SelfDistillationLoss
from puma_hf.modeling.inputs_puma import SPECIAL_TOKEN, SPECIAL_TOKEN_REMEDY
from puma_hf.pruning import read_limits, set_limits
from puma_hf.settings import config_text, convert, nearest, processing_of, save_config, shown
from puma_hf.trainer.checkpoints_puma import CHECKPOINT_NAME, last_whole_checkpoint
from puma_hf.trainer.distillation import PumaDistillationTrainer
from puma_hf.trainer.lora_puma import (
    PREFIX,
    add_lora,
    lora_config,
    puma_model,
    quantization_config,
    save_base_fingerprint,
)
from puma_hf.trainer.merge import merge_adapter
from puma_hf.trainer.trainer_puma import PumaTrainer, check_weights, whole_weights

logger = logging.getLogger(__name__)

# Columns of the training rows that the model is not to see.
_ID_COLUMNS = ("qid", "did", "positives")
_ROWS_AT_ONCE = 10_000
_UNFINISHED = ".unfinished"  # where an adapter is written before it goes to its place
# What an interrupted run leaves besides checkpoints; "runs" is a reporter's.
_LEFTOVERS = {*RECIPES.values(), "teacher_cache", "runs", _UNFINISHED}


def distill(config: DistillConfig) -> Path:
    """Distil the full model into the pruned one on single items, without labels: our stage 1.

    Of a folder in M-BEIR's layout the items are the queries (with their instructions) and candidates of the train
    split, each on its own: which query belongs to which candidate is never looked at. Any other corpus of texts and
    images will do as well.

    Returns:
        `config.output`, which holds the adapter and `distill.yaml`, the settings it was made with.

    Raises:
        FileExistsError: If the output is not empty and neither `resume` nor `overwrite` is set.
        ValueError: If the teacher does not fit, the output is the model, or the rows fill no batch.

    Example:
        >>> from puma_hf.configs import DistillConfig
        >>> config = DistillConfig(model="puma-k4", output="puma-k4-lora", data="demo/emoji", teacher="demo/backbone")
        >>> distill(config)  # doctest: +SKIP
    """
    arguments, checkpoint = _prepare(config)
    items = load_items(config.data, split=config.split, seed=config.seed)
    model = _begin(config, checkpoint, items)
    trainer = PumaDistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=items,
        loss=SelfDistillationLoss(model, config.metric),
        **_teacher_arguments(config),
    )
    return _run(trainer, config, checkpoint)


def train(config: TrainConfig) -> Path:
    """Train on labelled pairs: stage 2 with MAC-Loss, or with InfoNCE to compare; with a teacher, the released stage 1.

    No two rows of a batch share a right answer. Of pairs of one's own (`load_pairs`) these are known by their content.

    Returns:
        `config.output`, which holds the adapter and `train.yaml`, the settings it was made with.

    Raises:
        FileExistsError: If the output is not empty and neither `resume` nor `overwrite` is set.
        ValueError: If the output is the model, or the rows fill no batch.

    Example:
        >>> from puma_hf.configs import TrainConfig
        >>> train(TrainConfig(model="puma-k4-distilled", output="puma-k4-mac", data="demo/emoji"))  # doctest: +SKIP
    """
    for note in config.notes():
        logger.warning(note)
    arguments, checkpoint = _prepare(config)
    rows = _labelled_rows(config)
    model = _begin(config, checkpoint, rows)
    trainer = (PumaDistillationTrainer if config.joint else PumaTrainer)(
        model=model,
        args=arguments,
        train_dataset=rows.select_columns([name for name in rows.column_names if name not in _ID_COLUMNS]),
        positives=rows["positives"] if "positives" in rows.column_names else None,
        loss=training_loss(model, config, num_devices=PartialState().num_processes),
        **(_teacher_arguments(config) if config.joint else {}),
    )
    return _run(trainer, config, checkpoint)


def merge(config: MergeConfig) -> float:
    """Merge a trained adapter into its base, checked: `merge_adapter`, with its settings in one object."""
    return merge_adapter(config.adapter, config.output, base=config.base, overwrite=config.overwrite)


# --- the loss and the arguments of the Trainer


def training_loss(model: SentenceTransformer, config: TrainConfig, *, num_devices: int = 1) -> nn.Module:
    """MAC-Loss, its split form or InfoNCE, plain or cached, alone or with distillation, nested in Matryoshka or not.

    InfoNCE is MAC-Loss at equal temperatures, so that a comparison of the two is one of temperatures alone: copies of
    positives, `false_negative_margin` and the logs are the same. On one device nothing is gathered.
    """
    infonce = config.loss == "infonce"
    cache: dict[str, Any] = {"mini_batch_num_tokens": config.mini_batch_num_tokens} if config.cached else {}
    if config.mini_batch_size is not None:
        cache["mini_batch_size"] = config.mini_batch_size
    loss: Any = (CachedMultimodalMACLoss if config.cached else MultimodalMACLoss)(
        model,
        temperature=config.temperature,
        hard_temperature=config.temperature if infonce else config.hard_temperature,
        schedule="constant" if infonce else config.schedule,
        schedule_end=config.schedule_end,
        grouping=config.grouping,
        gather_across_devices=config.gather_across_devices and num_devices > 1,
        objective="split" if config.loss == "mac-split" else "mac",
        split_weight=config.split_weight,
        false_negative_margin=config.false_negative_margin,
        **cache,
    )
    if config.joint:
        names = ("contrastive_weight", "distillation_weight", "contrastive_weight_start", "distillation_weight_start")
        loss = JointDistillationLoss(model, loss, config.metric, **{name: getattr(config, name) for name in names})
    if not config.matryoshka_dims:
        return loss  # type: ignore[no-any-return]
    dim = int(model.get_embedding_dimension() or 0)
    if dim < max(config.matryoshka_dims):
        raise ValueError(
            f"matryoshka_dims={list(config.matryoshka_dims)} must not exceed the embedding's {dim} dimensions."
        )
    return MatryoshkaLoss(model, loss, sorted(config.matryoshka_dims, reverse=True))


def training_arguments(config: StageConfig) -> SentenceTransformerTrainingArguments:
    """The arguments of the Trainer that the settings of a stage mean, checked before anything is loaded.

    Raises:
        ValueError: If `training_arguments` has a name or value that the Trainer does not take, or the GPU does not
            compute in bfloat16.
    """
    hints = get_type_hints(SentenceTransformerTrainingArguments)
    more = {name: _argument(name, value, hints) for name, value in config.training_arguments.items()}
    slow_bf16 = config.bf16 and not is_torch_bf16_gpu_available()
    if slow_bf16 and torch.accelerator.is_available() and not more.get("use_cpu"):
        raise ValueError("bf16=True needs an accelerator that computes in it: set bf16=False (--no-bf16), or use_cpu.")
    arguments: dict[str, Any] = {
        "output_dir": str(config.output),
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup,  # below 1, a share of all steps
        "bf16": config.bf16,
        **({"use_cpu": True} if slow_bf16 else {}),  # where there is no GPU; the Trainer asks that this be said
        "seed": config.seed,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": config.dataloader_num_workers,
        # Every weight of the adapter takes part in every step: nothing to look for.
        "ddp_find_unused_parameters": False,
        f"{PREFIX}_checkpointing": config.gradient_checkpointing,
        "logging_steps": config.logging_steps,
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "save_total_limit": 2,
        "report_to": list(config.report_to) or "none",
    }
    if config.first_layer_learning_rate is not None:
        arguments["learning_rate_mapping"] = {FIRST_LAYER: config.first_layer_learning_rate}
    return SentenceTransformerTrainingArguments(**{**arguments, **more})


def _argument(name: str, value: Any, hints: dict[str, Any]) -> Any:
    """A value of `training_arguments` as the Trainer's own type: YAML reads 1e-4 as text, which fails much later."""
    if name not in hints:
        raise ValueError(f"training_arguments has {name!r}, which the Trainer does not know.{nearest(name, hints)}")
    kinds = get_args(hints[name]) if get_origin(hints[name]) in (Union, UnionType) else (hints[name],)
    try:
        return convert(name, value, hints[name]) if {*kinds} <= {bool, int, float, type(None)} else value
    except ValueError as error:
        raise ValueError(f"training_arguments: {error} Correct it, or leave it out.") from None


def _teacher_arguments(config: DistillConfig | TrainConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("teacher", "teacher_mode", "teacher_cache")}


# --- the rows


def _labelled_rows(config: TrainConfig) -> Dataset:
    if is_mbeir(Path(config.data)):
        if given := [*config.pair_arguments(), *(["bad_pairs"] if config.bad_pairs != "raise" else [])]:
            raise ValueError(
                f"{', '.join(given)}: for pairs of one's own, but {config.data} is M-BEIR's. Leave them out."
            )
        rows = load_mbeir(
            config.data,
            config.split,
            num_negatives=config.num_negatives,
            missing_negatives="drop",
            seed=config.seed,
            with_ids=True,
        )
    else:
        rows = _pairs(config)
    if config.train_fraction == 1:
        return rows
    count = max(1, round(config.train_fraction * len(rows)))
    return rows.select(sorted(random.Random(config.seed).sample(range(len(rows)), count)))


def _pairs(config: TrainConfig) -> Dataset:
    if config.split != "train":
        raise ValueError(f"split={config.split!r} is a part of M-BEIR, which {config.data} is not. Leave it out.")
    arguments = config.pair_arguments()
    if not config.num_negatives:
        arguments["negatives"] = ()
    arguments["special_tokens"] = config.special_tokens
    rows = load_pairs(config.data, on_error=config.bad_pairs, with_ids=True, **arguments)
    names = [name for name in rows.column_names if name.startswith("negative_")]
    if config.num_negatives > len(names):
        raise ValueError(
            f"num_negatives={config.num_negatives} must be 0 to {len(names)}: {config.data} has {len(names)} a pair."
        )
    return rows.remove_columns(names[config.num_negatives :])


def _check_special_tokens(rows: Dataset, config: StageConfig) -> None:
    """Name the first row that training would stop at, before it begins."""
    for number, batch in enumerate(rows.flatten().with_format("arrow").iter(_ROWS_AT_ONCE)):
        for name in batch.column_names if config.special_tokens != "split" else ():
            if not name.endswith((".text", ".instruction")):
                continue
            found = compute.match_substring_regex(batch[name], SPECIAL_TOKEN.pattern).fill_null(False)
            for place in compute.indices_nonzero(found).to_pylist()[:1]:
                row = number * _ROWS_AT_ONCE + place
                qid = f", query {rows[row]['qid']!r}" if "qid" in rows.column_names else ""
                raise ValueError(
                    f"{config.data} holds a special token, which the model would not read as text, in row {row}{qid}: "
                    f"{name} is {shown(batch[name][place].as_py())}. {SPECIAL_TOKEN_REMEDY}"
                )


# --- the beginning of a run


def _prepare(config: StageConfig) -> tuple[SentenceTransformerTrainingArguments, str | None]:
    """Arguments of the Trainer, and the checkpoint to go on from: all is checked, nothing touched yet."""
    arguments = training_arguments(config)
    folder = Path(config.model)
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{str(folder)!r} is an adapter. Merge it first (puma-hf merge), and train the result.")
    if not is_puma_directory(folder):
        raise ValueError(f"{str(folder)!r} is no PUMA directory. Make one with puma-hf prune.")
    # Each of these would else be found out after minutes of loading, or after an output was cleared.
    if config.load_in_4bit:
        quantization_config()  # raises where it cannot work
    _check_sharding(config, arguments)
    return arguments, _checkpoint(config)


def _check_sharding(config: StageConfig, arguments: SentenceTransformerTrainingArguments) -> None:
    """Raise a ValueError if FSDP is to hold in pieces what the stage calls on its own."""
    if not arguments.fsdp and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    cached = isinstance(config, TrainConfig) and config.cached
    if cached or isinstance(config, DistillConfig) or getattr(config, "joint", False):
        what = "gradient caching (mini_batch_size, mini_batch_num_tokens)" if cached else "a teacher"
        raise ValueError(
            f"{what} calls parts of the model, which FSDP holds in pieces. Launch without FSDP: plain DDP."
        )


def _checkpoint(config: StageConfig) -> str | None:
    """The checkpoint to continue from, if any, once the output is seen to be free, or a run of ours to go on with."""
    folder = Path(config.output)
    if Path(config.model).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"output {str(folder)!r} is, or holds, the model itself. Choose another directory.")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output {str(folder)!r} is a file. Choose a directory.")
    if config.resume and (checkpoint := last_whole_checkpoint(folder)) is not None:
        return checkpoint
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if config.resume:
        # A run that was killed before its first checkpoint was whole: there is nothing to lose.
        if {name for name in found - _LEFTOVERS if not CHECKPOINT_NAME.fullmatch(name)}:
            raise FileNotFoundError(
                f"output {str(folder)!r} holds no whole checkpoint to continue from: take overwrite (--overwrite)."
            )
        logger.warning("No whole checkpoint in %s: starting from the beginning.", folder)
    # Other processes may come here after the first has begun to write.
    elif found - {*RECIPES.values()} and not config.overwrite and PartialState().is_main_process:
        raise FileExistsError(
            f"output {str(folder)!r} is not empty. Take resume (--resume) or overwrite (--overwrite)."
        )
    return None


def _begin(config: StageConfig, checkpoint: str | None, rows: Dataset) -> SentenceTransformer:
    """Check the rows, remove checkpoints that must not be taken for this run's, and load the model with an adapter."""
    _check_special_tokens(rows, config)
    if len(rows) < _rows_per_batch(config) and not _is_finished(config, checkpoint):
        raise _no_batch(config, len(rows))
    if checkpoint is None and PartialState().is_main_process:
        for stale in Path(config.output).glob("checkpoint-*"):
            if CHECKPOINT_NAME.fullmatch(stale.name) and stale.is_dir():
                shutil.rmtree(stale)
    # An adapter is initialised at random: seeded, so that a run can be repeated.
    torch.manual_seed(config.seed)
    loading = {"quantization_config": quantization_config()} if config.load_in_4bit else {}
    model = SentenceTransformer(str(config.model), trust_remote_code=True, model_kwargs=loading)
    first: Any = model[0]
    # In the processor, so that whatever is saved of this run is read so by every loader.
    given = {"max_pixels": config.max_pixels, "max_length": config.max_length}
    set_limits(first.processor, **read_limits(Path(config.model)) | {k: v for k, v in given.items() if v is not None})
    for kind in ("image", "text"):
        for name in ("size", "min_pixels", "max_pixels", "max_length"):
            first.processing_kwargs.get(kind, {}).pop(name, None)
    for kind, options in processing_of(config.special_tokens).items():
        first.processing_kwargs.setdefault(kind, {}).update(options)
    pixels, length = first.processor.image_processor.size["longest_edge"], first.processor.tokenizer.model_max_length
    logger.info("Images are read at up to %d pixels, sequences at up to %d tokens", pixels, length)
    ret_token_id = puma_model(model).config.ret_token_id if config.train_ret_token else None
    lora = lora_config(r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout, ret_token_id=ret_token_id)
    add_lora(model, lora)
    return model


def _rows_per_batch(config: StageConfig) -> int:
    """Over all devices."""
    return config.batch_size * int(PartialState().num_processes)


def _no_batch(config: StageConfig, num_rows: int) -> ValueError:
    return ValueError(
        f"The {num_rows} rows fill no batch of {_rows_per_batch(config)}, so nothing was trained. Choose a smaller "
        "batch_size (--batch-size)."
    )


# --- the run and its end


def _run(trainer: PumaTrainer, config: StageConfig, checkpoint: str | None) -> Path:
    """Train, or go on from a checkpoint, and save the adapter and its recipe, whole or not at all."""
    rows: Any = trainer.train_dataset
    finished = _is_finished(config, checkpoint)
    trainer.accelerator.wait_for_everyone()  # all have read the recipe before it is written anew
    if finished:
        logger.info("%s is of the last step: saving its weights", checkpoint)
        trainer.state = TrainerState.load_from_json(str(Path(str(checkpoint), TRAINER_STATE_NAME)))
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        if trainer.is_world_process_zero():
            Path(config.output).mkdir(parents=True, exist_ok=True)
            if checkpoint is not None and (changed := _changed(config)):
                logger.warning("Continuing with other settings than the run began with: %s", "; ".join(changed))
            save_config(config, _recipe(config))
        shape = (len(rows), PartialState().num_processes, config.batch_size, config.gradient_accumulation_steps)
        logger.info("Training on %d rows; a step is %d device(s) x %d rows x %d batch(es)", *shape)
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step == 0:
        # The trainer itself only logs this, and an untrained adapter looks like a trained one.
        raise _no_batch(config, len(rows))
    if trainer.state.global_step < trainer.state.max_steps:
        logger.warning(
            "Training ended after %d of %d steps: too many rows share a right answer to fill every batch. Choose a "
            "smaller batch_size (--batch-size).",
            *(trainer.state.global_step, trainer.state.max_steps),
        )
    check_weights(trainer.model, trainer.args, trainer.state)
    _save_adapter(trainer, Path(config.output))
    return Path(config.output)


def _save_adapter(trainer: PumaTrainer, output: Path) -> None:
    """Write an adapter aside and move it into place: one that stands there stays until the new one is written."""
    with whole_weights(trainer.model):
        if trainer.is_world_process_zero():
            folder = output / _UNFINISHED
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            try:
                # A generated card would show rows of the dataset, with the paths that its images have here.
                trainer.model.save_pretrained(str(folder), create_model_card=False)
                save_base_fingerprint(trainer.model, folder)
                files = [path for path in folder.rglob("*") if path.is_file()]
                # What makes a folder an adapter goes first, and comes last: no mixture is ever taken for whole.
                files.sort(key=lambda path: path.name == ADAPTER_CONFIG)
                (output / ADAPTER_CONFIG).unlink(missing_ok=True)
                for path in files:
                    place = output / path.relative_to(folder)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, place)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            logger.info("Saved the adapter to %s", output)
    trainer.accelerator.wait_for_everyone()


def _recipe(config: StageConfig) -> Path:
    return Path(config.output, RECIPES[type(config)])


def _changed(config: StageConfig) -> list[str]:
    """What differs from the recipe in the output, if there is one."""
    file = _recipe(config)
    before = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    # Sorted, as an older version wrote the same settings in another order.
    lines = unified_diff(sorted(before), sorted(config_text(config).splitlines()), n=0, lineterm="")
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
