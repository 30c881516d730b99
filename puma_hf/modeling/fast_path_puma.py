"""The same embeddings with less work: no padding, shared prefixes once, and the last layer for `[RET]` alone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, addcmul, nn
from torch.nn.functional import linear
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import rotate_half
from transformers.vision_utils import get_vision_window_index

from .attention_puma import attend, blocks_of_lengths, sequences_of
from .packing_puma import PackedImages, PackedPart

logger: Any = logging.getLogger(__name__)  # transformers gives every logger `info_once`

# "flash" in a name makes the vision towers pass all images in one call, with the ends of each.
_ATTENTION_NAME = "puma_flash_blocks"
# A vision tower is changed while it computes, so one thread after another may do so.
_LOCK = threading.RLock()


@dataclass(frozen=True)
class FastPath:
    """How `PumaTransformer` embeds with less work; the vectors are those of the plain forward pass.

    - Inputs lie one after another, without padding, those of one length together.
    - First tokens that several inputs share, such as an instruction, are computed once.
    - The last layer computes queries and what follows for `[RET]` alone.
    - The vision tower attends to images of one size in one call (on CUDA to all of them), does not wait for the device
      in each layer, and embeds patches with a matrix product instead of a convolution.

    Args:
        max_tokens: A batch is computed in parts of so many tokens, which bounds its memory and suits the caches of a
            CPU. `None` chooses by device.

    Example:

    ```python
    >>> model[0].fast_path = FastPath(max_tokens=4096)  # doctest: +SKIP
    >>> model[0].fast_path = None  # the plain forward pass  # doctest: +SKIP
    ```
    """

    max_tokens: int | None = None


def can_pack(model: Any) -> bool:
    """Whether the decoder is one that `packed_states` knows: on one device, without sliding windows, as it was made."""
    if model.config.has_linear_attention:
        name = model.config.source_name
        logger.info_once("%s has linear attention: batches are padded, and no fast path is taken", name)
        return False
    decoder = model.language_model
    sliding = any(getattr(layer.self_attn, "sliding_window", None) is not None for layer in decoder.layers)
    # Each part that would not be called, and what it calls itself.
    parts = [(model, "language_model"), (decoder, "layers"), *((layer, "self_attn") for layer in decoder.layers)]
    parts += [(layer.self_attn, "q_proj") for layer in decoder.layers]
    as_made = all(_is_as_made(module, child) for module, child in parts)
    return as_made and not sliding and len(set((getattr(model, "hf_device_map", None) or {}).values())) < 2


def _is_as_made(module: nn.Module, child: str = "") -> bool:
    """Whether nobody counts on a module's being called as a whole: by a hook, a wrapper or another `forward`.

    FSDP and ZeRO-3 put a layer's weights together, and offloading brings them, when it is called.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # Those of transformers for output_hidden_states stay once they are there, and do nothing unless asked.
    hooked = any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)
    return not hooked and "forward" not in vars(module) and (not child or child in module._modules)


def packed_states(model: Any, part: PackedPart, num_kept_layers: int | None = None) -> Tensor:
    """The `[RET]` states `(num_inputs, hidden_size)` after the final norm, of `part.rows`, on the model's device.

    With `num_kept_layers` they are those of the first so many layers.
    """
    decoder, images = model.language_model, part.images
    hidden = decoder.embed_tokens(part.input_ids)
    added: list[Tensor] = []
    if images is not None:
        features, added = _image_features(model.visual, images)
        hidden = hidden.index_copy(0, images.token_index, features.to(hidden.dtype))
    # One position's cosines and sines serve all heads.
    angles = tuple(angle[0].unsqueeze(1) for angle in decoder.rotary_emb(hidden[None], part.position_ids))
    *inner_layers, last_layer = decoder.layers[:num_kept_layers]
    for number, layer in enumerate(inner_layers):
        query, key, value, residual = before_attention(layer, hidden, angles)
        attended = attend(query, key, value, part.sequences, scale=layer.self_attn.scaling, causal=True)
        hidden = after_attention(layer, attended, residual)
        if images is not None and number < len(added):  # DeepStack
            hidden = hidden.index_add(0, images.token_index, added[number].to(hidden.dtype))
    # [RET] sees every key and value of the last layer, but nothing reads that layer's other outputs.
    query, key, value, residual = before_attention(last_layer, hidden, angles, part.last_index)
    attended = attend(query, key, value, part.last_sequences, scale=last_layer.self_attn.scaling, causal=False)
    normed: Tensor = decoder.norm(after_attention(last_layer, attended, residual))
    return normed


def before_attention(
    layer: Any, hidden: Tensor, angles: tuple[Tensor, ...], wanted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values, `(num_tokens, num_heads, head_dim)`, and what the layer's output is added to.

    Queries are those of the tokens `wanted`, `(num_wanted,)`, or of all; `angles` are the cosines and sines of the
    positions, `(num_tokens, 1, head_dim)` each.
    """
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    shape = (-1, attention.head_dim)
    cos, sin = angles
    key, value = (projection(normed).unflatten(-1, shape) for projection in (attention.k_proj, attention.v_proj))
    if hasattr(attention, "k_norm"):  # Qwen3-VL's
        key = attention.k_norm(key)
    key = addcmul(key * cos, rotate_half(key), sin)
    if wanted is not None:
        hidden, normed, cos, sin = hidden[wanted], normed[wanted], cos[wanted], sin[wanted]
    query = attention.q_proj(normed).unflatten(-1, shape)
    if hasattr(attention, "q_norm"):
        query = attention.q_norm(query)
    return addcmul(query * cos, rotate_half(query), sin), key, value, hidden


def after_attention(layer: Any, attended: Tensor, residual: Tensor) -> Tensor:
    """The layer's output `(num_tokens, hidden_size)`."""
    hidden: Tensor = residual + layer.self_attn.o_proj(attended.flatten(1))
    output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return output


# --- the vision tower: transformers' own, which is told what it would otherwise read back from the device


def _image_features(visual: Any, images: PackedImages) -> tuple[Tensor, list[Tensor]]:
    """`(num_visual_tokens, hidden_size)`, and as much again for each of DeepStack's layers."""
    device, sequences = images.pixel_values.device, [images.sequences]
    known: dict[str, Any] = {
        "position_ids": images.patch_positions,
        "cu_seqlens": images.sequences.query_ends,
        "max_seqlen": images.sequences.max_queries,
        "sequences": sequences,
    }
    if hasattr(visual, "window_size"):  # Qwen2.5-VL's, most of whose blocks see windows of an image
        sizes = visual.spatial_merge_size, visual.window_size, visual.patch_size
        index, ends = get_vision_window_index(images.grid_thw, *sizes)
        windows = sequences_of(blocks_of_lengths(ends.diff().tolist())).to(device)
        known |= {"window_index": index.to(device), "cu_window_seqlens": windows.query_ends}
        known["max_window_seqlen"] = windows.max_queries
        sequences.append(windows)
    grid = images.grid_thw if device.type == "meta" else images.grid_thw.to(device)
    with fast_vision(visual):
        output = visual(images.pixel_values, grid_thw=grid, **known)
    return output.pooler_output, list(getattr(output, "deepstack_features", None) or [])


@contextmanager
def fast_vision(visual: Any) -> Iterator[None]:
    """A vision tower that batches its attention and embeds patches with a matrix product, within the block."""
    with _LOCK, ExitStack() as undo:
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION_NAME, _vision_attention)
        undo.callback(setattr, visual.config, "_attn_implementation", visual.config._attn_implementation)
        visual.config._attn_implementation = _ATTENTION_NAME
        projection = visual.patch_embed.proj
        # Hooks may put the weights together, or bring them to the device, when the projection itself is called.
        as_made = _is_as_made(projection) and "forward" not in vars(visual.patch_embed)
        if as_made and isinstance(projection, nn.Conv3d) and not hasattr(projection, "_hf_hook"):

            def embed(patches: Tensor) -> Tensor:
                weight = projection.weight.flatten(1)  # which FSDP puts together only now
                return linear(patches.to(weight.dtype).view(-1, weight.shape[1]), weight, projection.bias)

            # A convolution whose kernel covers a patch and whose step is a patch is a product; torch's Conv3d was ten
            # times slower in some releases. An attribute of the instance goes before the method of its class.
            visual.patch_embed.forward = embed
            undo.callback(delattr, visual.patch_embed, "forward")
        yield


def _vision_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls in each vision block; `(1, num_heads, num_patches, head_dim)` each."""
    ends = options["cu_seq_lens_q"]
    found = next((known for known in options.get("sequences", ()) if known.query_ends is ends), None)
    if found is None:  # of a batch that was not packed
        found = sequences_of(blocks_of_lengths(ends.diff().tolist())).to(query.device)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend(query, key, value, found, scale=options["scaling"], causal=False)[None], None
