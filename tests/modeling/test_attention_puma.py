from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from puma_hf.modeling import attention_puma
from puma_hf.modeling.attention_puma import Block, attend, blocks_of_lengths, sequences_of

HEADS, KEY_VALUE_HEADS, HEAD_DIM, SCALE = 4, 2, 8, 0.3
# Two prefixes of 3 and 5 tokens, then sequences: three with the first, one with the second, two with none.
PREFIXES = blocks_of_lengths([3, 5])
WITH_PREFIX = (
    *PREFIXES,
    Block(2, 4, 4, 8, 8, 0, 3),
    Block(1, 1, 1, 16, 16, 0, 3),
    Block(1, 2, 2, 17, 17, 3, 5),
    Block(2, 3, 3, 19, 19),
)
NUM_TOKENS = 25


def states(num_tokens: int, heads: int = HEADS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, heads, HEAD_DIM, generator=generator)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Of one sequence, head by head, written out; the last query stands at the last key."""
    groups = query.shape[1] // key.shape[1]
    attended = torch.empty_like(query)
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // groups].T * SCALE
        for row in range(len(query)):
            if causal:
                scores[row, len(key) - len(query) + row + 1 :] = -torch.inf
        attended[:, head] = scores.softmax(dim=-1) @ value[:, head // groups]
    return attended


def one_by_one(query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Block, ...], causal: bool) -> Tensor:
    parts = []
    for block in blocks:
        prefix = slice(block.first_prefix_key, block.first_prefix_key + block.num_prefix_keys)
        for number in range(block.count):
            start, first_key = block.first_query + number * block.num_queries, block.first_key + number * block.num_keys
            own = slice(first_key, first_key + block.num_keys)
            keys, values = (torch.cat([tensor[prefix], tensor[own]]) for tensor in (key, value))
            parts.append(softmax_attention(query[start : start + block.num_queries], keys, values, causal))
    return torch.cat(parts)


@pytest.mark.parametrize("causal", [True, False])
def test_a_prefix_is_seen_whole_and_by_its_own_sequences_alone(causal: bool) -> None:
    query, key, value = states(NUM_TOKENS), states(NUM_TOKENS, KEY_VALUE_HEADS, 1), states(NUM_TOKENS, 2, 2)
    attended = attend(query, key, value, sequences_of(WITH_PREFIX), scale=SCALE, causal=causal)
    torch.testing.assert_close(attended, one_by_one(query, key, value, WITH_PREFIX, causal), rtol=0, atol=1e-6)
    # What the first prefix holds reaches its three sequences and itself, and nothing else.
    other = value.clone()
    other[:3] += 1.0
    changed = (attend(query, key, other, sequences_of(WITH_PREFIX), scale=SCALE, causal=causal) != attended).any(dim=2)
    assert changed.all(dim=1).nonzero().flatten().tolist() == [0, 1, 2, *range(8, 17)]
    assert changed.any(dim=1).sum() == 12


# --- the kernel of CUDA, by what its documentation says


def varlen_by_its_documentation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q[-1] == len(query)
    assert cu_seq_k[-1] == len(key) == len(value)
    assert cu_seq_q.diff().max() == max_q
    assert cu_seq_k.diff().max() == max_k
    assert scale == SCALE
    assert window_size in ((-1, -1), (-1, 0))
    bounds = zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False)
    parts = [
        softmax_attention(query[start:end], key[first:last], value[first:last], window_size == (-1, 0))
        for start, end, first, last in bounds
    ]
    return torch.cat(parts)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_puma, "varlen_attn", varlen_by_its_documentation)


LAST = (Block(2, 1, 4, 0, 3, 0, 3), Block(1, 1, 2, 2, 11))  # one query of each sequence


@pytest.mark.parametrize("key_value_heads", [HEADS, KEY_VALUE_HEADS])
@pytest.mark.parametrize(
    ("blocks", "causal"),
    [(WITH_PREFIX, True), (WITH_PREFIX, False), (blocks_of_lengths([1, 4, 4]), True), (LAST, False)],
)
def test_the_kernel_for_any_length_equals_the_blocks(
    varlen: None, blocks: tuple[Block, ...], causal: bool, key_value_heads: int
) -> None:
    sequences = sequences_of(blocks)
    query = states(int(sequences.query_ends[-1]))
    num_keys = max(block.first_key + block.count * block.num_keys for block in blocks)
    key, value = states(num_keys, key_value_heads, 1), states(num_keys, key_value_heads, 2)
    attended = attention_puma._varlen(query, key, value, sequences, SCALE, causal)
    expected = attend(query, key, value, sequences, scale=SCALE, causal=causal)
    torch.testing.assert_close(attended, expected, rtol=0, atol=1e-6)


def test_the_stand_in_takes_what_the_kernel_of_this_torch_takes() -> None:
    module = pytest.importorskip("torch.nn.attention.varlen")
    parameters = inspect.signature(module.varlen_attn).parameters
    if "window_size" not in parameters:
        pytest.skip("this torch is older than 2.11")
    stand_in = inspect.signature(varlen_by_its_documentation).parameters
    ours = {name: (parameter.kind, parameter.default) for name, parameter in stand_in.items()}
    assert ours == {name: (parameters[name].kind, parameters[name].default) for name in stand_in}


class OnCuda:
    """What `attend` asks of its query before it chooses."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype, head_dim: int = 128) -> None:
        self.dtype, self.shape = dtype, (1, 1, head_dim)


@pytest.mark.parametrize(
    ("said", "head_dim", "dtype", "expected"),
    [
        ({}, 128, torch.bfloat16, True),
        ({}, 128, torch.float32, False),
        ({"capability": (7, 5)}, 128, torch.bfloat16, False),
        ({"built": False}, 128, torch.bfloat16, False),
        ({"kernel": lambda scale, window_size: None}, 128, torch.bfloat16, False),  # torch 2.11
        ({}, 12, torch.bfloat16, False),
    ],
)
def test_gpus_and_heads_that_take_the_kernel(
    varlen: None, said: dict[str, Any], head_dim: int, dtype: torch.dtype, expected: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: said.get("capability", (8, 0)))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: said.get("built", True))
    monkeypatch.setattr(torch.version, "hip", None)
    if "kernel" in said:
        monkeypatch.setattr(attention_puma, "varlen_attn", said["kernel"])
    taken = object()
    monkeypatch.setattr(attention_puma, "_varlen", lambda *args: taken)
    attention_puma._has_varlen.cache_clear()
    query: Any = OnCuda(dtype, head_dim)
    try:
        found: Any = attend(query, query, query, sequences_of(PREFIXES), scale=SCALE, causal=True)
    except TypeError:  # the blocks, which a stand-in cannot be cut into
        found = None
    attention_puma._has_varlen.cache_clear()
    assert (found is taken) is expected
