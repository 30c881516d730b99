"""The two training stages and the merge as functions of one configuration each, and the run that they share."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from pyarrow import compute  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn

from puma_hf.configs import (
    FIRST_LAYER,
    RECIPES,
    DistillConfig,
    Loss,
    MergeConfig,
    StageConfig,
    TrainConfig,
    parse_depths,
)
from puma_hf.data.items import load_items, load_mbeir
from puma_hf.data.mbeir import is_mbeir
from puma_hf.data.pairs import load_pairs
from puma_hf.files import ADAPTER_CONFIG, is_adapter_directory, write_whole
from puma_hf.losses import (
    CachedMultimodalMACLoss,
    ElasticDepthLoss,
    JointDistillationLoss,
    MultimodalMACLoss,
    SelfDistillationLoss,
)
from puma_hf.modeling.inputs_puma import SPECIAL_TOKEN, SPECIAL_TOKEN_REMEDY
from puma_hf.pruning import read_limits, set_limits
from puma_hf.settings import config_text, nearest, processing_of, shown
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
from puma_hf.trainer.trainer_puma import PumaTrainer, whole_weights

logger = logging.getLogger(__name__)

# Columns of the training rows that the model is not to see.
_ID_COLUMNS = ("qid", "did", "positives")
# Settings that the Trainer calls the same.
_SAME_NAMES = (
    *("num_train_epochs", "max_steps", "gradient_accumulation_steps", "learning_rate", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "bf16", "seed", "dataloader_num_workers", "logging_steps"),
)
_UNFINISHED = ".unfinished"  # where an adapter is written before it goes to its place
# What a killed run leaves besides checkpoints; "runs" is a reporter's.
_LEFTOVERS = {*RECIPES.values(), "teacher_cache", "runs", _UNFINISHED}
# YAML 1.1 reads 1e-4, without a point, as text, which the Trainer would fail at much later.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?e[-+]?\d+", re.IGNORECASE)


def distill(config: DistillConfig) -> Path:
    """Distil the full model into the pruned one on single items, without labels: our stage 1.

    Of a folder in M-BEIR's layout the items are the queries (with their instructions) and candidates of the split, each
    on its own. Any other corpus of texts and images will do as well.

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
    model = _load(config, items)
    loss = SelfDistillationLoss(model, config.metric, relational_temperature=config.relational_temperature)
    trainer = PumaDistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=items,
        loss=at_depths(model, loss, config),
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
    arguments, checkpoint = _prepare(config)
    rows = _labelled_rows(config)
    model = _load(config, rows)
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
    """MAC-Loss, its split form or InfoNCE, plain or cached, alone or with distillation, of any width and depth."""
    # InfoNCE is MAC-Loss at equal temperatures, so that a comparison of the two is one of temperatures alone: copies of
    # positives, `false_negative_margin` and the logs are the same.
    meaning: dict[Loss, dict[str, Any]] = {
        "mac": {},
        "mac-split": {"objective": "split"},
        "infonce": {"hard_temperature": config.temperature, "schedule": "constant"},
    }
    names = ["temperature", "hard_temperature", "schedule", "schedule_end", "grouping", "split_weight"]
    names += ["false_negative_margin", *(["mini_batch_size", "mini_batch_num_tokens"] if config.cached else [])]
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    gathers = config.gather_across_devices and num_devices > 1
    kind = CachedMultimodalMACLoss if config.cached else MultimodalMACLoss
    loss: Any = kind(model, gather_across_devices=gathers, **given | meaning[config.loss])
    if config.joint:
        names = ["contrastive_weight", "distillation_weight", "contrastive_weight_start", "distillation_weight_start"]
        options = config.given(*names, "relational_temperature")
        loss = JointDistillationLoss(model, loss, config.metric, **options)
    loss = MatryoshkaLoss(model, loss, config.matryoshka_dims) if config.matryoshka_dims else loss
    return at_depths(model, loss, config)


def at_depths(model: SentenceTransformer, loss: nn.Module, config: StageConfig) -> nn.Module:
    """The loss at the depths that the settings name, or as it is if they name none."""
    if config.depths is None:
        return loss
    return ElasticDepthLoss(model, loss, parse_depths(config.depths), config.depth_weights)


def training_arguments(config: StageConfig) -> SentenceTransformerTrainingArguments:
    """The arguments of the Trainer that the settings of a stage mean; a ValueError if it does not take them."""
    known = {entry.name for entry in fields(SentenceTransformerTrainingArguments)}
    for name in config.training_arguments.keys() - known:
        raise ValueError(f"training_arguments has {name!r}, which the Trainer does not know.{nearest(name, known)}")
    more = {
        name: float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
        for name, value in config.training_arguments.items()
    }
    arguments: dict[str, Any] = {
        **config.given(*_SAME_NAMES),
        "output_dir": str(config.output),
        "per_device_train_batch_size": config.batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup,  # below 1, a share of all steps
        "use_cpu": config.bf16 and not torch.accelerator.is_available(),  # the Trainer asks that this be said
        "dataloader_drop_last": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Every weight of the adapter takes part in every step, unless a depth is drawn: nothing to look for.
        "ddp_find_unused_parameters": config.depths is not None and config.depth_weights == "sampled",
        f"{PREFIX}_checkpointing": config.gradient_checkpointing,
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "save_total_limit": 2,
        "report_to": list(config.report_to) or "none",
    }
    if config.first_layer_learning_rate is not None:
        arguments["learning_rate_mapping"] = {FIRST_LAYER: config.first_layer_learning_rate}
    return SentenceTransformerTrainingArguments(**{**arguments, **more})


def _teacher_arguments(config: StageConfig) -> dict[str, Any]:
    return config.given("teacher", "teacher_mode", "teacher_cache")


# --- the rows


def _labelled_rows(config: TrainConfig) -> Dataset:
    pairs = config.pair_arguments()
    if is_mbeir(Path(config.data)):
        if pairs:
            raise ValueError(f"{', '.join(pairs)} is for pairs of one's own, not for M-BEIR's {config.data}.")
        given = config.given("split", "num_negatives", "seed")
        rows = load_mbeir(config.data, missing_negatives="drop", with_ids=True, **given)
    else:
        if config.split != "train":
            raise ValueError(f"split={config.split!r} is a part of M-BEIR, which {config.data} is not. Leave it out.")
        if not config.num_negatives:
            pairs["negatives"] = ()
        pairs["special_tokens"] = config.special_tokens
        rows = load_pairs(config.data, on_error=config.bad_pairs, with_ids=True, **pairs)
        names = [name for name in rows.column_names if name.startswith("negative_")]
        if config.num_negatives > len(names):
            raise ValueError(f"num_negatives={config.num_negatives}, but {config.data} has {len(names)} a pair.")
        rows = rows.remove_columns(names[config.num_negatives :])
    if config.train_fraction == 1:
        return rows
    count = max(1, round(config.train_fraction * len(rows)))
    return rows.select(sorted(random.Random(config.seed).sample(range(len(rows)), count)))


def _check_special_tokens(rows: Dataset, config: StageConfig) -> None:
    """Name the first row that training would stop at, before it begins."""
    flat = rows.flatten().with_format("arrow")
    texts = [name for name in flat.column_names if name.endswith((".text", ".instruction"))]
    for name in texts if config.special_tokens != "split" else ():
        column = flat.select_columns(name)[:][name]
        row = compute.index(compute.match_substring_regex(column, SPECIAL_TOKEN.pattern), True).as_py()
        if row >= 0:
            place = f"row {row}" + (f", query {rows[row]['qid']!r}" if "qid" in rows.column_names else "")
            raise ValueError(
                f"{config.data} holds a special token, which the model would not read as text, in {place}: {name} is "
                f"{shown(column[row].as_py())}. {SPECIAL_TOKEN_REMEDY}"
            )


# --- a run, from its beginning to its end


def _prepare(config: StageConfig) -> tuple[SentenceTransformerTrainingArguments, str | None]:
    """Arguments of the Trainer, and the checkpoint to go on from: all that is quickly checked; nothing is touched."""
    arguments = training_arguments(config)
    model, output = Path(config.model), Path(config.output)
    if is_adapter_directory(model):
        raise ValueError(f"{str(model)!r} is an adapter. Merge it first (puma-hf merge), and train the result.")
    if model.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"output {str(output)!r} is, or holds, the model itself. Choose another directory.")
    sharded = arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and (not isinstance(config, TrainConfig) or config.joint or config.cached or config.depths):
        several = "A teacher, and gradient caching, call parts of the model, which FSDP shards, and so do depths"
        raise ValueError(f"{several}. Launch DDP.")
    checkpoint = last_whole_checkpoint(output) if config.resume else None
    at_stake = {path.name for path in output.iterdir()} - {*RECIPES.values()} if output.is_dir() else set()
    if config.resume:
        # A run that was killed before its first checkpoint was whole begins again: all that it left may go.
        at_stake = {name for name in at_stake - _LEFTOVERS if not CHECKPOINT_NAME.fullmatch(name)}
    # Other processes may come here after the first has begun to write.
    if at_stake and checkpoint is None and not config.overwrite and PartialState().is_main_process:
        remedy = "Take overwrite (--overwrite), or resume (--resume) from a whole checkpoint in it"
        raise FileExistsError(f"output {str(output)!r} is not empty. {remedy}.")
    return arguments, checkpoint


def _load(config: StageConfig, rows: Dataset) -> SentenceTransformer:
    """The model with a fresh adapter, which reads as the settings say; the rows are checked before."""
    _check_special_tokens(rows, config)
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


def _run(trainer: PumaTrainer, config: StageConfig, checkpoint: str | None) -> Path:
    """Train, or go on from a checkpoint, and save the adapter and its recipe, whole or not at all."""
    output, rows = Path(config.output), len(trainer.train_dataset)  # type: ignore[arg-type]
    devices = int(PartialState().num_processes)
    # The trainer itself only logs this, and an untrained adapter looks like a trained one.
    no_batch = f"The {rows} rows fill no batch of {config.batch_size} on {devices} device(s), so nothing was trained."
    no_batch += " Choose a smaller batch_size (--batch-size)."
    if rows < devices * config.batch_size:
        raise ValueError(no_batch)
    trainer.check_negatives()  # before checkpoints of an earlier run are removed
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        recipe, text = output / RECIPES[type(config)], config_text(config)
        if checkpoint is None:
            # Checkpoints of an earlier run must not be taken for this one's.
            for stale in output.glob("checkpoint-*"):
                if CHECKPOINT_NAME.fullmatch(stale.name) and stale.is_dir():
                    shutil.rmtree(stale)
        elif recipe.is_file() and (changed := {*recipe.read_text("utf-8").splitlines()} ^ {*text.splitlines()}):
            logger.warning("Continuing with other settings than the run began with: %s", "; ".join(sorted(changed)))
        if config.resume and checkpoint is None:
            logger.warning("No whole checkpoint in %s: starting from the beginning.", output)
        write_whole(recipe, config_text(config).encode())
    shape = (rows, devices, config.batch_size, config.gradient_accumulation_steps)
    logger.info("Training on %d rows; a step is %d device(s) x %d rows x %d batch(es)", *shape)
    trainer.train(resume_from_checkpoint=checkpoint)
    done, planned = trainer.state.global_step, trainer.state.max_steps
    if done == 0:  # too many rows share a right answer
        raise ValueError(no_batch)
    if done < planned:
        too_early = "Training ended after %d of %d steps: too many rows share a right answer to fill every batch."
        logger.warning(f"{too_early} Choose a smaller batch_size (--batch-size).", done, planned)
    with whole_weights(trainer.model):
        if trainer.is_world_process_zero():
            _save_adapter(trainer.model, output)
            logger.info("Saved the adapter to %s", output)
    trainer.accelerator.wait_for_everyone()
    return output


def _save_adapter(model: SentenceTransformer, output: Path) -> None:
    """Write an adapter aside and move it into place: one that stands there stays until the new one is written."""
    folder = output / _UNFINISHED
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        # A generated card would show rows of the dataset, with the paths that its images have here.
        model.save_pretrained(str(folder), create_model_card=False)
        save_base_fingerprint(model, folder)
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
