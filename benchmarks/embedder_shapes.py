"""Parameters and operations of Qwen3-VL-Embedding's shapes, whole and cut to half; counted without weights.

    .venv/bin/python benchmarks/embedder_shapes.py

The shapes are those of Qwen3-VL 2B and 8B, from which the embedders were trained. A text has 64 tokens, an image 256
visual tokens and 34 of text; padding and language-model head are not counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from puma_hf.modeling import PumaQwen3VLConfig, PumaQwen3VLModel

TEXT_TOKENS, VISUAL_TOKENS, BESIDE = 64, 256, 34
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "2B": (
        {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_hidden_layers": 28},
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
    ),
    "8B": (
        {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
    ),
}


def build(name: str, num_layers: int) -> PumaQwen3VLModel:
    """The model on the meta device, where a tensor has a shape and takes no memory."""
    text, vision = SHAPES[name]
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {**text, "num_hidden_layers": num_layers, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
    vision = {**vision, "num_heads": 16, "patch_size": 16, "out_hidden_size": text["hidden_size"]}
    with torch.device("meta"):
        return PumaQwen3VLModel(PumaQwen3VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision))


@torch.no_grad()
def count(model: PumaQwen3VLModel, num_tokens: int, num_patches: int) -> int:
    """Operations of an input, the decoder's and the vision tower's."""
    decoder, tower = model.language_model, model.visual
    states = torch.zeros(1, num_tokens, decoder.config.hidden_size, device="meta")
    positions = torch.zeros(3, 1, num_tokens, dtype=torch.long, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(inputs_embeds=states, position_ids=positions, use_cache=False)
        if num_patches:
            heads = tower.config.hidden_size // tower.config.num_heads
            angles = (torch.zeros(num_patches, heads, device="meta"),) * 2
            hidden = tower.patch_embed(torch.zeros(num_patches, 3 * 2 * 16 * 16, device="meta"))
            for block in tower.blocks:
                hidden = block(hidden, cu_seqlens=torch.tensor([0, num_patches]), position_embeddings=angles)
            for merger in (tower.merger, *tower.deepstack_merger_list):
                merger(hidden)
    return int(counter.get_total_flops())


def main() -> None:
    print("| Qwen3-VL-Embedding | layers | parameters (B) | bfloat16 (GB) | text (TFLOP) | image (TFLOP) |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, (text, _) in SHAPES.items():
        for num_layers in (text["num_hidden_layers"], text["num_hidden_layers"] // 2):
            model = build(name, num_layers)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            text_flops = count(model, TEXT_TOKENS, 0)
            image_flops = count(model, VISUAL_TOKENS + BESIDE, 4 * VISUAL_TOKENS)
            print(f"| {name} | {num_layers} | {parameters / 1e9:.2f} | {2 * parameters / 1e9:.2f} "
                  f"| {text_flops / 1e12:.3f} | {image_flops / 1e12:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
