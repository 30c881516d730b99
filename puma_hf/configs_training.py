"""Settings of training and of pairs. Import them from `puma_hf.configs`, which has those of every command."""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from puma_hf.files import DISTILL_RECIPE, TRAIN_RECIPE
from puma_hf.losses.schedule_puma import (
    DEPTH_WEIGHTS,
    HARD_TEMPERATURE,
    RELATIONAL_TEMPERATURE,
    SCHEDULE,
    SCHEDULE_END,
    SPLIT_WEIGHT,
    TEMPERATURE,
    DepthWeights,
    DistillationMetric,
    ModalityGrouping,
    Schedule,
)
from puma_hf.settings import CheckedConfig, SpecialTokens, option, parse_numbers, positional

PairDirection = Literal["text-to-image", "image-to-text", "both"]
TeacherMode = Literal["frozen", "cached"]
Loss = Literal["mac", "mac-split", "infonce"]

# The adapter of the first decoder layer among the names of a loss's parameters.
FIRST_LAYER = r"language_model\.layers\.0\..*lora_"
# Arguments of the Trainer that a field of ours sets under another name; those of the same name are found by it.
_SET_BY_FIELDS = (
    *("output_dir", "save_strategy", "resume_from_checkpoint", "per_device_train_batch_size"),
    *("auto_find_batch_size", "warmup_steps", "warmup_ratio", "activation_checkpointing"),
)


def parse_depths(value: str) -> tuple[int, ...]:
    """Numbers of layers that are separated by commas, the smallest first; a ValueError if one is none, or comes twice.

    Example:
        >>> parse_depths("4,8,12")
        (4, 8, 12)
    """
    return parse_numbers("depths", value, 1, "must be different numbers of layers, such as 4,8,12")


@dataclass(frozen=True, kw_only=True)
class PairSettings(CheckedConfig):
    """How pairs of one's own are read; `load_pairs` has the same arguments.

    Args:
        anchor: Column of what asks, or text=COLUMN,image=COLUMN; default: guessed from the names (pairs of your own).
        positive: Column or columns of the right answers, likewise.
        negatives: Column or columns of a wrong answer, likewise; repeat for more.
        instruction: What the anchors of pairs look for: a text, or a column of texts.
        reverse_instruction: What the positives look for when they ask; direction both.
        direction: Which side of pairs asks; both: either in turn; default: as the columns say, a caption for its image.
        images_to: Folder to save images to that are inside of a dataset's files.
        bad_pairs: What to do if lines of pairs cannot be used: raise an error, or drop them.
    """

    # What a row says: columns are guessed from common names, and named here where that fails.
    anchor: str | None = None
    positive: str | None = None
    negatives: tuple[str, ...] = ()
    instruction: str | None = None
    reverse_instruction: str | None = None
    direction: PairDirection | None = None
    images_to: str | Path | None = None
    # A typo in one of a million rows should not be noticed after a day of training: raise is the default.
    bad_pairs: Literal["raise", "drop"] = "raise"
    special_tokens: SpecialTokens = "raise"

    def pair_arguments(self) -> dict[str, Any]:
        """The arguments of `load_pairs` that were given, but for what is to be done about errors and special tokens."""
        names = {entry.name for entry in fields(PairSettings)} - {"bad_pairs", "special_tokens"}
        return {name: value for name in names if (value := getattr(self, name)) not in (None, ())}


@dataclass(frozen=True, kw_only=True)
class PairsConfig(PairSettings):
    """Look through pairs of your own before training: what there is, and what is wrong with it.

    Example: puma-hf pairs photos/captions.csv --direction both

    Args:
        data: Table of pairs (.csv, .tsv, .jsonl, .json, .parquet), or a folder of images with its captions.* or
            metadata.*.
        decode: Decode every image instead of reading its header alone.
        json: Also write the report to this file as JSON.
        mbeir: Also write the pairs to this new folder in M-BEIR's layout, for puma-hf evaluate --data.
        val_fraction: Share of the queries for the split val; mbeir only.
        test_fraction: Share of the queries for the split test; mbeir only.
        seed: Seed of the splits; mbeir only.

    Example:
        >>> PairsConfig(data="photos", direction="both").pair_arguments()
        {'direction': 'both'}
    """

    data: str | Path = positional()
    decode: bool = False
    json: str | Path | None = None
    mbeir: str | Path | None = None
    # Splits go by query, so that no picture of a test query is trained on.
    val_fraction: float = option(0.1, at_least=0, at_most=1)
    test_fraction: float = option(0.1, at_least=0, at_most=1)
    seed: int = option(0, at_least=0)


@dataclass(frozen=True, kw_only=True)
class StageConfig(CheckedConfig):
    """What both stages have in common; use `DistillConfig` or `TrainConfig`.

    Args:
        model: PUMA directory to train.
        output: New directory for the adapter and its checkpoints.
        data: Training data.
        split: Split of an M-BEIR folder; union_train is M-BEIR's own mixture.
        max_steps: Optimizer steps; -1 for whole epochs.
        num_train_epochs: Passes over the data, if max_steps is -1.
        batch_size: Rows per step and device.
        gradient_accumulation_steps: Batches per optimizer step; in-batch negatives stay those of one batch.
        max_length: Longest sequence in tokens; only text is cut. It stays with the model; default: as the model says.
        max_pixels: Images are scaled down to so many pixels. It stays with the model; default: as the model says.
        learning_rate: Peak of the cosine schedule.
        first_layer_learning_rate: Peak for the first decoder layer; default: learning_rate.
        adam_beta1: Decay of AdamW's mean of gradients.
        adam_beta2: Decay of AdamW's mean of their squares; PUMA: 0.98.
        adam_epsilon: What AdamW adds to their root; PUMA: 1e-7.
        warmup: Fraction of the steps that warm up.
        lora_r: Rank of the adapter.
        lora_alpha: Scale of the adapter; by default twice the rank, as in LamRA.
        lora_dropout: Dropout of the adapter.
        train_ret_token: Also train the embedding row of [RET].
        load_in_4bit: QLoRA: hold the base in 4 bits; needs bitsandbytes and CUDA.
        seed: Seed of LoRA's start, order, dropout and wordings.
        bf16: Train in bfloat16 autocast.
        gradient_checkpointing: Recompute the decoder's activations instead of keeping them: less memory, more time.
        dataloader_num_workers: Processes that prepare batches.
        logging_steps: Steps between two log lines.
        save_steps: Steps between checkpoints, of which the last two are kept; 0 for none.
        report_to: Reporters of the Trainer, such as tensorboard or wandb; default: none.
        resume: Continue from the last whole checkpoint in the output.
        overwrite: Use an output that is not empty; checkpoints in it are removed.
        training_arguments: More SentenceTransformerTrainingArguments, by name (YAML and Python only).
        depths: Numbers of layers to embed after, such as 4,8,12, the last all that the model has: one training for
            models of all these depths, see --num-kept-layers of the other commands. Default: the model's own alone.
        depth_weights: How much each depth counts; equal, linear: as deep as it is, last: the deepest twice as much
            as all others; or sampled: one depth a batch, drawn evenly, and no layer above it computed.
        teacher: Checkpoint that was pruned, or another of its hidden size, or with metric relational any embedder;
            default: the one the model names.
        teacher_mode: frozen: the untouched full model, asked at every step; cached: its states, computed once and
            stored.
        teacher_cache: Where cached states are stored; default: teacher_cache in the output.
        metric: Distance of student and teacher; mse: the paper's, a sum; mse-mean: released, averaged over dimensions;
            cosine: of their embeddings; relational: of their similarities within a batch, for a teacher of any width.
        relational_temperature: Temperature of these similarities; metric relational only.
    """

    model: str | Path = positional()
    output: str | Path = positional()
    data: str | Path
    split: str = "train"
    # How long: epochs, unless steps are given.
    max_steps: int = option(-1, at_least=-1)
    num_train_epochs: float = option(1.0, above=0)
    # The batch decides how many negatives a query has: gradient accumulation adds none, gradient caching
    # (`mini_batch_size` of `TrainConfig`) does, and costs a second forward pass.
    batch_size: int = option(64, at_least=1)
    gradient_accumulation_steps: int = option(1, at_least=1)
    # What is read of an input. Both limits stay with the model, so that it is used as it was trained: 235,200
    # pixels are 300 visual tokens, and a visual token costs as much as one of text.
    max_length: int | None = option(None, at_least=1)
    special_tokens: SpecialTokens = "raise"
    max_pixels: int | None = option(None, at_least=28 * 28)
    # AdamW on a cosine after a short warm-up; LamRA takes 1e-4 to 2e-4. PUMA's code slows the first layer down.
    learning_rate: float = option(1e-4, above=0)
    first_layer_learning_rate: float | None = option(None, above=0)
    adam_beta1: float = option(0.9, at_least=0, below=1)
    adam_beta2: float = option(0.999, at_least=0, below=1)
    adam_epsilon: float = option(1e-8, above=0)
    warmup: float = option(0.03, at_least=0, below=1)
    # The adapter. LamRA takes rank 64 in its first stage and 128 in its second.
    lora_r: int = option(64, at_least=1)
    lora_alpha: int | None = option(None, at_least=1)
    lora_dropout: float = option(0.05, at_least=0, below=1)
    train_ret_token: bool = False
    load_in_4bit: bool = False
    seed: int = option(0, at_least=0, at_most=2**32 - 1)
    # Speed and memory; none of these changes what is learnt, but for rounding.
    bf16: bool = False
    gradient_checkpointing: bool = False
    dataloader_num_workers: int = option(0, at_least=0)
    # What a run tells and keeps. Two checkpoints: one may be half written when a run is killed.
    logging_steps: int = option(10, at_least=1)
    save_steps: int = option(500, at_least=0)
    report_to: tuple[str, ...] = ()
    resume: bool = False
    overwrite: bool = False
    # The rest of the Trainer, which needs no words of ours.
    training_arguments: Mapping[str, Any] = field(default_factory=dict, metadata={"flag": False})
    # Several depths of one checkpoint: one forward pass of the deepest has the states of all.
    depths: str | None = None
    depth_weights: DepthWeights = DEPTH_WEIGHTS
    # A cached teacher costs its states on the disk, and saves a forward pass of the full model in every step.
    teacher: str | Path | None = None
    teacher_mode: TeacherMode = "frozen"
    teacher_cache: str | Path | None = None
    metric: DistillationMetric = "mse"
    relational_temperature: float = option(RELATIONAL_TEMPERATURE, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps == 0:
            raise ValueError("max_steps=0 must be at least 1, or -1 for whole epochs.")
        if self.depths is not None:
            parse_depths(self.depths)
        own = {*_SET_BY_FIELDS, *(entry.name for entry in fields(StageConfig))}
        if taken := own & self.training_arguments.keys():
            raise ValueError(f"training_arguments may not set {sorted(taken)}: fields of the recipe do. Set those.")
        if self.first_layer_learning_rate is not None and "learning_rate_mapping" in self.training_arguments:
            given = f"first_layer_learning_rate={self.first_layer_learning_rate}"
            raise ValueError(f"{given} may not stand beside learning_rate_mapping. Put it there, as {FIRST_LAYER!r}.")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(StageConfig):
    """Stage 1 without labels, which is ours: distil the full model into the pruned one. Saves a LoRA adapter.

    The defaults are LamRA's where it states them (arXiv 2412.01720). PUMA's own stage 1 (ACM MM 2025, arXiv 2507.08064)
    learns from labelled pairs besides: it is a `TrainConfig` with a `distillation_weight`.

    Example: puma-hf distill puma-k14 puma-k14-lora --config configs/qwen2_vl_2b_stage1_ours.yaml --data M-BEIR

    Args:
        data: Folder in M-BEIR's layout or of images, .txt, or table with text, image or NLI columns; commas join
            several.
    """

    # LamRA takes 2e-4, too, and found 4e-4 unstable.
    learning_rate: float = option(2e-4, above=0)
    train_ret_token: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PairSettings, StageConfig):
    """Train on labelled pairs: stage 2 with MAC-Loss, stage 1 as released with a teacher. Saves a LoRA adapter.

    The defaults are LamRA's where it states them (arXiv 2412.01720); MAC-Loss is PUMA's (ACM MM 2025, arXiv
    2507.08064), with the temperatures of the code that its authors released.

    Example: puma-hf train puma-k14-distilled puma-k14-mac-lora --data M-BEIR --learning-rate 1e-4

    Args:
        data: Folder in M-BEIR's layout; or pairs of your own: a table, or a folder of images with captions.csv in it.
        loss: mac: the paper's MAC-Loss; mac-split: ours, InfoNCE over all and InfoNCE within the target's modality;
            infonce: to compare.
        temperature: Temperature of inter-modality candidates, or of InfoNCE.
        hard_temperature: Where the intra-modality temperature ends.
        schedule: How it gets there.
        schedule_end: Share of the training after which it stays.
        grouping: Whose modality makes a candidate hard: the target's (paper) or the query's.
        split_weight: Share of the part within a modality; mac-split only.
        num_negatives: Hard negatives per query.
        train_fraction: Share of the labelled rows to use, drawn by seed.
        mini_batch_size: Gradient caching: rows per forward pass, so that batch_size may exceed the memory.
        mini_batch_num_tokens: Gradient caching: tokens per forward pass, instead of rows.
        false_negative_margin: Leave out negatives that are more similar to the query than its positive by so much;
            Qwen3-Embedding: 0.1.
        gather_across_devices: Candidates of all devices are negatives; no effect on one.
        matryoshka_dims: Also train the first so many dimensions; repeat for more.
        distillation_weight: Above 0: distil in the same forward pass, weighted so.
        contrastive_weight: Weight of the other term, if distillation_weight is above 0.
        distillation_weight_start: Where the weight begins, to move in a straight line over the training; default: it
            stays.
        contrastive_weight_start: Likewise for contrastive_weight.

    Example:
        >>> TrainConfig(model="puma-k4", output="puma-k4-mac-lora", data="demo/emoji").lora_r
        128
    """

    lora_r: int = option(128, at_least=1)
    loss: Loss = "mac"
    # MAC-Loss: the temperature of candidates of the target's modality falls from the first to the second.
    temperature: float = option(TEMPERATURE, above=0)
    hard_temperature: float = option(HARD_TEMPERATURE, above=0)
    schedule: Schedule = SCHEDULE
    schedule_end: float = option(SCHEDULE_END, above=0, at_most=1)
    grouping: ModalityGrouping = "target"
    split_weight: float = option(SPLIT_WEIGHT, at_least=0, at_most=1)
    # Which rows, and what counts as a negative.
    num_negatives: int = option(0, at_least=0)
    train_fraction: float = option(1.0, above=0, at_most=1)
    # Gradient caching: memory for one mini-batch, gradients of the whole batch.
    mini_batch_size: int | None = option(None, at_least=1)
    mini_batch_num_tokens: int | None = option(None, at_least=1)
    false_negative_margin: float | None = option(None, at_least=0)
    gather_across_devices: bool = True
    matryoshka_dims: tuple[int, ...] = option((), at_least=1)
    # The teacher's part: PUMA's released stage 1 is InfoNCE and distillation in one forward pass.
    distillation_weight: float = option(0.0, at_least=0)
    contrastive_weight: float = option(1.0, at_least=0)
    distillation_weight_start: float | None = option(None, at_least=0)
    contrastive_weight_start: float | None = option(None, at_least=0)

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
        # Without a teacher the contrastive loss is trained alone, whatever its weight: at 0 nothing was meant to be.
        if not self.joint and not (self.contrastive_weight or self.contrastive_weight_start):
            raise ValueError("contrastive_weight=0.0 and distillation_weight=0.0 leave no loss. Raise one above 0.")
        if self.cached and self.joint:
            caching = f"mini_batch_size={self.mini_batch_size} and mini_batch_num_tokens={self.mini_batch_num_tokens}"
            raise ValueError(f"{caching} need distillation_weight=0, as caching has no joint form. Leave one out.")


@dataclass(frozen=True, kw_only=True)
class MergeConfig(CheckedConfig):
    """Merge a trained adapter into its base, checked, and write a complete directory.

    Example: puma-hf merge puma-k14-lora puma-k14-distilled

    Args:
        adapter: Directory that training saved.
        output: New directory for the complete model.
        base: PUMA directory it was trained on; default: the one it names.
    """

    adapter: str | Path = positional()
    output: str | Path = positional()
    base: str | Path | None = None
    overwrite: bool = False


# Written beside the adapter, so that a run can be repeated: puma-hf distill --config OUTPUT/distill.yaml.
RECIPES: Mapping[type[StageConfig], str] = {DistillConfig: DISTILL_RECIPE, TrainConfig: TRAIN_RECIPE}
