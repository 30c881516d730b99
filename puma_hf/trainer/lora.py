"""The PUMA LoRA recipe, and the merge of a trained adapter into a complete directory."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from PIL import Image
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from torch import Tensor

from puma_hf.configs import RECIPES
from puma_hf.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FILE, is_hub_id, named_base, new_directory
from puma_hf.model_card import with_training_note
from puma_hf.modeling import PumaConfig, PumaModel, PumaProcessor
from puma_hf.modeling.processing_puma import write_sentence_transformers_files
from puma_hf.pruning import read_limits, set_limits, told_limits

logger = logging.getLogger(__name__)

# All linear layers of the decoder. Unlike peft's "all-linear" this leaves the vision tower and the merger be.
DECODER_LINEARS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# Distance of two embeddings, which are of length 1, in float32.
MERGE_TOLERANCE = 1e-4


def lora_config(
    *,
    r: int = 64,
    alpha: int | None = None,
    dropout: float = 0.05,
    ret_token_id: int | None = None,
) -> LoraConfig:
    """LoRA on every linear layer of the kept decoder layers; vision tower and merger stay as they are.

    Args:
        r: Rank. LamRA takes 64 for the stage on text pairs and 128 for M-BEIR.
        alpha: Scale, by default twice the rank, as in LamRA.
        dropout: Dropout before the adapter.
        ret_token_id: Also train the embedding row of this token, which is `[RET]` in the distillation stage;
            `model.config.ret_token_id` knows it.

    Returns:
        A configuration for `add_lora(model, ...)`.

    Raises:
        ValueError: If `r`, `alpha` or `dropout` is out of range.

    Example:

    ```python
    >>> from puma_hf import lora_config

    >>> lora_config(r=8).lora_alpha
    16
    ```

    Source: PUMA, ACM MM 2025, arXiv 2507.08064 trains with LoRA; the numbers are LamRA's, arXiv 2412.01720.
    """
    alpha = 2 * r if alpha is None else alpha
    if r < 1 or alpha < 1:
        raise ValueError(f"LoRA needs a rank and an alpha of at least 1, got r={r} and alpha={alpha}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is outside [0, 1). LamRA takes 0.05.")
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=DECODER_LINEARS,
        trainable_token_indices=None if ret_token_id is None else {"embed_tokens": [ret_token_id]},
    )


def merge_adapter(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
) -> float:
    """Merge a trained adapter into its base and save a complete PUMA directory.

    The base is read from disk and never quantised, also if the adapter was trained on a quantised one. The recipe that
    training left beside the adapter is copied; a push reads it for the card, and leaves it here.

    Args:
        adapter_dir: Directory with `adapter_config.json` and `adapter_model.safetensors`.
        output_dir: New or empty directory.
        base: PUMA directory, or Hub id of one, that the adapter was trained on; by default the one its
            configuration names.
        overwrite: Replace `output_dir` if it is not empty.

    Returns:
        The largest distance of an embedding before merging to the one after it, on fixed batches of random
        tokens and of random images.

    Raises:
        FileNotFoundError: If there is no adapter, or its base cannot be found.
        ValueError: If `base` is not what the adapter was trained on, the adapter does not fit it, or merging
            moved an embedding by more than 1e-4. Merging and this check are done in float32; the result is
            saved in the base's own data type.
        FileExistsError: If `output_dir` is not empty and `overwrite` is false.

    Example:

    ```python
    >>> from puma_hf.trainer import merge_adapter

    >>> merge_adapter("puma-2b-k14-lora", "puma-2b-k14-distilled")  # doctest: +SKIP
    1.2e-07
    ```
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
        after = _probe_embeddings(merged, probe)
        largest = float((after - before).norm(dim=1).max())
        if not largest <= MERGE_TOLERANCE:  # NaN is no success
            raise ValueError(
                f"Merging {str(adapter_dir)!r} moved embeddings by up to {largest:.2e}, more than "
                f"{MERGE_TOLERANCE:g}: the merged model would retrieve differently. The adapter may be damaged: "
                "merge an earlier checkpoint, or train it again."
            )
        settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        note = f"A LoRA adapter of rank {settings['r']} was trained and merged into the weights."
        merged.to(PumaConfig.from_pretrained(folder_of_base).dtype or torch.float32)
        # A fresh processor: one that was used would save the padding it used.
        processor = PumaProcessor.from_pretrained(folder_of_base)
        set_limits(processor, **read_limits(adapter))
        save_complete(merged, processor, folder, folder_of_base, note)
        for name in RECIPES.values():  # what the card tells of the training, wherever the adapter is by then
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, folder / name)
    logger.info("Merged %s into %s (largest distance %.1e): %s", adapter, folder_of_base, largest, output_dir)
    return largest


def _find_base(adapter: Path, base: str | Path | None) -> Path:
    """The directory to merge into, once adapter and base are seen to be there."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter / name).is_file():
            raise FileNotFoundError(f"{str(adapter)!r} has no {name}. Point to a directory that training saved.")
    if base is None:
        base = named_base(adapter)
    if str(base) and Path(base).is_dir():
        return Path(base)
    reason = ""
    if is_hub_id(str(base)):
        try:
            return Path(snapshot_download(str(base)))
        except (OSError, HfHubHTTPError) as error:
            reason = f", and not on the Hub ({str(error).strip().splitlines()[0]})"
    raise FileNotFoundError(
        f"The adapter's base {str(base)!r} is not a directory{reason}. Name the PUMA directory it was trained "
        "on: base=... (--base)."
    )


def _check_base(adapter: Path, base: Path) -> None:
    """Raise if the weights of `base` are not those that the adapter was trained on, where that is known."""
    file = adapter / BASE_FILE
    if not file.is_file():
        logger.warning("%s has no %s: whether it was trained on %s is not known.", adapter, BASE_FILE, base)
        return
    expected = json.loads(file.read_text(encoding="utf-8"))["sha256"]
    if (found := weights_sha256(base)) != expected:
        raise ValueError(
            f"{str(adapter)!r} was not trained on the weights in {str(base)!r} (SHA-256 {found[:12]} instead "
            f"of {expected[:12]}). Name the directory it was trained on: base=... (--base). If that one has "
            "changed since, restore it or train the adapter again."
        )


def _load_adapter(adapter: Path, base: Path) -> PeftModel:
    try:
        model = PeftModel.from_pretrained(PumaModel.from_pretrained(base, dtype=torch.float32), str(adapter)).eval()
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as weights:
            saved = set(weights.keys())
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"The adapter {str(adapter)!r} does not fit {str(base)!r} or is damaged ({reason}). Name the "
            "directory it was trained on: base=... (--base)."
        ) from error
    # peft only warns about these, and fills the gap with an untrained adapter.
    if different := sorted(saved ^ set(get_peft_model_state_dict(model))):
        raise ValueError(
            f"The adapter {str(adapter)!r} and {str(base)!r} disagree on {len(different)} tensors (first: "
            f"{different[0]}). Name the directory it was trained on: base=... (--base)."
        )
    return model


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of the safetensors files of a directory, names included."""
    files = sorted(Path(folder).resolve().glob("*.safetensors"))
    stats = [(path, path.stat()) for path in files]
    return _files_sha256(tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@lru_cache(maxsize=4)
def _files_sha256(files: tuple[tuple[str, int, int], ...]) -> str:
    # Size and time of change are there for the cache: every checkpoint of a run asks for the same files.
    digest = hashlib.sha256()
    for name, _, _ in files:
        with Path(name).open("rb") as file:
            digest.update(Path(name).name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def save_base_fingerprint(model: SentenceTransformer, folder: str | Path) -> None:
    """Note beside a saved adapter which weights it belongs to, so that `merge_adapter` can check them.

    Nothing is written if the model has no adapter, or was not loaded from a directory.
    """
    backbone = puma_model(model)
    base = Path(str(backbone.name_or_path))
    if has_adapter(backbone) and base.is_dir():
        content = json.dumps({"sha256": weights_sha256(base)}, indent=2) + "\n"
        (Path(folder) / BASE_FILE).write_text(content, encoding="utf-8")


def save_complete(model: PumaModel, processor: PumaProcessor, folder: Path, like: Path, training_note: str) -> None:
    """Save a PUMA model so that both loaders open it, with prompts and card of the directory `like`."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    settings = json.loads((like / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    write_sentence_transformers_files(folder, settings["prompts"])
    card = like / "README.md"
    if card.is_file():
        text = with_training_note(card.read_text(encoding="utf-8"), training_note)
        if told := told_limits(like):
            text = text.replace(told, told_limits(folder) or told)
        (folder / "README.md").write_text(text, encoding="utf-8")


def _probe_batches(config: PumaConfig, processor: PumaProcessor) -> list[dict[str, Tensor]]:
    """8 random token sequences, and 2 random images."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, len(processor.tokenizer), (8, 24), generator=generator)
    input_ids[torch.isin(input_ids, torch.tensor([config.image_token_id, config.video_token_id]))] = 0
    if config.ret_token_id is not None:  # its row may have been trained too
        input_ids[:, -1] = config.ret_token_id
    pixels = torch.randint(0, 256, (2, 56, 84, 3), generator=generator, dtype=torch.uint8)
    alone, captioned = (Image.fromarray(image.numpy()) for image in pixels)
    pictures = processor.process_inputs([{"image": alone}, {"image": captioned, "text": "a picture"}])
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    return [{"input_ids": input_ids}, {name: pictures[name] for name in names}]


@torch.inference_mode()
def _probe_embeddings(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    on_device = ({name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches)
    return torch.cat([model(**batch).embeddings for batch in on_device]).float()


def is_puma_model(model: SentenceTransformer) -> bool:
    """Whether a SentenceTransformer runs a PUMA model."""
    config = getattr(getattr(model[0], "model", None), "config", None)
    return getattr(config, "model_type", None) == PumaConfig.model_type


def puma_model(model: SentenceTransformer) -> PumaModel:
    """The `PumaModel` inside a SentenceTransformer.

    Raises:
        ValueError: If there is none.
    """
    first: Any = model[0]
    backbone: Any = getattr(first, "model", None)
    model_type = getattr(getattr(backbone, "config", None), "model_type", None)
    if model_type != PumaConfig.model_type:
        raise ValueError(
            f"The model has model_type={model_type!r}, but only models pruned from a Qwen2-VL ('puma') can be "
            "trained here. Make one with puma_hf.prune (puma-hf prune)."
        )
    puma: PumaModel = backbone
    return puma


def has_adapter(backbone: PumaModel) -> bool:
    """Whether a model has a LoRA adapter."""
    return bool(getattr(backbone, "_hf_peft_config_loaded", False))


def add_lora(model: SentenceTransformer, config: LoraConfig) -> None:
    """Give a PUMA `SentenceTransformer` a fresh adapter in float32 and freeze everything else.

    Raises:
        ValueError: If the model is no PUMA model, or already has an adapter.
    """
    backbone = puma_model(model)
    if has_adapter(backbone):
        raise ValueError("The model already has an adapter. Merge it first (puma-hf merge), or load its base.")
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    model.add_adapter(config)
    base: Any = backbone.name_or_path
    if Path(base).is_dir():  # a relative path would be looked for wherever the adapter is opened
        backbone.peft_config["default"].base_model_name_or_path = str(Path(base).resolve())
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            # In the bfloat16 of published checkpoints, most updates of the optimizer would round to nothing.
            parameter.data = parameter.data.float()
