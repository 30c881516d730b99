"""Embed what a store lacks: the one loop of `puma-hf embed`, `evaluate` and `index`, and `puma-hf embed` itself.

A run that was stopped goes on where it was: what an input is known by says whether its embedding is there.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import is_sentence_transformer_model
from torch import Tensor
from tqdm.auto import tqdm

from puma_hf.checkpoint import open_sentence_transformer
from puma_hf.configs import EmbedConfig
from puma_hf.data.items import Corpus, open_corpus
from puma_hf.data.records import Record
from puma_hf.embedding.embed import (
    BrokenInputError,
    embed,
    embedding_dim,
    image_settings,
    iterate_embeddings,
    processing_for,
    quantize,
    ranges_of,
)
from puma_hf.embedding.prepare import WINDOW, BrokenInput, Unreadable
from puma_hf.embedding.store import MANIFEST, EmbeddingStore, read_manifest
from puma_hf.files import ADAPTER_CONFIG, write_whole
from puma_hf.fingerprint import content_key, model_fingerprint, noted, short_name
from puma_hf.processes import broadcast, connect, gather, own_device, shared_folder
from puma_hf.settings import shown

logger = logging.getLogger(__name__)

ERRORS = "errors.jsonl"
# What is embedded is written at least so often: a run that is killed loses no more than this.
_SECONDS = 60.0
_SHOWN = 3
_SEED = 0  # of the inputs that int8 and uint8 are scaled by
_STORED_AS = {"binary": torch.int8, "ubinary": torch.uint8}


# --- what a store lacks


class Item(NamedTuple):
    """A record, what its embedding is found by, and, where that is more, what the model sees of it."""

    record: Record
    key: int
    seen: str = ""


class Sink(Protocol):
    """Where embeddings go."""

    def has(self, item: Item) -> bool:
        """Whether an item need not be embedded; asked once for each of this process."""

    def kept(self, item: Item) -> Item:
        """What `add` needs of an item, which waits for it in memory: not the bytes of its image."""

    def add(self, items: list[Item], rows: Tensor) -> None:
        """Store embeddings `(num_items, embedding_dim)`."""


Embedder = Callable[[Iterator[Record], Callable[[BrokenInput], object]], Iterator[tuple[Tensor, Tensor]]]
"""From records to numbers of them, in the order in which they came, and their rows, as `iterate_embeddings` does it."""


@dataclass
class EmbeddingRun:
    """The work of one process: of all items those whose key falls to it, embedded and stored a shard at a time."""

    sink: Sink
    embedder: Embedder
    shard_size: int
    errors_file: Path | None = None  # lists broken inputs, which are left out; without it the first ends the run
    # Zeros in place of what is broken have the complement of its key, which no content has: so every run tries it
    # again, and lists it again.
    zeros: bool = False
    # Rows arrive by length inside of a window: with one more than a shard in memory, its first rows are all there.
    in_order: bool = False

    sent: dict[int, Item] = field(default_factory=dict, init=False)  # what the model has, by its number
    # The keys of what is not written, so that nothing is embedded twice in a row.
    pending: set[int] = field(default_factory=set, init=False)
    rows: list[tuple[Item, Tensor]] = field(default_factory=list, init=False)  # what is to be written
    errors: list[dict[str, Any]] = field(default_factory=list, init=False)
    num_new: int = field(default=0, init=False)
    progress: Any = field(default=None, init=False)

    def run(self, items: Iterable[Item], total: int, *, show_progress_bar: bool = True) -> tuple[int, int, float]:
        """Embed what the sink lacks; all processes give the same items, and wait for all.

        Returns:
            How many inputs all processes have embedded, how many of them are broken, and the seconds.
        """
        start = written = time.monotonic()
        rank, num_processes = connect()
        most = self.shard_size + (WINDOW if self.in_order else 0)
        bar = {"desc": "Embedding", "unit": "item", "smoothing": 0.1}
        bar["disable"] = rank > 0 or not show_progress_bar
        with tqdm(total=total // num_processes, **bar) as self.progress:
            try:
                for numbers, rows in self.embedder(self._missing(items, total), self._broken):
                    done = [self.sent.pop(number) for number in numbers.tolist()]
                    _check_finite([item.record for item in done], rows)
                    self.rows += zip(map(self.sink.kept, done), rows, strict=True)
                    self.progress.update(len(done))
                    is_late = time.monotonic() - written > _SECONDS
                    if is_late or len(self.rows) >= most:
                        self._write(len(self.rows) if is_late else self.shard_size)
                        written = time.monotonic()
            except BrokenInputError as error:
                record, reason = self.sent[error.index].record, _without_place(error.broken.message.rstrip("."))
                remedy = "Mend it and run the same command again, which goes on where this one ended"
                place = ""
                if self.errors_file is not None:  # a corpus, whose rows a user knows
                    remedy += "; or pass on_error='skip' (--on-error skip) to leave out what is broken"
                    place = f" (row {record.row})"
                raise ValueError(f"Input {shown(record.id)}{place} cannot be embedded: {reason}. {remedy}.") from error
            finally:  # whatever ends the run, SIGTERM and Ctrl-C too, what is done is kept
                self._write(len(self.rows))
        errors = sorted((error for part in gather(self.errors) for error in part), key=lambda error: error["row"])
        if rank == 0 and self.errors_file is not None:
            self.errors_file.unlink(missing_ok=True)
            if errors:
                text = "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors)
                write_whole(self.errors_file, text.encode("utf-8", "backslashreplace"))
        return sum(gather(self.num_new)), len(errors), max(gather(time.monotonic() - start))

    def _missing(self, items: Iterable[Item], total: int) -> Iterator[Record]:
        rank, num_processes = connect()
        numbers, num_read = count(), 0
        for item in items:
            num_read += 1
            # By its key, not by its row: an item that comes twice falls to one process, which sees that it is the same.
            if item.key % num_processes != rank:
                continue
            if item.key in self.pending or self.sink.has(item):
                # Not counted as done: so the rate, and the time left, are those of the work.
                self.progress.total -= 1
            else:
                self.pending.add(item.key)
                self.sent[next(numbers)] = item
                yield item.record
        if num_read != total:
            raise ValueError("The inputs changed while they were read. Run the same command again; what is done stays.")

    def _broken(self, error: BrokenInput) -> None:
        item = self.sent[error.index] if self.zeros else self.sent.pop(error.index)
        self.pending.discard(item.key)
        message = _without_place(error.message)
        self.errors.append({"row": item.record.row, "id": item.record.id, "message": message})
        if self.zeros:
            self.sent[error.index] = item._replace(key=~item.key)
        else:
            self.progress.update(1)

    def _write(self, num_rows: int) -> None:
        self.rows.sort(key=lambda row: row[0].record.row)
        now, self.rows = self.rows[:num_rows], self.rows[num_rows:]
        for start in range(0, num_rows, self.shard_size):
            items, rows = zip(*now[start : start + self.shard_size], strict=True)
            self.sink.add(list(items), torch.stack(rows))
            keys = {item.key for item in items}
            self.num_new += sum(key >= 0 for key in keys)
            self.pending -= keys


def embed_records(
    model: Any, records: Iterator[Record], report: Callable[[BrokenInput], object], **options: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """The `Embedder` of a `SentenceTransformer`; `options` are those of `iterate_embeddings`."""
    inputs = (record.model_input if record.problem is None else Unreadable(record.problem) for record in records)
    return iterate_embeddings(model, inputs, report=report, show_progress_bar=False, **options)


def options_of(config: EmbedConfig, model: SentenceTransformer) -> dict[str, Any]:
    """What a configuration says to `iterate_embeddings`; ValueError if the model cannot do it."""
    options = config.given("prompt", "max_batch_tokens", "num_workers", "on_error", "truncate_dim")
    processing = processing_for(model, config.special_tokens, config.max_pixels, config.decode)
    return {**options, "processing_kwargs": processing}


def _check_finite(records: list[Record], rows: Tensor) -> None:
    if bad := [records[place].id for place in (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()]:
        problem = f"The embeddings of {len(bad)} of {len(records)} inputs have NaN or infinity, first"
        remedy = "Look at these inputs, or load the weights as bfloat16 or float32 instead of float16."
        raise ValueError(f"{problem} {shown(bad[:_SHOWN])}. {remedy}")


def _without_place(message: str) -> str:
    return re.sub(r"^inputs\[\d+\]: ", "", message)  # which says nothing to who knows ids


@contextmanager
def disk_full_explained(folder: str | Path) -> Iterator[None]:
    """Say of the error of a full disk what is lost and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # LanceDB raises a RuntimeError for all that goes wrong, with the words of the system in it.
        if not any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise
        problem = f"{str(folder)!r} could not be written, the disk is full ({error})"
        remedy = "What was written before is kept: make room, and run the same command again"
        raise OSError(errno.ENOSPC, f"{problem}. {remedy}") from error


@dataclass
class StoreSink:
    """An `EmbeddingStore` to embed into."""

    store: EmbeddingStore
    keys: array[int] = field(default_factory=lambda: array("q"))  # of all items of this process, 8 bytes each

    def has(self, item: Item) -> bool:
        """Whether the store had it when it was opened."""
        self.keys.append(item.key)
        return bool(self.store.has(torch.tensor([item.key])))

    def kept(self, item: Item) -> Item:
        """An item without its image."""
        return item._replace(record=replace(item.record, image=None))

    def add(self, items: list[Item], rows: Tensor) -> None:
        """Write a shard, in the precision of the store."""
        keys = [item.key for item in items]
        self.keys.extend(key for key in keys if key < 0)  # of zeros
        settings = self.store.settings
        values = quantize(rows.numpy(), settings.get("precision", "float32"), settings.get("ranges"))
        ids = [item.record.id for item in items]
        self.store.add(torch.tensor(keys), torch.from_numpy(values), ids=ids, order=items[0].record.row)


# --- the command


@dataclass(frozen=True)
class EmbedReport:
    """What a run of `embed_corpus` has done; `str()` tells it in a few lines."""

    output: str  # the directory
    num_items: int  # inputs of the corpus
    num_rows: int  # embeddings in the directory
    num_errors: int  # inputs that could not be embedded
    num_new_items: int  # inputs that this run has embedded
    seconds: float  # from the first input to the last

    def __str__(self) -> str:
        rate = f", {self.num_new_items / self.seconds:,.1f} a second" if self.num_new_items and self.seconds else ""
        before = self.num_items - self.num_errors - self.num_new_items
        lines = [f"embedded {self.num_new_items:,} inputs{rate}; {before:,} already were"]
        lines += [f"saved    {self.num_rows:,} embeddings in {self.output}"]
        lines += [f"broken   {self.num_errors:,} inputs, see {Path(self.output, ERRORS)}"] if self.num_errors else []
        return "\n".join(lines)


def embed_corpus(config: EmbedConfig) -> EmbedReport:
    """Embed a corpus into a directory of shards; a run that was stopped goes on where it was.

    A row is found again by its id and its content: text, instruction, and path, size and time of change of an image. So
    only what is new is embedded, and what is no longer in the corpus is removed at the end. Rows of a shard are in the
    order of the corpus. Started by `accelerate launch` or `torchrun`, the processes share the corpus, and all return
    the same report. `open_embeddings` reads the result.

    Args:
        config: What to embed, with which model, and where to; see `EmbedConfig`.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: If the corpus or the model is missing.
        ValueError: If the corpus has wrong lines, an input is broken (with `on_error="raise"`), the model is no
            `SentenceTransformer`, or the directory holds embeddings of another model, setting or version.
        DirectoryInUseError: If another run writes into the directory.
        OSError: If the disk is full; what was written before is kept.

    Example:
        >>> from puma_hf.configs import EmbedConfig
        >>> from puma_hf.embedding.run import embed_corpus
        >>> config = EmbedConfig(data="demo/emoji", model="puma-k4-mac", output="embeddings")
        >>> print(embed_corpus(config))  # doctest: +SKIP
    """
    with disk_full_explained(config.output), shared_folder(config.output) as folder:
        corpus = open_corpus(config.data, split=config.split, pool=config.pool, on_error=config.on_error)
        # The whole corpus is read once before: so wrong lines are known before the model is loaded.
        is_scaled = config.precision in ("int8", "uint8")  # by the range of every dimension
        num_items, sample = corpus.survey(config.calibration_size if is_scaled else 0, _SEED)
        model = open_model(config)
        settings, is_main = settings_of(config, model), connect()[0] == 0
        if is_scaled:
            ranges = broadcast(_ranges(folder, model, sample, config) if is_main else None)
            settings |= {"calibration_size": config.calibration_size, "ranges": ranges}
        dtype = _STORED_AS.get(config.precision) or getattr(torch, config.precision)
        store = EmbeddingStore(folder, settings, dtype=dtype, file_format=config.format)
        gather(None)  # all have looked before anyone writes
        sink, embedder = StoreSink(store), partial(embed_records, model, **options_of(config, model))
        zeros = config.on_error == "zero"
        run = EmbeddingRun(sink, embedder, config.shard_size, folder / ERRORS, zeros=zeros, in_order=True)
        items = items_of(corpus, lambda record, seen: content_key(record.id, seen))
        num_new, num_errors, seconds = run.run(items, num_items)
        # The type is said: that of a process which had no rows would be float32, and so would then all keys.
        keys = torch.cat([torch.tensor(part, dtype=torch.int64) for part in gather(sink.keys)])
        if is_main:
            store.keep(keys)
            about = {"model": short_name(config.model), "data": short_name(config.data), "num_rows": len(store)}
            store.say(complete=True, num_items=num_items, num_errors=num_errors, **about)
        num_rows = broadcast(len(store))
        return EmbedReport(str(config.output), num_items, num_rows, num_errors, num_new, seconds)


def items_of(corpus: Corpus, key_of: Callable[[Record, str], int]) -> Iterator[Item]:
    """The records of a corpus with their keys, made from a record and the hash of its content."""
    for row, line in enumerate(corpus.lines()):
        record = corpus.record(row, line)
        seen = corpus.content_hash(record)
        yield Item(record, key_of(record, seen), seen)


def settings_of(config: EmbedConfig, model: SentenceTransformer) -> dict[str, Any]:
    """What embeddings depend on besides the inputs: those of another value cannot be compared."""
    settings: dict[str, Any] = {"weights_dtype": str(model.dtype).removeprefix("torch.")}
    settings |= {"fingerprint": model_fingerprint(model), "num_kept_layers": noted(model, "num_kept_layers")}
    settings |= image_settings(model, options_of(config, model)["processing_kwargs"])
    return settings | config.given("prompt", "truncate_dim", "precision")


def _ranges(
    folder: Path, model: SentenceTransformer, sample: list[Record], config: EmbedConfig
) -> list[list[float]] | None:
    # A corpus that grows keeps its ranges: else the integers of its first rows would mean something else.
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)["settings"].get("ranges")  # type: ignore[no-any-return]
    logger.info("Scaling %s by %d inputs", config.precision, len(sample))
    options = {**options_of(config, model), "on_error": "skip"}  # what is broken is told when its turn comes
    found = embed(model, [record.model_input for record in sample], **options)
    _check_finite([sample[place] for place in found.indices], torch.from_numpy(found.embeddings))
    return ranges_of(found.embeddings, config.precision)


def open_model(config: EmbedConfig) -> SentenceTransformer:
    """The model of a configuration, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is no `SentenceTransformer`, or has fewer dimensions than `truncate_dim`, or fewer layers than
            `num_kept_layers`.
    """
    # Of a folder without `modules.json` sentence-transformers would make a model of its own, and its vectors are noise.
    folder = Path(config.model)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if is_adapter or not is_sentence_transformer_model(config.model, revision=config.revision):
        remedy = "Make one of an original checkpoint with puma-hf prune, or of an adapter with puma-hf merge."
        if folder.is_dir():
            raise ValueError(f"model={config.model!r} is no PUMA model. {remedy}")
        problem = "is no folder here, and no PUMA model on the Hub, or it cannot be reached. Check the name"
        raise FileNotFoundError(f"model={config.model!r} {problem}. {remedy}")
    loading = config.given("num_kept_layers", "revision", "trust_remote_code")
    loading |= {"device": own_device(), "model_kwargs": {"dtype": config.dtype}}
    model = open_sentence_transformer(config.model, **loading).eval()
    embedding_dim(model, config.truncate_dim)  # so many there must be, before anything is written
    if not config.fast:
        first: Any = model[0]
        first.fast_path = None
    return model
