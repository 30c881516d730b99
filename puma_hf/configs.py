"""Every setting of every command: one dataclass a command, read from YAML, from flags and from Python alike.

`puma-hf COMMAND --help` explains the fields of one. Nothing heavy is imported here, so that it stays quick. What the
losses can be set to lives with the losses, which travel to the Hub without this file.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from puma_hf.files import DISTILL_RECIPE, TRAIN_RECIPE, is_hub_id
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

BadPairs = Literal["raise", "drop"]
PairDirection = Literal["text-to-image", "image-to-text", "both"]
TeacherMode = Literal["frozen", "cached"]
Loss = Literal["mac", "mac-split", "infonce"]
Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
OnError = Literal["raise", "skip", "zero"]
FileFormat = Literal["parquet", "safetensors"]
WeightsDtype = Literal["auto", "float32", "float16", "bfloat16"]
Benchmark = Literal["mbeir", "nano"]
Pool = Literal["local", "global", "both"]
EmbeddingDtype = Literal["float32", "float16", "bfloat16"]
SearchBackend = Literal["torch", "faiss"]
QualityMetric = Literal["score", "hit@1", "hit@5", "hit@10", "ndcg@10", "mrr@10"]
Target = Literal["any", "text", "image"]
Backend = Literal["exact", "ann", "torch", "faiss"]
AnnKind = Literal["none", "hnsw", "int8", "binary"]
ExportFormat = Literal["stock", "onnx"]

RESCORE_MULTIPLIER = 50
FIRST_PORT = 7860  # where Gradio's pages are, and what a Space shows
# The adapter of the first decoder layer among the names of a loss's parameters.
FIRST_LAYER = r"language_model\.layers\.0\..*lora_"

# What several commands say of the same option.
_REVISION = "Branch, tag or commit of a model on the Hub."
_REMOTE_CODE = "Run the code of a Hub repository; a local directory's is run."
_TRUNCATE_DIM = "Keep only the first so many dimensions of an embedding."

# Arguments of the Trainer that a field of ours sets under another name; those of the same name are found by it.
_SET_BY_FIELDS = {
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "auto_find_batch_size": "batch_size",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "activation_checkpointing": "gradient_checkpointing",
    "save_strategy": "save_steps",
    "resume_from_checkpoint": "resume",
}


def _check_is_folder(output: str | Path | None, holds: str) -> None:
    path = None if output is None else Path(output)
    # A file that an older version of the command would have written: nobody means a folder of that name.
    if path is not None and (path.is_file() or (path.suffix == ".json" and not path.exists())):
        raise ValueError(
            f"output={str(path)!r} must be a directory: {holds} go into it. Name one, such as "
            f"{str(path.with_suffix(''))!r}."
        )


# ----------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class PairSettings(CheckedConfig):
    """How pairs of one's own are read; `load_pairs` has the same arguments."""

    anchor: str | None = option(
        None, "Column of what asks, or text=COLUMN,image=COLUMN; default: guessed from the names (pairs of your own)."
    )
    positive: str | None = option(None, "Column or columns of the right answers, likewise.")
    negatives: tuple[str, ...] = option((), "Column or columns of a wrong answer, likewise; repeat for more.")
    instruction: str | None = option(None, "What the anchors of pairs look for: a text, or a column of texts.")
    reverse_instruction: str | None = option(None, "What the positives look for when they ask; direction both.")
    direction: PairDirection | None = option(
        None, "Which side of pairs asks; both: either in turn; default: as the columns say, a caption for its image."
    )
    images_to: str | Path | None = option(None, "Folder to save images to that are inside of a dataset's files.")
    bad_pairs: BadPairs = option("raise", "What to do if lines of pairs cannot be used: raise an error, or drop them.")

    special_tokens: SpecialTokens = special_tokens_option()

    def pair_arguments(self) -> dict[str, Any]:
        """The arguments of `load_pairs` that were given, but for what is to be done about errors and special tokens."""
        names = {entry.name for entry in fields(PairSettings)} - {"bad_pairs", "special_tokens"}
        values = {entry.name: getattr(self, entry.name) for entry in fields(PairSettings) if entry.name in names}
        return {name: value for name, value in values.items() if value is not None and value != ()}


@dataclass(frozen=True, kw_only=True)
class PairsConfig(PairSettings):
    """Settings of the dry run, `puma_hf.data.pairs_report.pairs`.

    Example:
        >>> PairsConfig(data="photos", direction="both").pair_arguments()
        {'direction': 'both'}
    """

    data: str | Path = required(
        "Table of pairs (.csv, .tsv, .jsonl, .json, .parquet), or a folder of images with its captions.* or "
        "metadata.*.",
        positional=True,
    )
    decode: bool = option(False, "Decode every image instead of reading its header alone.")
    json: str | Path | None = option(None, "Also write the report to this file as JSON.")
    mbeir: str | Path | None = option(
        None, "Also write the pairs to this new folder in M-BEIR's layout, for puma-hf evaluate --data."
    )
    val_fraction: float = option(0.1, "Share of the queries for the split val; mbeir only.", at_least=0, at_most=1)
    test_fraction: float = option(0.1, "Share of the queries for the split test; mbeir only.", at_least=0, at_most=1)
    seed: int = option(0, "Seed of the splits; mbeir only.", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_fraction + self.test_fraction > 1:
            raise ValueError(
                f"val_fraction={self.val_fraction} and test_fraction={self.test_fraction} must be 1 at most together; "
                "what they leave is for training. Lower one."
            )


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
        own = _SET_BY_FIELDS | {entry.name: entry.name for entry in fields(StageConfig)}
        for name in self.training_arguments:
            if name in own:
                raise ValueError(
                    f"training_arguments may not set {name!r}: it is the field {own[name]!r}. Set that instead."
                )
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
    learns from labelled pairs besides: it is a `TrainConfig` with a `distillation_weight`.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:
        >>> DistillConfig(model="puma-k4", output="puma-k4-lora", data="demo/emoji").learning_rate
        0.0002
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
    2507.08064), with the temperatures of the code that its authors released.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:
        >>> TrainConfig(model="puma-k4", output="puma-k4-mac-lora", data="demo/emoji").lora_r
        128
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
        notes: list[str] = []
        if self.loss == "infonce":
            of_mac = ("hard_temperature", "schedule", "schedule_end", "grouping", "split_weight")
            notes += self._unused("loss='infonce'", *of_mac)
        elif self.loss == "mac":
            notes += self._unused("loss='mac'", "split_weight")
        if self.loss != "infonce" and self.schedule == "constant":
            notes += self._unused("schedule='constant'", "schedule_end")
        if self.mini_batch_num_tokens is not None:
            notes += self._unused("mini_batch_num_tokens", "mini_batch_size")
        if not self.joint:
            of_a_teacher = ("teacher", "teacher_mode", "teacher_cache", "metric")
            notes += self._unused(
                "distillation_weight=0", "contrastive_weight", "contrastive_weight_start", *of_a_teacher
            )
        return notes if self.num_negatives else notes + self._unused("num_negatives=0", "negatives")


# Written beside the adapter, so that a run can be repeated: puma-hf distill --config OUTPUT/distill.yaml.
RECIPES: Mapping[type[StageConfig], str] = {DistillConfig: DISTILL_RECIPE, TrainConfig: TRAIN_RECIPE}


@dataclass(frozen=True, kw_only=True)
class MergeConfig(CheckedConfig):
    """Settings of `puma_hf.trainer.stages.merge`, which merges a trained adapter into its base."""

    adapter: str | Path = required("Directory that training saved.", positional=True)
    output: str | Path = required("New directory for the complete model.", positional=True)
    base: str | Path | None = option(None, "PUMA directory it was trained on; default: the one it names.")
    overwrite: bool = option(False, "Replace the output if it is not empty.")


# ------------------------------------------------------------------------------------------- embedding and evaluation


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(CheckedConfig):
    """Settings of `puma_hf.embedding.run.embed_corpus`.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:
        >>> EmbedConfig(data="demo/emoji", model="puma-k4-mac", output="embeddings").precision
        'float32'
    """

    data: str | Path = required(
        "A folder of images; a .txt, .jsonl, .json, .csv, .tsv or .parquet with columns among id, text, image and "
        "instruction; or a folder in M-BEIR's layout, whose pool is embedded.",
        positional=True,
    )
    model: str = required("PUMA directory, here or on the Hub.")
    output: str | Path = required("Directory of the embeddings; a run that was stopped goes on from there.")
    split: str = option("test", "Split of a folder in M-BEIR's layout.")
    pool: str = option("global", "Its pool: global, or that of a task, such as webqa_task1.")
    prompt: str | None = option(None, "Instruction for every input that brings none of its own.")
    truncate_dim: int | None = option(None, _TRUNCATE_DIM, at_least=1)
    precision: Precision = option("float32", "Numbers that are stored; binary and ubinary pack 8 dimensions a byte.")
    calibration_size: int = option(1024, "Inputs, drawn at random, that int8 and uint8 are scaled by.", at_least=2)
    on_error: OnError = option(
        "raise", "On an input that cannot be read: raise; skip, which leaves it out; or zero, which stores zeros."
    )
    special_tokens: SpecialTokens = special_tokens_option()
    format: FileFormat = option("parquet", "Files to write; safetensors has the ids in a Parquet file beside.")
    shard_size: int = option(10_000, "Inputs a file; those of up to three are in memory at a time.", at_least=1)
    max_batch_tokens: int | None = option(None, "Tokens of a batch; default: by device.", at_least=1)
    num_workers: int | None = option(None, "Processes that read and prepare inputs; default: by device.", at_least=0)
    dtype: WeightsDtype = option("auto", "Data type of the weights; auto is what they are stored in.")
    fast: bool = option(True, "Pack inputs without padding, among other savings; off, they are padded.")
    revision: str | None = option(None, _REVISION)
    trust_remote_code: bool = option(False, _REMOTE_CODE)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_is_folder(self.output, "shards and a manifest")

    @property
    def is_scaled(self) -> bool:
        """Whether the precision needs the range of every dimension."""
        return self.precision in ("int8", "uint8")

    def notes(self) -> list[str]:
        """Options that this combination ignores, one sentence each."""
        return [] if self.is_scaled else self._unused(f"precision={self.precision!r}", "calibration_size")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(CheckedConfig):
    """Settings of `puma_hf.evaluation.mbeir.evaluate`.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:
        >>> EvaluateConfig(model="puma-k4-mac", data="demo/emoji").pool
        'both'
    """

    model: str = required("PUMA directory, or any SentenceTransformer here or on the Hub.", positional=True)
    data: str | Path = required(
        "Folder in M-BEIR's layout, folder of parquet copies, or a Hub id (mteb/mbeir_cirr_task7, or mteb for all)."
    )
    benchmark: Benchmark = option(
        "mbeir", "mbeir: all of the data; nano: a fixed, seeded subset, quick enough to train by."
    )
    split: str = option("test", "Split to evaluate.")
    tasks: tuple[str, ...] = option((), "Tasks such as webqa_task1; repeat for more. Default: all of the split.")
    pool: Pool = option("both", "Each task's own pool, that of all tasks, or both.")
    batch_size: int = option(32, "Inputs per forward pass.", at_least=1)
    output: str | Path | None = option(
        None, "Directory for results, run files and embeddings; a run that was stopped goes on from there."
    )
    instruction_seed: int | None = option(
        None, "Draws one wording of the instruction a query; default: always the first wording.", at_least=0
    )
    popularity_penalty: float | None = option(
        None,
        "Also report figures by similarity less this share, such as 0.2, of the candidate's mean similarity to all "
        "test queries of the task, as PUMA's released code has it. Transductive: no query can be answered alone.",
        at_least=0,
        at_most=1,
    )
    nano_queries: int = option(200, "Queries a task of the nano benchmark; 0 for all.", at_least=0)
    nano_candidates: int = option(2000, "Candidates a task of the nano benchmark; 0 for all.", at_least=0)
    nano_seed: int = option(0, "Seed of what the nano benchmark holds.", at_least=0)
    nano_folder: str | Path | None = option(
        None, "Where the nano benchmark is kept for other runs; default: nano in the output."
    )
    embedding_dtype: EmbeddingDtype = option(
        "float32", "Data type that embeddings are stored in; two bytes halve the disk space."
    )
    search_backend: SearchBackend = option("torch", "Both are exact; faiss needs pip install 'puma-hf[faiss]'.")
    truncate_dim: int | None = option(None, _TRUNCATE_DIM, at_least=1)
    special_tokens: SpecialTokens = special_tokens_option()
    revision: str | None = option(None, _REVISION)
    data_revision: str | None = option(None, "Branch, tag or commit of data on the Hub.")
    trust_remote_code: bool = option(False, _REMOTE_CODE)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_is_folder(self.output, "results.json, results.md and run files")

    def notes(self) -> list[str]:
        """Options that this combination ignores, one sentence each."""
        names = ("nano_queries", "nano_candidates", "nano_seed", "nano_folder")
        return self._unused("benchmark='mbeir'", *names) if self.benchmark == "mbeir" else []


_COUNT = re.compile(r"(\d+\.?\d*|\.\d+)\s*([KMBG]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def parse_parameters(value: str | int | float) -> int:
    """A number of parameters, as people write it.

    Args:
        value: Such as "4B", "800M", "1.5b", "300000" or 4e9.

    Returns:
        The number.

    Raises:
        ValueError: If it is no such number, or below 1.

    Example:
        >>> parse_parameters("1.5B"), parse_parameters("800M"), parse_parameters(4e9)
        (1500000000, 800000000, 4000000000)
    """
    match = _COUNT.fullmatch(f"{value:.0f}" if isinstance(value, int | float) else value.strip().replace("_", ""))
    number = round(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if number < 1:
        raise ValueError(f"max_params={value!r} must be a number of parameters. Write it as 4B, 800M or 300000.")
    return number


@dataclass(frozen=True, kw_only=True)
class SweepConfig(CheckedConfig):
    """Settings of `puma_hf.evaluation.layer_sweep.sweep`, which measures every depth of a model at once.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:
        >>> SweepConfig(model="demo/backbone", data="demo/emoji", max_params="800M").keep
        0.97
    """

    model: str | Path = required(
        "The full model: folder or Hub id of an original Qwen2-VL, 2.5 or 3, or of a PUMA directory.", positional=True
    )
    data: str | Path = required("Folder in M-BEIR's layout, or what else evaluate takes as --data.")
    split: str = option("val", "Split to measure on; choose k on val, and report test.")
    tasks: tuple[str, ...] = option((), "Such as webqa_task1; default: all of the split.")
    pool: Pool = option("local", "Each task's own pool, that of all tasks, or both; with both, local decides.")
    metric: QualityMetric = option("score", "Quality that decides; score is hit@5, and hit@10 on fashion datasets.")
    compare: tuple[str, ...] = option((), "Further models, such as a distilled PUMA directory, swept beside the full.")
    output: str | Path | None = option(None, "Directory for sweep.json, sweep.md and sweep.png.")
    max_params: str | None = option(None, "Budget of parameters for the recommendation, such as 4B or 800M.")
    keep: float = option(
        0.97, "Share of the full model's quality that k must keep.", above=0, at_most=1, remedy="Take 0.97, or less."
    )
    keep_last: bool = option(False, "Measure the first k - 1 layers with the last one, too, for every k.")
    batch_size: int = option(32, "Inputs per forward pass.", at_least=1)
    nano_queries: int = option(200, "Queries a task, drawn by nano_seed; 0 for all.", at_least=0)
    nano_candidates: int = option(2000, "Candidates a task, all relevant ones among them; 0 for all.", at_least=0)
    nano_seed: int = option(0, "Seed of that choice.", at_least=0)
    special_tokens: SpecialTokens = special_tokens_option()
    trust_remote_code: bool = option(False, _REMOTE_CODE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_params is not None:
            parse_parameters(self.max_params)
        _check_is_folder(self.output, "sweep.json, sweep.md and sweep.png")


# -------------------------------------------------------------------------------------------------- search and the Hub


@dataclass(frozen=True, kw_only=True)
class IndexConfig(EmbedConfig):
    """Settings of `puma_hf.search.index.build_index`; `puma-hf index --help` explains every field."""

    model: str = option("", "PUMA directory, here or on the Hub; needed by the first run, which the index remembers.")
    output: str | Path = required("Directory of the index; a run that was stopped goes on from there.")
    on_error: OnError = option("skip", "On an input that cannot be read: raise; or skip, which leaves it out.")
    precision: Precision = option("float32", "Numbers that are stored: float32; or float16, half as large.")
    shard_size: int = option(
        4096, "Inputs embedded between two writes; a run that is killed loses at most these.", at_least=1, at_most=4096
    )
    calibration_size: int = option(1024, "Not used by an index.", at_least=2)
    format: FileFormat = option("parquet", "Not used by an index, which is a table of LanceDB.")
    ann: AnnKind | None = option(
        None,
        "Add an index for approximate search in large corpora (--backend ann): hnsw is quickest; int8 misses least; "
        "binary is smallest; none removes it. By default it stays what it is.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_error == "zero":
            raise ValueError(
                "on_error='zero' would put zeros into the index, which no query finds. Choose skip, or raise."
            )
        if self.precision not in ("float32", "float16"):
            raise ValueError(
                f"precision={self.precision!r} must be 'float32' or 'float16' in an index. Choose ann='int8' or "
                "'binary' (--ann) for a search that reads less."
            )

    def notes(self) -> list[str]:
        """Options that an index ignores, one sentence each."""
        return self._unused("an index", "calibration_size", "format")


@dataclass(frozen=True, kw_only=True)
class SearchConfig(CheckedConfig):
    """Settings of `puma_hf.search.query.search`."""

    index: str | Path = required("Directory that puma-hf index has written.", positional=True)
    query: str | None = field(default=None, metadata={"help": "What to look for, in words.", "positional": True})
    image: str | Path | None = option(None, "Picture to look for, or that the words are about.")
    # `for` is a keyword of Python.
    target: Target = field(
        default="any",
        metadata={"help": "What answers may be: texts, pictures (with or without text), or any.", "flag": "for"},
    )
    top: int = option(10, "Answers to show.", at_least=1)
    instruction: str | None = option(None, "What the query asks for, in the words that the model was trained with.")
    json: bool = option(False, "Print the answers as JSON.")
    html: str | Path | None = option(None, "File for a page of the answers, with small pictures inside.")
    model: str | None = option(None, "The model that made the index, if it is no longer where it was.")
    backend: Backend = option(
        "exact", "exact; or ann, approximate, for an index made with --ann. torch and faiss are old words for exact."
    )
    rescore_multiplier: int = option(
        RESCORE_MULTIPLIER,
        "With --backend ann: how many items are compared exactly for each answer that is shown.",
        at_least=1,
    )
    trust_remote_code: bool = option(False, _REMOTE_CODE)

    def notes(self) -> list[str]:
        """Options that this combination ignores, one sentence each."""
        return [] if self.backend == "ann" else self._unused(f"backend={self.backend!r}", "rescore_multiplier")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.query and self.query.strip()) and self.image is None:
            raise ValueError(
                f"query={self.query!r} and image=None: nothing to look for. Give words, a picture (--image), or both."
            )
        if self.html is not None and Path(self.html).is_dir():
            raise ValueError(f"html={str(self.html)!r} is a directory, must be a file. Name one, such as answers.html.")


@dataclass(frozen=True, kw_only=True)
class AppConfig(CheckedConfig):
    """Settings of `puma_hf.app.launch.launch`; `puma-hf app --help` explains every field."""

    index: str | Path = required("Directory that puma-hf index has written.", positional=True)
    host: str = option(
        "127.0.0.1", "Address to serve at. The default is seen from this machine alone; 0.0.0.0 from all others, too."
    )
    port: int | None = option(
        None,
        f"Port to serve at; 0 for any. Default: {FIRST_PORT}, or the next that is free.",
        at_least=0,
        at_most=65535,
    )
    instruction: str | None = option(
        None, "What queries ask for, in the words that the model was trained with; can be changed on the page."
    )
    top: int = option(24, "Answers to show.", at_least=1, at_most=200)
    max_upload_mb: float = option(10.0, "Megabytes that the file of a picture may have.", above=0, at_most=1000)
    open_browser: bool = option(False, "Open the page in a browser.")
    space: str | Path | None = option(
        None, "New directory for a Space of the Hub that shows this page; written instead of serving."
    )
    model: str | None = option(
        None, "The model that made the index, if it is no longer where it was; of a Space, its name on the Hub."
    )
    backend: Backend = option("exact", "As for puma-hf search.")
    trust_remote_code: bool = option(False, _REMOTE_CODE)

    def notes(self) -> list[str]:
        """Options that a Space ignores: it is written, and nothing is served."""
        of_serving = ("host", "port", "top", "max_upload_mb", "open_browser", "backend")
        return [] if self.space is None else self._unused("space, whose app.py sets them", *of_serving)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(CheckedConfig):
    """Settings of `puma_hf.export.export`."""

    source: str = required("PUMA directory, here or on the Hub.", positional=True)
    output: str | Path = required("New directory for the plain checkpoint.", positional=True)
    format: ExportFormat = option(
        "stock",
        "stock: a Qwen2-VL, 2.5 or 3 checkpoint of fewer layers, without code; onnx: a graph that embeds texts.",
    )
    revision: str | None = option(None, "Branch, tag or commit on the Hub.")
    overwrite: bool = option(False, "Replace the output if it is not empty.")


@dataclass(frozen=True, kw_only=True)
class PushConfig(CheckedConfig):
    """Settings of `puma_hf.hub.push.push_configured`.

    Raises:
        ValueError: If a name is not of the Hub's form.
    """

    directory: str | Path = required("A PUMA directory, or the directory of a trained LoRA adapter.", positional=True)
    repo_id: str = required("Repository on the Hub, such as org/name; it is made if need be.", positional=True)
    private: bool | None = option(None, "Make the repository private; default: as the organisation has it.")
    revision: str | None = option(None, "Branch to push to, made if need be; default: main.")
    create_pr: bool = option(False, "Open a pull request instead of writing to the branch.")
    dry_run: bool = option(False, "Check and load everything, list files, bytes and the card, and upload nothing.")
    message: str | None = option(None, "Message of the commit.")
    results: tuple[str, ...] = option(
        (), "results.json, train.yaml or distill.yaml for the card; default: those found beside the model."
    )
    base_model: str | None = option(None, "Hub id of what the model was made from, or that an adapter belongs to.")
    license: str | None = option(None, "Licence of the model in the Hub's spelling, such as apache-2.0.")
    base_license: str | None = option(None, "Licence of what it was made from, for the card.")
    data_license: str | None = option(None, "Licence of the data it was trained on, for the card.")
    datasets: tuple[str, ...] = option((), "Hub id of a dataset it was trained on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("repo_id", "base_model", "datasets"):
            value = getattr(self, name)
            for given in value if isinstance(value, tuple) else (value,):
                if given is not None and not is_hub_id(given):
                    raise ValueError(f"{name}={given!r} must be a Hub id of the form organisation/name.")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(CheckedConfig):
    """Settings of `puma_hf.hub.check.check`."""

    directory: str | Path = required("PUMA directory, or one of an adapter. Its code is run.", positional=True)
    merged: str | Path | None = option(
        None, "PUMA directory that the adapter was merged into; default: it is merged for the check."
    )
    base: str | Path | None = option(None, "PUMA directory that the adapter was trained on; default: the one it names.")
    exported: str | Path | None = option(
        None, "Directory that puma-hf export wrote; default: the model is exported for the check."
    )
    seed: int = option(0, "Draws the texts and pictures.", at_least=0)
    device: str = option("cpu", "Device that the model runs on, such as cuda; bounds are for float32 on it.")
