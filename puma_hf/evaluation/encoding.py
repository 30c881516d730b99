"""Embed records into a store with the `encode` of any model: stopped at any point, it goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from puma_hf.data.mbeir import Candidate, Query
from puma_hf.data.records import Record
from puma_hf.embedding.embed import BrokenInputError, embed, is_puma
from puma_hf.embedding.store import EmbeddingStore
from puma_hf.fingerprint import content_key, image_content
from puma_hf.processes import broadcast, connect, gather

SHARD_SIZE = 1024
# Shards of one process that are planned at once: of a pool of millions no more records are in memory.
_SHARDS_AT_ONCE = 8
_SHOWN = 5
# Arguments of `encode` that say how it runs, not what comes out.
_HOW_IT_RUNS = {"batch_size", "chunk_size", "convert_to_numpy", "convert_to_tensor", "device", "pool"}
_HOW_IT_RUNS |= {"show_progress_bar"}
# Arguments that would take the instruction's place, or make something else than comparable embeddings.
_REFUSED = {"output_value", "precision", "prompt", "prompt_name"}
Pair = tuple[Query | Candidate, str]
"""A record, and the prompt that it is embedded with."""


class Encoder(Protocol):
    """What is asked of a model: `encode(inputs, prompt=..., batch_size=..., show_progress_bar=...)`."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Embed inputs as rows: a tensor or array `(len(inputs), embedding_dim)`."""


def embed_into(
    store: EmbeddingStore,
    model: Encoder,
    pairs: Iterable[Pair],
    *,
    root: str | Path,
    total: int,
    shard_size: int = SHARD_SIZE,
    show_progress_bar: bool = True,
    **options: Any,
) -> Tensor:
    """Embed what a store lacks, shard by shard; of several processes each has its share, and all wait for all.

    Args:
        store: Where embeddings go.
        model: The model.
        pairs: Records with their prompts, the same in every process.
        root: Folder of the images: a dataset that was moved keeps its embeddings.
        total: Number of pairs.
        shard_size: Records of a shard, at most.
        show_progress_bar: Whether the main process shows how many it has passed, and the time that is left.
        options: Arguments of `encode`.

    Returns:
        The keys of all pairs, `(num_pairs,)`, in their order.

    Raises:
        ValueError: If an input cannot be read, or `encode` returns a wrong shape, NaN or infinity.
        OSError: If an image is gone, or the disk is full; finished shards are kept.
    """
    rank, count = connect()
    root, remaining, keys = os.path.realpath(root), iter(pairs), [torch.empty(0, dtype=torch.int64)]
    with tqdm(total=total, desc="Embedding", unit="item", disable=not show_progress_bar or rank > 0) as progress:
        while window := list(islice(remaining, shard_size * _SHARDS_AT_ONCE * count)):
            here = [content_key(prompt, one.text, image_content(one.image, root)) for one, prompt in window]
            keys.append(torch.tensor(here))
            # One process looks and tells the others: on a network drive they may not see the same files yet.
            shards = broadcast([*_missing(store, window, keys[-1], shard_size)] if rank == 0 else [])
            for shard in shards[rank::count]:
                store.add(keys[-1][shard], _encode(model, [window[place] for place in shard], store, options))
                progress.update(len(shard))
            if shards:  # otherwise a pool of millions that is there already would be listed again and again
                gather(None)
                store.refresh()
            progress.update(sum(map(len, keys)) - progress.n)
    return torch.cat(keys)


def _missing(store: EmbeddingStore, window: Sequence[Pair], keys: Tensor, shard_size: int) -> Iterator[list[int]]:
    # A shard is of one prompt and one modality, and has every key once. The largest come first, so that every process
    # has about as much to do.
    groups: dict[tuple[str, str], dict[int, int]] = {}
    for place, (key, is_there) in enumerate(zip(keys.tolist(), store.has(keys).tolist(), strict=True)):
        if not is_there:
            record, prompt = window[place]
            groups.setdefault((prompt, record.modality), {}).setdefault(key, place)
    for places in sorted((list(group.values()) for group in groups.values()), key=len, reverse=True):
        yield from (places[start : start + shard_size] for start in range(0, len(places), shard_size))


def _encode(model: Encoder, pairs: Sequence[Pair], store: EmbeddingStore, options: Mapping[str, Any]) -> Tensor:
    records, prompt = [record for record, _ in pairs], pairs[0][1]
    encode = partial(_rows, model, prompt, options)
    encoded = encode_named(encode, [record.model_input for record in records], records)
    rows = float_rows(encoded, records, store.embedding_dim)
    if bad := (~rows.to(store.dtype).isfinite().all(dim=1)).nonzero().flatten().tolist():
        remedy = "look at these inputs, or take float32 or bfloat16 for the model and as embedding_dtype"
        problem = f"the embeddings of {len(bad)} of {len(records)} inputs are not finite as {store.dtype}, first"
        raise ValueError(f"{problem} {[records[place].id for place in bad[:_SHOWN]]}; {remedy}")
    return rows


def float_rows(encoded: Any, records: Sequence[Record], dim: int | None) -> Tensor:
    """What `encode` gave for records of one modality as float32 on the CPU; one row would be taken for all."""
    rows, count = torch.as_tensor(encoded).float().cpu(), len(records)
    if rows.ndim != 2 or len(rows) != count or rows.shape[1] != (dim or rows.shape[1]):
        problem = f"encode returned {tuple(rows.shape)} for {count} inputs of modality {records[0].modality!r}"
        raise ValueError(f"{problem}, expected ({count}, {dim or 'embedding_dim'})")
    return rows


def _rows(model: Encoder, prompt: str, options: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
    """A PUMA embeds as `embed` does, where worker processes decode images ahead; any other model by its `encode`.

    The empty prompt, unlike None, keeps a SentenceTransformer's default prompt away.
    """
    what = {name: value for name, value in options.items() if name not in _HOW_IT_RUNS}
    if not is_puma(model) or not what.keys() <= {"truncate_dim", "processing_kwargs"}:
        return model.encode(inputs, prompt=prompt, show_progress_bar=False, **options)
    try:
        return embed(model, inputs, prompt=prompt, show_progress_bar=False, **what).embeddings
    except BrokenInputError as error:
        raise ValueError(error.broken.message) from error  # without what is said of `on_error`


def encode_named(encode: Callable[[Sequence[Any]], Any], inputs: Sequence[Any], records: Sequence[Record]) -> Any:
    """What `encode` gives for inputs; if one cannot be read, the ValueError or FileNotFoundError names its record."""
    try:
        return encode(inputs)
    except (ValueError, FileNotFoundError) as error:
        for record, one in zip(records, inputs, strict=True):
            try:
                encode([one])
            except (ValueError, FileNotFoundError) as own:
                kind = FileNotFoundError if isinstance(own, FileNotFoundError) else ValueError
                name = f"{type(record).__name__.lower()} {record.id!r}"
                raise kind(f"{name}: {str(own).removeprefix('inputs[0]: ')}") from error
        raise


def settings_of_encode(encode_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those arguments of `encode` that change what comes out; ValueError if an evaluation cannot pass one on."""
    if refused := sorted(_REFUSED.intersection(encode_kwargs or {})):
        # int8, for one, would be scaled anew in every call.
        problem = f"encode_kwargs has {refused}: each task's instruction is the prompt, and floats are compared."
        raise ValueError(f"{problem} Leave them out; embedding_dtype stores embeddings in fewer bytes.")
    kept = {name: value for name, value in (encode_kwargs or {}).items() if name not in _HOW_IT_RUNS}
    return dict(json.loads(json.dumps(kept, sort_keys=True, default=str)))
