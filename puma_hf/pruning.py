"""Cut an original checkpoint to its first k decoder layers, or to others, and write a complete PUMA directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.auto.video_processing_auto import get_video_processor_config

from puma_hf.checkpoint import SourceCheckpoint, kept_weights, open_checkpoint
from puma_hf.data.instructions import MBEIR_INSTRUCTIONS
from puma_hf.files import new_directory, read_config
from puma_hf.limits import DEFAULT_VISUAL_TOKENS, pixels_per_token, set_limits, told_limits
from puma_hf.model_card import write_model_card
from puma_hf.modeling import RET_TOKEN, PumaConfig, PumaImageTextProcessor, PumaModel, PumaProcessor
from puma_hf.modeling.configuration_puma import chosen_layers, config_class_of, named_layers
from puma_hf.modeling.modeling_puma import MODEL_CLASSES
from puma_hf.modeling.processing_puma import PIPELINES
from puma_hf.modeling.reading_puma import Reading, reading_of
from puma_hf.modeling.sentence_transformers_files_puma import write_sentence_transformers_files

logger = logging.getLogger(__name__)

__all__ = ["PruneReport", "prune", "write_sentence_transformers_files"]

_MODELING = Path(__file__).parent / "modeling"

# What each backbone is before pruning, to count its parameters. A PUMA directory that is pruned further is none of
# these: it has no language-model head to count.
_ORIGINALS: dict[str, Any] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}


@dataclass(frozen=True)
class PruneReport:
    """What pruning kept and dropped.

    Attributes:
        source: Hub id or path of the original checkpoint.
        output_dir: The directory written.
        num_kept_layers: Decoder layers kept.
        original_num_hidden_layers: Decoder layers of the original.
        parameters_before: Parameters of the source, language-model head included where it has one.
        parameters_after: Parameters of the pruned model.
        bytes_before: Bytes of the source's parameters in its own dtype.
        bytes_after: Bytes of the pruned model's parameters.
        max_pixels: Pixels that images are scaled down to.
        max_visual_tokens: Tokens of an image of so many pixels.
        source_max_pixels: The source's own limit.
        num_source_layers: Decoder layers of the source, if that is a PUMA directory; None for an original.
        kept_layers: Which layers of the source were kept, if not its first ones.
        reading: How the model reads.
    """

    source: str
    output_dir: str
    num_kept_layers: int
    original_num_hidden_layers: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    max_pixels: int
    max_visual_tokens: int
    source_max_pixels: int
    num_source_layers: int | None = None
    kept_layers: list[int] | None = None
    reading: str = "puma"

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        total = self.num_source_layers or self.original_num_hidden_layers
        kept = self.kept_layers or range(self.num_kept_layers)
        dropped, origin = [], ""
        if left := [layer for layer in range(total) if layer not in kept]:
            dropped.append(named_layers(left))
        if self.num_source_layers is None:
            dropped.append("the language-model head" if dropped else "language-model head")
        else:  # which was cut before, and has no head
            origin = f" (the original has {self.original_num_hidden_layers})"
        return (
            f"kept     vision tower, token embedding, {named_layers(kept)} of {total}{origin}, final norm\n"
            f"dropped  {' and '.join(dropped) or 'nothing'}\n"
            f"before   {self.parameters_before:>14,} parameters  {self.bytes_before:>15,} bytes\n"
            f"after    {self.parameters_after:>14,} parameters  {self.bytes_after:>15,} bytes"
            f"  ({self.parameters_after / self.parameters_before:.0%})\n"
            f"images   at most {self.max_visual_tokens:,} visual tokens, {self.max_pixels:,} pixels"
            f" (source: {self.source_max_pixels:,})\n"
            f"reading  {self.reading}, positions: {reading_of(self.reading).positions}\n"
            f"saved    {self.output_dir}"
        )


def prune(
    source: str | Path,
    output_dir: str | Path,
    *,
    num_kept_layers: int | None = None,
    keep_layers: Sequence[int] | str | None = None,
    dtype: str | torch.dtype = "auto",
    max_pixels: int | Literal["source"] | None = None,
    reading: str | None = None,
    prompts: Mapping[str, str] | None = None,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> PruneReport:
    """Keep the first decoder layers, or a list of them, of a Qwen2-VL, 2.5 or 3 and save a complete directory.

    The result holds weights, processor with `[RET]`, chat template, prompts, a model card, and the code that
    `AutoModel` and `SentenceTransformer` need where puma_hf is not installed. Tensors of dropped layers are
    never read, and from the Hub only the shards that hold kept tensors are downloaded.

    `[RET]` starts as the mean of all token embeddings of the original vocabulary (in float32, rounded to the
    model's dtype): deterministic, and a point from which the distillation stage may train it. A tokenizer
    that already has `[RET]` keeps its row.

    Args:
        source: Folder or Hub id of an original Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint (safetensors, one file or
            shards), or of a PUMA directory to prune further.
        output_dir: New or empty directory.
        num_kept_layers: Number k of decoder layers to keep, 1 to the number of layers.
        keep_layers: Instead of it, which of the source's layers to keep: rising numbers from 0, as a list or as text
            such as "0-10,27". A Qwen3-VL keeps those after which DeepStack adds features: the first three.
        dtype: Data type of the saved weights; "auto" keeps the checkpoint's.
        max_pixels: Pixels that images are scaled down to, kept in the processor's configuration; "source" keeps the
            source's own limit. By default 300 visual tokens (235,200 pixels for Qwen2-VL and Qwen2.5-VL, 307,200 for
            Qwen3-VL), as in PUMA and LamRA, or the source's limit if that is lower; a PUMA directory keeps its own.
        reading: How the model reads its inputs, which it keeps: "puma", this library's prompt with M-RoPE positions, or
            "puma-released", the prompt and the sequential positions of the authors' code (Qwen2-VL and Qwen2.5-VL). By
            default "puma", or what a PUMA directory has.
        prompts: Named instructions for `encode(prompt_name=...)`; M-BEIR's task instructions by default.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        overwrite: Replace `output_dir` if it is not empty.

    Returns:
        What was kept and dropped, with parameters and bytes before and after.

    Raises:
        ValueError: If `num_kept_layers`, `keep_layers` or `max_pixels` is out of range, `dtype` is unknown, the source
            cannot have that `reading`, or the checkpoint is of another family, is damaged, or is not in safetensors
            format.
        FileNotFoundError: If the source, or a shard of it, does not exist.
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
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype={dtype!r} is not known to torch. Choose 'auto', 'float32', 'bfloat16' or 'float16'.")
    checkpoint = open_checkpoint(source, revision=revision, token=token)
    source_type: Any = PreTrainedConfig.get_config_dict(checkpoint.folder)[0].get("model_type")
    config = config_class_of(source_type).from_pretrained(checkpoint.folder)
    layers = chosen_layers(num_kept_layers, keep_layers, config.num_kept_layers or 0)
    name = _chosen_reading(reading, checkpoint, config, is_original=source_type in _ORIGINALS)
    with new_directory(output_dir, overwrite=overwrite, forbidden=checkpoint.folder) as folder:
        processor = _build_processor(checkpoint, _processor_class(config), name)
        before = _limit_images(processor, max_pixels, is_original=source_type in _ORIGINALS)
        model = _load_kept(checkpoint, config, layers, dtype)
        place_ret_token(model, processor.tokenizer)
        model.config.positions = reading_of(name).positions
        model.config.custom_pipelines = PIPELINES
        model.config.source_name_or_path = config.source_name_or_path or _short_name(checkpoint)
        model.config.source_revision = config.source_revision or checkpoint.revision
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_sentence_transformers_files(folder, MBEIR_INSTRUCTIONS if prompts is None else prompts)
        source_class = _ORIGINALS.get(source_type, type(model))
        report = _report(checkpoint, source_class, config, model, output_dir, processor.image_processor, before)
        report = replace(report, kept_layers=None if layers == list(range(len(layers))) else layers, reading=name)
        facts: dict[str, Any] = {**report.to_dict(), "backbone": config.source_name, "limits": told_limits(folder)}
        facts["kept_layers"] = model.config.kept_layers  # of the original, which the source may not be
        if source_type not in _ORIGINALS:  # what a PUMA directory had is not what the original has
            report = replace(report, num_source_layers=config.num_kept_layers)
            facts |= {"parameters_before": None, "bytes_before": None}
        write_model_card(folder, model.config, facts)
    num_layers = report.num_source_layers or report.original_num_hidden_layers
    logger.info("Pruned %s to %d of %d layers: %s", source, len(layers), num_layers, output_dir)
    return report


def _short_name(checkpoint: SourceCheckpoint) -> str:
    # A local path says where the user keeps files; only its last part is worth publishing.
    return checkpoint.repo_id or checkpoint.folder.resolve().name


def _load_kept(checkpoint: SourceCheckpoint, config: Any, layers: list[int], dtype: str | torch.dtype) -> PumaModel:
    model_class = MODEL_CLASSES[type(config)]
    with kept_weights(checkpoint, layers) as weights:
        try:
            model: PumaModel = model_class.from_pretrained(weights, keep_layers=layers, dtype=dtype)
        except ValueError as error:
            # The temporary folder's name says nothing to the user.
            raise ValueError(str(error).replace(str(weights), checkpoint.name)) from error
    return model


def _processor_class(config: Any) -> type[PumaProcessor]:
    return PumaProcessor if isinstance(config, PumaConfig) else PumaImageTextProcessor


def _chosen_reading(asked: str | None, checkpoint: SourceCheckpoint, config: Any, *, is_original: bool) -> str:
    own = None if is_original else read_config(checkpoint.folder, "processor_config.json").get("reading", "puma")
    name = str((own or "puma") if asked is None else asked)
    backbones = reading_of(name).backbones or (config.source_model_type,)
    if config.source_model_type not in backbones:
        raise ValueError(
            f"reading={name!r} is made of the template of {' and '.join(backbones)}, but {checkpoint.name!r} is a "
            f"{config.source_name}. Choose reading='puma' (--reading puma)."
        )
    if own not in (None, name):
        raise ValueError(
            f"reading={name!r}, but {checkpoint.name!r} reads as {own!r}, which its weights were made for. Leave it "
            "out, or prune the original checkpoint with the other."
        )
    return name


def template_of(reading: Reading) -> str:
    """The chat template of a reading."""
    text = (_MODELING / reading.template).read_text(encoding="utf-8")
    return text if reading.system is None else f"{{%- set system = {json.dumps(reading.system)} -%}}\n{text}"


def _build_processor(checkpoint: SourceCheckpoint, processor_class: type[PumaProcessor], reading: str) -> PumaProcessor:
    folder = checkpoint.folder
    arguments = {
        "image_processor": AutoImageProcessor.from_pretrained(folder),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
        "video_processor": get_video_processor_config(folder) or None,  # settings: they need no torchvision
    }
    image_token = "<|image_pad|>"
    # Without tokenizer files transformers builds an empty tokenizer.
    if image_token not in arguments["tokenizer"].get_vocab():
        raise ValueError(
            f"The tokenizer of {checkpoint.name!r} does not know {image_token!r}: its files are missing or "
            "belong to another model. Download the checkpoint again, with its tokenizer."
        )
    return processor_class(**arguments, chat_template=template_of(reading_of(reading)), reading=reading)


def _limit_images(processor: PumaProcessor, max_pixels: Any, *, is_original: bool) -> int:
    """Set the limit that is asked for, or a default one; the source's own is returned."""
    images = processor.image_processor
    shortest, longest = images.size["shortest_edge"], int(images.size["longest_edge"])
    if max_pixels is None and is_original:
        max_pixels = min(longest, max(shortest, DEFAULT_VISUAL_TOKENS * pixels_per_token(images)))
    if isinstance(max_pixels, str) and max_pixels != "source":
        raise ValueError(f"max_pixels={max_pixels!r} must be a whole number, or 'source' to keep the source's limit.")
    if max_pixels not in (None, "source"):
        set_limits(processor, max_pixels=max_pixels)
    return longest


def place_ret_token(model: PumaModel, tokenizer: Any) -> None:
    """Make `[RET]` one special token with an embedding row, adding both where the model's tokenizer lacks it."""
    rows = len(tokenizer)
    is_new = RET_TOKEN not in tokenizer.get_vocab()
    # A [RET] that is there already may be an ordinary token, which a user's text could hold unnoticed.
    tokenizer.add_tokens([AddedToken(RET_TOKEN, special=True, normalized=False)], special_tokens=True)
    ret_token_id = int(tokenizer.convert_tokens_to_ids(RET_TOKEN))
    if is_new:
        embedding: Any = model.get_input_embeddings()
        if ret_token_id >= len(embedding.weight):
            embedding = model.resize_token_embeddings(ret_token_id + 1, mean_resizing=False)
        with torch.no_grad():
            weight = embedding.weight
            weight[ret_token_id] = weight[:rows].mean(dim=0, dtype=torch.float32).to(weight)
    model.config.ret_token_id = ret_token_id


def _report(
    checkpoint: SourceCheckpoint,
    source_class: Any,
    source_config: Any,
    model: PumaModel,
    output_dir: str | Path,
    images: Any,
    source_max_pixels: int,
) -> PruneReport:
    with torch.device("meta"):
        original = source_class(source_config)
    before = sum(parameter.numel() for parameter in original.parameters())
    after = sum(parameter.numel() for parameter in model.parameters())
    # Qwen3-VL's checkpoints name their data type in the text tower's configuration alone.
    named = (source_config.dtype, source_config.text_config.dtype)
    source_dtype = next((dtype for dtype in named if isinstance(dtype, torch.dtype)), model.dtype)
    return PruneReport(
        source=checkpoint.name,
        output_dir=str(output_dir),
        num_kept_layers=int(model.config.num_kept_layers or 0),
        original_num_hidden_layers=int(model.config.original_num_hidden_layers or 0),
        parameters_before=before,
        parameters_after=after,
        bytes_before=before * source_dtype.itemsize,
        bytes_after=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        max_pixels=images.size["longest_edge"],
        max_visual_tokens=images.size["longest_edge"] // pixels_per_token(images),
        source_max_pixels=source_max_pixels,
    )
