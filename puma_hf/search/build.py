"""`puma-hf index`: an index of a corpus is made, or brought up to it, and a run that was stopped goes on.

A run appends what is new, removes what is gone in one transaction, and tags the version that it has come to: LanceDB
keeps the versions, so there is nothing to repair after a kill. What the model saw is found again by its content.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch import Tensor

from puma_hf.configs import AnnKind, IndexConfig
from puma_hf.data.items import open_corpus
from puma_hf.embedding.embed import embedding_dim
from puma_hf.embedding.run import (
    ERRORS,
    EmbeddingRun,
    Item,
    disk_full_explained,
    embed_records,
    items_of,
    open_model,
    options_of,
    settings_of,
)
from puma_hf.embedding.store import check_settings
from puma_hf.files import write_whole
from puma_hf.fingerprint import content_key, exit_fingerprints, noted, space_fingerprint
from puma_hf.modeling.inputs_puma import open_image
from puma_hf.processes import connect, gather, locked_for_all
from puma_hf.search.index import ABOUT, ANN_TYPES, COMPLETE, FORMAT, TABLE, about, open_index, open_table

logger = logging.getLogger(__name__)

_COLUMNS = ("key", "seen", "id", "text", "image", "modality")
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
    with locked_for_all(folder), disk_full_explained(folder):
        table = open_table(folder)
        before = None if table is None else about(folder, table)
        if before is not None and not config.model:
            given = config.given("revision", "num_kept_layers")
            given = {name: before.get(name) if value is None else value for name, value in given.items()}
            config = replace(config, model=before["model"], **given)
        if not config.model:
            problem = f"model is missing: {str(config.output)!r} is no index yet."
            raise ValueError(f"{problem} Name the model that makes it, as in --model DIRECTORY; later runs need not.")
        corpus = open_corpus(config.data, split=config.split, pool=config.pool, on_error=config.on_error)
        # Wrong lines are found here, before the model is loaded.
        num_items = corpus.survey().num_items
        model = open_model(config)
        settings, is_main = settings_of(config, model), connect()[0] == 0
        description = {
            **settings,
            "format_version": FORMAT,
            # Of the same model, which is checked below, it is the same: all weights need not be read for it again.
            "space": (before or {}).get("space") or space_fingerprint(model),
            "exits": (before or {}).get("exits") or exit_fingerprints(model),
            "teacher": noted(model, "teacher_fingerprint"),
            **config.given("revision", "dtype"),
            "model": str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model,
            "data": str(Path(config.data).resolve()),
        }
        if before is not None:
            check_settings(folder, {name: before[name] for name in settings if name in before}, settings)
            if before["data"] != description["data"]:
                said = "%s was of %s, becomes one of %s: what is not there goes."
                logger.warning(said, folder, before["data"], description["data"])
        elif is_main:
            create_table(folder, description, embedding_dim(model, config.truncate_dim))
        gather(None)
        sink = _TableSink(folder, open_table(folder), config.shard_size)
        gather(None)  # all have looked before anyone writes
        embedder = partial(embed_records, model, **options_of(config, model))
        run = EmbeddingRun(sink, embedder, config.shard_size, folder / ERRORS)
        # An item is its id, the place of its picture and its content.
        items = items_of(
            corpus, lambda one, seen: content_key(one.id, None if isinstance(one.image, bytes) else one.image, seen)
        )
        num_new, num_errors, seconds = run.run(items, num_items)
        sink.add_moved()
        wanted = set().union(*gather(sink.wanted))
        if is_main:
            _finish(folder, sink.table, wanted, sink.there - wanted, description, config.ann)
        gather(None)
        counts = open_index(folder).counts
        return IndexReport(str(folder), num_new, sum(counts.values()) - num_new, num_errors, seconds, counts)


class _TableSink:
    """The table of an index, to which each process appends its own rows."""

    def __init__(self, folder: Path, table: Any, shard_size: int) -> None:
        self.folder, self.table, self.shard_size = folder, table, shard_size
        # All keys at once: a lookup on disk for each item would cost more than 300 bytes of memory do.
        there = table.search().with_row_id(True).select(["key", "seen"]).limit(max(1, table.count_rows())).to_arrow()
        self.there = set(there["key"].to_pylist())
        self.row_of = dict(zip(there["seen"].to_pylist(), there["_rowid"].to_pylist(), strict=True))
        self.wanted: set[str] = set()  # keys of the corpus, as far as it was read
        self.moved: list[Item] = []  # what has its vector in another row

    def has(self, item: Item) -> bool:
        """Whether it has a row, or gets one with the vector that a row of other id or place has."""
        key = str(item.key)
        self.wanted.add(key)
        # Lines of a table without ids are numbered: one that goes renames all behind it, which must not cost the model.
        if key not in self.there and item.seen in self.row_of:
            self.there.add(key)
            self.moved.append(self.kept(item))
            if len(self.moved) >= self.shard_size:
                self.add_moved()
        return key in self.there

    def kept(self, item: Item) -> Item:
        """An item whose picture is a file: one inside of a Parquet file is copied into the index."""
        image = item.record.image
        if not isinstance(image, bytes):
            return item
        return item._replace(record=replace(item.record, image=keep_picture(self.folder, image)))

    def add_moved(self) -> None:
        """Append what was moved, with its vectors."""
        if not self.moved:
            return
        row_ids = sorted({self.row_of[item.seen] for item in self.moved})
        found = self.table.take_row_ids(row_ids).select(["seen", "vector"]).to_arrow()
        place = {seen: number for number, seen in enumerate(found["seen"].to_pylist())}
        vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(len(place), -1)
        moved, self.moved = self.moved, []
        self.add(moved, torch.from_numpy(vectors[[place[item.seen] for item in moved]]))

    def add(self, items: list[Item], rows: Tensor) -> None:
        """Append rows; an item that comes again later is there."""
        schema, columns = self.table.schema, []
        for record, key, seen in items:
            columns.append((str(key), seen, record.id, record.text, record.image, record.modality))
        kind = schema.field("vector").type
        # Built by hand: of rows as dicts Arrow would look at every number of every vector. And JSON, and names of
        # files, may hold half a character, which no table can.
        texts = [
            pa.array([value and value.encode("utf-8", "backslashreplace").decode() for value in column], pa.string())
            for column in zip(*columns, strict=True)
        ]
        values = pa.array(rows.numpy().astype(kind.value_type.to_pandas_dtype()).ravel())
        vector = pa.FixedSizeListArray.from_arrays(values, kind.list_size)
        self.table.add(pa.Table.from_arrays([*texts, vector], schema=schema))
        self.there |= {str(item.key) for item in items}


def _finish(
    folder: Path, table: Any, wanted: set[str], gone: set[str], description: Mapping[str, Any], ann: AnnKind | None
) -> None:
    """Remove what is gone, and make this version the one that is searched."""
    table.checkout_latest()  # with what other processes have appended
    if gone:  # in one transaction
        keys = pa.table({"key": sorted(wanted)}, pa.schema([("key", pa.string())]))
        table.merge_insert("key").when_not_matched_by_source_delete().execute(keys)
    if about(folder, table) != description:
        table.update_field_metadata({"path": "vector", "metadata": {ABOUT: json.dumps(description)}})
    update_ann(table, ann)
    tag_complete(table)


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
