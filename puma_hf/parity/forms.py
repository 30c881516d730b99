"""The embeddings of one model by every way in: AutoModel, SentenceTransformer, an adapter, and the stock classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from puma_hf.modeling import PumaModel
from puma_hf.modeling.modeling_puma import last_token_state
from puma_hf.parity.inputs import pictures_of, to_chat

_IMAGE_TOKEN = "<|image_pad|>"
_FEATURES = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


def open_auto_model(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """A PUMA directory by AutoModel, with the code that lies in it."""
    model: Any = AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=True)
    return model.to(device).eval()


def open_sentence_transformer(folder: Path, dtype: torch.dtype | str, device: str) -> SentenceTransformer:
    """A PUMA directory by SentenceTransformer, with the code that lies in it."""
    loading = {"dtype": dtype}
    return SentenceTransformer(str(folder), trust_remote_code=True, device=device, model_kwargs=loading).eval()


def release(model: SentenceTransformer) -> None:
    """Let the weights go at once: a SentenceTransformer holds itself in a cycle, so it would stay for a while."""
    model.to("meta")


def open_adapter(adapter: Path, base: str | Path, device: str) -> Any:
    """An adapter on its base, in float32, not merged."""
    from peft import PeftModel

    model = PumaModel.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).to(device).eval()


def features_of(folder: Path, inputs: Sequence[Any], *, padding_side: str = "left") -> dict[str, Tensor]:
    """One batch by a PUMA directory's own processor."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.tokenizer.padding_side = padding_side
    batch = processor.process_inputs(list(inputs))
    return {name: batch[name] for name in _FEATURES if name in batch}


@torch.inference_mode()
def embed_features(model: Any, features: dict[str, Tensor]) -> Tensor:
    """Embeddings `(batch_size, embedding_dim)` of a PUMA model, or of an adapter on one."""
    on_device = {name: tensor.to(model.device) for name, tensor in features.items()}
    embeddings: Tensor = model(**on_device).embeddings
    return embeddings.float().cpu()


def encode(model: SentenceTransformer, inputs: Sequence[Any], **options: Any) -> Tensor:
    """Embeddings of a SentenceTransformer, `(num_inputs, embedding_dim)`."""
    found: Any = model.encode(list(inputs), convert_to_tensor=True, show_progress_bar=False, **options)
    embeddings: Tensor = found.float().cpu()
    return embeddings


def stock_features(folder: Path, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """One batch by the tokenizer, image processor and chat template of an export, without any code of PUMA's.

    Written with the parts and not with AutoProcessor, which for these families needs torchvision.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder)
    pictures = [picture for one in inputs for picture in pictures_of(one)]
    images = dict(image_processor(images=pictures, return_tensors="pt")) if pictures else {}
    texts = [str(tokenizer.apply_chat_template(to_chat(one), tokenize=False)) for one in inputs]
    if pictures:
        counts = iter((images["image_grid_thw"].prod(dim=1) // image_processor.merge_size**2).tolist())
        # Each picture's placeholder becomes as many as it has tokens.
        texts = [
            _with_placeholders(text, [next(counts) for _ in pictures_of(one)])
            for text, one in zip(texts, inputs, strict=True)
        ]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    is_image = batch["input_ids"] == tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "mm_token_type_ids": is_image.int(),
        **images,
    }


def _with_placeholders(text: str, counts: Sequence[int]) -> str:
    first, *rest = text.split(_IMAGE_TOKEN)
    return first + "".join(_IMAGE_TOKEN * count + part for count, part in zip(counts, rest, strict=True))


def open_stock(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """An export by the stock class, without remote code."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval()


@torch.inference_mode()
def embed_stock(model: Any, features: dict[str, Tensor]) -> Tensor:
    """The last hidden state of a stock model at the last token, scaled to unit length: `(batch_size, hidden_size)`."""
    on_device = {name: tensor.to(model.device) for name, tensor in features.items() if name in _FEATURES}
    states = model.model(**on_device).last_hidden_state
    return normalize(last_token_state(states, on_device["attention_mask"]).float(), dim=-1).cpu()
