"""What is trained on: pairs of M-BEIR's queries with their answers, and single items of any corpus."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets

from puma_hf.data.images import BrokenImageError, ImageFiles, LeftOut, image_files, image_table
from puma_hf.data.mbeir import MBEIR, MBEIRTask, Pool, is_mbeir, seeded_random, select_tasks
from puma_hf.data.records import (
    COLUMNS,
    NLI_COLUMNS,
    Line,
    Problems,
    Query,
    Record,
    dataset_lines,
    file_state,
    item_lines,
    location,
    on_disk,
    wrong,
)
from puma_hf.settings import cut, is_unicode, shown

logger = logging.getLogger(__name__)

Source: TypeAlias = str | Path | MBEIR | datasets.Dataset

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
    split.  Each choice depends only on the seed and the row, never on the order of calls:

    - the instruction: one of its wordings;
    - the positive: one of `pos_cand_list`;
    - the negatives: drawn from `neg_cand_list`, less the positives, without repetition; a query with fewer
      than `num_negatives` repeats its own in turn, which counts them twice in a softmax; one with none at all
      is an error or is dropped, see `missing_negatives`.

    The rows are made once and kept in the cache of `datasets`; all processes of a machine map the same file.

    Args:
        root: Folder in M-BEIR's layout, or an `MBEIR` of it.
        split: "train" (the files of each task or dataset), "union_train" (M-BEIR's mixture, smaller datasets
            repeated), or any other split.
        tasks: Names such as "webqa_task1"; None for all.
        num_negatives: Number of columns `negative_1`, `negative_2`, ...
        missing_negatives: What to do with a query without hard negatives if `num_negatives` > 0.
        seed: Seed of the choices above.
        with_ids: Whether to add the columns `qid`, `did` (the chosen positive) and `positives` (all of them),
            which a batch sampler can use to keep false negatives apart.  Remove them before training: a
            trainer embeds every column.

    Raises:
        MBEIRFormatError: If a file is not what the format says; the message names file and line.
        FileNotFoundError: If a file or an image is missing.

    Example:
        >>> rows = load_mbeir("demo/emoji", num_negatives=1)
        >>> rows.column_names
        ['anchor', 'positive', 'negative_1']
    """
    if num_negatives < 0:
        raise ValueError(f"num_negatives is {num_negatives}, must be 0 or more; 0 trains on in-batch negatives alone")
    if missing_negatives not in ("error", "drop"):
        raise ValueError(f"missing_negatives is {missing_negatives!r}, must be 'error' or 'drop'")
    data = root if isinstance(root, MBEIR) else MBEIR(root)
    names = None if tasks is None else sorted({tasks} if isinstance(tasks, str) else set(tasks))
    features = training_features(num_negatives, with_ids)
    make = partial(_training_rows, data, split, names, num_negatives, missing_negatives, seed, list(features))
    key = ["load_mbeir 1", names, num_negatives, missing_negatives, seed, with_ids, _state(data, split)]
    return on_disk(make, features, key)


def training_features(num_negatives: int, with_ids: bool) -> datasets.Features:
    """The columns of training rows: anchor, positive, `negative_1`, ..., and with ids `qid`, `did` and `positives`."""
    cell = {"text": _STRING, "image": _STRING}
    features: dict[str, Any] = {"anchor": {**cell, "instruction": _STRING}, "positive": cell}
    features |= {f"negative_{number}": cell for number in range(1, num_negatives + 1)}
    if with_ids:
        features |= {"qid": _STRING, "did": _STRING, "positives": datasets.List(_STRING)}
    return datasets.Features(features)


def cell_of(record: Record) -> dict[str, str | None]:
    """A record as a cell of training rows."""
    return {"text": record.text, "image": record.image}


def _state(data: MBEIR, split: str) -> list[Any]:
    """What rows of a split depend on."""
    files = [data.query_path(split, task) for task in data.task_files(split)] + data.mixed_paths(split)
    files += [data.global_pool_path(split), data.instruction_path]
    return [split, str(data.image_root), *map(file_state, files)]


def _training_rows(
    data: MBEIR,
    split: str,
    names: Sequence[str] | None,
    num_negatives: int,
    missing_negatives: str,
    seed: int,
    columns: Sequence[str],
) -> Iterator[dict[str, Any]]:
    pool, dropped = data.global_pool(split), 0
    for query, row, path, _ in _queries(data, split, names, pool, seed, judged=True):
        negatives = _choose_negatives(query, num_negatives, row, seed)
        if negatives is None and missing_negatives == "drop":
            dropped += 1
            continue
        if negatives is None:
            what = f"query {shown(query.qid)} has no negatives but num_negatives is {num_negatives}"
            remedy = "pass num_negatives=0 or missing_negatives='drop'"
            raise wrong(location(path, query.line), f"{what}; {remedy}")
        positive = pool[_choose_positive(query, row, seed)]
        # The positive's own modality: a file of one task may hold another's, whose instruction is the right one.
        instruction = data.instruction(query, positive.modality, seed, row=row)
        values: dict[str, Any] = {"anchor": {**cell_of(query), "instruction": instruction}}
        values["positive"] = cell_of(positive)
        values |= {f"negative_{number}": cell_of(pool[did]) for number, did in enumerate(negatives, start=1)}
        values |= {"qid": query.qid, "did": positive.did, "positives": list(query.positives)}
        yield {name: values[name] for name in columns}
    if dropped:
        logger.warning("Dropped %d queries of %s without negatives", dropped, split)


def _queries(
    data: MBEIR, split: str, names: Sequence[str] | None, pool: Pool, seed: int, *, judged: bool
) -> Iterator[tuple[Query, int, Path, MBEIRTask]]:
    """Each query of the wanted tasks with its row number, file and task.

    Where the name of a file does not tell the task, the positive does. If they are `judged`, there must be one, and
    all candidates must be in the pool.
    """
    mixed = data.mixed_paths(split)
    known = data.task_files(split) if mixed else data.tasks(split)
    found = set(known)
    files: list[tuple[Path, MBEIRTask | None]] = [(data.query_path(split, task), task) for task in known]
    for path, task in [*files, *((path, None) for path in mixed)]:
        if task is not None and names is not None and task.name not in names:
            continue
        with Problems(path) as problems:
            for row, query in enumerate(data.read_queries(path, problems, task)):
                where = location(path, query.line)
                if (judged or task is None) and not problems.attempt(_check_candidates, query, pool, where):
                    continue
                its = task
                if its is None:
                    its = data.task_of(query, pool[_choose_positive(query, row, seed)].modality)
                    found.add(its)
                if names is None or its.name in names:
                    yield query, row, path, its
    select_tasks(sorted(found), names)  # a name that is none of these is an error


def _check_candidates(query: Query, pool: Pool, where: str) -> bool:
    if not query.positives:
        what = f"pos_cand_list of query {shown(query.qid)} is empty; a training row needs a positive"
        raise wrong(where, what, "no positive")
    for name, dids in (("pos_cand_list", query.positives), ("neg_cand_list", query.negatives)):
        if unknown := [did for did in dids if did not in pool]:
            what = f"{name} has dids that are not in the global pool of the split: {shown(unknown[:3])}"
            raise wrong(where, what, "did that is in no pool")
    return True


def _choose_positive(query: Query, row: int, seed: int) -> str:
    return seeded_random(seed, "positive", query.qid, row).choice(query.positives)


def _choose_negatives(query: Query, count: int, row: int, seed: int) -> list[str] | None:
    """`count` dids, or None if the query has none to choose from."""
    if count == 0:
        return []
    usable = [did for did in query.negatives if did not in query.positives]
    seeded_random(seed, "negatives", query.qid, row).shuffle(usable)
    return [usable[index % len(usable)] for index in range(count)] if usable else None


# --- single items


def load_items(source: Source | Sequence[Source], *, split: str = "train", seed: int = 0) -> datasets.Dataset:
    """Items for self-distillation from whatever holds texts or images: no labels, no pairs.

    A source is one of

    - a folder of images, with all folders below it, or with a table of them: `metadata.csv`, `.jsonl` or `.parquet`
      with `file_name` and `text`, as the Hub has it;
    - a .txt with one text a line;
    - a .jsonl, .json, .csv, .tsv or .parquet with columns among `text`, `image` (a path below the file's own
      folder) and `instruction`, or with the NLI columns sent0, sent1 and hard_neg, each an item of its own;
      other columns are ignored; BEIR's `corpus.jsonl`, a title before its text;
    - a `datasets.Dataset` with such columns, or with the result's column `item`;
    - a folder in M-BEIR's layout, or an `MBEIR` of it: see `load_mbeir_items`.

    Equal items come once. Only the header of an image file is read here; damage further in is found when a batch
    needs the image, with the file's name in the error. The items are made once and kept in the cache of `datasets`.

    Args:
        source: A source, several in a list, or several paths joined with commas.
        split: The split of M-BEIR folders; the others have none.
        seed: Seed of the wordings of M-BEIR's instructions.

    Returns:
        A dataset with the column `item`, structs `{"text": ..., "image": absolute path, "instruction": ...}`.

    Raises:
        FileNotFoundError: If a source or an image is missing.
        ValueError: If a source holds nothing, or a line of it is wrong, which the message names.

    Example:

    ```python
    >>> from puma_hf.data import load_items

    >>> load_items(["demo/emoji/mbeir_images", "demo/emoji"]).column_names
    ['item']
    ```
    """
    opened = [_open(one, split, seed) for one in _split_source(source)]
    return on_disk(partial(_item_rows, opened), _ITEMS, ["items 1", *(key for _, _, key in opened)])


def load_mbeir_items(
    root: str | Path | MBEIR, split: str = "train", *, tasks: Iterable[str] | None = None, seed: int = 0
) -> datasets.Dataset:
    """Every query and every candidate of a split as an item of its own, for self-distillation; see `load_items`.

    Queries carry one wording of their instruction, drawn with the seed; candidates carry none, and are those of the
    whole pool, whatever the tasks. Nothing in the result tells which candidate answers which query.
    """
    data = root if isinstance(root, MBEIR) else MBEIR(root)
    opened = _open_mbeir(data, split, tasks, seed)
    return on_disk(partial(_item_rows, [opened]), _ITEMS, ["items 1", opened[2]])


# A source: how errors call it, its records, and what they depend on.
_Opened: TypeAlias = tuple[str, Any, list[Any]]


def _split_source(source: Source | Sequence[Source]) -> list[Source]:
    if isinstance(source, str) and "," in source and not Path(source).exists():
        source = [name.strip() for name in source.split(",")]
    if isinstance(source, (str, Path, MBEIR, datasets.Dataset)):
        source = [source]
    if not isinstance(source, (list, tuple)):
        allowed = "a path, a datasets.Dataset, an MBEIR, or a list of such. Of a DatasetDict choose one split"
        raise ValueError(f"The source is a {type(source).__name__}, must be {allowed}.")
    if not source or "" in [name for name in source if isinstance(name, str)]:
        raise ValueError(f"The source is {shown(source)}, must name at least one file or folder, and no empty name.")
    return list(source)


def _open(source: Source, split: str, seed: int) -> _Opened:
    if isinstance(source, MBEIR):
        return _open_mbeir(source, split, None, seed)
    if isinstance(source, datasets.Dataset):
        lines = partial(dataset_lines, source)
        return "The dataset", partial(_records, "The dataset", lines, None), ["dataset", source._fingerprint]
    if not isinstance(source, (str, Path)):
        raise ValueError(f"A source is a {type(source).__name__}, must be a path, a datasets.Dataset or an MBEIR.")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{str(source)!r} is neither a file nor a folder. Check the path.")
    if path.is_dir() and is_mbeir(path):
        return _open_mbeir(MBEIR(path), split, None, seed)
    table = image_table(path) if path.is_dir() else path
    if table is not None:
        records = partial(_records, str(table), partial(item_lines, table), table.parent)
        return str(source), records, ["table", file_state(table)]
    found = sorted(image_files(path, LeftOut()))
    return str(source), partial(_folder_records, path), ["folder", *(file_state(path / name) for name in found)]


def _open_mbeir(data: MBEIR, split: str, tasks: Iterable[str] | None, seed: int) -> _Opened:
    names = None if tasks is None else sorted({tasks} if isinstance(tasks, str) else set(tasks))
    records = partial(_mbeir_records, data, split, names, seed)
    return str(data.root), records, ["mbeir", names, seed, *_state(data, split)]


def _item_rows(opened: Sequence[_Opened]) -> Iterator[dict[str, Any]]:
    seen: set[int] = set()  # hashes: two different items of ten million have the same once in 400,000 times
    for name, records, _ in opened:
        empty = True
        for record in records():
            empty = False
            item = {column: getattr(record, column) for column in COLUMNS}
            if (value := hash(tuple(item.values()))) not in seen:
                seen.add(value)
                yield {"item": item}
        if empty:
            raise ValueError(f"{name} holds no items. Name a source with at least one text or image.")


def _mbeir_records(data: MBEIR, split: str, names: Sequence[str] | None, seed: int) -> Iterator[Record]:
    pool = data.global_pool(split)
    for query, row, _, task in _queries(data, split, names, pool, seed, judged=False):
        instruction = data.instruction(query, task.candidate_modality, seed, row=row)
        yield Record(text=query.text, image=query.image, instruction=instruction)
    yield from pool.values()


def _folder_records(folder: Path) -> Iterator[Record]:
    """Every image below a folder, by name; all that are not what their names say are told in one error."""
    left_out, images, empty = LeftOut(), ImageFiles(None), True
    with Problems(folder) as problems:
        for name in image_files(folder, left_out):
            empty = False
            path = os.path.join(folder, name)
            try:
                image = images.find(path, path)
            except BrokenImageError as error:
                problems.add(error, "image that cannot be used")
            else:
                yield Record(image=image)
    if empty:
        raise left_out.no_images(folder)
    left_out.tell(folder)


def _records(name: str, lines: Any, folder: Path | None) -> Iterator[Record]:
    """The items of a table or a dataset, whose images may not leave the folder."""
    images = ImageFiles(folder)
    ignored: dict[str, None] = {}
    for line in lines():
        yield from _row_records(line, images, ignored)
    if ignored:
        logger.info("%s: ignored the columns %s", name, cut(", ".join(map(str, ignored))))


def _row_records(line: Line, images: ImageFiles, ignored: dict[str, None]) -> Iterator[Record]:
    if line.error is not None:
        raise line.error
    where, row = line.where, line.columns
    if isinstance(row.get("item"), dict):
        row = row["item"]
    is_item = "text" in row or "image" in row
    known = COLUMNS if is_item else NLI_COLUMNS
    if not is_item and not set(NLI_COLUMNS) <= set(row):
        here = f"The columns here are {cut(', '.join(map(str, row))) or 'none'}: rename those that hold them"
        raise ValueError(f"{where}: no column text or image, nor {', '.join(NLI_COLUMNS)}. {here}.")
    ignored |= dict.fromkeys(name for name in row if name not in known)
    if not is_item:
        for name in NLI_COLUMNS:
            if (sentence := _text(row, name, where)) is None:
                raise ValueError(f"{where}: {name} is {shown(row[name])}, must be a text. Mend or remove the line.")
            yield Record(text=sentence)
        return
    text, instruction = (_text(row, name, where) for name in ("text", "instruction"))
    image = row.get("image")
    image = None if image is None or image == "" else images.find(image, where)
    if text is None and image is None:
        raise ValueError(f"{where}: text and image are both empty. Fill one of them or leave the line out.")
    yield Record(text=text, image=image, instruction=instruction)


def _text(row: Mapping[str, Any], name: str, where: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {shown(value)}, must be a text or null.")
    if not is_unicode(value):
        raise ValueError(f"{where}: {name} is {shown(value)}, which holds half a character. Mend its encoding.")
    return value.strip() or None
