"""QLoRA: the frozen base in four bits, the adapter in full."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

# Everything but the decoder: as with LoRA, vision tower and merger stay as they are.
KEPT_MODULES = ("visual",)


def quantization_config() -> BitsAndBytesConfig:
    """How to load a PUMA model for QLoRA: its decoder in 4-bit NormalFloat, doubly quantised, computing in bfloat16.

    Vision tower, merger, token embedding and norms are not quantised. `merge_adapter` always merges into the base
    as it is on disk, not quantised: its embeddings differ from those seen in training by the quantisation error.
    Measure the merged model. A frozen teacher is then held whole beside the student, with a warning; a cached
    one is not held at all.

    Returns:
        A configuration for `from_pretrained(..., quantization_config=...)`.

    Raises:
        ImportError: If bitsandbytes is not installed.
        ValueError: If there is no CUDA GPU.

    Example:

    ```python
    >>> from sentence_transformers import SentenceTransformer
    >>> from puma_hf.trainer.quantization import quantization_config

    >>> settings = {"quantization_config": quantization_config()}  # doctest: +SKIP
    >>> model = SentenceTransformer("puma-7b-k8", trust_remote_code=True, model_kwargs=settings)  # doctest: +SKIP
    ```

    Source: QLoRA, Dettmers et al., NeurIPS 2023, arXiv 2305.14314. Neither PUMA nor LamRA trains this way.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "load_in_4bit needs bitsandbytes, which is not installed: pip install 'puma-hf[qlora]'. "
            "Without it leave load_in_4bit out."
        )
    if not torch.cuda.is_available():
        raise ValueError("load_in_4bit needs a CUDA GPU, and there is none. Train on one, or leave load_in_4bit out.")
    untyped: Any = BitsAndBytesConfig
    config: BitsAndBytesConfig = untyped(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(KEPT_MODULES),
    )
    return config


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether a model was loaded with quantised weights, which cannot be compared with those of a full model."""
    return bool(getattr(model, "is_quantized", False))
