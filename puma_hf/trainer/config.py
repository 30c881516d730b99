"""The settings of the two stages and of the merge: one truth for YAML files, the command's flags, and Python.

Nothing heavy is imported here, so that `puma-hf --help` stays quick.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from puma_hf.data.pairs_config import PairSettings
from puma_hf.files import DISTILL_RECIPE, TRAIN_RECIPE
from puma_hf.losses.schedule_puma import (
    HARD_TEMPERATURE,
    SCHEDULE,
    SCHEDULE_END,
    SPLIT_WEIGHT,
    TEMPERATURE,
    DistillationMetric,
    ModalityGrouping,
    Schedule,
)
from puma_hf.settings import CheckedConfig, SpecialTokens, option, required, special_tokens_option

TeacherMode = Literal["frozen", "cached"]
Loss = Literal["mac", "mac-split", "infonce"]

# The adapter of the first decoder layer among the names of a loss's parameters.
FIRST_LAYER = r"language_model\.layers\.0\..*lora_"

# What a field of ours already says; `training_arguments` may not say it again.
SET_BY_FIELDS = {
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "num_train_epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "learning_rate": "learning_rate",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "bf16": "bf16",
    "seed": "seed",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "auto_find_batch_size": "batch_size",
    "dataloader_num_workers": "dataloader_num_workers",
    "logging_steps": "logging_steps",
    "save_steps": "save_steps",
    "save_strategy": "save_steps",
    "report_to": "report_to",
    "resume_from_checkpoint": "resume",
}


@dataclass(frozen=True, kw_only=True)
class StageConfig(CheckedConfig):
    """What both stages have in common; use `DistillConfig` or `TrainConfig`. Each field says what it does."""

    model: str | Path = required("PUMA directory to train.", positional=True)
    output: str | Path = required("New directory for the adapter and its checkpoints.", positional=True)
    data: str | Path = required("Training data.")
    split: str = option("train", "Split of an M-BEIR folder; union_train is M-BEIR's own mixture.")
    max_steps: int = option(
        -1, "Optimizer steps; -1 for whole epochs.", at_least=-1, remedy="Take -1 for whole epochs."
    )
    num_train_epochs: float = option(1.0, "Passes over the data, if max_steps is -1.", above=0)
    batch_size: int = option(64, "Rows per step and device.", at_least=1)
    gradient_accumulation_steps: int = option(
        1, "Batches per optimizer step; in-batch negatives stay those of one batch.", at_least=1
    )
    max_length: int | None = option(
        None,
        "Longest sequence in tokens; only text is cut. It stays with the model; default: as the model says.",
        at_least=1,
    )
    special_tokens: SpecialTokens = special_tokens_option()
    max_pixels: int | None = option(
        None,
        "Images are scaled down to so many pixels. It stays with the model; default: as the model says.",
        at_least=28 * 28,
        remedy="One visual token is 28 x 28 pixels.",
    )
    learning_rate: float = option(1e-4, "Peak of the cosine schedule.", above=0, remedy="LamRA takes 1e-4 to 2e-4.")
    first_layer_learning_rate: float | None = option(
        None, "Peak for the first decoder layer; default: learning_rate.", above=0, remedy="PUMA takes 1e-4."
    )
    adam_beta1: float = option(0.9, "Decay of AdamW's mean of gradients.", at_least=0, below=1)
    adam_beta2: float = option(0.999, "Decay of AdamW's mean of their squares; PUMA: 0.98.", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "What AdamW adds to their root; PUMA: 1e-7.", above=0)
    warmup: float = option(0.03, "Fraction of the steps that warm up.", at_least=0, below=1)
    lora_r: int = option(64, "Rank of the adapter.", at_least=1)
    lora_alpha: int | None = option(None, "Scale of the adapter; by default twice the rank, as in LamRA.", at_least=1)
    lora_dropout: float = option(0.05, "Dropout of the adapter.", at_least=0, below=1, remedy="LamRA takes 0.05.")
    train_ret_token: bool = option(False, "Also train the embedding row of [RET].")
    load_in_4bit: bool = option(False, "QLoRA: hold the base in 4 bits; needs bitsandbytes and CUDA.")
    seed: int = option(0, "Seed of LoRA's start, order, dropout and wordings.", at_least=0, at_most=2**32 - 1)
    bf16: bool = option(False, "Train in bfloat16 autocast.")
    gradient_checkpointing: bool = option(
        False, "Recompute the decoder's activations instead of keeping them: less memory, more time."
    )
    dataloader_num_workers: int = option(0, "Processes that prepare batches.", at_least=0)
    logging_steps: int = option(10, "Steps between two log lines.", at_least=1)
    save_steps: int = option(500, "Steps between checkpoints, of which the last two are kept; 0 for none.", at_least=0)
    report_to: tuple[str, ...] = option((), "Reporters of the Trainer, such as tensorboard or wandb; default: none.")
    resume: bool = option(False, "Continue from the last whole checkpoint in the output.")
    overwrite: bool = option(False, "Use an output that is not empty; checkpoints in it are removed.")
    training_arguments: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "More SentenceTransformerTrainingArguments, by name (YAML and Python only).", "flag": False},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps == 0:
            raise ValueError("max_steps=0 must be at least 1, or -1 for whole epochs.")
        for name in self.training_arguments:
            if own := SET_BY_FIELDS.get(name):
                raise ValueError(f"training_arguments may not set {name!r}: it is the field {own!r}. Set that instead.")
        if self.first_layer_learning_rate is not None and "learning_rate_mapping" in self.training_arguments:
            raise ValueError(
                f"first_layer_learning_rate={self.first_layer_learning_rate} may not stand beside "
                f"learning_rate_mapping in training_arguments. Put it there, as {FIRST_LAYER!r}."
            )

    def _check_teacher(self) -> None:
        given = {name: getattr(self, name) for name in ("teacher_mode", "teacher_cache")}
        if given["teacher_cache"] is not None and given["teacher_mode"] != "cached":
            raise ValueError(
                f"teacher_cache={given['teacher_cache']!r} is read with teacher_mode='cached' only, not "
                f"{given['teacher_mode']!r}. Set teacher_mode to 'cached', or leave teacher_cache out."
            )


@dataclass(frozen=True, kw_only=True)
class DistillConfig(StageConfig):
    """Self-distillation without labels, our stage 1: settings of `puma_hf.trainer.stages.distill`.

    The defaults are LamRA's where it states them (arXiv 2412.01720). PUMA's own stage 1 (ACM MM 2025, arXiv 2507.08064)
    learns from labelled pairs besides: it is a `TrainConfig` with a `distillation_weight`. `{field.name:
    field.metadata["help"]}` over `dataclasses.fields` explains every field, and so does `puma-hf distill --help`.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:

    ```python
    >>> from puma_hf.trainer.config import DistillConfig

    >>> DistillConfig(model="puma-k4", output="puma-k4-lora", data="demo/emoji").learning_rate
    0.0002
    ```
    """

    data: str | Path = required(
        "Folder in M-BEIR's layout or of images, .txt, or table with text, image or NLI columns; commas join several."
    )
    learning_rate: float = option(
        2e-4, "Peak of the cosine schedule.", above=0, remedy="LamRA takes 2e-4, and found 4e-4 unstable."
    )
    train_ret_token: bool = option(True, "Also train the embedding row of [RET].")
    teacher: str | Path | None = option(
        None, "Checkpoint that was pruned, or another model of its hidden size; default: the one the model names."
    )
    teacher_mode: TeacherMode = option(
        "frozen",
        "frozen: the untouched full model, asked at every step; cached: its states, computed once and stored.",
    )
    teacher_cache: str | Path | None = option(
        None, "Where cached states are stored; default: teacher_cache in the output."
    )
    metric: DistillationMetric = option(
        "mse", "Distance of student and teacher; mse: the paper's, a sum; mse-mean: released, averaged over dimensions."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_teacher()


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PairSettings, StageConfig):
    """Training on labelled pairs, stage 2, or with a teacher stage 1: settings of `puma_hf.trainer.stages.train`.

    The defaults are LamRA's where it states them (arXiv 2412.01720); MAC-Loss is PUMA's (ACM MM 2025, arXiv
    2507.08064), with the temperatures of the code that its authors released. `puma-hf train --help` explains every
    field.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:

    ```python
    >>> from puma_hf.trainer.config import TrainConfig

    >>> TrainConfig(model="puma-k4", output="puma-k4-mac-lora", data="demo/emoji").lora_r
    128
    ```
    """

    data: str | Path = required(
        "Folder in M-BEIR's layout; or pairs of your own: a table, or a folder of images with captions.csv in it."
    )
    lora_r: int = option(128, "Rank of the adapter.", at_least=1)
    loss: Loss = option(
        "mac",
        "mac: the paper's MAC-Loss; mac-split: ours, InfoNCE over all and InfoNCE within the target's modality; "
        "infonce: to compare.",
    )
    temperature: float = option(TEMPERATURE, "Temperature of inter-modality candidates, or of InfoNCE.", above=0)
    hard_temperature: float = option(HARD_TEMPERATURE, "Where the intra-modality temperature ends.", above=0)
    schedule: Schedule = option(SCHEDULE, "How it gets there.")
    schedule_end: float = option(
        SCHEDULE_END,
        "Share of the training after which it stays.",
        above=0,
        at_most=1,
        remedy="Take 1.0 to let it fall to the end, or schedule='constant'.",
    )
    grouping: ModalityGrouping = option(
        "target", "Whose modality makes a candidate hard: the target's (paper) or the query's."
    )
    split_weight: float = option(
        SPLIT_WEIGHT, "Share of the part within a modality; mac-split only.", at_least=0, at_most=1
    )
    num_negatives: int = option(0, "Hard negatives per query.", at_least=0)
    train_fraction: float = option(1.0, "Share of the labelled rows to use, drawn by seed.", above=0, at_most=1)
    mini_batch_size: int | None = option(
        None, "Gradient caching: rows per forward pass, so that batch_size may exceed the memory.", at_least=1
    )
    mini_batch_num_tokens: int | None = option(
        None, "Gradient caching: tokens per forward pass, instead of rows.", at_least=1
    )
    false_negative_margin: float | None = option(
        None,
        "Leave out negatives that are more similar to the query than its positive by so much; Qwen3-Embedding: 0.1.",
        at_least=0,
    )
    gather_across_devices: bool = option(True, "Candidates of all devices are negatives; no effect on one.")
    matryoshka_dims: tuple[int, ...] = option(
        (), "Also train the first so many dimensions; repeat for more.", at_least=1
    )
    distillation_weight: float = option(0.0, "Above 0: distil in the same forward pass, weighted so.", at_least=0)
    contrastive_weight: float = option(1.0, "Weight of the other term, if distillation_weight is above 0.", at_least=0)
    distillation_weight_start: float | None = option(
        None, "Where the weight begins, to move in a straight line over the training; default: it stays.", at_least=0
    )
    contrastive_weight_start: float | None = option(None, "Likewise for contrastive_weight.", at_least=0)
    teacher: str | Path | None = option(None, "Teacher, if distillation_weight is above 0; default: as in distill.")
    teacher_mode: TeacherMode = option("frozen", "As in distill.")
    teacher_cache: str | Path | None = option(
        None, "Where cached states are stored; default: teacher_cache in the output."
    )
    metric: DistillationMetric = option("mse", "As in distill.")

    @property
    def cached(self) -> bool:
        """Whether gradients are cached, so that a batch may exceed the memory."""
        return self.mini_batch_size is not None or self.mini_batch_num_tokens is not None

    @property
    def joint(self) -> bool:
        """Whether a teacher takes part."""
        return self.distillation_weight > 0 or (self.distillation_weight_start or 0) > 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_teacher()
        if not self.contrastive_weight and not (self.contrastive_weight_start or self.joint):
            raise ValueError(
                "contrastive_weight=0.0 and distillation_weight=0.0 leave no loss. Give one a weight above 0."
            )
        if self.cached and self.joint:
            raise ValueError(
                f"mini_batch_size={self.mini_batch_size} and mini_batch_num_tokens={self.mini_batch_num_tokens} need "
                f"distillation_weight=0, got {self.distillation_weight}: gradient caching has no joint form. Leave one "
                "of them out."
            )
        if len(set(self.matryoshka_dims)) < len(self.matryoshka_dims):
            raise ValueError(f"matryoshka_dims={list(self.matryoshka_dims)} must not repeat a size. Name each once.")

    def notes(self) -> list[str]:
        """Options that this combination ignores, one sentence each."""
        unused: dict[str, list[str]] = {}
        if self.loss == "infonce":
            names = ["hard_temperature", "schedule", "schedule_end", "grouping", "split_weight"]
            unused["loss='infonce'"] = names
        elif self.loss == "mac":
            unused["loss='mac'"] = ["split_weight"]
        if self.loss != "infonce" and self.schedule == "constant":
            unused["schedule='constant'"] = ["schedule_end"]
        if self.mini_batch_num_tokens is not None:
            unused["mini_batch_num_tokens"] = ["mini_batch_size"]
        if not self.joint:
            names = ["contrastive_weight", "contrastive_weight_start"]
            names += ["teacher", "teacher_mode", "teacher_cache", "metric"]
            unused["distillation_weight=0"] = names
        if not self.num_negatives:
            unused["num_negatives=0"] = ["negatives"]
        defaults = {entry.name: entry.default for entry in fields(self)}
        sentences = []
        for reason, names in unused.items():
            if given := [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != defaults[name]]:
                sentences.append(f"{', '.join(given)}: not used with {reason}.")
        return sentences


# Written beside the adapter, so that a run can be repeated: puma-hf distill --config OUTPUT/distill.yaml.
RECIPES: Mapping[type[StageConfig], str] = {DistillConfig: DISTILL_RECIPE, TrainConfig: TRAIN_RECIPE}


@dataclass(frozen=True, kw_only=True)
class MergeConfig(CheckedConfig):
    """Settings of `puma_hf.trainer.stages.merge`, which merges a trained adapter into its base.

    Example:

    ```python
    >>> from puma_hf.trainer.config import MergeConfig

    >>> MergeConfig(adapter="puma-k4-lora", output="puma-k4-distilled").overwrite
    False
    ```
    """

    adapter: str | Path = required("Directory that training saved.", positional=True)
    output: str | Path = required("New directory for the complete model.", positional=True)
    base: str | Path | None = option(None, "PUMA directory it was trained on; default: the one it names.")
    overwrite: bool = option(False, "Replace the output if it is not empty.")
