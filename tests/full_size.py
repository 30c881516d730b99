"""Models at the true shapes of Qwen2-VL-7B on the meta device, and the operations of a training step on them.

A tensor on the meta device has a shape and no data, so nothing is computed and 7 billion parameters take no memory;
every matrix product, convolution and attention is dispatched as on a GPU and counted by its shape. Three things stand
in for what needs data: the positions are computed beforehand on the CPU, the image grid and the modality ids stay
there, and the check that an image has as many features as tokens is switched off. Attention is counted as matrix
products over all pairs of positions, as for a fused kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from puma_hf import PumaConfig, PumaModel, lora_config
from puma_hf.modeling.sentence_transformers_puma import PumaTransformer

NUM_LAYERS = 28
HIDDEN_SIZE = 3584
VISUAL_TOKENS, TEXT_TOKENS = 256, 34
RET_TOKEN_ID = 151_665
_VISION_START, _IMAGE = 151_652, 151_655
_VISION_CLASS = "Qwen2VisionTransformerPretrainedModel"

TEXT_CONFIG = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18_944,
    "vocab_size": 152_064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION_CONFIG = {"depth": 32, "embed_dim": 1280, "hidden_size": HIDDEN_SIZE, "num_heads": 16, "mlp_ratio": 4}


class InputModule(PumaTransformer):
    """The forward pass of `PumaTransformer`, without a processor."""

    fast_path = None

    def __init__(self, model: PumaModel) -> None:
        nn.Module.__init__(self)
        self.model = model


def build_model(
    num_kept_layers: int = NUM_LAYERS,
    *,
    adapter: bool = True,
    train_ret_token: bool = False,
    rank: int = 64,
    depth: int = VISION_CONFIG["depth"],
) -> PumaModel:
    """A PumaModel of the first k of 28 layers (and `depth` of the tower's) in bfloat16, with LoRA on their linears."""
    vision = VISION_CONFIG | {"depth": depth}
    config = PumaConfig(text_config=TEXT_CONFIG, vision_config=vision, num_kept_layers=num_kept_layers)
    config.ret_token_id = RET_TOKEN_ID
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = PumaModel(config).to(torch.bfloat16).requires_grad_(False)
        if adapter:
            ret_token_id = RET_TOKEN_ID if train_ret_token else None
            model.add_adapter(lora_config(r=rank, dropout=0.0, ret_token_id=ret_token_id))
    # It makes angles of positions that the tower computes on the CPU.
    model.visual.rotary_pos_emb.register_forward_pre_hook(lambda _, args: (args[0], args[1].to(args[0].device)))
    return model


def sentence_transformer(model: PumaModel) -> SentenceTransformer:
    """The model as a SentenceTransformer that takes ready-made features."""
    return SentenceTransformer(modules=[InputModule(model)], device="meta")


def image_item(model: PumaModel, batch_size: int = 1) -> dict[str, Any]:
    """Features of images with text: 290 tokens each, of which 256 visual (one image of 32 x 32 patches)."""
    before = TEXT_TOKENS // 2
    row = [*range(1000, 1000 + before - 1), _VISION_START, *[_IMAGE] * VISUAL_TOKENS]
    row += [*range(2000, 2000 + TEXT_TOKENS - before - 1), RET_TOKEN_ID]
    input_ids = torch.tensor([row] * batch_size)
    types = (input_ids == model.config.image_token_id).int()
    grid = torch.tensor([[1, 32, 32]] * batch_size)
    positions, _ = model.get_rope_index(input_ids, types, image_grid_thw=grid)
    vision: Any = model.config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": input_ids.to(model.device),
        "mm_token_type_ids": types.to(model.device),
        "position_ids": positions.to(model.device),
        "pixel_values": torch.empty(batch_size * 4 * VISUAL_TOKENS, patch, device=model.device, dtype=model.dtype),
        "image_grid_thw": grid,
        "modality_ids": torch.full((batch_size,), 2),
    }


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step until the loss and of its way back, with forward passes that are repeated there."""

    forward: int
    backward: int
    forward_by_module: dict[str, int]
    backward_by_module: dict[str, int]

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def of(self, module: str) -> tuple[int, int]:
        """Forward and backward operations of all modules whose own name is `module`, such as "visual"."""
        # The counter knows a module that is called from outside its parent by its class.
        names = {module, _VISION_CLASS} if module == "visual" else {module}
        forward, backward = (
            sum(flops for name, flops in counts.items() if name.rpartition(".")[2] in names)
            for counts in (self.forward_by_module, self.backward_by_module)
        )
        return forward, backward


def count_step(step: Callable[[], Tensor | None]) -> StepFlops:
    """Operations of a step that returns a loss, which is then propagated back (or None: nothing is)."""
    unchecked = mock.patch.dict(os.environ, {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"})
    with unchecked, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = step()
        forward = _by_module(counter)
        if loss is not None:
            loss.backward()
        both = _by_module(counter)
    backward = {name: flops - forward.get(name, 0) for name, flops in both.items()}
    return StepFlops(forward.get("Global", 0), backward.get("Global", 0), forward, backward)


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of the parameters of all modules, each shared one once."""
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def _by_module(counter: FlopCounterMode) -> dict[str, int]:
    return {name: int(sum(counts.values())) for name, counts in counter.get_flop_counts().items()}
