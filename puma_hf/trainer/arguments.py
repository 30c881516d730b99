"""The arguments of the Trainer that the settings of a stage mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_xla_available

from puma_hf.configs import FIRST_LAYER, StageConfig
from puma_hf.settings import convert, nearest

# Values of training_arguments of these types are checked here; the Trainer would fail on them much later.
_SIMPLE = {bool, int, float, type(None)}


def training_arguments(config: StageConfig) -> SentenceTransformerTrainingArguments:
    """The arguments of the Trainer for a stage, checked before anything is loaded.

    Args:
        config: The settings of the stage.

    Raises:
        ValueError: If `training_arguments` has a name or value that the Trainer does not take, a reporter is not
            installed, or the GPU does not compute in bfloat16.

    Example:

    ```python
    >>> from puma_hf.trainer.arguments import training_arguments
    >>> from puma_hf.configs import TrainConfig

    >>> training_arguments(TrainConfig(model="puma-k4", output="lora", data="demo/emoji")).lr_scheduler_type.value
    'cosine'
    ```
    """
    known = {entry.name for entry in fields(SentenceTransformerTrainingArguments) if entry.init}
    more = _checked(config, known)
    _check_reporters(config.report_to)
    slow_bf16 = config.bf16 and not (is_torch_bf16_gpu_available() or is_torch_xla_available())
    if slow_bf16 and torch.accelerator.is_available() and not more.get("use_cpu"):
        raise ValueError(
            "bf16=True needs an accelerator that computes in bfloat16, and the one here does not. Set bf16=False "
            "(--no-bf16), or use another; without any, the CPU does."
        )
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
        "warmup_steps": config.warmup,
        "bf16": config.bf16,
        **({"use_cpu": True} if slow_bf16 else {}),  # where there is no GPU; the Trainer asks that this be said
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
    if config.first_layer_learning_rate is not None:
        arguments["learning_rate_mapping"] = {FIRST_LAYER: config.first_layer_learning_rate}
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it, and warns of the old name.
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        arguments[name] = True
    try:
        return SentenceTransformerTrainingArguments(**{**arguments, **more})
    except Exception as error:  # of many kinds; what is not given by the user has been checked
        if not more:
            raise
        raise ValueError(
            f"training_arguments={more} were refused by SentenceTransformerTrainingArguments: {error} Change or "
            "remove the value."
        ) from error


def _checked(config: StageConfig, known: Iterable[str]) -> dict[str, Any]:
    hints = get_type_hints(SentenceTransformerTrainingArguments)
    values: dict[str, Any] = {}
    for name, value in config.training_arguments.items():
        if name not in known:
            raise ValueError(
                f"training_arguments has {name!r}, which is no argument of SentenceTransformerTrainingArguments."
                f"{nearest(name, known)}"
            )
        kinds = get_args(hints[name]) if get_origin(hints[name]) in (Union, UnionType) else (hints[name],)
        if not set(kinds) <= _SIMPLE:
            values[name] = value
            continue
        try:
            values[name] = convert(name, value, hints[name])
        except ValueError as error:
            raise ValueError(f"training_arguments: {error} Correct it, or leave it out.") from None
    return values


def _check_reporters(names: Iterable[str]) -> None:
    for name in names:
        if name in ("all", "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to={name!r} must be one of {', '.join(INTEGRATION_TO_CALLBACK)}."
                f"{nearest(name, INTEGRATION_TO_CALLBACK)}"
            )
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to={name!r} needs the package of that name. Install it, or leave report_to out.")
