"""What is trained on and embedded: M-BEIR's pairs of a query and its answer, and single records of any corpus."""

from __future__ import annotations

import json
import logging
import os
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import datasets
import numpy as np

from puma_hf.configs import OnError
from puma_hf.data.images import Images, image_files, image_table
from puma_hf.data.mbeir import MBEIR, Pool, Query, is_mbeir, parse_candidate, seeded_random
from puma_hf.data.records import (
    COLUMNS,
    Line,
    Problems,
    Record,
    dataset_lines,
    file_state,
    item_lines,
    json_lines,
    on_disk,
    wrong,
)
from puma_hf.data.tasks import MBEIRTask, select_tasks
from puma_hf.fingerprint import image_content
from puma_hf.modeling.inputs_puma import is_image_name
from puma_hf.settings import cut, is_unicode, shown

logger = logging.getLogger(__name__)

Source: TypeAlias = str | Path | MBEIR | datasets.Dataset

GLOBAL_POOL = "global"
_STRING = datasets.Value("string")
_ITEMS = datasets.Features({"item": {name: _STRING for name in COLUMNS}})


# --- M-BEIR's pairs


def load_mbeir(
    root: str | Path | MBEIR,
    split: str = "train",
    *,
    tasks: Iterable[str] | None = None,
    num_negatives: int = 0,
    missing_negatives: Literal["error", "drop"] = "error",
    seed: int = 0,
    with_ids: bool = False,
) -> datasets.Dataset:
    """Training rows of M-BEIR, one a query, for `SentenceTransformerTrainer` and its relatives.

    Every cell is a struct `{"text": str | None, "image": absolute path | None}`, the anchor's also has
    "instruction"; images are read when a batch is collated.  The candidates come from the global pool of the
    split.  Three choices are made, each by the seed and the row alone, whatever the order of calls: one of the wordings
    of the instruction; one of `pos_cand_list` as the positive; negatives from `neg_cand_list`, less the positives,
    without repetition. A query with fewer than `num_negatives` repeats its own in turn, which counts them twice in a
    softmax. The rows are made once and kept in the cache of `datasets`; all processes of a machine map the same file.

    Args:
        root: Folder in M-BEIR's layout, or an `MBEIR` of it.
        split: "train" (the files of each task or dataset), "union_train" (M-BEIR's mixture, smaller datasets
            repeated), or any other split.
        tasks: Names such as "webqa_task1"; None for all.
        num_negatives: Number of columns `negative_1`, `negative_2`, ...
        missing_negatives: What to do with a query without any hard negative if `num_negatives` > 0.
        seed: Seed of the choices above.
        with_ids: Whether to add the columns `qid`, `did` (the chosen positive) and `positives` (all of them), by which
            a batch sampler keeps false negatives apart. Remove them before training: a trainer embeds every column.

    Raises:
        MBEIRFormatError: If a file is not what the format says; the message names file and line.
        FileNotFoundError: If a file or an image is missing.

    Example:
        >>> rows = load_mbeir("demo/emoji", num_negatives=1)
        >>> rows.column_names
        ['anchor', 'positive', 'negative_1']
    """
    if num_negatives < 0 or missing_negatives not in ("error", "drop"):
        raise ValueError(f"{num_negatives=} must be 0 or more, and {missing_negatives=} 'error' or 'drop'.")
    data, names = root if isinstance(root, MBEIR) else MBEIR(root), _names(tasks)

    # The generator runs in one process of a machine, and only if the cache has no such rows yet.
    def rows() -> Iterator[dict[str, Any]]:
        pool, dropped = data.global_pool(split), 0
        for query, chosen, row, _ in _queries(data, split, names, pool, seed, judged=True):
            # None is usable of a query without negatives, or one whose negatives are all right answers.
            usable = [did for did in query.negatives if did not in query.positives] if num_negatives else []
            if num_negatives and not usable:
                if missing_negatives == "error":
                    what = f"query {query.id!r} has no negatives; pass num_negatives=0 or missing_negatives='drop'"
                    raise wrong(query.where, what)
                dropped += 1
                continue
            seeded_random(seed, "negatives", query.id, row).shuffle(usable)
            negatives = [pool[usable[number % len(usable)]] for number in range(num_negatives)]
            positive = pool[chosen]
            # The positive's own modality: a file of one task may hold another's, whose instruction is the right one.
            instruction = data.instruction(query, positive.modality, seed, row=row)
            values = training_row(replace(query, instruction=instruction), positive, negatives)
            ids = {"qid": query.id, "did": positive.id, "positives": list(query.positives)}
            yield {**values, **(ids if with_ids else {})}
        if dropped:
            logger.warning("Dropped %d queries of %s without negatives", dropped, split)

    key = ["load_mbeir 1", names, num_negatives, missing_negatives, seed, with_ids, _state(data, split)]
    return on_disk(rows, training_features(num_negatives, with_ids), key)


def training_features(num_negatives: int, with_ids: bool) -> datasets.Features:
    """The columns of training rows: anchor, positive, `negative_1`, ..., and with ids `qid`, `did` and `positives`."""
    cell = {"text": _STRING, "image": _STRING}
    features: dict[str, Any] = {"anchor": {**cell, "instruction": _STRING}, "positive": cell}
    features |= {f"negative_{number}": cell for number in range(1, num_negatives + 1)}
    ids = {"qid": _STRING, "did": _STRING, "positives": datasets.List(_STRING)}
    return datasets.Features({**features, **(ids if with_ids else {})})


def training_row(anchor: Record, positive: Record, negatives: Sequence[Record]) -> dict[str, Any]:
    """One of them, without ids."""
    sides = {"positive": positive, **{f"negative_{number}": one for number, one in enumerate(negatives, start=1)}}
    cells = {name: {"text": one.text, "image": one.image} for name, one in sides.items()}
    return {"anchor": {name: getattr(anchor, name) for name in COLUMNS}, **cells}


def _names(tasks: Iterable[str] | None) -> list[str] | None:
    return None if tasks is None else sorted({tasks} if isinstance(tasks, str) else set(tasks))


def _state(data: MBEIR, split: str) -> list[Any]:
    """What rows of a split depend on."""
    files = [*data.query_files(split), data.pool_path(None, split), data.instruction_path]
    return [split, str(data.image_root), *map(file_state, files)]


def _queries(
    data: MBEIR, split: str, names: Sequence[str] | None, pool: Pool, seed: int, *, judged: bool
) -> Iterator[tuple[Query, str, int, MBEIRTask]]:
    """Each query of the wanted tasks with one of its positives, its row number and its task.

    Where the name of a file does not tell the task, the positive does. If they are `judged`, there must be one, and
    all candidates must be in the pool.
    """
    if not (files := data.query_files(split)):
        data.tasks(split)  # the error that tells which splits there are
    found = {task for task in files.values() if task is not None}
    for path, task in files.items():
        if task is not None and names is not None and task.name not in names:
            continue
        with Problems(path) as problems:
            for row, query in enumerate(data.read_queries(path, problems, task)):
                its = task
                chosen = seeded_random(seed, "positive", query.id, row).choice(query.positives or ("",))
                if judged or its is None:
                    unknown = [did for did in (*query.positives, *query.negatives) if did not in pool]
                    if unknown or not query.positives:
                        what = f"dids that are not in the global pool of the split: {shown(unknown[:3])}"
                        what = what if unknown else "no positive: pos_cand_list is empty. Leave it out"
                        problems.add(wrong(query.where, f"query {shown(query.id)} has {what}", "no candidate"))
                        continue
                if its is None:
                    its = data.task_of(query, pool[chosen].modality)
                    found.add(its)
                if names is None or its.name in names:
                    yield query, chosen, row, its
    select_tasks(sorted(found), names)  # a name that is none of these is an error


# --- single items to learn from


def load_items(source: Source | Sequence[Source], *, split: str = "train", seed: int = 0) -> datasets.Dataset:
    """Items for self-distillation from whatever holds texts or images: no labels, no pairs.

    A source is one of

    - whatever `open_corpus` reads: a folder of images, a table, a `datasets.Dataset`; also a table with NLI's columns,
      whose sentences are an item each;
    - a folder in M-BEIR's layout, or an `MBEIR` of it: see `load_mbeir_items`.

    Equal items come once, and texts lose the blanks around them. Only the header of an image file is read here; damage
    further in is found when a batch needs the image. The items are made once and kept in the cache of `datasets`.

    Args:
        source: A source, several in a list, or several paths joined with commas.
        split: The split of M-BEIR folders; the others have none.
        seed: Seed of the wordings of M-BEIR's instructions.

    Returns:
        A dataset with the column `item`, structs `{"text": ..., "image": absolute path, "instruction": ...}`.

    Raises:
        FileNotFoundError: If a source is missing, or images are all that is.
        ValueError: If a source holds nothing, or lines of it are wrong; all are counted, and the first named.

    Example:
        >>> load_items(["demo/emoji/mbeir_images", "demo/emoji"]).column_names
        ['item']
    """
    # A comma may be part of a name.
    if isinstance(source, str) and "," in source and not Path(source).exists():
        source = [name.strip() for name in source.split(",")]
    sources = source if isinstance(source, list | tuple) else [source]
    return _items([_open(one, split, seed) for one in sources])


def load_mbeir_items(
    root: str | Path | MBEIR, split: str = "train", *, tasks: Iterable[str] | None = None, seed: int = 0
) -> datasets.Dataset:
    """Every query and every candidate of a split as an item of its own, for self-distillation; see `load_items`.

    Queries carry one wording of their instruction, drawn with the seed; candidates carry none, and are those of the
    whole pool, whatever the tasks. Nothing in the result tells which candidate answers which query.
    """
    return _items([_open_mbeir(root if isinstance(root, MBEIR) else MBEIR(root), split, tasks, seed)])


# A source: its records, and what they depend on.
_Opened: TypeAlias = tuple[Callable[[], Iterator[Record]], list[Any]]


def _open(source: Source, split: str, seed: int) -> _Opened:
    if isinstance(source, str | Path) and is_mbeir(Path(source)):
        source = MBEIR(source)
    if isinstance(source, MBEIR):
        return _open_mbeir(source, split, None, seed)
    corpus = open_corpus(source)
    images = Images()  # where they may be has been looked at by then

    def read(line: Line) -> Record:
        record = corpus.read(line)
        return record if record.image is None else replace(record, image=images.read(record.image, line.where))

    def records() -> Iterator[Record]:
        with Problems(corpus.path) as problems:
            yield from (record for line in corpus.lines() if (record := problems.attempt(read, line)) is not None)

    if isinstance(source, datasets.Dataset):
        return records, ["dataset", source._fingerprint]
    files = [corpus.path] if corpus.path.is_file() else [Path(line.where) for line in corpus.lines()]
    return records, ["files", *map(file_state, files)]


def _open_mbeir(data: MBEIR, split: str, tasks: Iterable[str] | None, seed: int) -> _Opened:
    names = _names(tasks)

    def records() -> Iterator[Record]:
        pool = data.global_pool(split)
        for query, _, row, task in _queries(data, split, names, pool, seed, judged=False):
            yield replace(query, instruction=data.instruction(query, task.candidate_modality, seed, row=row))
        yield from pool.values()

    return records, ["mbeir", names, seed, *_state(data, split)]


def _items(opened: Sequence[_Opened]) -> datasets.Dataset:
    def rows() -> Iterator[dict[str, Any]]:
        seen: set[int] = set()  # hashes: two different items of ten million have the same once in 400,000 times
        for records, _ in opened:
            record = None
            for record in records():
                item = {name: getattr(record, name) for name in COLUMNS}
                # Blanks around a text are noise of tables; `embed` keeps them, as they change a vector.
                item |= {name: item[name] and item[name].strip() for name in ("text", "instruction")}
                if (value := hash(tuple(item.values()))) not in seen:
                    seen.add(value)
                    yield {"item": item}
            if record is None:
                raise ValueError("A source holds no items. Name one with at least one text or image.")

    return on_disk(rows, _ITEMS, ["items 2", *(key for _, key in opened)])


# --- a corpus to embed


class Survey(NamedTuple):
    """How many lines a corpus has, and some of them, drawn at random."""

    num_items: int
    sample: list[Record]


@dataclass(frozen=True)
class Corpus:
    """A corpus that is read from its first line to its last, as often as is wanted; see `open_corpus`.

    Memory does not grow with it, but for a .json and the names of the files of one folder. Texts are kept as they are,
    and a missing image is the trouble of who embeds it. `lines` makes its lines, not checked yet, and `read` a record
    of one. A row that has no id has its number, from 0, as one.
    """

    path: Path
    root: str  # what an image is known by is its path below this folder, which may be moved
    lines: Callable[[], Iterator[Line]]
    read: Callable[[Line], Record]
    on_error: OnError = "raise"

    def record(self, row: int, line: Line) -> Record:
        """A line, checked; that its image is there is not. ValueError or FileNotFoundError if `on_error` is "raise"."""
        try:
            record = self.read(line)
            return replace(record, id=record.id or str(row), row=row)
        except (ValueError, FileNotFoundError) as error:
            if self.on_error == "raise":
                raise
            return Record(_id_of(line) or str(row), row=row, problem=str(error))

    def survey(self, sample_size: int = 0, seed: int = 0) -> Survey:
        """Read the corpus once, to count it, draw records, and find all wrong rows before a model is loaded.

        A ValueError with their count if rows are wrong, and `on_error` is "raise" or none is right; or if the file
        cannot be read to its end.
        """
        generator, sample = random.Random(seed), list[Record | None]()
        num_items, problems, ids = 0, Problems(self.path), array("q")  # 8 bytes a row
        read = replace(self, on_error="raise").record
        for row, line in enumerate(self.lines()):
            record = problems.attempt(read, row, line)
            num_items += 1
            ids.append(hash(row if record is None else record.id))
            # A reservoir: every set of so many rows is drawn with the same probability, and only those are kept.
            place = row if row < sample_size else generator.randint(0, row)
            sample[place : place + 1] = [record] if place < sample_size else []
        if not num_items:
            raise ValueError(f"{self.path} holds no inputs. Name one with at least one text or image.")
        if problems:
            if self.on_error == "raise" or problems.counts.total() == num_items:
                raise problems.report()
            logger.warning("%s\nThe run goes on without them (on_error=%r).", problems.report(), self.on_error)
        if repeated := num_items - len(np.unique(np.frombuffer(ids, np.int64))):
            what = "repeat the id of another. A database that replaces items by their ids keeps one of each"
            logger.warning("%s: %d rows %s.", self.path, repeated, what)
        return Survey(num_items, sorted(filter(None, sample), key=lambda record: record.row))

    def content_hash(self, record: Record) -> str:
        """A name for what a model sees of a record, and not for its id."""
        content = [record.text, record.instruction, image_content(record.image, self.root)]
        return blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def open_corpus(
    data: str | Path | datasets.Dataset, *, split: str = "test", pool: str = GLOBAL_POOL, on_error: OnError = "raise"
) -> Corpus:
    """The records of a folder of images, a table, or a pool in M-BEIR's layout, as a stream.

    Args:
        data: A folder of images, whose paths below it are their ids, unless a table describes it (`image_table`); a
            table with columns among id, text, image and instruction, images being paths below its folder or inside of
            a .parquet; a dataset with such columns, or with `load_items`' own; or a folder in M-BEIR's layout.
        split: Split of the latter.
        pool: Its pool, "global" or a task's name such as "webqa_task1".
        on_error: What to do about wrong rows: raise, or make records of them that say what is wrong.

    Raises:
        FileNotFoundError: If it is not there; if it is the pool, then when the lines are read.
        ValueError: If it is of no such kind, holds nothing, or there is no such task.

    Example:
        >>> next(open_corpus("demo/emoji").lines()).columns["did"]
        '10:7'
    """
    anywhere = partial(_table_record, images=Images())
    if isinstance(data, datasets.Dataset):  # its images may have any path: who made it has chosen them
        return Corpus(Path("the dataset"), "", partial(dataset_lines, data), anywhere, on_error)
    path = Path(data)
    if is_mbeir(path):
        mbeir = MBEIR(path)
        file = mbeir.pool_path(None, split)
        if pool != GLOBAL_POOL:
            file = mbeir.pool_path(select_tasks(mbeir.tasks(split), [pool])[0], split)
        candidate = partial(parse_candidate, images=Images(mbeir.image_root), may_be_missing=True)
        return Corpus(file, str(mbeir.image_root), partial(json_lines, file), candidate, on_error)
    table = path if path.is_file() else image_table(path)
    if table is None:
        # One more walk, so that what is left out is told before hours of embedding and not after.
        left_out = Counter[str]()
        num_images = sum(1 for _ in image_files(path, left_out))
        rest = ", ".join(f"{count} x {kind}" for kind, count in left_out.most_common())
        if not num_images:
            raise ValueError(f"{path} holds no image, nor is it M-BEIR. Left out: {rest or 'none'}. Name another.")
        logger.info("%s: %d images; left out %s", path, num_images, rest or "nothing")
        root = os.path.realpath(path)
        return Corpus(path, root, partial(_folder_lines, root), anywhere, on_error)
    below = partial(_table_record, images=Images(table.parent))
    return Corpus(table, os.path.realpath(table.parent), partial(item_lines, table), below, on_error)


def _folder_lines(root: str) -> Iterator[Line]:
    paths = ((name, os.path.join(root, name)) for name in image_files(Path(root)))
    return (Line(path, {"id": Path(name).as_posix(), "image": path}) for name, path in paths)


def _table_record(line: Line, images: Images) -> Record:
    # A struct "item" is as `load_items` makes it; any other is a column of somebody's own.
    if isinstance(item := line.columns.get("item"), dict):
        line = Line(line.where, item)
    record_id, image, text = _id_of(line), line.columns.get("image"), line.text("text")
    # Row numbers in its place could meet the ids of other rows.
    if "id" in line.columns and not record_id:
        raise wrong(line.where, f"id is {shown(line.columns['id'])}, must be a text or number.", "wrong id")
    image = image.get("bytes") or image.get("path") if isinstance(image, dict) else image
    if not isinstance(image, str | bytes | None) or (isinstance(image, str) and "://" in image):
        raise wrong(line.where, f"image is {shown(image)}, must be a file below {images.root}. Download images first.")
    # A table of documents with a column `file_name` is known here, and not after each of them was broken.
    if isinstance(image, str) and os.path.splitext(image)[1] and not is_image_name(image):
        what = f"image is {shown(image)}, whose ending is that of no image. Convert it, or rename the column."
        raise wrong(line.where, what, "image of no known kind")
    if text is None and not image:
        here = cut(", ".join(map(str, line.columns)))
        what = f"text and image are both empty, or no columns: these are {here}. Fill or rename one of them."
        raise wrong(line.where, what, "empty row")
    # A missing file is not a wrong row: with on_error="skip" it is told with its index when it is embedded.
    if image and isinstance(image, str):
        image = images.find(image, line.where, may_be_missing=True)
    return Record(record_id, text, image or None, instruction=line.text("instruction"))


def _id_of(line: Line) -> str:
    """The id of a row of a table, "" if it has none that can be one."""
    value = line.columns.get("id", "")
    is_id = isinstance(value, str | int) and not isinstance(value, bool) and is_unicode(str(value))
    return str(value) if is_id else ""
