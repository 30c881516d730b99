"""Cut an original checkpoint to its first k decoder layers, or to others, and write a complete PUMA directory."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from tokenizers import AddedToken
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoTokenizer
from transformers.image_utils import SizeDict
from transformers.models.auto.video_processing_auto import get_video_processor_config

from puma_hf.checkpoint import INDEX_NAME, Checkpoint, load_kept, open_checkpoint
from puma_hf.data.tasks import MBEIR_INSTRUCTIONS
from puma_hf.files import PUMA_MODEL_TYPES, is_adapter_directory, is_hub_id, model_files, new_directory, read_config
from puma_hf.modeling import RET_TOKEN, PumaConfig, PumaImageTextProcessor, PumaModel, PumaProcessor
from puma_hf.modeling.configuration_puma import chosen_layers, config_class_of, named_layers
from puma_hf.modeling.processing_puma import PIPELINES, write_sentence_transformers_files
from puma_hf.modeling.readings_puma import reading_of
from puma_hf.sources import TRANSFORMER_FILE, Source, check_template, find_source

logger = logging.getLogger(__name__)

# As PUMA and LamRA read images, in training and in evaluation. A general model's limit is thousands.
DEFAULT_VISUAL_TOKENS = 300
_IMAGE_TOKEN = "<|image_pad|>"
_CARD = Path(__file__).with_name("hub_card.md")  # where a wheel has it
if not _CARD.is_file():
    _CARD = Path(__file__).parents[1] / "hub_card.md"  # at the root of the repository, as in an editable install
TAGS = ("puma", "multimodal-retrieval", "layer-pruning", "sentence-transformers", "transformers", "custom_code")


@dataclass(frozen=True)
class PruneReport:
    """What pruning kept and dropped.

    Parameters and bytes "before" are those of the source, with the language-model head if it has one. `kept_layers`
    counts from the source's first layer, `num_source_layers` is how many that had, and a PUMA directory that is cut
    further has fewer than `original_num_hidden_layers`.
    """

    output_dir: str
    num_kept_layers: int
    kept_layers: list[int]
    num_source_layers: int
    original_num_hidden_layers: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    max_pixels: int
    max_visual_tokens: int
    reading: str
    found: str  # what says that it is read so

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        dropped = [layer for layer in range(self.num_source_layers) if layer not in self.kept_layers]
        return (
            f"kept     vision tower, token embedding, {named_layers(self.kept_layers)} of {self.num_source_layers}, "
            "final norm\n"
            f"dropped  {named_layers(dropped) if dropped else 'no decoder layer'}; a language-model head, if any\n"
            f"before   {self.parameters_before:>14,} parameters  {self.bytes_before:>15,} bytes\n"
            f"after    {self.parameters_after:>14,} parameters  {self.bytes_after:>15,} bytes"
            f"  ({self.parameters_after / self.parameters_before:.0%})\n"
            f"images   at most {self.max_visual_tokens:,} visual tokens, {self.max_pixels:,} pixels\n"
            f"reading  {self.reading} ({self.found}), positions: {reading_of(self.reading).positions}\n"
            f"saved    {self.output_dir}"
        )


def prune(
    source: str | Path,
    output_dir: str | Path,
    *,
    num_kept_layers: int | None = None,
    keep_layers: Sequence[int] | str | None = None,
    dtype: str | torch.dtype = "auto",
    max_pixels: int | str | None = None,
    reading: str | None = None,
    prompts: Mapping[str, str] | None = None,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> PruneReport:
    """Keep the first decoder layers, or a list of them, of a Qwen-VL (2, 2.5, 3, 3.5) and save a complete directory.

    The result holds weights, processor, chat template, prompts, a model card, and the code that `AutoModel` and
    `SentenceTransformer` need where puma_hf is not installed. Tensors of dropped layers are never read, and from the
    Hub only the shards that hold kept tensors are downloaded.

    An embedder goes on reading inputs as it does: template, instruction, limits, padding, positions, prompts and
    similarity stay, and nothing is added to its vocabulary. A generative model gets the token `[RET]`, at which the
    embedding is read. It starts as the mean of all token embeddings of the original vocabulary, from where the
    distillation stage may train it. A tokenizer that already has `[RET]` keeps its row.

    Args:
        source: Folder or Hub id of an original Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5 checkpoint (safetensors, one
            file or shards), of an embedder made from one, or of a PUMA directory to prune further.
        output_dir: New or empty directory.
        num_kept_layers: Number k of decoder layers to keep, 1 to the number of layers.
        keep_layers: Instead of it, which of the source's layers to keep: rising numbers from 0, as a list or as text
            such as "0-10,27". A Qwen3-VL keeps those after which DeepStack adds features: the first three.
        dtype: Data type of the saved weights; "auto" keeps the checkpoint's.
        max_pixels: Pixels that images are scaled down to; "source" keeps the source's own limit. By default 300 visual
            tokens (235,200 pixels, later 307,200), as in PUMA and LamRA, or the source's limit if that is lower;
            a PUMA directory and an embedder keep their own.
        reading: "puma", this library's prompt with M-RoPE positions; "puma-released", the prompt and the sequential
            positions of the authors' code (Qwen2-VL and Qwen2.5-VL); "source", what a sentence-transformers directory
            says of itself; or an embedder's own, such as "gme" (see `READINGS`). By default it is found out from the
            source, see `puma_hf.sources.find_source`.
        prompts: Named instructions for `encode(prompt_name=...)`; an embedder's own, or M-BEIR's, by default.
        revision: Branch, tag or commit on the Hub.
        token: Hub token; by default the one that huggingface_hub has stored.
        overwrite: Replace `output_dir` if it is not empty.

    Returns:
        What was kept and dropped; `print` shows it.

    Raises:
        ValueError: If `num_kept_layers`, `keep_layers`, `max_pixels`, `dtype` or `reading` cannot be of this source, or
            the checkpoint is of another family, damaged, or an embedder that a cut copy could not be read like.
        FileNotFoundError: If the source, or a shard of it, does not exist, or it is not in safetensors format.
        FileExistsError: If `output_dir` is not empty and `overwrite` is false.

    Example:

    ```python
    >>> from puma_hf import prune

    >>> report = prune("Qwen/Qwen2-VL-2B-Instruct", "puma-2b-k14", num_kept_layers=14)  # doctest: +SKIP
    >>> report.num_kept_layers, report.original_num_hidden_layers  # doctest: +SKIP
    (14, 28)
    ```

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, layer-pruned self-distillation; its released code for a list of layers.
    """
    checkpoint = open_checkpoint(source, revision=revision, token=token)
    model_type = read_config(checkpoint.folder).get("model_type", "")
    is_original = model_type not in PUMA_MODEL_TYPES
    config = config_class_of(model_type).from_pretrained(checkpoint.folder)
    layers = chosen_layers(num_kept_layers, keep_layers, config.num_kept_layers or 0)
    with new_directory(output_dir, overwrite=overwrite, forbidden=checkpoint.folder) as folder:
        processor, origin = _build_processor(checkpoint, config, reading)
        images = processor.image_processor
        if is_original:
            set_limits(processor, **_own_limits(checkpoint.folder, processor, is_limited=max_pixels is None))
        limit: Any = None if max_pixels == "source" else max_pixels
        # The command line gives a number as text.
        set_limits(processor, max_pixels=int(limit) if isinstance(limit, str) and limit.isdecimal() else limit)
        model = load_kept(checkpoint, config, layers, dtype)
        if reading_of(processor.reading).end == RET_TOKEN:
            place_ret_token(model, processor.tokenizer)
        if is_original and hasattr(model.config, "auto_map"):
            del model.config.auto_map  # to code of the source's, which is not there
        model.config.positions = reading_of(processor.reading).positions
        model.config.custom_pipelines = PIPELINES
        # A local path says where the user keeps files; only its last part is worth publishing.
        own_name = checkpoint.name if checkpoint.revision else checkpoint.folder.resolve().name
        model.config.source_name_or_path = config.source_name_or_path or own_name
        model.config.source_revision = config.source_revision or checkpoint.revision
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        settings = origin.settings or {"prompts": MBEIR_INSTRUCTIONS}
        if prompts is not None:
            default = settings.get("default_prompt_name")
            settings |= {"prompts": prompts, "default_prompt_name": default if default in prompts else None}
        write_sentence_transformers_files(folder, settings)
        with torch.device("meta"):  # where a tensor has a shape and takes no memory
            make: Any = AutoModelForImageTextToText if "lm_head.weight" in checkpoint.weight_files else AutoModel
            before = make.from_config(AutoConfig.from_pretrained(checkpoint.folder)).num_parameters()
        # Qwen3-VL's checkpoints name their data type in the text tower's configuration alone.
        source_dtype = config.dtype or config.text_config.dtype or model.dtype
        report = PruneReport(
            output_dir=str(output_dir),
            num_kept_layers=len(layers),
            kept_layers=layers,
            num_source_layers=config.num_kept_layers,
            original_num_hidden_layers=model.config.original_num_hidden_layers or 0,
            parameters_before=before,
            parameters_after=model.num_parameters(),
            bytes_before=before * source_dtype.itemsize,
            bytes_after=model.num_parameters() * model.dtype.itemsize,
            max_pixels=images.size["longest_edge"],
            max_visual_tokens=images.size["longest_edge"] // pixels_per_token(images),
            reading=processor.reading,
            found=origin.found,
        )
        write_model_card(folder, model.config, report, is_original=is_original)
    logger.info("Pruned %s to %d of %d layers: %s", source, len(layers), report.num_source_layers, output_dir)
    return report


def cut_copy(source: Path, output_dir: Path, num_kept_layers: int) -> None:
    """Write the first layers of a PUMA directory as a directory of its own, which embeds as the source at that depth.

    Weights and configuration are new. Code, prompts, limits and card are the source's own, which `prune` makes anew.
    A ValueError if the source is an adapter, or has no such number of layers.
    """
    if is_adapter_directory(source):
        problem = f"num_kept_layers={num_kept_layers} is for a whole model, and {str(source)!r} is an adapter"
        raise ValueError(f"{problem}. Merge it first (puma-hf merge), and take the result.")
    model = AutoModel.from_pretrained(source, num_kept_layers=num_kept_layers, dtype="auto")
    model.save_pretrained(output_dir)
    for name in (*model_files(source), "README.md"):
        is_new = name in ("config.json", INDEX_NAME) or name.endswith(".safetensors")
        if not is_new and (source / name).is_file():
            shutil.copyfile(source / name, output_dir / name)


def _build_processor(checkpoint: Checkpoint, config: Any, asked: str | None) -> tuple[PumaProcessor, Source]:
    folder, tokenizer = checkpoint.folder, AutoTokenizer.from_pretrained(checkpoint.folder)
    # Without tokenizer files transformers builds an empty tokenizer.
    if _IMAGE_TOKEN not in tokenizer.get_vocab():
        raise ValueError(f"{checkpoint.name!r} lacks its tokenizer, with {_IMAGE_TOKEN!r}. Download it again.")
    origin = find_source(checkpoint, tokenizer, asked)
    reading = reading_of(origin.reading)
    if reading.backbones is not None and config.source_model_type not in reading.backbones:
        made = f"reading={origin.reading!r} is made for {' and '.join(reading.backbones)}"
        raise ValueError(f"{made}, but {checkpoint.name!r} is a {config.source_name}. Choose reading='puma'.")
    if origin.padding_side is not None:
        # The second is what a save writes.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = origin.padding_side
    processor = (PumaProcessor if isinstance(config, PumaConfig) else PumaImageTextProcessor)(
        image_processor=AutoImageProcessor.from_pretrained(folder),
        tokenizer=tokenizer,
        video_processor=get_video_processor_config(folder) or None,  # settings: they need no torchvision
        chat_template=origin.template,
        reading=origin.reading,
    )
    if reading.template is None:
        check_template(processor, checkpoint.name)
    return processor, origin


def place_ret_token(model: PumaModel, tokenizer: Any) -> None:
    """Make `[RET]` one special token with an embedding row, adding both where the model's tokenizer lacks it."""
    rows = len(tokenizer)
    is_new = RET_TOKEN not in tokenizer.get_vocab()
    # A [RET] that is there already may be an ordinary token, which a user's text could hold unnoticed.
    tokenizer.add_tokens([AddedToken(RET_TOKEN, special=True, normalized=False)], special_tokens=True)
    ret_token_id = int(tokenizer.convert_tokens_to_ids(RET_TOKEN))
    if is_new:
        embedding: Any = model.get_input_embeddings()
        if ret_token_id >= len(embedding.weight):  # Qwen pads the vocabulary, so that most have a row to spare
            embedding = model.resize_token_embeddings(ret_token_id + 1, mean_resizing=False)
        with torch.no_grad():
            weight = embedding.weight
            weight[ret_token_id] = weight[:rows].mean(dim=0, dtype=torch.float32).to(weight)
    model.config.ret_token_id = ret_token_id


# ------------------------------------------------------------------ limits: how large an image, how long a text is read


def _own_limits(folder: Path, processor: PumaProcessor, *, is_limited: bool) -> dict[str, Any]:
    """What `set_limits` is to set of an original's: its own, or the reading's; a generative model's is far too high."""
    reading, images = reading_of(processor.reading), processor.image_processor
    token = pixels_per_token(images)
    if reading.template is None:
        return read_limits(folder)
    if reading.visual_tokens is not None:
        least, most = (number * token for number in reading.visual_tokens)
        limits = {"min_pixels": least, "max_pixels": most} if is_limited else {}
        return {**limits, "max_length": reading.max_length}
    usual = max(images.size["shortest_edge"], DEFAULT_VISUAL_TOKENS * token)
    return {"max_pixels": min(images.size["longest_edge"], usual)} if is_limited else {}


def pixels_per_token(image_processor: Any) -> int:
    """Pixels that make one visual token: 28 x 28 for Qwen2-VL and Qwen2.5-VL, 32 x 32 later."""
    return int(image_processor.patch_size * image_processor.merge_size) ** 2


def set_limits(
    processor: Any, *, min_pixels: int | None = None, max_pixels: int | None = None, max_length: int | None = None
) -> None:
    """Change what a `PumaProcessor` reads, for good: saved, it is read so by stock classes, too.

    Images are enlarged to `min_pixels` and scaled down to `max_pixels`; text alone is cut at `max_length` tokens. None
    leaves a limit as it is.

    Raises:
        ValueError: If `max_pixels` is not a whole number, or less than `min_pixels` or than one visual token.
    """
    images = processor.image_processor
    lowest = images.size["shortest_edge"] if min_pixels is None else min_pixels
    highest = images.size["longest_edge"] if max_pixels is None else max_pixels
    least = max(lowest, pixels_per_token(images))
    if not isinstance(highest, int) or highest < least:
        why = "one visual token, and what images are enlarged to (shortest_edge)"
        raise ValueError(f"max_pixels={highest!r} must be a whole number of at least {least}: {why}. Choose more.")
    # In the place where stock image processors look, so that they read alike.
    images.size = SizeDict(shortest_edge=lowest, longest_edge=highest)
    if max_length is not None:
        processor.tokenizer.model_max_length = max_length


def read_limits(folder: Path) -> dict[str, int]:
    """What `set_limits` sets, from the files of a PUMA directory or of an adapter; what they do not say is left out."""
    size = read_config(folder, "processor_config.json").get("image_processor", {}).get("size", {})
    # What a SentenceTransformer was told to pass to the processor, and was saved with, wins.
    transformer = read_config(folder, TRANSFORMER_FILE)
    passed, opened = transformer.get("processing_kwargs") or {}, transformer.get("processor_kwargs") or {}
    image, text = {**opened, **(passed.get("image") or {})}, passed.get("text") or {}
    size = {**size, **(image.get("size") or {})}
    own_length = read_config(folder, "tokenizer_config.json").get("model_max_length")
    own_length = opened.get("model_max_length", transformer.get("max_seq_length") or own_length)
    found = {
        "min_pixels": image.get("min_pixels", size.get("shortest_edge")),
        "max_pixels": image.get("max_pixels", size.get("longest_edge")),
        "max_length": text.get("max_length", own_length),
    }
    return {name: value for name, value in found.items() if value is not None}


def told_limits(folder: Path) -> str | None:
    """The limits and the reading of a directory in words for its card, or None if its files do not name them."""
    limits, processor = read_limits(folder), read_config(folder, "processor_config.json")
    images, reading = processor.get("image_processor", {}), processor.get("reading", "puma")
    if "max_pixels" not in limits or "patch_size" not in images:
        return None
    tokens = limits["max_pixels"] // (images["patch_size"] * images["merge_size"]) ** 2
    told = f"Images are scaled down to at most {limits['max_pixels']:,} pixels, {tokens:,} visual tokens"
    if 0 < limits.get("max_length", 0) < 10**9:
        told += f"; texts are cut at {limits['max_length']:,} tokens"
    return told if reading == "puma" else f"{told}. Inputs are read as `{reading}`, {reading_of(reading).told}"


# ------------------------------------------------------------------------------------------------------- the model card


def write_model_card(folder: Path, config: Any, report: PruneReport, *, is_original: bool) -> None:
    """Write the first `README.md` of a PUMA directory; the size before the cut is told where an original was read."""
    source = config.source_name_or_path
    card_data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        # A path of this machine is nobody else's business.
        base_model=source if source and is_hub_id(source) else None,
        tags=list(TAGS),
    )
    values = report.to_dict() | {"source": source, "backbone": config.source_name, "limits": told_limits(folder)}
    values |= {"no_ret": config.ret_token_id is None, "kept_layers": config.kept_layers}
    values["embedding_dim"] = config.text_config.hidden_size
    if not is_original:
        values |= {"parameters_before": None, "bytes_before": None}
    (folder / "README.md").write_text(fill_template(card_data, **values), encoding="utf-8")


def fill_template(card_data: ModelCardData, **values: Any) -> str:
    """The text of a card with its metadata; values that are left out, or None, leave no trace in it."""
    kept, total = values.get("num_kept_layers"), values.get("original_num_hidden_layers")
    if kept and total:
        layers = values.get("kept_layers") or range(kept)
        others = [layer for layer in range(total) if layer not in layers]
        values |= {"kept": named_layers(layers), "dropped": named_layers(others) if others else None}
    return str(ModelCard.from_template(card_data, template_path=str(_CARD), **values))


def with_training_note(card: str, note: str) -> str:
    """A card with one more line in its section "Training", which is made before "Use" if need be."""
    head, use, rest = card.partition("\n\n## Use\n")
    title = "" if "\n## Training\n" in head else "\n\n## Training\n"
    return f"{head}{title}\n- {note}{use}{rest}"
