"""Guess how many tokens an input has without decoding its images, so that batches can be planned."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from puma_hf.modeling.inputs_puma import is_image_reference, open_image

DEFAULT_IMAGE_TOKENS = 512.0  # of an image of unknown size; one of 640 x 640 pixels has 529
_DEFAULT_BYTES_PER_TOKEN = 4.0  # English prose
_SAMPLED_TEXTS, _SAMPLED_CHARACTERS = 32, 2000
_SAMPLED_IMAGES = 16
_URL = ("http://", "https://", "data:")


@dataclass(frozen=True)
class Rates:
    """What a guess is made of.

    Args:
        tokens_per_input: Tokens of the template and the prompt, which every input pays for.
        bytes_per_token: UTF-8 bytes of text that make a token.
        image_tokens: Tokens of an image of unknown size.
    """

    tokens_per_input: float = 0.0
    bytes_per_token: float = _DEFAULT_BYTES_PER_TOKEN
    image_tokens: float = DEFAULT_IMAGE_TOKENS


class Parts(NamedTuple):
    """Texts and images of one input; a video, and what nobody knows, counts as an image."""

    texts: tuple[str, ...] = ()
    images: tuple[Any, ...] = ()


def parts_of(item: Any) -> Parts:
    """What an input is made of, as `PumaProcessor.process_inputs` reads it; never an error."""
    if isinstance(item, str) and not is_image_reference(item):
        return Parts((item,))
    texts: list[str] = []
    images: list[Any] = []
    for kind, value in _entries(item):
        for one in value if isinstance(value, list | tuple) else (value,):
            if kind == "text" and isinstance(one, str):
                texts.append(one)
            elif one is not None:
                images.append(one)
    return Parts(tuple(texts), tuple(images))


def _entries(item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, str):
        yield "image", item
    elif isinstance(item, Mapping) and "role" in item:
        content = item.get("content")
        if isinstance(content, str):
            yield "text", content
        for entry in content if isinstance(content, list) else ():
            for key, value in entry.items() if isinstance(entry, Mapping) else ():
                if key != "type":
                    yield key, value
    elif isinstance(item, Mapping) and not {"bytes", "path"} & set(item):
        for key, value in item.items():
            yield ("text" if key in ("text", "instruction") else "image"), value
    elif isinstance(item, list | tuple):
        for message in item:
            yield from _entries(message)
    else:
        yield "image", item


def image_size(image: Any, open_files: bool) -> tuple[int, int] | None:
    """Height and width of an image, from its header if it has to be opened; None if that takes more.

    Args:
        image: As `PumaProcessor.process_inputs` takes it.
        open_files: Whether paths and bytes may be opened. Nothing is downloaded.
    """
    if isinstance(image, Image.Image):
        return image.height, image.width
    if isinstance(image, np.ndarray | torch.Tensor) and image.ndim == 3:
        return int(image.shape[0]), int(image.shape[1])
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes | bytearray):
        image = io.BytesIO(image)
    elif not isinstance(image, str | os.PathLike) or str(image).startswith(_URL):
        return None
    if not open_files:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(image) as opened:
                return opened.height, opened.width
    except Exception:  # the processor will say what is wrong with it
        return None


def is_known(parts: Parts) -> bool:
    """Whether nothing has to be opened to know the sizes of the images of an input."""
    return all(image_size(image, False) is not None for image in parts.images)


class Measure:
    """Guesses the tokens of inputs.

    Args:
        processor: A `PumaProcessor`.
        images_kwargs: Options of the image processor for this call; what its `size` leaves out is the processor's.
        max_length: Longest sequence in tokens; by default the tokenizer's `model_max_length`.
        open_files: Whether a few image files may be opened to see how large they are. With a loader of the user's
            own a path may be anything.
    """

    def __init__(
        self,
        processor: Any,
        *,
        images_kwargs: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        open_files: bool = True,
    ) -> None:
        self._tokenizer, self._image_processor = processor.tokenizer, processor.image_processor
        size = {**dict(self._image_processor.size), **((images_kwargs or {}).get("size") or {})}
        self._images_kwargs = {
            **(images_kwargs or {}),
            "size": size,
            "min_pixels": size["shortest_edge"],
            "max_pixels": size["longest_edge"],
        }
        self._limit = self._tokenizer.model_max_length if max_length is None else max_length
        self._open_files = open_files

    def rates(self, parts: Sequence[Parts], known: Rates) -> Rates:
        """Rates for these inputs, from a few of them, evenly spaced; the known ones where there is nothing to see."""
        texts = _spread([text for one in parts for text in one.texts], _SAMPLED_TEXTS)
        # Half a character, which JSON may hold, is an error for the tokenizer; the processor will say so.
        texts = [text[:_SAMPLED_CHARACTERS].encode(errors="replace").decode() for text in texts]
        if num_bytes := sum(map(_num_bytes, texts)):
            encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            known = replace(known, bytes_per_token=num_bytes / max(1, sum(map(len, encoded))))
        unknown = [image for one in parts for image in one.images if image_size(image, False) is None]
        sizes = [image_size(image, self._open_files) for image in _spread(unknown, _SAMPLED_IMAGES)]
        if tokens := [self._image_tokens(size) for size in sizes if size is not None]:
            known = replace(known, image_tokens=sum(tokens) / len(tokens))
        return known

    def tokens(self, parts: Parts, rates: Rates, open_files: bool = False) -> float:
        """About how many tokens an input has, at most the limit that its text is cut to."""
        text = sum(map(_num_bytes, parts.texts)) / rates.bytes_per_token
        sizes = (image_size(image, open_files) for image in parts.images)
        visual = sum(rates.image_tokens if size is None else self._image_tokens(size) for size in sizes)
        return max(1.0, min(rates.tokens_per_input + text + visual, float(self._limit)))

    def _image_tokens(self, size: tuple[int, int]) -> float:
        try:
            patches = self._image_processor.get_number_of_image_patches(*size, self._images_kwargs)
        except (ValueError, ZeroDivisionError):  # too long for its width, or empty; the processor will say so
            return 1.0
        return float(patches // self._image_processor.merge_size**2)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` of the items, evenly spaced."""
    return list(items[:: max(1, -(-len(items) // count))])
