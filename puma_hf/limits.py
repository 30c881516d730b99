"""How large a picture and how long a text a model reads: in its processor's own files, where every loader looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.image_utils import SizeDict

from puma_hf.files import read_config
from puma_hf.modeling.reading_puma import reading_of

# As PUMA and LamRA read images, in training and in evaluation. A general model's limit is thousands.
DEFAULT_VISUAL_TOKENS = 300


def pixels_per_token(image_processor: Any) -> int:
    """Pixels that make one visual token: 28 x 28 for Qwen2-VL and Qwen2.5-VL, 32 x 32 for Qwen3-VL."""
    return int(image_processor.patch_size * image_processor.merge_size) ** 2


def set_limits(
    processor: Any, *, min_pixels: int | None = None, max_pixels: int | None = None, max_length: int | None = None
) -> None:
    """Change what a processor reads, for good: saved, it is read so by stock classes, too.

    Args:
        processor: A `PumaProcessor`.
        min_pixels: Images are enlarged to so many pixels; None leaves this, and each, as it is.
        max_pixels: Images are scaled down to so many pixels.
        max_length: Longest sequence in tokens; only text is cut.

    Raises:
        ValueError: If `max_pixels` is not a whole number, or less than `min_pixels` or than one visual token.
    """
    images = processor.image_processor
    lowest = images.size["shortest_edge"] if min_pixels is None else min_pixels
    highest = images.size["longest_edge"] if max_pixels is None else max_pixels
    least = max(lowest, pixels_per_token(images))
    if not isinstance(highest, int) or highest < least:
        raise ValueError(
            f"max_pixels={highest!r} must be a whole number of at least {least}: one visual token has "
            f"{pixels_per_token(images)} pixels, and the model enlarges images to {lowest} (shortest_edge in its "
            "processor_config.json or preprocessor_config.json). Choose more, or lower that first."
        )
    images.size = SizeDict(shortest_edge=lowest, longest_edge=highest)
    if max_length is not None:
        processor.tokenizer.model_max_length = max_length


def read_limits(folder: Path) -> dict[str, int]:
    """What `set_limits` sets, from the files of a PUMA directory or of an adapter; what they do not say is left out.

    What a SentenceTransformer was told to pass to the processor, and was saved with, counts.
    """
    passed = read_config(folder, "sentence_bert_config.json").get("processing_kwargs") or {}
    image, text = passed.get("image") or {}, passed.get("text") or {}
    size = {**read_config(folder, "processor_config.json").get("image_processor", {}).get("size", {})}
    size |= image.get("size") or {}
    own_length = read_config(folder, "tokenizer_config.json").get("model_max_length")
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
    length = limits.get("max_length", 0)
    told = f"{told}; texts are cut at {length:,} tokens" if 0 < length < 10**9 else told
    return told if reading == "puma" else f"{told}. Inputs are read as `{reading}`, {reading_of(reading).told}"
