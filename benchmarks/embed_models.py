"""Random models for the benchmarks of embedding: a small one for the CPU, and the true 2B and 7B shapes."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from puma_hf import PumaConfig, PumaModel, prune

BACKBONE = Path(__file__).resolve().parents[1] / "demo" / "backbone"
ROPE = {"rope_type": "default", "rope_theta": 1e6}
PATCH_SIZE, MERGE_SIZE = 14, 2
MAX_LENGTH = 8192
INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight")


def _text(hidden: int, intermediate: int, heads: int, layers: int, vocabulary: int, sections: list[int]) -> Any:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4 if heads > 12 else 2,
        "vocab_size": vocabulary,
        "rope_parameters": {**ROPE, "mrope_section": sections},
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _vision(width: int, depth: int, heads: int, hidden: int) -> dict[str, int]:
    return {"embed_dim": width, "depth": depth, "num_heads": heads, "hidden_size": hidden, "mlp_ratio": 4}


# In "small" and "medium", half of whose layers are kept, a token costs the vision tower (per token of an image), the
# layers and the head about 1.6 to 1 to 0.3, as in 7B at k = 8.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "text_config": _text(64, 128, 4, 4, 3200, [2, 3, 3]),
        "vision_config": _vision(32, 2, 2, 64),
    },
    "small": {
        "text_config": _text(256, 704, 4, 16, 6912, [8, 12, 12]),
        "vision_config": _vision(192, 5, 3, 256),
    },
    "medium": {
        "text_config": _text(1024, 2816, 8, 8, 12_288, [16, 24, 24]),
        "vision_config": _vision(512, 6, 8, 1024),
    },
    "2b": {
        "text_config": _text(1536, 8960, 12, 28, 151_936, [16, 24, 24]),
        "vision_config": _vision(1280, 32, 16, 1536),
    },
    "7b": {
        "text_config": _text(3584, 18_944, 28, 28, 152_064, [16, 24, 24]),
        "vision_config": _vision(1280, 32, 16, 3584),
    },
}


class Models:
    """One set of random weights, cut to any depth; all depths share their tensors.

    Args:
        shape: A key of `SHAPES`.
        device: "cpu" or "cuda".
        dtype: Of the weights.
        max_visual_tokens: Larger images are scaled down to as many.
        seed: Of the weights.
    """

    def __init__(self, shape: str, *, device: str, dtype: torch.dtype, max_visual_tokens: int, seed: int) -> None:
        self.shape, self.device, self.max_visual_tokens = shape, device, max_visual_tokens
        self.num_layers = int(SHAPES[shape]["text_config"]["num_hidden_layers"])
        self.full = self._random_model(dtype, seed)
        self._cuts: dict[int, SentenceTransformer] = {}

    def at(self, kept: int) -> SentenceTransformer:
        """The first `kept` layers as a SentenceTransformer, the same one at every call."""
        if kept not in self._cuts:
            with tempfile.TemporaryDirectory() as folder:
                # Its tokenizer, template and modules are those of any PUMA model; processor and weights are replaced.
                prune(BACKBONE, folder, num_kept_layers=1, overwrite=True)
                model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
            module: Any = model[0]
            self._prepare(module.processor)
            module.model = self._cut(kept)
            self._cuts[kept] = model.eval()
        return self._cuts[kept]

    def with_head(self, kept: int) -> Qwen2VLForConditionalGeneration:
        """The first `kept` layers under a language-model head, tied to the token embedding."""
        cut: Any = self.at(kept)[0].model
        shapes = copy.deepcopy(SHAPES[self.shape])
        shapes["text_config"]["num_hidden_layers"] = kept
        config = Qwen2VLConfig(**shapes, **self._token_ids(), tie_word_embeddings=True)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model: Any = Qwen2VLForConditionalGeneration(config)
        model.model.visual = cut.visual
        model.model.language_model = cut.language_model
        model.lm_head.weight = cut.language_model.embed_tokens.weight
        return model.eval()  # type: ignore[no-any-return]

    def _random_model(self, dtype: torch.dtype, seed: int) -> PumaModel:
        default = torch.get_default_dtype()
        torch.manual_seed(seed)
        try:
            torch.set_default_dtype(dtype)
            with torch.device(self.device):
                model = PumaModel(self._config(self.num_layers))
        finally:
            torch.set_default_dtype(default)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:  # wide enough that what a text says reaches its last token
                    parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
                if name.endswith(INTO_RESIDUAL):  # or rounding would grow from layer to layer, as in no trained model
                    parameter.mul_(self.num_layers**-0.5)
            model.language_model.embed_tokens.weight.normal_()
        return model.requires_grad_(False).eval()

    def _cut(self, kept: int) -> PumaModel:
        with torch.device("meta"):
            model = PumaModel(self._config(kept))
        for name in ("embed_tokens", "norm", "rotary_emb"):
            setattr(model.language_model, name, getattr(self.full.language_model, name))
        model.language_model.layers = nn.ModuleList(self.full.language_model.layers[:kept])
        model.visual = self.full.visual
        return model.requires_grad_(False).eval()

    def _config(self, kept: int) -> PumaConfig:
        config = PumaConfig(**copy.deepcopy(SHAPES[self.shape]), **self._token_ids(), num_kept_layers=kept)
        config._attn_implementation = "sdpa"
        return config

    @staticmethod
    def _token_ids() -> dict[str, Any]:
        backbone = Qwen2VLConfig.from_pretrained(BACKBONE)
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return {name: getattr(backbone, name) for name in names}

    def _prepare(self, processor: Any) -> None:
        pixels = (PATCH_SIZE * MERGE_SIZE) ** 2
        size = {"shortest_edge": 4 * pixels, "longest_edge": self.max_visual_tokens * pixels}
        processor.image_processor = type(processor.image_processor)(
            patch_size=PATCH_SIZE, merge_size=MERGE_SIZE, size=size
        )
        processor.tokenizer.model_max_length = MAX_LENGTH
