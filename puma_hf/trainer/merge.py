"""The merge of a trained adapter into a complete directory, checked: merged == adapter."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor

from puma_hf.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_FILE,
    DISTILL_RECIPE,
    TRAIN_RECIPE,
    is_hub_id,
    is_puma_directory,
    named_base,
    new_directory,
    read_config,
)
from puma_hf.modeling import PumaModel, PumaProcessor
from puma_hf.modeling.processing_puma import write_sentence_transformers_files
from puma_hf.pruning import read_limits, set_limits, told_limits, with_training_note
from puma_hf.trainer.lora_puma import weights_sha256

logger = logging.getLogger(__name__)

# Distance of two embeddings, which are of length 1, in float32.
MERGE_TOLERANCE = 1e-4


def merge_adapter(
    adapter_dir: str | Path, output_dir: str | Path, *, base: str | Path | None = None, overwrite: bool = False
) -> float:
    """Merge a trained adapter into its base and save a complete PUMA directory, with the recipes of its training.

    Merging and its check are done in float32, on the base as it is on disk, never quantised; the result is saved in the
    base's own data type.

    Args:
        adapter_dir: Directory that training saved.
        output_dir: New or empty directory.
        base: PUMA directory, or Hub id of one, that it was trained on; by default the one its configuration names.
        overwrite: Replace `output_dir` if it is not empty.

    Returns:
        The largest distance of an embedding before merging to the one after it, on random texts and images.

    Raises:
        FileNotFoundError: If there is no adapter, or its base cannot be found.
        ValueError: If the adapter was not trained on `base`, does not fit it, lies in `output_dir`, or moved an
            embedding by above 1e-4.
        FileExistsError: If `output_dir` is not empty and `overwrite` is false.

    Example:
        >>> merge_adapter("puma-2b-k14-lora", "puma-2b-k14-distilled")  # doctest: +SKIP
        1.2e-07
    """
    adapter, output = Path(adapter_dir), Path(output_dir)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter / name).is_file():
            raise FileNotFoundError(f"{str(adapter)!r} has no {name}. Point to a directory that training saved.")
    name = str(base or named_base(adapter))
    source = Path(name)
    if not is_puma_directory(source):
        if not is_hub_id(name):
            raise FileNotFoundError(f"The adapter's base {name!r} is no PUMA directory. Name it: base=... (--base).")
        source = Path(snapshot_download(name))
    if adapter.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"output_dir {str(output)!r} is, or holds, the adapter itself. Choose another directory.")
    with new_directory(output, overwrite=overwrite, forbidden=source) as folder:
        model = _load_adapter(adapter, source)
        probe = _probe(AutoProcessor.from_pretrained(source))
        with torch.inference_mode():
            before = model(**probe).embeddings
        merged: Any = model.merge_and_unload()
        with torch.inference_mode():
            largest = float((merged(**probe).embeddings - before).norm(dim=1).max())
        if not largest <= MERGE_TOLERANCE:  # NaN is no success
            moved = f"Merging {str(adapter)!r} moved embeddings by up to {largest:.2e}, more than {MERGE_TOLERANCE:g}"
            raise ValueError(f"{moved}, as with a damaged adapter: merge an earlier checkpoint, or train it again.")
        merged.to(AutoConfig.from_pretrained(source).dtype or torch.float32)
        _save_complete(merged, folder, source, adapter)
    logger.info("Merged %s into %s (largest distance %.1e): %s", adapter, source, largest, output)
    return largest


def _load_adapter(adapter: Path, base: Path) -> PeftModel:
    """The adapter on its base, whose weights must be those that it was trained on, where that is known."""
    if "sha256" not in (noted := read_config(adapter, BASE_FILE)):
        logger.warning("%s has no %s: whether it was trained on %s is not known.", adapter, BASE_FILE, base)
    elif (found := weights_sha256(base)) != noted["sha256"]:
        other = f"(SHA-256 {found[:12]} instead of {noted['sha256'][:12]}). Name the directory that it was: --base."
        raise ValueError(f"{str(adapter)!r} was not trained on the weights in {str(base)!r} {other}")
    try:
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), str(adapter)).eval()
    except RuntimeError as error:  # of tensors of other shapes, each on a line of its own
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(f"{str(adapter)!r} does not fit {str(base)!r}: {first} Name its base (--base).") from error
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as weights:
        saved = set(weights.keys())
    # peft only warns about these, and fills the gap with an untrained adapter.
    if different := sorted(saved ^ set(get_peft_model_state_dict(model))):
        what = f"{len(different)} tensors, first: {different[0]}"
        raise ValueError(f"{str(adapter)!r} does not fit {str(base)!r}: {what}. Name its base (--base).")
    return model


def _save_complete(model: PumaModel, folder: Path, base: Path, adapter: Path) -> None:
    """Save a model so that both loaders open it, with the base's prompts and card, and the adapter's limits."""
    # The last training decides which space the model is in, and after which layers it embeds.
    noted = read_config(adapter, BASE_FILE)
    model.config.teacher_fingerprint, model.config.trained_depths = noted.get("teacher"), noted.get("trained_depths")
    model.save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(base)  # a fresh one: the one that was used would save its padding
    set_limits(processor, **read_limits(adapter))
    processor.save_pretrained(folder)
    # Prompts belong to the base: training neither reads nor changes them.
    write_sentence_transformers_files(folder, read_config(base, "config_sentence_transformers.json"))
    if (base / "README.md").is_file():
        rank = read_config(adapter, ADAPTER_CONFIG)["r"]
        note = f"A LoRA adapter of rank {rank} was trained and merged into the weights."
        text = with_training_note((base / "README.md").read_text(encoding="utf-8"), note)
        if told := told_limits(base):
            text = text.replace(told, told_limits(folder) or told)
        (folder / "README.md").write_text(text, encoding="utf-8")
    # What the card tells of all stages, wherever the adapters are by then.
    for recipe in (source / name for source in (base, adapter) for name in (DISTILL_RECIPE, TRAIN_RECIPE)):
        if recipe.is_file():
            shutil.copyfile(recipe, folder / recipe.name)


def _probe(processor: PumaProcessor) -> dict[str, Tensor]:
    """A batch of 8 random texts and 2 random images, which end in `[RET]`: its row may have been trained, too."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, processor.tokenizer.vocab_size, (8, 24), generator=generator)
    texts = [" ".join(map(str, row)) for row in ids.tolist()]
    pixels = torch.randint(0, 256, (2, 56, 84, 3), generator=generator, dtype=torch.uint8)
    alone, captioned = (Image.fromarray(image.numpy()) for image in pixels)
    batch = processor.process_inputs([*texts, {"image": alone}, {"image": captioned, "text": "a picture"}])
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
