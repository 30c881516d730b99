"""An evaluation as a function of one configuration: it opens the model and the data."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from pathlib import Path

from sentence_transformers import SentenceTransformer

from puma_hf.configs import EvaluateConfig
from puma_hf.data.mbeir import MBEIR
from puma_hf.data.mbeir_hub import open_mbeir
from puma_hf.data.mbeir_write import build_nano
from puma_hf.evaluation.mbeir import evaluate_mbeir
from puma_hf.evaluation.mbeir_results import MBEIRResults
from puma_hf.fingerprint import short_name
from puma_hf.modeling.configuration_puma import CONFIG_CLASSES
from puma_hf.opening import check_truncate_dim, open_sentence_transformer
from puma_hf.processes import locked_for_all, main_process_first, own_device, shared_folder
from puma_hf.settings import processing_of

logger = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> MBEIRResults:
    """Measure a model on M-BEIR, on data in its layout, or on a small subset of either.

    Started by `accelerate launch` or `torchrun`, the processes share the work, and all return the same results.

    Args:
        config: What to measure, on what, and how; see `EvaluateConfig`.

    Returns:
        The table; `print(results.to_markdown())` shows it.

    Raises:
        FileNotFoundError: If the data, the split or an image is missing.
        ValueError: If the data are wrong, the output holds embeddings of another model or setting, or `truncate_dim`
            is more than the model has.
        DirectoryInUseError: If another run writes into the output.

    Example:
        >>> from puma_hf.configs import EvaluateConfig
        >>> from puma_hf.evaluation.run import evaluate
        >>> config = EvaluateConfig(model="puma-k4-mac", data="demo/emoji", output="results")
        >>> print(evaluate(config).to_markdown())  # doctest: +SKIP
    """
    for note in config.notes():
        logger.warning(note)
    processing = processing_of(config.special_tokens)
    with locked_for_all(config.output), ExitStack() as stack:
        data = _open_data(config, stack)
        return evaluate_mbeir(
            _open_model(config),
            data,
            split=config.split,
            tasks=config.tasks or None,
            pool=config.pool,
            batch_size=config.batch_size,
            instruction_seed=config.instruction_seed,
            popularity_penalty=config.popularity_penalty,
            output_dir=config.output,
            embedding_dtype=config.embedding_dtype,
            search_backend=config.search_backend,
            encode_kwargs={"processing_kwargs": processing} if processing else None,
            model_name=short_name(config.model),
            data_name=short_name(config.data) + (" (nano)" if config.benchmark == "nano" else ""),
        )


def _open_data(config: EvaluateConfig, stack: ExitStack) -> MBEIR:
    tasks = config.tasks or None
    with main_process_first():  # it imports, the others read what it made
        data = open_mbeir(config.data, split=config.split, tasks=tasks, revision=config.data_revision)
    if config.benchmark != "nano":
        return data
    folder = config.nano_folder or (Path(config.output, "nano") if config.output is not None else None)
    if folder is None:
        folder = stack.enter_context(shared_folder(None)) / "nano"
    with main_process_first():
        return build_nano(
            data,
            folder,
            split=config.split,
            tasks=tasks,
            num_queries=config.nano_queries,
            num_candidates=config.nano_candidates,
            seed=config.nano_seed,
        )


def _open_model(config: EvaluateConfig) -> SentenceTransformer:
    _refuse_unpruned(config.model)
    model = open_sentence_transformer(
        config.model,
        device=own_device(),
        revision=config.revision,
        truncate_dim=config.truncate_dim,
        trust_remote_code=config.trust_remote_code,
    )
    check_truncate_dim(model, config.model, config.truncate_dim)
    return model


def _refuse_unpruned(model: str) -> None:
    """Raise a ValueError for an original checkpoint, which sentence-transformers would read its own way."""
    try:
        found = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # on the Hub, or no model: sentence-transformers says so
    sources = [config_class.source_model_type for config_class in CONFIG_CLASSES]
    is_original = isinstance(found, dict) and found.get("model_type") in sources
    if is_original and not Path(model, "modules.json").is_file():
        raise ValueError(
            f"{model!r} is an original {found['model_type']} checkpoint, must be an embedder. Make one of it first: "
            f"puma-hf prune {model} OUTPUT --num-kept-layers K (all of its layers for the whole model)."
        )
