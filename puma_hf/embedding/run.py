"""Embed a corpus to disk, as a function of one configuration: it opens the corpus, the model and the directory."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from puma_hf.configs import EmbedConfig
from puma_hf.embedding.corpus_store import ERRORS, MANIFEST, RANGES, EmbeddingStore
from puma_hf.embedding.precision import quantize, ranges_of
from puma_hf.embedding.record_embeddings import embed_records, embedding_dim, expect_less
from puma_hf.embedding.records import Corpus, Record, input_hash, open_corpus
from puma_hf.embedding.results import EmbedResult
from puma_hf.embedding.shards import BrokenRecord, Shard, ShardInfo
from puma_hf.embedding.unfinished import UnfinishedShard
from puma_hf.files import is_puma_directory
from puma_hf.fingerprint import model_fingerprint, short_name
from puma_hf.opening import check_truncate_dim, open_sentence_transformer
from puma_hf.processes import broadcast, connect, gather, locked_for_all, own_device, shared_folder

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SEED = 0  # of the inputs that int8 and uint8 are scaled by


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """What a run of `embed_corpus` has done; `str()` tells it in a few lines.

    Args:
        output: The directory.
        num_items: Inputs of the corpus.
        num_rows: Embeddings in the directory.
        num_errors: Inputs that could not be embedded.
        num_shards: Shards in the directory.
        num_new_shards: Those of them that this run has made.
        num_new_items: Inputs of these that this run has embedded.
        embedding_dim: Dimensions of an embedding.
        precision: What is stored of them.
        seconds: Time from the first input to the last.
    """

    output: str
    num_items: int
    num_rows: int
    num_errors: int
    num_shards: int
    num_new_shards: int
    num_new_items: int
    embedding_dim: int
    precision: str
    seconds: float

    def __str__(self) -> str:
        rate = f", {self.num_new_items / self.seconds:,.1f} a second" if self.num_new_items and self.seconds else ""
        lines = [
            f"embedded {_count(self.num_new_items, 'input')}{rate}; "
            f"{self.num_items - self.num_new_items:,} already were",
            f"saved    {_count(self.num_rows, 'embedding')} of {self.embedding_dim} dimensions as {self.precision} in "
            f"{_count(self.num_shards, 'shard')}: {self.output}",
        ]
        if self.num_errors:
            lines.append(f"broken   {_count(self.num_errors, 'input')}, see {Path(self.output, ERRORS)}")
        return "\n".join(lines)


def _count(count: int, name: str) -> str:
    return f"1 {name}" if count == 1 else f"{count:,} {name}s"


def embed_corpus(config: EmbedConfig) -> EmbedReport:
    """Embed a corpus into a directory of shards; a run that was stopped goes on where it was.

    Shards are of consecutive inputs, and each is written whole or not at all. A shard is made again if its inputs
    changed: ids, texts, instructions, or path, size or time of change of an image. What an error leaves of a shard is
    kept beside it, and the next run embeds the rest. Started by `accelerate launch` or `torchrun`, the processes share
    the shards, and all return the same report. `open_embeddings` reads the result.

    Args:
        config: What to embed, with which model, and where to; see `EmbedConfig`.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: If the corpus is missing.
        ValueError: If the corpus has wrong lines, an input is broken (with `on_error="raise"`), the model is no PUMA
            model, or the directory holds embeddings of another model or setting.
        DirectoryInUseError: If another run writes into the directory.
        OSError: If the disk is full; finished shards are kept.

    Example:
        >>> from puma_hf.configs import EmbedConfig
        >>> from puma_hf.embedding.run import embed_corpus
        >>> config = EmbedConfig(data="demo/emoji", model="puma-k4-mac", output="embeddings")
        >>> print(embed_corpus(config))  # doctest: +SKIP
    """
    for note in config.notes():
        logger.warning(note)
    with locked_for_all(config.output):
        corpus = open_corpus(config.data, split=config.split, pool=config.pool, on_error=config.on_error)
        # Wrong lines are found here, before the model is loaded.
        is_main = connect()[0] == 0
        survey = corpus.survey(config.calibration_size if config.is_scaled else 0, _SEED) if is_main else None
        num_items = broadcast(survey.num_items if survey is not None else 0)
        model = open_model(config)
        with shared_folder(config.output) as folder, _disk_explained(folder):
            store = EmbeddingStore(folder, _settings(config, model), config.format)
            gather(None)  # all have looked before anyone writes
            if is_main and not (folder / MANIFEST).is_file():
                store.begin()
            if config.is_scaled and survey is not None and not store.load_ranges():
                ranges = _find_ranges(model, survey.sample, config)
                store.save_ranges(ranges)
                store.ranges = ranges
            store.ranges = broadcast(store.ranges)
            return _Run(config, corpus, model, store).run(num_items)


class _Work(NamedTuple):
    """A shard of the corpus: what it will say of itself, its inputs and a hash of each, and itself if it is there."""

    wanted: ShardInfo
    records: list[Record]
    content_hashes: list[str]
    there: ShardInfo | None


class _Run:
    """The work of one process, and what all of them come to."""

    def __init__(self, config: EmbedConfig, corpus: Corpus, model: SentenceTransformer, store: EmbeddingStore) -> None:
        self.config = config
        self.corpus = corpus
        self.model = model
        self.store = store
        self.rank, self.count = connect()
        self.new: list[ShardInfo] = []
        self.num_kept = 0  # inputs of these that an earlier run has embedded

    def run(self, num_items: int) -> EmbedReport:
        """Make what is missing, and finish the directory."""
        start = time.monotonic()
        size = self.config.shard_size
        mine = sum(min(size, num_items - first) for first in range(self.rank * size, num_items, self.count * size))
        shares = "" if self.count == 1 else f", process 1 of {self.count}"
        with tqdm(total=mine, desc=f"Embedding{shares}", unit="item", disable=self.rank > 0, smoothing=0.1) as progress:
            found = self._work(progress)
        seconds = time.monotonic() - start
        shards = sorted((info for part in gather(found) for info in part), key=lambda info: info.shard)
        new = [info for part in gather(self.new) for info in part]
        num_kept = sum(gather(self.num_kept))
        self._check_whole(shards)
        dim = embedding_dim(self.model, self.config)
        if self.rank == 0:
            described = {
                "model": short_name(self.config.model),
                "data": short_name(self.config.data),
                "embedding_dim": dim,
                "dtype": str(quantize(np.ones((1, dim), np.float32), self.config.precision, self.store.ranges).dtype),
                "ranges": RANGES if self.config.is_scaled else None,
            }
            self.store.finish(shards, described)
        return EmbedReport(
            output=str(self.config.output),
            num_items=sum(info.num_items for info in shards),
            num_rows=sum(info.num_rows for info in shards),
            num_errors=sum(info.num_errors for info in shards),
            num_shards=len(shards),
            num_new_shards=len(new),
            num_new_items=sum(info.num_items for info in new) - num_kept,
            embedding_dim=dim,
            precision=self.config.precision,
            seconds=max(gather(seconds)),
        )

    def _work(self, progress: Any) -> list[ShardInfo]:
        """All shards of this process, one after the other: the next one is read, and the last written, meanwhile."""
        found: list[ShardInfo] = []
        writes: list[Future[ShardInfo]] = []
        with ThreadPoolExecutor(1) as writer:
            for work in _ahead(self._my_shards()):
                if work.there is not None:
                    expect_less(progress, len(work.records))
                    found.append(work.there)
                    continue
                unfinished = UnfinishedShard(self.store.folder, work.wanted, work.content_hashes)
                result = embed_records(self.model, work.records, self.config, progress, unfinished)
                self.num_kept += unfinished.num_kept
                # Before the wait for the last one: whatever ends the run in it, this one is written.
                writes.append(writer.submit(self._write, work, result, unfinished))
                if len(writes) > 1:
                    self.new.append(writes.pop(0).result())  # one at a time waits in memory
            self.new += [write.result() for write in writes]
        return found + self.new

    def _my_shards(self) -> Iterator[_Work]:
        """Every so-many-th shard of the corpus."""
        # Where inputs are left out for their special tokens, they may be read as text the next time.
        how = self.config.on_error + (", split" if self.config.special_tokens == "split" else "")
        for number, records in self._my_records():
            hashes = [self.corpus.content_hash(record) for record in records]
            key = input_hash(records, hashes)
            wanted = self.store.info(number, records[0].row, len(records), key, how)
            yield _Work(wanted, records, hashes, self.store.finished(wanted))

    def _my_records(self) -> Iterator[tuple[int, list[Record]]]:
        """The number and the inputs of each of these shards; the lines of the others are not kept."""
        records: list[Record] = []
        number = 0
        for row, line in enumerate(self.corpus.lines()):
            if row // self.config.shard_size != number:
                if records:
                    yield number, records
                number, records = row // self.config.shard_size, []
            if number % self.count == self.rank:
                records.append(self.corpus.record(row, line))
        if records:
            yield number, records

    def _write(self, work: _Work, result: EmbedResult, unfinished: UnfinishedShard) -> ShardInfo:
        records = work.records
        rows = [records[place] for place in result.indices.tolist()]
        content = Shard(
            [record.id for record in rows],
            np.array([record.row for record in rows], np.int64),
            quantize(result.embeddings, self.config.precision, self.store.ranges),
        )
        broken = [(records[error.index], error.message) for error in result.errors]
        errors = [BrokenRecord(record.row, record.id, message) for record, message in broken]
        info = self.store.write(work.wanted, content, errors)
        unfinished.remove()
        return info

    def _check_whole(self, shards: Sequence[ShardInfo]) -> None:
        """All processes must have read the same corpus."""
        ends = [info.first_row + info.num_items for info in shards]
        starts = [info.first_row for info in shards]
        if starts != [0, *ends[:-1]]:
            raise ValueError(
                f"{self.corpus.path} changed while it was read. Run the same command again: finished shards are kept."
            )


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each made while the one before is worked on."""
    end: Any = object()
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = reader.submit(next, items, end)
            yield item


def _find_ranges(model: SentenceTransformer, sample: Sequence[Record], config: EmbedConfig) -> NDArray[np.float32]:
    """The least and the largest value of every dimension among the embeddings of a sample, `(2, embedding_dim)`."""
    logger.info("Scaling %s by %d inputs", config.precision, len(sample))
    # What is broken is told with its shard.
    rows = embed_records(model, sample, replace(config, on_error="skip")).embeddings
    if len(rows) < 2:
        raise ValueError(
            f"precision={config.precision!r} is scaled by the embeddings of 2 inputs or more, and of {len(sample)} "
            f"drawn {len(rows)} could be embedded. Take float32, float16 or binary, or a larger calibration_size."
        )
    return ranges_of(rows, config.precision)


def open_model(config: EmbedConfig) -> SentenceTransformer:
    """The model of a configuration, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is no PUMA model, or has fewer dimensions than `truncate_dim`.
    """
    if Path(config.model).is_dir() and not is_puma_directory(Path(config.model)):
        raise ValueError(
            f"model={config.model!r} is no PUMA model. Make one of an original checkpoint with puma-hf prune, or of an "
            "adapter with puma-hf merge."
        )
    model = open_sentence_transformer(
        config.model,
        device=own_device(),
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        model_kwargs={"dtype": config.dtype},
    ).eval()
    check_truncate_dim(model, config.model, config.truncate_dim)
    if not config.fast:
        first: Any = model[0]
        first.fast_path = None
    return model


def _settings(config: EmbedConfig, model: SentenceTransformer) -> dict[str, Any]:
    """What the embeddings, and the cut into shards, depend on besides the inputs."""
    values: dict[str, Any] = {
        "fingerprint": model_fingerprint(model),
        "weights_dtype": str(model.dtype).removeprefix("torch."),
        "prompt": config.prompt,
        "truncate_dim": config.truncate_dim,
        "precision": config.precision,
        "shard_size": config.shard_size,
    }
    return {**values, "calibration_size": config.calibration_size} if config.is_scaled else values


@contextmanager
def _disk_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{str(folder)!r} could not be written, the disk is full ({error.strerror}). Finished shards are kept: "
            "make room, and run the same command again",
        ) from error
