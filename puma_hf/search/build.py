"""Make an index of a corpus: embed what is not embedded yet, and keep what is needed to show an answer."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from puma_hf.embedding.records import Corpus, Record, input_hash, open_corpus
from puma_hf.embedding.run import EmbedReport, embed_corpus
from puma_hf.embedding.shards import read_info
from puma_hf.embedding.store import MANIFEST, StoredEmbeddings, open_embeddings
from puma_hf.evaluation.fingerprint import short_name
from puma_hf.evaluation.processes import connect, gather, locked_for_all
from puma_hf.files import write_whole
from puma_hf.search.ann import ANN_DRAFTS, require_faiss, write_ann
from puma_hf.search.config import AnnKind, IndexConfig
from puma_hf.search.index import (
    DESCRIPTION,
    FORMAT,
    FORMAT_VERSION,
    manifest_hash,
    model_of,
    open_index,
    read_description,
)
from puma_hf.search.items import Item, image_state, items_file, write_items
from puma_hf.search.pictures import IMAGES, keep_picture
from puma_hf.search.reuse import keep_embeddings

logger = logging.getLogger(__name__)

_DRAFTS = (".items-*.tmp", f".{DESCRIPTION}-*.tmp", f"{IMAGES}/.*.tmp", ANN_DRAFTS)


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What a run of `build_index` has done; `str()` tells it in a few lines.

    Args:
        embedded: What was embedded.
        counts: Items of each modality in the index.
    """

    embedded: EmbedReport
    counts: Mapping[str, int]

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} of {name}" for name, count in self.counts.items()) or "no items"
        return f'{self.embedded}\nindexed  {counts}; ask with: puma-hf search {self.embedded.output} "WORDS"'


def build_index(config: IndexConfig) -> IndexReport:
    """Make an index of a corpus; a run that was stopped goes on where it was.

    The index is a directory of embeddings as `embed_corpus` writes it, a file of ids, texts and paths of pictures
    beside each of its shards, and `index.json`, written last. Pictures stay where they are, but for those inside of a
    Parquet file, which are copied. Run it again when items were added, removed or changed: the model sees what is new,
    the rest is kept (with int8 and uint8, of shards whose inputs are the same). A file for approximate search is made
    of the stored embeddings, so `ann` can be added, changed or removed later without the model seeing anything again.
    An index names its model, and the code of a model in a local directory is run: without `model` in the configuration,
    make anew only indexes that you trust.

    Args:
        config: What to index, with which model, and where to; see `IndexConfig`.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: If the corpus is missing.
        ValueError: If the corpus has wrong lines, the model is no PUMA model, or the directory is of another model or
            setting.
        ImportError: If approximate search is wanted, and faiss is not installed.
        DirectoryInUseError: If another run writes into the directory.
        OSError: If the disk is full; finished shards are kept.

    Example:
        >>> from puma_hf.search.build import build_index
        >>> from puma_hf.search.config import IndexConfig
        >>> config = IndexConfig(data="demo/emoji", model="puma-k4-mac", output="index")
        >>> print(build_index(config))  # doctest: +SKIP
    """
    output = Path(config.output)
    if (Path(config.data) / MANIFEST).is_file():
        raise ValueError(
            f"data={str(config.data)!r} is a directory of embeddings, which hold nothing to show. Name the corpus that "
            "they were made of, and this directory as output: its embeddings are kept."
        )
    with locked_for_all(output):
        before = read_description(output)  # somebody else's file of that name is not written over
        config = _with_its_model(config, output, before)
        if _ann_kind(config, before) != "none":
            require_faiss()
        data = str(Path(config.data).resolve())
        if before is not None and before["data"] not in (data, short_name(data)):  # the latter in a portable copy
            logger.warning("%s was of %s, and becomes one of %s: what is not there goes.", output, before["data"], data)
        rank, _ = connect()
        if rank == 0:
            keep_embeddings(config)
        gather(None)
        embedded = embed_corpus(config)
        if rank == 0:
            _write(config, output, before)
        gather(None)
        return IndexReport(embedded=embedded, counts=open_index(output).counts)


def _with_its_model(config: IndexConfig, folder: Path, described: Mapping[str, Any] | None) -> IndexConfig:
    """The configuration with the model that made the index, unless it names one."""
    if config.model:
        return config
    if described is None:
        raise ValueError(
            f"model is missing: {str(config.output)!r} is no index yet, so the model that makes it must be named, as "
            "in --model DIRECTORY. Later runs need not."
        )
    revision = described["revision"] if config.revision is None else config.revision
    return replace(config, model=model_of(folder, described), revision=revision)


def _ann_kind(config: IndexConfig, described: Mapping[str, Any] | None) -> AnnKind:
    """What is asked for, or what is there."""
    before = (described or {}).get("ann")
    return config.ann or (before["kind"] if before else "none")


def _write(config: IndexConfig, folder: Path, before: Mapping[str, Any] | None) -> None:
    # Before they are opened: another run that ends meanwhile must not get the items of this one.
    bound_to = manifest_hash(folder)
    stored = open_embeddings(folder)
    corpus = open_corpus(config.data, split=config.split, pool=config.pool, on_error=config.on_error)
    counts: Counter[str] = Counter()
    hashes = []
    for shard, (records, states, seen_hashes) in enumerate(_shards(corpus, stored)):
        items = [
            Item(record.id, record.text, _image(record, folder), state)
            for record, state in zip(records, states, strict=True)
        ]
        counts.update(item.modality for item in items)
        hashes.append(write_items(folder, shard, items, seen_hashes))
    for file in [*folder.glob("items-*.parquet"), *(draft for pattern in _DRAFTS for draft in folder.glob(pattern))]:
        if file not in {items_file(folder, shard) for shard in range(len(hashes))}:
            file.unlink(missing_ok=True)  # of a longer corpus, or of a run that was killed
    ann = write_ann(stored, _ann_kind(config, before), bound_to, (before or {}).get("ann"))
    is_folder = Path(config.model).is_dir()
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "manifest_hash": bound_to,
        "model": str(Path(config.model).resolve()) if is_folder else config.model,
        "revision": config.revision,
        "dtype": config.dtype,
        "data": str(Path(config.data).resolve()),
        "counts": dict(sorted(counts.items())),
        "items": hashes,
        "ann": ann,
    }
    content = (json.dumps(values, indent=2) + "\n").encode()
    write_whole(folder / DESCRIPTION, content)


def _shards(corpus: Corpus, stored: StoredEmbeddings) -> Iterator[tuple[list[Record], list[str | None], list[str]]]:
    """The records of each shard that have an embedding in it, state of picture and hash of each; a shard at a time."""
    lines = enumerate(corpus.lines())
    for shard, entry in enumerate(stored.manifest["shards"]):
        records = [corpus.record(row, line) for row, line in islice(lines, entry["num_items"])]
        # Before the hashes, which then tell that a picture is still as it was embedded.
        states = [image_state(record.image) if isinstance(record.image, str) else None for record in records]
        hashes = [corpus.content_hash(record) for record in records]
        if input_hash(records, hashes) != entry["input_hash"]:
            raise _changed(corpus)
        info, errors = read_info(stored.folder, shard, stored.manifest["settings"]["file_format"])
        broken = {error.row for error in errors} if info.num_rows < info.num_items else set()
        there = [place for place, record in enumerate(records) if record.row not in broken]
        yield (
            [records[place] for place in there],
            [states[place] for place in there],
            [hashes[place] for place in there],
        )
    if next(lines, None) is not None:
        raise _changed(corpus)


def _changed(corpus: Corpus) -> ValueError:
    return ValueError(
        f"{corpus.path} changed while it was read. Run the same command again: what has not changed is kept."
    )


def _image(record: Record, folder: Path) -> str | None:
    """Path of its picture; one that is inside of the corpus becomes a file of the index."""
    image: Any = record.image
    if not isinstance(image, bytes):
        return image  # type: ignore[no-any-return]
    return keep_picture(folder, image)
