"""The merge of a trained adapter into a complete directory, checked: merged == adapter."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel, get_peft_model_state_dict
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puma_hf.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_FILE,
    DISTILL_RECIPE,
    TRAIN_RECIPE,
    is_hub_id,
    named_base,
    new_directory,
)
from puma_hf.modeling import PumaConfig, PumaModel, PumaProcessor
from puma_hf.modeling.processing_puma import write_sentence_transformers_files
from puma_hf.pruning import read_limits, set_limits, told_limits, with_training_note
from puma_hf.trainer.lora_puma import weights_sha256

logger = logging.getLogger(__name__)

# Distance of two embeddings, which are of length 1, in float32.
MERGE_TOLERANCE = 1e-4


def merge_adapter(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
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
        The largest distance of an embedding before merging to the one after it, on random tokens and images.

    Raises:
        FileNotFoundError: If there is no adapter, or its base cannot be found.
        ValueError: If the adapter was not trained on `base`, does not fit it, or moved an embedding by above 1e-4.
        FileExistsError: If `output_dir` is not empty and `overwrite` is false.

    Example:
        >>> merge_adapter("puma-2b-k14-lora", "puma-2b-k14-distilled")  # doctest: +SKIP
        1.2e-07
    """
    adapter = Path(adapter_dir)
    folder_of_base = _find_base(adapter, base)
    if adapter.resolve().is_relative_to(Path(output_dir).resolve()):
        raise ValueError(f"output_dir {str(output_dir)!r} is, or holds, the adapter itself. Choose another directory.")
    with new_directory(output_dir, overwrite=overwrite, forbidden=folder_of_base) as folder:
        _check_base(adapter, folder_of_base)
        model = _load_adapter(adapter, folder_of_base)
        probe = _probe_batches(model.config, PumaProcessor.from_pretrained(folder_of_base))
        before = _probe_embeddings(model, probe)
        merged: Any = model.merge_and_unload()
        largest = float((_probe_embeddings(merged, probe) - before).norm(dim=1).max())
        if not largest <= MERGE_TOLERANCE:  # NaN is no success
            raise ValueError(
                f"Merging {str(adapter_dir)!r} moved embeddings by up to {largest:.2e}, more than {MERGE_TOLERANCE:g}, "
                "as with a damaged adapter: merge an earlier checkpoint, or train it again."
            )
        merged.to(PumaConfig.from_pretrained(folder_of_base).dtype or torch.float32)
        _save_complete(merged, folder, folder_of_base, adapter)
    logger.info("Merged %s into %s (largest distance %.1e): %s", adapter, folder_of_base, largest, output_dir)
    return largest


def _find_base(adapter: Path, base: str | Path | None) -> Path:
    """The directory to merge into, once adapter and base are seen to be there."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter / name).is_file():
            raise FileNotFoundError(f"{str(adapter)!r} has no {name}. Point to a directory that training saved.")
    name = str(base or named_base(adapter))
    if name and Path(name).is_dir():
        return Path(name)
    reason = ""
    if is_hub_id(name):
        try:
            return Path(snapshot_download(name))
        except (OSError, HfHubHTTPError) as error:
            reason = f", and not on the Hub ({str(error).strip().splitlines()[0]})"
    raise FileNotFoundError(f"The adapter's base {name!r} is not a directory{reason}. Name it: base=... (--base).")


def _check_base(adapter: Path, base: Path) -> None:
    """Raise if the weights of `base` are not those that the adapter was trained on, where that is known."""
    if not (adapter / BASE_FILE).is_file():
        logger.warning("%s has no %s: whether it was trained on %s is not known.", adapter, BASE_FILE, base)
        return
    expected = json.loads((adapter / BASE_FILE).read_text(encoding="utf-8"))["sha256"]
    if (found := weights_sha256(base)) != expected:
        raise ValueError(
            f"{str(adapter)!r} was not trained on the weights in {str(base)!r} (SHA-256 {found[:12]} instead "
            f"of {expected[:12]}). Name the directory it was trained on, unchanged: base=... (--base)."
        )


def _load_adapter(adapter: Path, base: Path) -> PeftModel:
    try:
        model = PeftModel.from_pretrained(PumaModel.from_pretrained(base, dtype=torch.float32), str(adapter)).eval()
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as weights:
            saved = set(weights.keys())
        # peft only warns about these, and fills the gap with an untrained adapter.
        different = sorted(saved ^ set(get_peft_model_state_dict(model)))
        reason = f"{len(different)} tensors, first: {different[0]}" if different else ""
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
    if reason:
        raise ValueError(
            f"{str(adapter)!r} does not fit {str(base)!r} or is damaged ({reason}). Name its base (--base)."
        )
    return model


def _save_complete(model: PumaModel, folder: Path, base: Path, adapter: Path) -> None:
    """Save a model so that both loaders open it, with the base's prompts and card, and the adapter's limits."""
    model.save_pretrained(folder)
    processor = PumaProcessor.from_pretrained(base)  # a fresh one: the one that was used would save its padding
    set_limits(processor, **read_limits(adapter))
    processor.save_pretrained(folder)
    # Prompts belong to the base: training neither reads nor changes them.
    settings = json.loads((base / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    write_sentence_transformers_files(folder, settings["prompts"])
    if (base / "README.md").is_file():
        rank = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"]
        note = f"A LoRA adapter of rank {rank} was trained and merged into the weights."
        text = with_training_note((base / "README.md").read_text(encoding="utf-8"), note)
        if told := told_limits(base):
            text = text.replace(told, told_limits(folder) or told)
        (folder / "README.md").write_text(text, encoding="utf-8")
    # What the card tells of all stages, wherever the adapters are by then.
    for recipe in (source / name for source in (base, adapter) for name in (DISTILL_RECIPE, TRAIN_RECIPE)):
        if recipe.is_file():
            shutil.copyfile(recipe, folder / recipe.name)


def _probe_batches(config: PumaConfig, processor: PumaProcessor) -> list[dict[str, Tensor]]:
    """8 random token sequences, and 2 random images."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, len(processor.tokenizer), (8, 24), generator=generator)
    input_ids[torch.isin(input_ids, torch.tensor([config.image_token_id, config.video_token_id]))] = 0
    if config.ret_token_id is not None:  # its row may have been trained too
        input_ids[:, -1] = config.ret_token_id
    pixels = torch.randint(0, 256, (2, 56, 84, 3), generator=generator, dtype=torch.uint8)
    alone, captioned = (Image.fromarray(image.numpy()) for image in pixels)
    images = processor.process_inputs([{"image": alone}, {"image": captioned, "text": "a picture"}])
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    return [{"input_ids": input_ids}, {name: images[name] for name in names}]


@torch.inference_mode()
def _probe_embeddings(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    on_device = ({name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches)
    return torch.cat([model(**batch).embeddings for batch in on_device]).float()
