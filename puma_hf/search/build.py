"""`puma-hf index`: an index of a corpus is made, or brought up to it, and a run that was stopped goes on.

A run appends what is new, removes what is gone in one transaction, and tags the version that it has come to: LanceDB
keeps the versions, so there is nothing to repair after a kill. What the model saw is found again by its content.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from puma_hf.configs import AnnKind, IndexConfig
from puma_hf.data.items import Corpus, open_corpus
from puma_hf.data.records import Record
from puma_hf.embedding.embed import embed_records, embedding_dim
from puma_hf.embedding.run import open_model
from puma_hf.files import write_whole
from puma_hf.fingerprint import model_fingerprint
from puma_hf.modeling.inputs_puma import open_image
from puma_hf.processes import broadcast, connect, gather, locked_for_all
from puma_hf.search.index import ABOUT, ANN_TYPES, COMPLETE, ERRORS, FORMAT, TABLE, about, open_index, open_table

logger = logging.getLogger(__name__)

_COLUMNS = ("key", "seen", "id", "text", "image", "modality")
# What vectors depend on besides the inputs: those of another value cannot be compared.
_BOUND = ("fingerprint", "weights_dtype", "prompt", "truncate_dim", "precision")
_LEAST_FREE = 32 * 2**20  # bytes; a write of 4,096 vectors takes about as many
_MOST_FRAGMENTS = 100  # files of a table, one a write; of more LanceDB makes few, which writes all of them again


@dataclass(frozen=True)
class IndexReport:
    """What a run of `build_index` has done; `str()` tells it in a few lines."""

    output: str  # the index
    num_new: int  # items that were embedded
    num_kept: int  # items whose embeddings were there
    num_errors: int  # inputs that could not be embedded
    seconds: float  # from the first input to the last
    counts: Mapping[str, int]  # items of each modality in the index

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} of {name}" for name, count in self.counts.items()) or "no items"
        lines = [f"embedded {self.num_new:,} inputs in {self.seconds:,.1f} s; {self.num_kept:,} already were"]
        lines += [f"broken   {self.num_errors:,} inputs, see {Path(self.output, ERRORS)}"] if self.num_errors else []
        return "\n".join([*lines, f'indexed  {counts}; ask with: puma-hf search {self.output} "WORDS"'])


def build_index(config: IndexConfig) -> IndexReport:
    """Make an index of a corpus, or bring one up to it; a run that was stopped goes on where it was.

    The model sees what is new: an embedding is found again by text, instruction, and path, size and time of change of a
    picture. Pictures stay where they are, but for those inside of a Parquet file, which are copied. Started by
    `accelerate launch` or `torchrun`, the processes share the work. About 300 bytes an item are in memory.
    An index names its model, and the code of a model in a local directory is run: without `model` in the configuration,
    make anew only indexes that you trust.

    ValueError if the corpus has wrong lines, or the directory is of another model, setting or version;
    DirectoryInUseError if another run writes into it.
    """
    folder = Path(config.output)
    # One run writes at a time. Who searches is not in its way: LanceDB keeps the version that they have open.
    with locked_for_all(folder), _full_disk_told(folder):
        table = open_table(folder)
        before = None if table is None else about(folder, table)
        if before is not None and not config.model:
            revision = before["revision"] if config.revision is None else config.revision
            config = replace(config, model=before["model"], revision=revision)
        if not config.model:
            problem = f"model is missing: {str(config.output)!r} is no index yet."
            raise ValueError(f"{problem} Name the model that makes it, as in --model DIRECTORY; later runs need not.")
        corpus = open_corpus(config.data, split=config.split, pool=config.pool, on_error=config.on_error)
        # Wrong lines are found here, before the model is loaded.
        num_items = broadcast(corpus.survey().num_items if connect()[0] == 0 else 0)
        model = open_model(config)
        description = _describe(config, model)
        if before is not None:
            _compare(folder, before, description)
        elif connect()[0] == 0:
            create_table(folder, description, embedding_dim(model, config.truncate_dim))
        gather(None)
        return _Run(config, corpus, model, open_table(folder)).run(num_items, description)


@contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    # LanceDB raises the same error for all that goes wrong, so the disk is asked.
    try:
        yield
    except RuntimeError as error:
        if shutil.disk_usage(folder if folder.is_dir() else folder.resolve().parent).free > _LEAST_FREE:
            raise
        raise OSError(
            f"{str(folder)!r} could not be written ({error}): the disk is full. Make room, and go on."
        ) from error


class _Run:
    """The work of one process: of all items those whose key falls to it, which it appends to the table itself."""

    def __init__(self, config: IndexConfig, corpus: Corpus, model: SentenceTransformer, table: Any) -> None:
        self.config, self.corpus, self.model, self.table = config, corpus, model, table
        self.rank, self.count = connect()
        self.folder, self.progress = Path(config.output), tqdm(disable=True)
        self.errors: list[dict[str, Any]] = []
        self.num_new = 0
        # All keys at once: a lookup on disk for each item would cost more than 300 bytes of memory do.
        there = table.search().with_row_id(True).select(["key", "seen"]).limit(max(1, table.count_rows())).to_arrow()
        self.there = set(there["key"].to_pylist())
        self.row_of = dict(zip(there["seen"].to_pylist(), there["_rowid"].to_pylist(), strict=True))
        self.wanted: set[str] = set()  # keys of the corpus, as far as it was read
        self.sent: dict[int, tuple[str, str]] = {}  # key and content of what the model has, by row of the corpus
        self.new: list[tuple[dict[str, str | None], Any]] = []  # what is to be written, with its vectors
        self.moved: list[dict[str, str | None]] = []  # what has its vector in another row
        gather(None)  # all have looked before anyone writes

    def run(self, num_items: int, description: Mapping[str, Any]) -> IndexReport:
        """Embed what was never seen, write it a shard at a time, and finish the table."""
        start = time.monotonic()
        shown = {"desc": "Embedding", "unit": "item", "smoothing": 0.1, "disable": self.rank > 0}
        with tqdm(total=num_items // self.count, **shown) as self.progress:
            try:
                for records, vectors in embed_records(self.model, self._missing(), self.config, self._broken):
                    rows = [self._row(record, *self.sent.pop(record.row)) for record in records]
                    self.new += zip(rows, vectors.numpy(), strict=True)
                    self.progress.update(len(records))
                    if len(self.new) >= self.config.shard_size:
                        self._write()
            finally:  # whatever ends the run, what is done is kept
                self._write()
        seconds = time.monotonic() - start
        wanted, errors = gather(self.wanted), gather(self.errors)
        num_new, self.errors = sum(gather(self.num_new)), [error for part in errors for error in part]
        if self.rank == 0:
            self._finish(description, set().union(*wanted))
        gather(None)
        counts = open_index(self.folder).counts
        kept = sum(counts.values()) - num_new
        return IndexReport(str(self.folder), num_new, kept, len(self.errors), seconds, counts)

    def _missing(self) -> Iterator[Record]:
        """The records of this process that the model has not seen; those that have another id or place now are noted.

        An item is its id, its place and its content. The same item once more, or one that is there, is passed by.
        """
        for row, line in enumerate(self.corpus.lines()):
            record = self.corpus.record(row, line)
            seen = self.corpus.content_hash(record)
            place = record.image if isinstance(record.image, str) else None
            key = blake2b(json.dumps([record.id, place, seen]).encode(), digest_size=16).hexdigest()
            # By its key, not by its row: an item that comes twice falls to one process, which sees that it is the same.
            if int(key[:8], 16) % self.count != self.rank:
                continue
            is_there = key in self.there or key in self.wanted
            if record.problem is None and (is_there or seen in self.row_of):
                # Not counted as done: so the rate, and the time left, are those of the work.
                self.progress.total -= 1
                self.moved += [] if is_there else [self._row(record, key, seen)]
                if len(self.moved) >= self.config.shard_size:
                    self._write()
            else:
                self.sent[row] = (key, seen)
                yield record
            self.wanted.add(key)

    def _broken(self, record: Record, message: str) -> None:
        self.errors.append({"row": record.row, "id": record.id, "message": message})
        self.progress.update(1)

    def _row(self, record: Record, key: str, seen: str) -> dict[str, str | None]:
        image = keep_picture(self.folder, record.image) if isinstance(record.image, bytes) else record.image
        row = {"key": key, "seen": seen, "id": record.id, "text": record.text, "image": image}
        row["modality"] = ",".join(name for name in ("image", "text") if row[name] is not None)
        # JSON, and names of files, may hold half a character, which no table can.
        return {name: value and value.encode("utf-8", "backslashreplace").decode() for name, value in row.items()}

    def _write(self) -> None:
        """Append what is new, and what was moved with the vectors that it has in other rows."""
        # Lines of a table without ids are numbered: one that goes renames all behind it, which must not cost the model.
        if self.moved:
            row_ids = sorted({self.row_of[str(row["seen"])] for row in self.moved})
            found = self.table.take_row_ids(row_ids).select(["seen", "vector"]).to_arrow()
            place = {seen: number for number, seen in enumerate(found["seen"].to_pylist())}
            vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(len(place), -1)
            self._add(self.moved, vectors[[place[str(row["seen"])] for row in self.moved]])
        if self.new:
            rows, new = zip(*self.new, strict=True)
            self._add(list(rows), np.stack(new))
        self.num_new += len(self.new)
        self.new, self.moved = [], []

    def _add(self, rows: list[dict[str, str | None]], vectors: NDArray[Any]) -> None:
        schema = self.table.schema
        kind = schema.field("vector").type
        # Built by hand: of rows as dicts Arrow would look at every number of every vector.
        columns = [pa.array([row[name] for row in rows], pa.string()) for name in _COLUMNS]
        values = pa.array(vectors.astype(kind.value_type.to_pandas_dtype()).ravel())
        vector = pa.FixedSizeListArray.from_arrays(values, kind.list_size)
        self.table.add(pa.Table.from_arrays([*columns, vector], schema=schema))

    def _finish(self, description: Mapping[str, Any], wanted: set[str]) -> None:
        """Remove what is gone, write what is broken, and make this version the one that is searched."""
        self.table.checkout_latest()  # with what other processes have appended
        if self.there - wanted:  # in one transaction
            keys = pa.table({"key": sorted(wanted)}, pa.schema([("key", pa.string())]))
            self.table.merge_insert("key").when_not_matched_by_source_delete().execute(keys)
        (self.folder / ERRORS).unlink(missing_ok=True)
        if self.errors:
            write_whole(self.folder / ERRORS, "".join(json.dumps(error) + "\n" for error in self.errors).encode())
        if about(self.folder, self.table) != description:
            self.table.update_field_metadata({"path": "vector", "metadata": {ABOUT: json.dumps(description)}})
        update_ann(self.table, self.config.ann)
        tag_complete(self.table)


def keep_picture(folder: Path, content: bytes) -> str:
    """Write the bytes of a picture's file below an index, named by their content; its path below the index."""
    with open_image(io.BytesIO(content)) as opened:
        name = f"images/{blake2b(content, digest_size=16).hexdigest()}.{(opened.format or 'image').lower()}"
    path = folder / name
    # It may be cut off, as the machine may lose power: to wait for the disk with each would take longer than to embed.
    if not path.is_file() or path.stat().st_size != len(content):
        write_whole(path, content, sync=False)
    return name


def create_table(folder: Path, description: Mapping[str, Any], dim: int) -> Any:
    """The empty table of a new index."""
    import lancedb

    # What the vectors are of lies in the metadata of their column, where other readers of the table find it, too.
    numbers = pa.float16() if description["precision"] == "float16" else pa.float32()
    vector = pa.field("vector", pa.list_(numbers, dim), metadata={ABOUT: json.dumps(description)})
    schema = pa.schema([*((name, pa.string()) for name in _COLUMNS), vector])
    return lancedb.connect(str(folder)).create_table(TABLE, schema=schema)


def tag_complete(table: Any) -> None:
    """Make the newest version of a table the one that is searched."""
    (table.tags.update if COMPLETE in table.tags.list() else table.tags.create)(COMPLETE, table.version)


def update_ann(table: Any, kind: AnnKind | None) -> None:
    """Make, remove or bring up to date the index of approximate search; LanceDB compares what it lacks exactly."""
    from lancedb.index import HnswSq, IvfRq, IvfSq

    there = {one.index_type: one for one in table.list_indices()}
    wanted = ANN_TYPES.get(kind) if kind is not None else next(iter(there), None)
    for name in there.keys() - {wanted}:
        table.drop_index(there[name].name)
    if wanted is not None and wanted not in there and table.count_rows():
        # One part: with more of them a search would have to choose some, and miss what is in others.
        config = {"IvfHnswSq": HnswSq, "IvfSq": IvfSq, "IvfRq": IvfRq}[wanted]
        table.create_index("vector", config=config(distance_type="cosine", num_partitions=1))
    # To put fragments together rewrites all vectors, so it waits until there are many.
    is_behind = wanted in there and there[wanted].num_unindexed_rows > 0
    if is_behind or table.stats()["fragment_stats"]["num_fragments"] > _MOST_FRAGMENTS:
        table.optimize()


def _describe(config: IndexConfig, model: SentenceTransformer) -> dict[str, Any]:
    return {
        **{"format_version": FORMAT, "fingerprint": model_fingerprint(model)},
        "weights_dtype": str(model.dtype).removeprefix("torch."),
        **{name: getattr(config, name) for name in ("prompt", "truncate_dim", "precision", "revision", "dtype")},
        "model": str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model,
        "data": str(Path(config.data).resolve()),
    }


def _compare(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse vectors that cannot be compared, and say that a corpus takes another's place."""
    other = [f"{name} is {before[name]!r} there, {now[name]!r} here" for name in _BOUND if before[name] != now[name]]
    if other:
        problem = f"The embeddings in {str(folder)!r} are of another model or setting: {'; '.join(other)}."
        raise ValueError(f"{problem} Choose another directory, or delete this one.")
    if before["data"] != now["data"]:
        logger.warning("%s was of %s, becomes one of %s: what is not there goes.", folder, before["data"], now["data"])
