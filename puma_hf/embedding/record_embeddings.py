"""Embed records of a corpus: errors name the record, and what was done before them is kept."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from puma_hf.configs import EmbedConfig
from puma_hf.embedding.embed import iterate_embeddings
from puma_hf.embedding.precision import Collector
from puma_hf.embedding.records import Record
from puma_hf.embedding.results import BrokenInput, BrokenInputError, EmbedResult
from puma_hf.embedding.unfinished import UnfinishedShard
from puma_hf.processes import sigterm_waits, stop_if_sigterm
from puma_hf.settings import processing_of, shown

_SHOWN = 5
_PLACE = re.compile(r"^inputs\[\d+\]: ")  # in a shard, which says nothing to who knows ids


def embed_records(
    model: Any,
    records: Sequence[Record],
    config: EmbedConfig,
    progress: Any = None,
    unfinished: UnfinishedShard | None = None,
) -> EmbedResult:
    """Embed records in float32.

    Args:
        model: A PUMA model as a `SentenceTransformer`.
        records: The records.
        config: How to embed them, and what to do about broken ones.
        progress: A tqdm bar over records, if there is one.
        unfinished: What an earlier run has left of them; if this one fails, what it leaves goes there.

    Returns:
        Rows and errors by the places of the records among these.

    Raises:
        ValueError: If a record is broken and `config.on_error` is "raise", or an embedding is not finite.
    """
    dim = embedding_dim(model, config)
    rows = Collector(len(records), dim, "float32")
    errors: list[BrokenInput] = []
    bad = [place for place, record in enumerate(records) if record.problem is not None]
    errors += [BrokenInput(place, str(records[place].problem)) for place in bad]
    if config.on_error == "zero":
        rows.add(torch.tensor(bad, dtype=torch.int64), torch.zeros(len(bad), dim))
    todo = np.delete(np.arange(len(records)), bad)
    if unfinished is not None:
        places, done = unfinished.load(dim)
        rows.add(torch.from_numpy(places), torch.from_numpy(done))
        todo = np.setdiff1d(todo, places)
    if progress is not None and len(todo) < len(records):
        expect_less(progress, len(records) - len(todo))
    batches = iterate_embeddings(
        model,
        [records[place].model_input for place in todo.tolist()],
        prompt=config.prompt,
        max_batch_tokens=config.max_batch_tokens,
        num_workers=config.num_workers,
        on_error=config.on_error,
        report=lambda error: errors.append(BrokenInput(int(todo[error.index]), _PLACE.sub("", error.message))),
        truncate_dim=config.truncate_dim,
        processing_kwargs=processing_of(config.special_tokens),
        show_progress_bar=False,
    )
    before = 0 if progress is None else progress.n
    with sigterm_waits():
        try:
            for indices, embeddings in batches:
                rows.add(torch.from_numpy(todo[indices.numpy()]), embeddings)
                if progress is not None:
                    progress.update(len(indices))
                stop_if_sigterm()
            result = rows.result(errors)
            _check_finite(result, records)
        except BaseException as error:  # whatever ends the run
            if unfinished is not None:
                unfinished.save(rows.result(errors))
            if isinstance(error, BrokenInputError):
                raise ValueError(_broken_record(records[todo[error.index]], error.broken.message)) from error
            raise
    if progress is not None:
        progress.update(before + len(todo) - progress.n)  # what was left out
    return result


def expect_less(progress: Any, num_items: int) -> None:
    """Take what need not be done from the total, so that the rate, and the time left, are those of the work."""
    progress.total -= num_items
    progress.refresh()


def embedding_dim(model: Any, config: EmbedConfig) -> int:
    """Dimensions of an embedding."""
    return config.truncate_dim or int(model.get_embedding_dimension() or 0)


def _check_finite(result: EmbedResult, records: Sequence[Record]) -> None:
    bad = (~np.isfinite(result.embeddings).all(axis=1)).nonzero()[0].tolist()
    if bad:
        names = [records[result.indices[place]].id for place in bad[:_SHOWN]]
        raise ValueError(
            f"The embeddings of {len(bad)} of {len(records)} inputs have NaN or infinity, first {shown(names)}. Look "
            "at these inputs, or load the weights as bfloat16 or float32 instead of float16."
        )


def _broken_record(record: Record, message: str) -> str:
    reason = _PLACE.sub("", message).rstrip(".")
    return (
        f"Input {shown(record.id)} (row {record.row}) cannot be embedded: {reason}. Mend it and run the same command "
        "again, which goes on where this one ended; or pass on_error='skip' (--on-error skip) to leave out what is "
        "broken."
    )
