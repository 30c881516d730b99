"""Single items for training without labels: of an M-BEIR folder, or of a corpus of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import datasets

from puma_hf.data.corpus import COLUMNS, Item, dataset_items, file_items, folder_items, image_table
from puma_hf.data.mbeir import mixed_queries
from puma_hf.data.mbeir_format import is_mbeir
from puma_hf.data.mbeir_reader import MBEIR, select_tasks
from puma_hf.values import shown

Source: TypeAlias = str | Path | MBEIR | datasets.Dataset


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
    needs the image, with the file's name in the error.

    Args:
        source: A source, several in a list, or several paths joined with commas.
        split: The split of M-BEIR folders; the others have none.
        seed: Seed of the wordings of M-BEIR's instructions.

    Returns:
        A dataset with the column `item`, structs `{"text": ..., "image": absolute path, "instruction": ...}`.

    Raises:
        FileNotFoundError: If a source or an image is missing.
        ValueError: If a source is of an unknown kind, holds nothing, or a line of it is wrong; the message
            names the line.

    Example:

    ```python
    >>> from puma_hf.data.items import load_items

    >>> load_items(["demo/emoji/mbeir_images", "demo/emoji"]).column_names
    ['item']
    ```
    """
    items: dict[Item, None] = {}
    for one in _split_source(source):
        found = False
        for item in _items(one, split, seed):
            items[item] = None
            found = True
        if not found:
            raise ValueError(f"{_name(one)} holds no items. Name a source with at least one text or image.")
    return _to_dataset(items)


def load_mbeir_items(
    root: str | Path | MBEIR, split: str = "train", *, tasks: Iterable[str] | None = None, seed: int = 0
) -> datasets.Dataset:
    """Every query and every candidate of a split as an item of its own, for self-distillation.

    Queries carry one wording of their instruction, drawn with the seed; candidates carry none. Nothing in the
    result tells which candidate answers which query.

    Args:
        root: Folder in M-BEIR's layout, or an `MBEIR` of it.
        split: "train", "union_train" or another split with a global pool.
        tasks: Names such as "webqa_task1"; None for all. Candidates are those of the whole pool.
        seed: Seed of the wordings.

    Returns:
        A dataset with the column `item`, structs `{"text": ..., "image": absolute path, "instruction": ...}`.

    Raises:
        MBEIRFormatError: If a file is not what the format says; the message names file and line.
        FileNotFoundError: If a file or an image is missing.

    Example:

    ```python
    >>> from puma_hf.data.items import load_mbeir_items

    >>> load_mbeir_items("demo/emoji").column_names
    ['item']
    ```
    """
    data = root if isinstance(root, MBEIR) else MBEIR(root)
    return _to_dataset(dict.fromkeys(_mbeir_items(data, split, tasks, seed)))


def _split_source(source: Source | Sequence[Source]) -> list[Source]:
    if isinstance(source, str) and "," in source and not Path(source).exists():
        source = [name.strip() for name in source.split(",")]
    if isinstance(source, (str, Path, MBEIR, datasets.Dataset)):
        source = [source]
    if not isinstance(source, (list, tuple)):
        raise ValueError(
            f"The source is a {type(source).__name__}, must be a path, a datasets.Dataset, an MBEIR, or a list of "
            "such. Of a DatasetDict choose one split."
        )
    if not source or "" in [name for name in source if isinstance(name, str)]:
        raise ValueError(f"The source is {shown(source)}, must name at least one file or folder, and no empty name.")
    return list(source)


def _items(source: Source, split: str, seed: int) -> Iterator[Item]:
    if isinstance(source, MBEIR):
        return _mbeir_items(source, split, None, seed)
    if isinstance(source, datasets.Dataset):
        return dataset_items(source)
    if not isinstance(source, (str, Path)):
        raise ValueError(f"A source is a {type(source).__name__}, must be a path, a datasets.Dataset or an MBEIR.")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{str(source)!r} is neither a file nor a folder. Check the path.")
    if path.is_dir() and is_mbeir(path):
        return _mbeir_items(MBEIR(path), split, None, seed)
    table = image_table(path) if path.is_dir() else path
    return folder_items(path) if table is None else file_items(table)


def _mbeir_items(data: MBEIR, split: str, tasks: Iterable[str] | None, seed: int) -> Iterator[Item]:
    pool = data.global_pool(split)
    mixed = mixed_queries(data, split, pool, seed)
    found = data.task_files(split) if mixed else data.tasks(split)
    wanted = select_tasks(sorted({*found, *(task for *_, task in mixed)}), tasks)
    rows = [
        (query, row, task) for task in found if task in wanted for row, query in enumerate(data.queries(task, split))
    ]
    rows += [(query, row, task) for query, row, _, task in mixed if task in wanted]
    for query, row, task in rows:
        yield query.text, query.image, data.instruction(query, task.candidate_modality, seed, row=row)
    for candidate in pool.values():
        yield candidate.text, candidate.image, None


def _name(source: Source) -> str:
    return str(source) if isinstance(source, (str, Path)) else f"The {type(source).__name__}"


def _to_dataset(items: Iterable[Item]) -> datasets.Dataset:
    string = datasets.Value("string")
    features = datasets.Features({"item": {name: string for name in COLUMNS}})
    rows = [dict(zip(COLUMNS, item, strict=True)) for item in items]
    return datasets.Dataset.from_dict({"item": rows}, features=features)
