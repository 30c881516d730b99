"""The embeddings of an evaluation: of many records, by any model with an `encode`, kept in a store as they are made."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from puma_hf.data.records import Record
from puma_hf.embedding.embed import BrokenInputError, is_puma, iterate_embeddings
from puma_hf.embedding.store import EmbeddingStore
from puma_hf.fingerprint import content_key, image_content
from puma_hf.processes import broadcast, connect, gather

logger = logging.getLogger(__name__)

SHARD_SIZE = 1024
_BATCHES_AT_ONCE = 8  # so many batches a call: `encode` sorts by length, and the progress bar moves
# Records in memory at a time, in shards for each process: a pool of millions stays in its file.
_SHARDS_AT_ONCE = 8
_SHOWN = 5
_PLACE = re.compile(r"^inputs\[\d+\]: ")
# Arguments of `encode` that say how it runs, not what comes out.
_HOW_IT_RUNS = {
    "batch_size",
    "chunk_size",
    "convert_to_numpy",
    "convert_to_tensor",
    "device",
    "pool",
    "show_progress_bar",
}
# Arguments that would take the instruction's place, or make something else than comparable embeddings.
_REFUSED = ("output_value", "precision", "prompt", "prompt_name")

Pair = tuple[Record, str]
"""A record, and the instruction that goes with it; the empty one keeps a model's default prompt away."""


class Encoder(Protocol):
    """What is asked of a model: `encode(inputs, prompt=..., batch_size=..., show_progress_bar=...)`."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Embed inputs as rows: a tensor or array `(len(inputs), embedding_dim)`."""


def iterate_rows(
    model: Any, pairs: Sequence[Pair], *, batch_size: int = 32, encode_kwargs: Mapping[str, Any] | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Embed records with an instruction each: a PUMA as `embed` does, and any other model by its `encode`.

    Args:
        model: The model.
        pairs: The records and their instructions.
        batch_size: Of `encode`, which gets inputs of one instruction and one modality at a time. A PUMA has no use for
            it: its batches are cut by tokens.
        encode_kwargs: Further arguments of `encode`.

    Returns:
        An iterator over places in `pairs` and their rows, float32 `(num_places, embedding_dim)` on the CPU.

    Raises:
        ValueError: If an input cannot be read, or `encode` returns a wrong shape, NaN or infinity.
        FileNotFoundError: If an image is gone.
    """
    options = dict(encode_kwargs or {})
    how = {name: options[name] for name in ("truncate_dim", "processing_kwargs") if name in options}
    if is_puma(model) and options.keys() <= how.keys() | _HOW_IT_RUNS:
        inputs = [replace(record, instruction=prompt or None).model_input for record, prompt in pairs]
        try:
            for indices, rows in iterate_embeddings(model, inputs, prompt="", show_progress_bar=False, **how):
                yield _checked(indices.tolist(), rows, pairs)
        except BrokenInputError as error:
            raise ValueError(_named(pairs[error.index][0], error.broken.message)) from error
        return
    options = {"batch_size": batch_size, "show_progress_bar": False, **options}
    groups: dict[tuple[str, str], list[int]] = {}
    for place, (record, prompt) in enumerate(pairs):
        groups.setdefault((prompt, record.modality), []).append(place)
    step = max(1, batch_size) * _BATCHES_AT_ONCE
    dim = None
    for (prompt, modality), places in groups.items():
        for part in (places[start : start + step] for start in range(0, len(places), step)):
            records = [pairs[place][0] for place in part]
            encode = partial(model.encode, prompt=prompt, **options)
            found = encode_named(encode, [record.model_input for record in records], records)
            rows = torch.as_tensor(found).float().cpu()
            dim = rows.shape[-1] if dim is None else dim
            if rows.shape != (len(part), dim):  # one row would be taken for all
                raise ValueError(
                    f"encode returned {tuple(rows.shape)} for {len(part)} inputs of modality {modality!r}, expected "
                    f"({len(part)}, {dim if rows.ndim == 2 else 'embedding_dim'}), the same for every modality"
                )
            yield _checked(part, rows, pairs)


class Embedder:
    """Embeds records into a store; what is there is not embedded again.

    A record is known by what it is, so that a store outlives a moved folder but not a changed file: its instruction,
    its text, and path, size and time of change of its image.

    Args:
        model: The model.
        store: Where embeddings go.
        image_root: Folder of the images.
        batch_size: As in `iterate_rows`.
        encode_kwargs: Likewise.
        shard_size: Inputs of one stored shard; a process that is stopped loses at most so many.
        show_progress_bar: Whether the main process shows its progress and the time that is left.
    """

    def __init__(
        self,
        model: Encoder,
        store: EmbeddingStore,
        image_root: str | Path,
        batch_size: int = 32,
        encode_kwargs: Mapping[str, Any] | None = None,
        shard_size: int = SHARD_SIZE,
        show_progress_bar: bool = True,
    ) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size is {shard_size}, must be 1 or more")
        self._model, self._store, self._root = model, store, os.path.realpath(image_root)
        self._options: dict[str, Any] = {"batch_size": batch_size, "encode_kwargs": encode_kwargs}
        self._shard_size, self._show = shard_size, show_progress_bar

    def keys(self, pairs: Iterable[Pair]) -> Tensor:
        """Embed what the store lacks; the keys `(num_pairs,)` of all, in their order.

        A window of records is in memory at a time. Of several processes each embeds its share, and all wait for all.

        Raises:
            ValueError: As in `iterate_rows`, or if an embedding is too large for the type of the store.
            OSError: If the disk is full; finished shards are kept.
        """
        keys = [torch.empty(0, dtype=torch.int64)]
        remaining = iter(pairs)
        while window := list(islice(remaining, self._shard_size * _SHARDS_AT_ONCE * connect()[1])):
            keys.append(torch.tensor([self.key(record, prompt) for record, prompt in window]))
            self._embed(window, keys[-1])
        return torch.cat(keys)

    def key(self, record: Record, prompt: str) -> int:
        """What a record with its instruction is found by."""
        return content_key(prompt, record.text, image_content(record.image, self._root))

    def _embed(self, window: Sequence[Pair], keys: Tensor) -> None:
        rank, count = connect()
        self._store.refresh()
        # One process looks and tells the others: on a network drive they may not see the same files yet.
        lacking = broadcast((~self._store.has(keys)).nonzero().flatten().tolist() if rank == 0 else [])
        first: dict[int, int] = {}  # the place of each key
        for place in lacking:
            first.setdefault(int(keys[place]), place)
        todo = [*first.values()]
        if rank == 0 and todo:
            logger.info("%d inputs to embed: %d already are, %d to do", len(window), len(window) - len(todo), len(todo))
        mine = todo[rank::count]
        hidden = not self._show or rank > 0 or not mine
        with tqdm(total=len(mine), desc="Embedding", unit="item", disable=hidden, smoothing=0.1) as progress:
            for shard in (mine[start : start + self._shard_size] for start in range(0, len(mine), self._shard_size)):
                rows: list[Tensor] = [torch.empty(0)] * len(shard)
                for places, part in iterate_rows(self._model, [window[place] for place in shard], **self._options):
                    for place, row in zip(places, part, strict=True):
                        rows[place] = row
                    progress.update(len(places))
                self._store.add(keys[shard], torch.stack(rows))
        gather(None)
        self._store.refresh()


def encode_named(encode: Callable[[Sequence[Any]], Any], inputs: Sequence[Any], records: Sequence[Record]) -> Any:
    """What `encode` gives for inputs; if one cannot be read, the error names its record.

    Raises:
        FileNotFoundError: If an image is gone.
        ValueError: If an input cannot be read.
    """
    try:
        return encode(inputs)
    except (ValueError, FileNotFoundError) as error:
        for record, one in zip(records, inputs, strict=True):
            try:
                encode([one])
            except (ValueError, FileNotFoundError) as own:
                kind = FileNotFoundError if isinstance(own, FileNotFoundError) else ValueError
                raise kind(_named(record, str(own))) from error
        raise


def check_encode_kwargs(encode_kwargs: Mapping[str, Any] | None) -> None:
    """Refuse arguments of `encode` that an evaluation cannot pass on.

    Raises:
        ValueError: If there is one.
    """
    refused = sorted(set(encode_kwargs or {}).intersection(_REFUSED))
    if refused:
        raise ValueError(
            f"encode_kwargs has {refused}: each task's instruction is the prompt, and what is compared are float "
            "embeddings of whole inputs (int8 would be scaled anew in every call). Leave them out; embedding_dtype "
            "stores embeddings in fewer bytes."
        )


def settings_of_encode(encode_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those arguments of `encode` that change what comes out, as plain values; a ValueError as above."""
    check_encode_kwargs(encode_kwargs)
    kept = {name: value for name, value in (encode_kwargs or {}).items() if name not in _HOW_IT_RUNS}
    plain: dict[str, Any] = json.loads(json.dumps(kept, sort_keys=True, default=str))
    return plain


def _checked(places: list[int], rows: Tensor, pairs: Sequence[Pair]) -> tuple[list[int], Tensor]:
    bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        names = [pairs[places[row]][0].id for row in bad[:_SHOWN]]
        raise ValueError(
            f"the embeddings of {len(bad)} of {len(rows)} inputs are not finite, first {names}; look at these inputs, "
            "or encode in float32 or bfloat16 instead of float16"
        )
    return places, rows


def _named(record: Record, message: str) -> str:
    """An error about an input, by the record instead of its place."""
    return f"{type(record).__name__.lower()} {record.id!r}: {_PLACE.sub('', message)}"
