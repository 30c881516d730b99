"""Attention within each of many sequences that lie one after another: no padding, and no mask over all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """`count` sequences of one length that lie one after another, and the prefix that they share.

    Each has `num_queries` queries, all of its tokens or one, and `num_keys` keys besides those of the prefix; the first
    begins at `first_query` and `first_key`. The prefix, if any, begins at `first_prefix_key`.
    """

    count: int
    num_queries: int
    num_keys: int
    first_query: int
    first_key: int
    first_prefix_key: int = 0
    num_prefix_keys: int = 0


@dataclass(frozen=True)
class Sequences:
    """Which queries look at which keys: as blocks, and as a kernel for sequences of any length asks for it.

    `query_ends` and `key_ends`, `(num_sequences + 1,)` int32, are where the queries and keys of each sequence end,
    after a 0. Keys of a prefix come before each sequence's own: `key_index` says which all are, `None` if in order.
    """

    blocks: tuple[Block, ...]
    query_ends: Tensor
    key_ends: Tensor
    key_index: Tensor | None
    max_queries: int
    max_keys: int

    def to(self, device: Any) -> Sequences:
        """The same with its tensors on another device."""
        return mapped(self, lambda tensor: tensor.to(device))


def mapped(part: T, change: Callable[[Tensor], Tensor]) -> T:
    """A dataclass with each tensor in it, and in the dataclasses within, changed; `grid_thw` stays on the CPU."""
    changed: Any = {}
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if isinstance(value, Tensor) and field.name != "grid_thw":
            changed[field.name] = change(value)
        elif is_dataclass(value):
            changed[field.name] = mapped(value, change)
    return replace(part, **changed)  # type: ignore[type-var]


def sequences_of(blocks: Sequence[Block]) -> Sequences:
    """Lay out sequences; `blocks` come in the order of their queries, and in that of their keys."""
    queries, keys, index = [0], [0], []
    for block in blocks:
        prefix = torch.arange(block.first_prefix_key, block.first_prefix_key + block.num_prefix_keys)
        own = torch.arange(block.first_key, block.first_key + block.count * block.num_keys).view(block.count, -1)
        index.append(torch.cat([prefix.expand(block.count, -1), own], dim=1).flatten())
        for _ in range(block.count):
            queries.append(queries[-1] + block.num_queries)
            keys.append(keys[-1] + block.num_prefix_keys + block.num_keys)
    return Sequences(
        blocks=tuple(blocks),
        query_ends=torch.tensor(queries, dtype=torch.int32),
        key_ends=torch.tensor(keys, dtype=torch.int32),
        key_index=torch.cat(index) if any(block.num_prefix_keys for block in blocks) else None,
        max_queries=max(block.num_queries for block in blocks),
        max_keys=max(block.num_prefix_keys + block.num_keys for block in blocks),
    )


def blocks_of_lengths(lengths: Sequence[int], start: int = 0, *prefix: int) -> tuple[Block, ...]:
    """Blocks of sequences with these lengths, neighbours of one length together; `prefix` is its start and length."""
    blocks: list[Block] = []
    for length in lengths:
        if blocks and blocks[-1].num_keys == length:
            blocks[-1] = replace(blocks[-1], count=blocks[-1].count + 1)
        else:
            blocks.append(Block(1, length, length, start, start, *prefix))
        start += length
    return tuple(blocks)


def attend(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, *, scale: float, causal: bool) -> Tensor:
    """Attention of each sequence's queries to its keys.

    On NVIDIA GPUs from Ampere on, in half precision and with a recent torch, one kernel for sequences of any length
    does it; elsewhere one call for each block of sequences of one length. Neither waits for the device.

    Args:
        query: `(num_queries, num_heads, head_dim)`, all sequences one after another.
        key: `(num_keys, num_key_value_heads, head_dim)`, like `value`.
        value: See `key`.
        sequences: Which queries look at which keys.
        scale: What products of queries and keys are multiplied with.
        causal: Whether a sequence's last query stands at its last key and none looks ahead.

    Returns:
        `(num_queries, num_heads, head_dim)`.
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and _has_varlen(query.device, query.shape[-1]):
        return _varlen(query, key, value, sequences, scale, causal)
    attended = torch.empty_like(query)
    for block in sequences.blocks:
        queries = _per_sequence(query, block.first_query, block.count, block.num_queries)
        keys, values = (_with_prefix(tensor, block) for tensor in (key, value))
        causal_here, mask = causal and block.num_queries > 1, None
        if causal_here and block.num_prefix_keys:
            # torch's own causal mask stands at the first key, so after a prefix a mask of num_queries x num_keys bytes
            # is needed. It keeps the math of the kernel, but not its skipping of what is masked.
            end = block.num_prefix_keys + block.num_queries
            mask = _triangle(2 ** (end - 1).bit_length(), query.device)[block.num_prefix_keys : end, :end]
        part = scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=causal_here and mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        end = block.first_query + block.count * block.num_queries
        attended[block.first_query : end] = part.transpose(1, 2).flatten(0, 1)
    return attended


def _per_sequence(tensor: Tensor, start: int, count: int, length: int) -> Tensor:
    """`(count, num_heads, length, head_dim)`, a view."""
    parts: Tensor = tensor[start : start + count * length].unflatten(0, (count, length))
    return parts.transpose(1, 2)


def _with_prefix(tensor: Tensor, block: Block) -> Tensor:
    own = _per_sequence(tensor, block.first_key, block.count, block.num_keys)
    if not block.num_prefix_keys:
        return own
    prefix = _per_sequence(tensor, block.first_prefix_key, 1, block.num_prefix_keys)
    return torch.cat([prefix.expand(block.count, -1, -1, -1), own], dim=2)


@lru_cache(maxsize=16)
def _triangle(size: int, device: torch.device) -> Tensor:
    """Which keys each query may see; every such mask is a part of few of them, for all lengths and layers."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


@lru_cache(maxsize=16)
def _has_varlen(device: torch.device, head_dim: int) -> bool:
    """Whether the kernel for sequences of any length is there and takes such heads."""
    if varlen_attn is None or torch.version.hip is not None:
        return False
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # before torch 2.12
        return False
    built = torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0) and head_dim % 8 == 0 and head_dim <= 256


def _varlen(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, causal: bool) -> Tensor:
    if sequences.key_index is not None:
        key, value = key[sequences.key_index], value[sequences.key_index]
    options = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    # A window without a right side is causal: where a sequence has more keys than queries, its last query stands at
    # its last key.
    window = (-1, 0) if causal else (-1, -1)
    ends = (sequences.query_ends, sequences.key_ends, sequences.max_queries, sequences.max_keys)
    attended: Tensor = varlen_attn(query, key, value, *ends, window_size=window, **options)
    return attended
