"""Embed records into a store with the `encode` of any model: stopped at any point, it goes on where it was."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puma_hf.data.mbeir import Candidate, Query
from puma_hf.data.records import Record
from puma_hf.embedding.embed import is_puma
from puma_hf.embedding.run import EmbeddingRun, Item, StoreSink, disk_full_explained, embed_records
from puma_hf.embedding.store import EmbeddingStore
from puma_hf.fingerprint import content_key, image_content

SHARD_SIZE = 1024
# Inputs of any model that are put into groups together: of a pool of millions no more records are in memory.
_WINDOW = 8 * SHARD_SIZE
# Arguments of `encode` that say how it runs, not what comes out.
_HOW_IT_RUNS = {"batch_size", "chunk_size", "convert_to_numpy", "convert_to_tensor", "device", "pool"}
_HOW_IT_RUNS |= {"show_progress_bar"}
# Arguments that would take the instruction's place, or make something else than comparable embeddings.
_REFUSED = {"output_value", "precision", "prompt", "prompt_name"}
Pair = tuple[Query | Candidate, str]
"""A record, and the prompt that it is embedded with."""


def embed_into(
    store: EmbeddingStore,
    model: Any,
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
        model: A `SentenceTransformer` or anything with its `encode`, as the evaluation takes it.
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
    keys, root = array("q"), os.path.realpath(root)

    def items() -> Iterator[Item]:
        for row, (record, prompt) in enumerate(pairs):
            keys.append(content_key(prompt, record.text, image_content(record.image, root)))
            yield Item(replace(record, instruction=prompt, row=row), keys[-1])

    what = {name: value for name, value in options.items() if name not in _HOW_IT_RUNS}
    if is_puma(model) and what.keys() <= {"truncate_dim", "processing_kwargs"}:
        # It fills its batches by tokens: so that a smaller batch takes less memory, each of its inputs stands for 512,
        # as 32 of them do for the 16,384 that a GPU takes by default.
        size = options.get("batch_size", 32)
        budget = 512 * size if size < 32 else None
        # The empty prompt, unlike None, keeps a SentenceTransformer's default prompt away.
        embedder = partial(embed_records, model, prompt="", max_batch_tokens=budget, **what)
    else:
        embedder = partial(_encode_groups, model, options, shard_size)
    with disk_full_explained(store.folder):
        run = EmbeddingRun(StoreSink(store), embedder, shard_size)
        run.run(items(), total, show_progress_bar=show_progress_bar)
    store.refresh()
    return torch.tensor(keys, dtype=torch.int64)


def _encode_groups(
    model: Any, options: Mapping[str, Any], size: int, records: Iterator[Record], report: object
) -> Iterator[tuple[Tensor, Tensor]]:
    """The `Embedder` of any model: a call of its `encode` is of one prompt and one modality."""
    first = 0
    while window := list(islice(records, _WINDOW)):
        groups: dict[tuple[str | None, str], list[int]] = {}
        for place, record in enumerate(window):
            groups.setdefault((record.instruction, record.modality), []).append(place)
        for (prompt, _), places in groups.items():
            for part in (places[start : start + size] for start in range(0, len(places), size)):
                own = [replace(window[place], instruction=None) for place in part]
                encode = partial(model.encode, prompt=prompt, show_progress_bar=False, **options)
                encoded = encode_named(encode, [record.model_input for record in own], own)
                yield torch.tensor(part) + first, float_rows(encoded, own, None)
        first += len(window)


def float_rows(encoded: Any, records: Sequence[Record], dim: int | None) -> Tensor:
    """What `encode` gave for records of one modality as float32 on the CPU; one row would be taken for all."""
    rows, count = torch.as_tensor(encoded).float().cpu(), len(records)
    if rows.ndim != 2 or len(rows) != count or rows.shape[1] != (dim or rows.shape[1]):
        problem = f"encode returned {tuple(rows.shape)} for {count} inputs of modality {records[0].modality!r}"
        raise ValueError(f"{problem}, expected ({count}, {dim or 'embedding_dim'})")
    return rows


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
