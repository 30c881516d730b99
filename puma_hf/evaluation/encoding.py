"""Embed many records, shard by shard, into a cache: stopped at any point, it goes on where it was."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from puma_hf.data.mbeir import Candidate, Query
from puma_hf.embedding.store import EmbeddingStore
from puma_hf.fingerprint import content_key, image_content
from puma_hf.processes import broadcast, connect, gather

logger = logging.getLogger(__name__)

SHARD_SIZE = 1024
_BATCHES_AT_ONCE = 8  # so many batches a call: `encode` sorts by length, and the progress bar moves
_SHOWN = 5
# Arguments of `encode` that say how it runs, not what comes out.
_HOW_IT_RUNS = (
    "batch_size",
    "chunk_size",
    "convert_to_numpy",
    "convert_to_tensor",
    "device",
    "pool",
    "show_progress_bar",
)
# Arguments that would take the instruction's place, or make something else than comparable embeddings.
_REFUSED = ("output_value", "precision", "prompt", "prompt_name")


class Encoder(Protocol):
    """What is asked of a model: `encode(inputs, prompt=..., batch_size=..., show_progress_bar=...)`."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Embed inputs as rows: a tensor or array `(len(inputs), embedding_dim)`."""


class Item(NamedTuple):
    """One record to embed, with the instruction that goes with it."""

    key: int
    record: Query | Candidate
    prompt: str


class ContentKeys:
    """Names what is embedded by what it is, so that a store outlives a moved folder but not a changed file.

    A key is of the prompt, the text, and the image's path below the root, size and time of change.

    Args:
        root: Folder of the images.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = os.path.realpath(root)

    def key(self, record: Query | Candidate, prompt: str) -> int:
        """The key of a record with its prompt."""
        return content_key(prompt, record.text, image_content(record.image, self._root))

    def items(self, records: Iterable[Query | Candidate], prompts: Iterable[str]) -> list[Item]:
        """Records and prompts with their keys."""
        pairs = zip(records, prompts, strict=True)
        return [Item(self.key(record, prompt), record, prompt) for record, prompt in pairs]


def plan_shards(items: Iterable[Item], shard_size: int = SHARD_SIZE) -> list[list[Item]]:
    """Cut items into shards of one prompt and one modality each, every key once.

    The plan is the same whatever the cache holds: what shares a batch with what changes the last digits of an
    embedding, so a run that was stopped must go on with the same batches.

    Args:
        items: What to embed.
        shard_size: Items of a shard.

    Returns:
        The shards, in the order that their prompts and modalities first appear in.

    Raises:
        ValueError: If the shard size is below 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}, must be 1 or more")
    groups: dict[tuple[str, str], dict[int, Item]] = {}
    seen: set[int] = set()
    for item in items:
        if item.key not in seen:
            seen.add(item.key)
            groups.setdefault((item.prompt, item.record.modality), {})[item.key] = item
    shards = []
    for group in groups.values():
        members = list(group.values())
        shards += [members[start : start + shard_size] for start in range(0, len(members), shard_size)]
    return shards


@dataclass(frozen=True)
class Embedder:
    """Embeds shards with a model and puts them into a cache.

    Args:
        model: The model.
        cache: Where embeddings go.
        batch_size: Batch size of `encode`.
        show_progress_bar: Whether the main process shows its progress and the time that is left.
        encode_kwargs: Further arguments of `encode`.
    """

    model: Encoder
    cache: EmbeddingStore
    batch_size: int = 32
    show_progress_bar: bool = True
    encode_kwargs: Mapping[str, Any] | None = None

    def embed(self, shards: Sequence[Sequence[Item]]) -> None:
        """Embed what the cache lacks; of several processes each has its share, and all wait for all.

        Args:
            shards: As `plan_shards` cuts them.

        Raises:
            ValueError: If `encode` returns a wrong shape, NaN or infinity.
            OSError: If the disk is full; finished shards are kept.
        """
        rank, count = connect()
        self.cache.refresh()
        # One process looks and tells the others: on a network drive they may not see the same files yet.
        missing = [self._missing(shard) for shard in shards] if rank == 0 else []
        todo = [number for number, items in enumerate(missing) if items]
        # The largest first, so that every process has about as much to do.
        numbers = broadcast(sorted(todo, key=lambda number: -len(missing[number])))
        if rank == 0:
            total, to_do = sum(map(len, shards)), sum(map(len, missing))
            logger.info("%d inputs to embed: %d already are, %d to do", total, total - to_do, to_do)
        mine = [self._missing(shards[number]) for number in numbers[rank::count]]
        hidden = not self.show_progress_bar or rank > 0 or not mine
        with tqdm(total=sum(map(len, mine)), desc="Embedding", unit="item", disable=hidden, smoothing=0.1) as progress:
            for items in mine:
                parts: list[Tensor] = []
                for rows in self._encode(items):
                    _check_dim(rows, self.cache.embedding_dim or (parts or [rows])[0].shape[1], items)
                    parts.append(rows)
                    progress.update(len(rows))
                self.cache.add(torch.tensor([item.key for item in items]), torch.cat(parts))
        gather(None)
        self.cache.refresh()

    def _missing(self, shard: Sequence[Item]) -> list[Item]:
        there = self.cache.has(torch.tensor([item.key for item in shard])).tolist()
        return [item for item, is_there in zip(shard, there, strict=True) if not is_there]

    def _encode(self, items: Sequence[Item]) -> Iterator[Tensor]:
        """Embeddings of the items of one shard, `(call_size, embedding_dim)` at a time."""
        options = {"batch_size": self.batch_size, "show_progress_bar": False, **(self.encode_kwargs or {})}
        size = max(1, self.batch_size) * _BATCHES_AT_ONCE
        for start in range(0, len(items), size):
            part = items[start : start + size]
            inputs = [item.record.model_input for item in part]
            # The empty prompt, unlike None, keeps a SentenceTransformer's default prompt away.
            encode = partial(self.model.encode, prompt=part[0].prompt, **options)
            rows = torch.as_tensor(encode_named(encode, inputs, [item.record for item in part])).float().cpu()
            if rows.ndim != 2 or len(rows) != len(part):
                raise ValueError(
                    f"encode returned {tuple(rows.shape)} for {len(part)} inputs of modality "
                    f"{part[0].record.modality!r}, expected ({len(part)}, embedding_dim)"
                )
            self._check_finite(rows, part)
            yield rows

    def _check_finite(self, rows: Tensor, items: Sequence[Item]) -> None:
        bad = (~rows.to(self.cache.dtype).isfinite().all(dim=1)).nonzero().flatten().tolist()
        if not bad:
            return
        names = [record_id(items[row].record) for row in bad[:_SHOWN]]
        remedy = "look at these inputs, or encode in float32 or bfloat16 instead of float16"
        if rows.isfinite().all():
            remedy = "they are too large for float16: choose embedding_dtype='bfloat16' or 'float32'"
        raise ValueError(
            f"the embeddings of {len(bad)} of {len(items)} inputs of modality {items[0].record.modality!r} are not "
            f"finite as {self.cache.dtype}, first {names}; {remedy}"
        )


def encode_named(
    encode: Callable[[Sequence[Any]], Any], inputs: Sequence[Any], records: Sequence[Query | Candidate]
) -> Any:
    """What `encode` gives for inputs; if one cannot be read, the error names its record.

    Args:
        encode: Embeds inputs.
        inputs: The inputs.
        records: The record of each.

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
                name = f"{type(record).__name__.lower()} {record_id(record)!r}"
                raise kind(f"{name}: {str(own).removeprefix('inputs[0]: ')}") from error
        raise


def record_id(record: Query | Candidate) -> str:
    """The qid or did of a record."""
    return record.qid if isinstance(record, Query) else record.did


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
    """Those arguments of `encode` that change what comes out, as plain values.

    Raises:
        ValueError: If one cannot be passed on.
    """
    check_encode_kwargs(encode_kwargs)
    given = dict(encode_kwargs or {})
    kept = {name: value for name, value in given.items() if name not in _HOW_IT_RUNS}
    plain: dict[str, Any] = json.loads(json.dumps(kept, sort_keys=True, default=str))
    return plain


def _check_dim(rows: Tensor, dim: int, items: Sequence[Item]) -> None:
    if rows.shape[1] != dim:
        raise ValueError(
            f"encode returned {tuple(rows.shape)} for {len(rows)} inputs of modality {items[0].record.modality!r}, "
            f"expected ({len(rows)}, {dim}): the same embedding_dim for every modality"
        )
