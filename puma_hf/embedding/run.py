"""`puma-hf embed`: a corpus into a store, as a function of one configuration; a run that was stopped goes on."""

from __future__ import annotations

import json
import logging
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import is_sentence_transformer_model
from torch import Tensor
from tqdm.auto import tqdm

from puma_hf.checkpoint import check_truncate_dim, open_sentence_transformer
from puma_hf.configs import EmbedConfig
from puma_hf.data.items import Corpus, open_corpus
from puma_hf.data.records import Record
from puma_hf.embedding.embed import embed_records, embedding_dim, quantize, ranges_of
from puma_hf.embedding.prepare import WINDOW
from puma_hf.embedding.store import MANIFEST, EmbeddingStore, disk_full_explained, read_manifest
from puma_hf.files import ADAPTER_CONFIG, write_whole
from puma_hf.fingerprint import content_key, model_fingerprint, short_name
from puma_hf.processes import broadcast, connect, gather, locked_for_all, own_device, shared_folder

logger = logging.getLogger(__name__)

ERRORS = "errors.jsonl"
# What is embedded is written at least so often: a run that is killed loses no more than this.
_SECONDS = 60.0
_LOOKED_UP = 256  # records whose keys are looked up together; so many are in memory with the bytes of their images
_SEED = 0  # of the inputs that int8 and uint8 are scaled by
_Row = tuple[int, int, str, Tensor]  # number in the corpus, key, id, and embedding
_STORED_AS = {"binary": torch.int8, "ubinary": torch.uint8}


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """What a run of `embed_corpus` has done; `str()` tells it in a few lines."""

    output: str  # the directory
    num_items: int  # inputs of the corpus
    num_rows: int  # embeddings in the directory
    num_errors: int  # inputs that could not be embedded
    num_shards: int  # shards in the directory
    num_new_items: int  # inputs that this run has embedded
    embedding_dim: int
    precision: str
    seconds: float  # from the first input to the last

    def __str__(self) -> str:
        rate = f", {self.num_new_items / self.seconds:,.1f} a second" if self.num_new_items and self.seconds else ""
        before = self.num_items - self.num_errors - self.num_new_items
        broken = f"\nbroken   {self.num_errors:,} inputs, see {Path(self.output, ERRORS)}" if self.num_errors else ""
        return (
            f"embedded {self.num_new_items:,} inputs{rate}; {before:,} already were\n"
            f"saved    {self.num_rows:,} embeddings of {self.embedding_dim} dimensions as {self.precision}, shards: "
            f"{self.num_shards:,}, in {self.output}{broken}"
        )


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
        FileNotFoundError: If the corpus is missing.
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
    with locked_for_all(config.output):
        corpus = open_corpus(config.data, split=config.split, pool=config.pool, on_error=config.on_error)
        # The whole corpus is read once before: so wrong lines are known before the model is loaded.
        survey = corpus.survey(config.calibration_size if config.is_scaled else 0, _SEED) if connect()[0] == 0 else None
        num_items = broadcast(survey.num_items if survey is not None else 0)
        model = open_model(config)
        with shared_folder(config.output) as folder:
            settings = _settings(config, model)
            if config.is_scaled:
                ranges = None if survey is None else _ranges(folder, model, survey.sample, config)
                settings["ranges"] = broadcast(ranges)
            dtype = _STORED_AS.get(config.precision) or getattr(torch, config.precision)
            store = EmbeddingStore(folder, settings, dtype=dtype, file_format=config.format)
            gather(None)  # all have looked before anyone writes
            return _Run(config, corpus, model, store).run(num_items)


class _Run:
    """The work of one process, and what all of them come to."""

    def __init__(self, config: EmbedConfig, corpus: Corpus, model: SentenceTransformer, store: EmbeddingStore) -> None:
        self.config, self.corpus, self.model, self.store = config, corpus, model, store
        self.rank, self.count = connect()
        self.keys = array("q")  # of all records of this process, 8 bytes each
        self.waiting: dict[int, int] = {}  # the key of each record that the model has not seen, by its row
        self.errors: list[dict[str, Any]] = []
        self.num_read = self.num_new = 0
        self.progress: Any = None

    def run(self, num_items: int) -> EmbedReport:
        start, size = time.monotonic(), self.config.shard_size
        mine = sum(min(size, num_items - first) for first in range(self.rank * size, num_items, self.count * size))
        shares = "" if self.count == 1 else f", process 1 of {self.count}"
        with tqdm(total=mine, desc=f"Embedding{shares}", unit="item", disable=self.rank > 0, smoothing=0.1) as bar:
            self.progress = bar
            self._embed()
        seconds = time.monotonic() - start
        if any(num_read != num_items for num_read in gather(self.num_read)):
            raise ValueError(
                f"{self.corpus.path} changed while it was read. Run the same command again: what is done is kept."
            )
        errors = sorted((error for part in gather(self.errors) for error in part), key=lambda error: error["row"])
        # The type is said: that of a process which had no rows would be float32, and so would then all keys.
        keys = torch.cat([torch.tensor(part, dtype=torch.int64) for part in gather(self.keys)])
        if self.rank == 0:
            self._finish(keys, num_items, errors)
        num_new, seconds = sum(gather(self.num_new)), max(gather(seconds))
        self.store.refresh()
        return EmbedReport(
            output=str(self.config.output),
            num_items=num_items,
            num_rows=len(self.store),
            num_errors=len(errors),
            num_shards=self.store.num_shards,
            num_new_items=num_new,
            embedding_dim=embedding_dim(self.model, self.config.truncate_dim),
            precision=self.config.precision,
            seconds=seconds,
        )

    def _embed(self) -> None:
        # Rows are written in the order of the corpus, a shard at a time, but arrive by length inside of a window. With
        # a window more than a shard in the buffer, its first rows are all there: only then are they written, unless a
        # minute has passed. So the order costs a window of rows in memory.
        buffer: list[_Row] = []
        written = time.monotonic()
        try:
            for records, rows in embed_records(self.model, self._missing(), self.config, self._broken):
                for record, row in zip(records, rows, strict=True):
                    buffer.append((record.row, self.waiting.pop(record.row), record.id, row))
                self.progress.update(len(records))
                is_late = time.monotonic() - written > _SECONDS
                if is_late or len(buffer) >= self.config.shard_size + WINDOW:
                    buffer = self._write(buffer, len(buffer) if is_late else self.config.shard_size)
                    written = time.monotonic()
        finally:  # whatever ends the run, SIGTERM and Ctrl-C too, what is done is kept
            self._write(buffer, len(buffer))

    # The records that the store lacks, of this process: every so-many-th shard of the corpus.
    def _missing(self) -> Iterator[Record]:
        lines = self._my_lines()
        while part := [self.corpus.record(row, line) for row, line in islice(lines, _LOOKED_UP)]:
            keys = [content_key(record.id, self.corpus.content_hash(record)) for record in part]
            self.keys.extend(keys)
            for record, key, is_there in zip(part, keys, self.store.has(torch.tensor(keys)).tolist(), strict=True):
                if is_there:  # not done: so the rate, and the time left, are those of the work
                    self.progress.total -= 1
                else:
                    self.waiting[record.row] = key
                    yield record

    def _my_lines(self) -> Iterator[tuple[int, Any]]:
        for row, line in enumerate(self.corpus.lines()):
            self.num_read = row + 1
            if row // self.config.shard_size % self.count == self.rank:
                yield row, line

    def _broken(self, record: Record, message: str) -> None:
        # Its key stays absent, so that every run tries it again, and lists it again. Zeros in its place have the
        # complement of the key, which no content has.
        self.errors.append({"row": record.row, "id": record.id, "message": message})
        if self.config.on_error == "zero":
            self.waiting[record.row] = ~self.waiting[record.row]
            self.keys.append(self.waiting[record.row])
        else:
            del self.waiting[record.row]
            self.progress.update(1)

    def _write(self, buffer: list[_Row], count: int) -> list[_Row]:
        # The first rows of the buffer; what is left of it is returned.
        buffer.sort(key=lambda entry: entry[0])
        self.num_new += sum(key >= 0 for _, key, _, _ in buffer[:count])
        for start in range(0, count, self.config.shard_size):
            part = buffer[start : min(count, start + self.config.shard_size)]
            there = self.store.has(torch.tensor([key for _, key, _, _ in part])).tolist()  # zeros of an earlier run
            if part := [entry for entry, is_there in zip(part, there, strict=True) if not is_there]:
                numbers, keys, ids, rows = zip(*part, strict=True)
                values = quantize(torch.stack(rows).numpy(), self.config.precision, self.store.settings.get("ranges"))
                self.store.add(torch.tensor(keys), torch.from_numpy(values), ids=ids, order=numbers[0])
        return buffer[count:]

    def _finish(self, keys: Tensor, num_items: int, errors: Sequence[dict[str, Any]]) -> None:
        path = self.store.folder / ERRORS
        with disk_full_explained(self.store.folder):
            self.store.keep(keys)
            text = "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors)
            content = text.encode("utf-8", "backslashreplace")
            if not errors:
                path.unlink(missing_ok=True)
            elif not path.is_file() or path.read_bytes() != content:
                write_whole(path, content)
            self.store.say(
                complete=True,
                model=short_name(self.config.model),
                data=short_name(self.config.data),
                num_items=num_items,
                num_rows=len(self.store),
                num_errors=len(errors),
            )


def _settings(config: EmbedConfig, model: SentenceTransformer) -> dict[str, Any]:
    # What the embeddings depend on besides the inputs.
    values: dict[str, Any] = {
        "fingerprint": model_fingerprint(model),
        "weights_dtype": str(model.dtype).removeprefix("torch."),
        "prompt": config.prompt,
        "truncate_dim": config.truncate_dim,
        "precision": config.precision,
    }
    return {**values, "calibration_size": config.calibration_size} if config.is_scaled else values


def _ranges(
    folder: Path, model: SentenceTransformer, sample: Sequence[Record], config: EmbedConfig
) -> list[list[float]] | None:
    # A corpus that grows keeps its ranges: else the integers of its first rows would mean something else.
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)["settings"].get("ranges")  # type: ignore[no-any-return]
    logger.info("Scaling %s by %d inputs", config.precision, len(sample))
    # What is broken is told when its turn comes.
    parts = [rows for _, rows in embed_records(model, sample, replace(config, on_error="skip"), lambda *_: None)]
    return ranges_of(
        torch.cat([torch.empty(0, embedding_dim(model, config.truncate_dim)), *parts]).numpy(), config.precision
    )


def open_model(config: EmbedConfig) -> SentenceTransformer:
    """The model of a configuration, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is no `SentenceTransformer`, or has fewer dimensions than `truncate_dim`.
    """
    # Of a folder without `modules.json` sentence-transformers would make a model of its own, and its vectors are noise.
    folder, refusal = Path(config.model), None
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if is_adapter or not is_sentence_transformer_model(config.model, revision=config.revision):
        remedy = "Make one of an original checkpoint with puma-hf prune, or of an adapter with puma-hf merge."
        refusal = ValueError(f"model={config.model!r} is no PUMA model. {remedy}")
        if folder.is_dir():
            raise refusal
    model = open_sentence_transformer(
        config.model,
        device=own_device(),
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        model_kwargs={"dtype": config.dtype},
    ).eval()
    if refusal is not None:  # it is one on the Hub; of what is not there the error is another
        raise refusal
    check_truncate_dim(model, config.model, config.truncate_dim)
    if not config.fast:
        first: Any = model[0]
        first.fast_path = None
    return model
