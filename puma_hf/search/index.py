"""The index of a corpus: a table of LanceDB with an embedding, a text and the path of a picture for each item.

A run adds what is new, removes what is gone, and at last tags the version of the table that it has come to. A search
opens the tagged version, so it never sees half of a run: of one that goes on, or of one that was killed.
"""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from puma_hf.configs import AnnKind, IndexConfig, Target
from puma_hf.embedding.embed import embed_records, embedding_dim
from puma_hf.embedding.records import Corpus, Record, open_corpus
from puma_hf.embedding.run import open_model
from puma_hf.files import write_whole
from puma_hf.fingerprint import model_fingerprint
from puma_hf.modeling.inputs_puma import open_image
from puma_hf.processes import broadcast, connect, gather, locked_for_all

logger = logging.getLogger(__name__)

TABLE = "items"
ABOUT = "puma_hf"  # metadata of the column of vectors: what the index says of itself
ERRORS = "errors.jsonl"
FORMAT_VERSION = 2  # 1 was a directory of shards with an index.json

_COMPLETE = "complete"  # tag of the version that the last whole run has made
_SHOWN = ("id", "text", "image", "modality")
_COLUMNS = ("key", "seen", *_SHOWN)
_FILTERS = {"text": "modality = 'text'", "image": "modality != 'text'"}
# What vectors depend on besides the inputs: those of another value cannot be compared.
_BOUND = ("fingerprint", "weights_dtype", "prompt", "truncate_dim", "precision")
_ANN_TYPES = {"hnsw": "IvfHnswSq", "int8": "IvfSq", "binary": "IvfRq"}
_Item = tuple[Record, str, str]  # with the key of its row, and a hash of what the model sees of it
_MOST_FRAGMENTS = 100  # files of a table, one a write; of more LanceDB makes few, which writes all of them again


class Index:
    """What `puma-hf index` has written, as its last whole run left it: a folder with a table of LanceDB.

    The `table` has `id`, `text`, `image`, `modality` and `vector` of every item; `counts` says how many there are of
    each modality, and `description` how to open the model, named `model`, and what the vectors depend on.
    """

    def __init__(self, folder: Path, table: Any) -> None:
        self.folder, self.table = folder, table
        self.description = _about(folder, table)
        self.fingerprint = str(self.description["fingerprint"])  # of the model
        self.model = _model_of(folder, self.description)  # an absolute path, or a Hub id
        found = {name: table.count_rows(f"modality = '{name}'") for name in ("image", "image,text", "text")}
        self.counts: dict[str, int] = {name: count for name, count in found.items() if count}

    def __len__(self) -> int:
        """Number of items."""
        return sum(self.counts.values())

    @property
    def ann(self) -> str:
        """What approximate search rests on; "none" if there is nothing."""
        there = {one.index_type for one in self.table.list_indices()}
        return next((kind for kind, name in _ANN_TYPES.items() if name in there), "none")

    def num_candidates(self, target: Target = "any") -> int:
        """How many items a search may find: "text", "image" (with or without text), or "any"; ValueError if none."""
        if target not in get_args(Target):
            raise ValueError(f"target is {target!r}, must be one of {', '.join(map(repr, get_args(Target)))}.")
        texts = self.counts.get("text", 0)
        found = {"any": len(self), "text": texts, "image": len(self) - texts}[target]
        if not len(self):
            raise ValueError(
                f"The index {str(self.folder)!r} is empty: nothing of its corpus could be embedded. Look into its "
                f"{ERRORS}, mend what is there, and run puma-hf index again."
            )
        if not found:
            there = ", ".join(f"{count} of {name}" for name, count in self.counts.items())
            raise ValueError(
                f"The index {str(self.folder)!r} has no {target} to find, only {there}. Look for 'any' (--for any), or "
                f"index a corpus that holds {target}s."
            )
        return found

    def nearest(
        self, query: NDArray[np.float32], target: Target = "any", top_k: int = 10, *, rescored: int | None = None
    ) -> list[dict[str, Any]]:
        """The items with the largest cosine, best first: `id`, `text`, `image`, `modality` and `score` of each.

        The query is `(embedding_dim,)`. With `rescored=None` all items are compared; otherwise the approximate index
        proposes `rescored * top_k` of them. ValueError if files of the index are gone or damaged.
        """
        asked = self.table.search(query).distance_type("cosine").limit(top_k).select([*_SHOWN, "_distance"])
        asked = asked.bypass_vector_index() if rescored is None else asked.refine_factor(rescored)
        try:
            rows = (asked.where(_FILTERS[target], prefilter=True) if target in _FILTERS else asked).to_list()
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(
                f"The index {str(self.folder)!r} cannot be read ({str(error).partition(chr(10))[0][:200]}). Open it "
                "again, as it may have been made anew meanwhile; or delete it and run puma-hf index again."
            ) from error
        for row in rows:
            row["score"] = 1 - row.pop("_distance")
            row["image"] = None if row["image"] is None else os.path.join(self.folder, row["image"])
        return sorted(rows, key=lambda row: (-row["score"], row["id"]))


def open_index(folder: str | Path) -> Index:
    """Open a directory that `puma-hf index` has written.

    FileNotFoundError if there is none; ValueError if its first run was not finished or another version has made it.
    """
    if (table := _open_table(Path(folder))) is None:
        raise FileNotFoundError(f"{str(folder)!r} is no index. Name a directory that puma-hf index has written.")
    if _COMPLETE not in table.tags.list():
        raise ValueError(
            f"The run that makes the index {str(folder)!r} has not finished. Wait for it, or run puma-hf index again."
        )
    table.checkout(_COMPLETE)
    return Index(Path(folder), table)


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
        rate = f", {self.num_new / self.seconds:,.1f} a second" if self.num_new and self.seconds else ""
        counts = ", ".join(f"{count:,} of {name}" for name, count in self.counts.items()) or "no items"
        broken = f"broken   {self.num_errors:,} inputs, see {Path(self.output, ERRORS)}\n" if self.num_errors else ""
        return (
            f"embedded {self.num_new:,} inputs{rate}; {self.num_kept:,} already were\n{broken}"
            f'indexed  {counts}; ask with: puma-hf search {self.output} "WORDS"'
        )


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
    for note in config.notes():
        logger.warning(note)
    folder = Path(config.output)
    with locked_for_all(folder):
        table = _open_table(folder)
        before = None if table is None else _about(folder, table)
        if not (config.model or before):
            raise ValueError(
                f"model is missing: {str(config.output)!r} is no index yet, so the model that makes it must be named, "
                "as in --model DIRECTORY. Later runs need not."
            )
        if before is not None and not config.model:
            revision = before["revision"] if config.revision is None else config.revision
            config = replace(config, model=_model_of(folder, before), revision=revision)
        corpus = open_corpus(config.data, split=config.split, pool=config.pool, on_error=config.on_error)
        # Wrong lines are found here, before the model is loaded.
        num_items = broadcast(corpus.survey().num_items if connect()[0] == 0 else 0)
        model = open_model(config)
        about = _describe(config, model)
        if before is not None:
            _compare(folder, before, about)
        elif connect()[0] == 0:
            create_table(folder, about, embedding_dim(model, config.truncate_dim))
        gather(None)
        return _Run(config, corpus, model, table or _open_table(folder)).run(num_items, about)


class _Run:
    """The work of one process; the main one writes what all of them have embedded."""

    def __init__(self, config: IndexConfig, corpus: Corpus, model: SentenceTransformer, table: Any) -> None:
        self.config, self.corpus, self.model, self.table = config, corpus, model, table
        self.rank, self.count = connect()
        self.folder = Path(config.output)
        self.errors: list[dict[str, Any]] = []
        self.num_new = 0
        there = table.search().with_row_id(True).select(["key", "seen"]).limit(max(1, table.count_rows())).to_arrow()
        self.there = set(there["key"].to_pylist())
        self.row_of = dict(zip(there["seen"].to_pylist(), there["_rowid"].to_pylist(), strict=True))
        gather(None)  # all have looked before anyone writes

    def run(self, num_items: int, about: Mapping[str, Any]) -> IndexReport:
        start = time.monotonic()
        with tqdm(total=num_items, desc="Embedding", unit="item", disable=self.rank > 0, smoothing=0.1) as progress:
            wanted = self._add_what_is_new(progress)
        seconds = time.monotonic() - start
        if self.rank == 0:
            self._finish(about, wanted)
        gather(None)
        counts = open_index(self.folder).counts
        kept = sum(counts.values()) - self.num_new
        return IndexReport(str(self.folder), self.num_new, kept, len(self.errors), seconds, counts)

    def _add_what_is_new(self, progress: Any) -> set[str]:
        """Embed what was never seen, copy the vectors of what has another id or place now; the keys of the corpus."""
        wanted: set[str] = set()
        new: list[_Item] = []
        moved: list[_Item] = []
        for row, line in enumerate(self.corpus.lines()):
            record = self.corpus.record(row, line)
            seen = self.corpus.content_hash(record)
            place = record.image if isinstance(record.image, str) else None
            key = blake2b(json.dumps([record.id, place, seen]).encode(), digest_size=16).hexdigest()
            is_good = record.problem is None
            if is_good and (key in self.there or key in wanted):  # or the same item once more
                progress.total -= 1
            else:
                (moved if is_good and seen in self.row_of else new).append((record, key, seen))
            wanted.add(key)
            for waiting, flush in ((new, self._embed), (moved, self._copy)):
                if len(waiting) == self.config.shard_size:
                    flush(waiting, progress)
                    waiting.clear()
        self._embed(new, progress)
        self._copy(moved, progress)
        return wanted

    def _embed(self, items: Sequence[_Item], progress: Any) -> None:
        mine = {item[0].row: item for item in items[self.rank :: self.count]}
        broken: list[dict[str, Any]] = []
        found: dict[int, NDArray[Any]] = {}

        def on_broken(record: Record, message: str) -> None:
            broken.append({"row": record.row, "id": record.id, "message": message})
            progress.update(1)

        for records, part in embed_records(self.model, [one for one, *_ in mine.values()], self.config, on_broken):
            found |= {record.row: row for record, row in zip(records, part.numpy(), strict=True)}
            progress.update(len(records))
        order = sorted(found)
        done: tuple[Any, ...] = (
            [self._row(*mine[row]) for row in order],
            np.stack([found[row] for row in order]) if found else None,
            broken,
        )
        for rows, vectors, errors in gather(done):
            self.errors += errors
            self.num_new += len(rows)
            if rows and self.rank == 0:
                self._add(rows, vectors)

    def _copy(self, items: Sequence[_Item], progress: Any) -> None:
        progress.total -= len(items)
        if items and self.rank == 0:
            row_ids = sorted({self.row_of[seen] for *_, seen in items})
            found = self.table.take_row_ids(row_ids).select(["seen", "vector"]).to_arrow()
            place = {seen: number for number, seen in enumerate(found["seen"].to_pylist())}
            vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(len(place), -1)
            self._add([self._row(*item) for item in items], vectors[[place[seen] for *_, seen in items]])

    def _row(self, record: Record, key: str, seen: str) -> dict[str, str | None]:
        text, image = record.text, record.image
        image = keep_picture(self.folder, image) if isinstance(image, bytes) else image
        modality = ",".join(name for name, value in (("image", image), ("text", text)) if value is not None)
        row = {"key": key, "seen": seen, "id": record.id, "text": text, "image": image}
        # JSON, and names of files, may hold half a character, which no table can.
        stored = {name: value and value.encode("utf-8", "backslashreplace").decode() for name, value in row.items()}
        return {**stored, "modality": modality}

    def _add(self, rows: Sequence[Mapping[str, str | None]], vectors: NDArray[Any]) -> None:
        schema = self.table.schema
        kind = schema.field("vector").type
        columns = [pa.array([row[name] for row in rows], pa.string()) for name in _COLUMNS]
        values = pa.array(vectors.astype(kind.value_type.to_pandas_dtype()).ravel())
        vector = pa.FixedSizeListArray.from_arrays(values, kind.list_size)
        self.table.add(pa.Table.from_arrays([*columns, vector], schema=schema))

    def _finish(self, about: Mapping[str, Any], wanted: set[str]) -> None:
        """Remove what is gone, write what is broken, and make this version the one that is searched."""
        if self.there - wanted:  # in one transaction
            keys = pa.table({"key": sorted(wanted)}, pa.schema([("key", pa.string())]))
            self.table.merge_insert("key").when_not_matched_by_source_delete().execute(keys)
        (self.folder / ERRORS).unlink(missing_ok=True)
        if self.errors:
            write_whole(self.folder / ERRORS, "".join(json.dumps(error) + "\n" for error in self.errors).encode())
        if _about(self.folder, self.table) != about:
            self.table.update_field_metadata({"path": "vector", "metadata": {ABOUT: json.dumps(about)}})
        update_ann(self.table, self.config.ann)
        tag_complete(self.table)


def keep_picture(folder: Path, content: bytes) -> str:
    """Write the bytes of a picture's file below an index, named by their content; its path below the index."""
    with open_image(io.BytesIO(content)) as opened:
        name = f"images/{blake2b(content, digest_size=16).hexdigest()}.{(opened.format or 'image').lower()}"
    path = folder / name
    if not path.is_file() or path.stat().st_size != len(content):  # cut off when the machine lost power
        write_whole(path, content, sync=False)
    return name


def create_table(folder: Path, about: Mapping[str, Any], dim: int) -> Any:
    """The empty table of a new index."""
    import lancedb

    numbers = pa.float16() if about["precision"] == "float16" else pa.float32()
    vector = pa.field("vector", pa.list_(numbers, dim), metadata={ABOUT: json.dumps(about)})
    schema = pa.schema([*((name, pa.string()) for name in _COLUMNS), vector])
    return lancedb.connect(str(folder)).create_table(TABLE, schema=schema)


def tag_complete(table: Any) -> None:
    """Make the newest version of a table the one that is searched."""
    (table.tags.update if _COMPLETE in table.tags.list() else table.tags.create)(_COMPLETE, table.version)


def _open_table(folder: Path) -> Any:
    """The table of an index at its newest version, or None if there is none."""
    try:
        import lancedb
    except ImportError as error:
        raise ImportError(f"An index needs LanceDB ({error}). Run: pip install 'puma-hf[search]'") from error
    if (folder / f"{TABLE}.lance").is_dir():
        return lancedb.connect(str(folder)).open_table(TABLE)
    for name in ("index.json", "manifest.json"):
        if (folder / name).is_file():
            said = json.loads((folder / name).read_text(encoding="utf-8"))
            command = f"puma-hf index {said.get('data', 'DATA')} --model {said.get('model', 'MODEL')} --output NEW"
            raise ValueError(
                f"{str(folder)!r} was made by puma-hf embed, or by an older puma-hf index: it has {name}, and an index "
                f"is a table of LanceDB now. Make it anew: {command}"
            )
    return None


def _about(folder: Path, table: Any) -> dict[str, Any]:
    """What an index says of itself."""
    metadata = next((field.metadata for field in table.schema if field.name == "vector"), None) or {}
    found: dict[str, Any] = json.loads(metadata.get(ABOUT.encode(), "{}"))
    if (version := found.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"{str(folder)!r} has a table {TABLE!r} of format {version}, must be {FORMAT_VERSION} of puma-hf index. "
            "Choose another folder, or install the puma-hf that has made it."
        )
    return found


def _model_of(folder: Path, about: Mapping[str, Any]) -> str:
    name = str(about["model"])  # a Space has its model inside, and says where from its own folder
    return str((folder / name).resolve()) if name.startswith(".") else name


def _describe(config: IndexConfig, model: SentenceTransformer) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": model_fingerprint(model),
        "weights_dtype": str(model.dtype).removeprefix("torch."),
        **{name: getattr(config, name) for name in ("prompt", "truncate_dim", "precision", "revision", "dtype")},
        "model": str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model,
        "data": str(Path(config.data).resolve()),
    }


def _compare(folder: Path, before: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Refuse vectors that cannot be compared, and say that a corpus takes another's place."""
    pairs = {name: (before[name], about[name]) for name in ("data", *_BOUND) if before[name] != about[name]}
    other = "; ".join(
        f"{name} is {pairs[name][0]!r} there, {pairs[name][1]!r} here" for name in _BOUND if name in pairs
    )
    if other:
        raise ValueError(
            f"The embeddings in {str(folder)!r} are of another model or setting: {other}. Choose another directory, or "
            "delete this one."
        )
    if "data" in pairs:
        logger.warning("%s was of %s, and becomes one of %s: what is not there goes.", folder, *pairs["data"])


def update_ann(table: Any, kind: AnnKind | None) -> None:
    """Make, remove or bring up to date the index of approximate search; LanceDB compares what it lacks exactly."""
    from lancedb.index import HnswSq, IvfRq, IvfSq

    there = {one.index_type: one for one in table.list_indices()}
    wanted = _ANN_TYPES.get(kind) if kind is not None else next(iter(there), None)
    for name in there.keys() - {wanted}:
        table.drop_index(there[name].name)
    if wanted is not None and wanted not in there and table.count_rows():
        # One part: with more of them a search would have to choose some, and miss what is in others.
        config = {"IvfHnswSq": HnswSq, "IvfSq": IvfSq, "IvfRq": IvfRq}[wanted]
        table.create_index("vector", config=config(distance_type="cosine", num_partitions=1))
    is_behind = wanted in there and there[wanted].num_unindexed_rows > 0
    if is_behind or table.stats()["fragment_stats"]["num_fragments"] > _MOST_FRAGMENTS:
        table.optimize()
