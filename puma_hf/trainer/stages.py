"""The two training stages and the merge as functions of one configuration each."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from pyarrow import compute  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformer

from puma_hf.configs import DistillConfig, MergeConfig, StageConfig, TrainConfig
from puma_hf.data.items import load_items, load_mbeir
from puma_hf.data.mbeir import is_mbeir
from puma_hf.data.pairs import load_pairs
from puma_hf.files import ADAPTER_CONFIG, is_puma_directory
from puma_hf.losses import SelfDistillationLoss
from puma_hf.modeling.inputs_puma import SPECIAL_TOKEN, SPECIAL_TOKEN_REMEDY, shown
from puma_hf.pruning import read_limits, set_limits
from puma_hf.settings import processing_of
from puma_hf.trainer.arguments import training_arguments
from puma_hf.trainer.distillation import PumaDistillationTrainer
from puma_hf.trainer.lora import add_lora, lora_config, merge_adapter, puma_model
from puma_hf.trainer.objectives import training_loss
from puma_hf.trainer.puma import PumaTrainer
from puma_hf.trainer.quantization import quantization_config
from puma_hf.trainer.run import begin, check_sharding, prepare_output, run

logger = logging.getLogger(__name__)

# Columns of the training rows that the model is not to see.
_ID_COLUMNS = ("qid", "did", "positives")
_ROWS_AT_ONCE = 10_000


def distill(config: DistillConfig) -> Path:
    """Distil the full model into the pruned one on single items, without labels: our stage 1.

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
    >>> from puma_hf.configs import DistillConfig
    >>> from puma_hf.trainer.stages import distill

    >>> config = DistillConfig(model="puma-k4", output="puma-k4-lora", data="demo/emoji", teacher="demo/backbone")
    >>> distill(config)  # doctest: +SKIP
    ```
    """
    arguments, loading = training_arguments(config), _check_model(config)
    check_sharding(config, arguments)
    checkpoint = prepare_output(config)
    items = load_items(config.data, split=config.split, seed=config.seed)
    _check_special_tokens(items, config)
    begin(config, checkpoint, len(items))
    model = _load_with_lora(config, loading)
    trainer = PumaDistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=items,
        loss=SelfDistillationLoss(model, config.metric),
        **_teacher_arguments(config),
    )
    return run(trainer, config, checkpoint)


def train(config: TrainConfig) -> Path:
    """Train on labelled pairs: stage 2 with MAC-Loss, or with InfoNCE to compare; with a teacher, the released stage 1.

    No two rows of a batch share a right answer. Of pairs of one's own (`load_pairs`) these are known by their content.

    Args:
        config: What to train, on what, and how; see `TrainConfig`.

    Returns:
        `config.output`, which holds the adapter and `train.yaml`, the settings it was made with.

    Raises:
        FileExistsError: If the output is not empty and neither `resume` nor `overwrite` is set.
        ValueError: If the output is the model, or the dataset has no full batch.

    Example:

    ```python
    >>> from puma_hf.configs import TrainConfig
    >>> from puma_hf.trainer.stages import train

    >>> config = TrainConfig(model="puma-k4-distilled", output="puma-k4-mac-lora", data="demo/emoji")
    >>> train(config)  # doctest: +SKIP
    ```
    """
    for note in config.notes():
        logger.warning(note)
    arguments, loading = training_arguments(config), _check_model(config)
    check_sharding(config, arguments)
    checkpoint = prepare_output(config)
    rows = _labelled_rows(config)
    begin(config, checkpoint, len(rows))
    model = _load_with_lora(config, loading)
    trainer_class = PumaDistillationTrainer if config.joint else PumaTrainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=rows.select_columns([name for name in rows.column_names if name not in _ID_COLUMNS]),
        positives=rows["positives"] if "positives" in rows.column_names else None,
        loss=training_loss(model, config, num_devices=PartialState().num_processes),
        **(_teacher_arguments(config) if config.joint else {}),
    )
    return run(trainer, config, checkpoint)


def merge(config: MergeConfig) -> float:
    """Merge a trained adapter into its base, checked; `puma_hf.trainer.merge_adapter` with its settings in one object.

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
    _check_special_tokens(rows, config)
    if config.train_fraction == 1:
        return rows
    count = max(1, round(config.train_fraction * len(rows)))
    return rows.select(sorted(random.Random(config.seed).sample(range(len(rows)), count)))


def _pairs(config: TrainConfig) -> Dataset:
    if config.split != "train":
        raise ValueError(
            f"split={config.split!r} is a part of M-BEIR, and {config.data} holds pairs of one's own, which have no "
            "splits. Leave it out, or write them in M-BEIR's layout first (puma-hf pairs --mbeir)."
        )
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
    """Name the rows that training would stop at, before it begins."""
    if config.special_tokens == "split":
        return
    bad: dict[int, str] = {}
    for number, batch in enumerate(rows.flatten().with_format("arrow").iter(_ROWS_AT_ONCE)):
        for name in batch.column_names:
            if name.endswith((".text", ".instruction")):
                found = compute.match_substring_regex(batch[name], SPECIAL_TOKEN.pattern).fill_null(False)
                for place in compute.indices_nonzero(found).to_pylist():
                    bad.setdefault(number * _ROWS_AT_ONCE + place, f"{name} is {shown(batch[name][place].as_py())}")
    if bad:
        row = min(bad)
        qid = f", query {rows[row]['qid']!r}" if "qid" in rows.column_names else ""
        raise ValueError(
            f"{len(bad)} of {len(rows)} rows of {config.data} hold a special token, which the model would not read as "
            f"text. The first: row {row}{qid}: {bad[row]}. {SPECIAL_TOKEN_REMEDY}"
        )


def _teacher_arguments(config: DistillConfig | TrainConfig) -> dict[str, Any]:
    return {
        "teacher": config.teacher,
        "teacher_mode": config.teacher_mode,
        "teacher_cache": config.teacher_cache,
    }


def _check_model(config: StageConfig) -> dict[str, Any]:
    """How to load the model, once it is seen to be one: before anything in the output is touched."""
    folder = Path(config.model)
    if (folder / ADAPTER_CONFIG).is_file():
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
