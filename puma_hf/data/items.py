"""Single items of an M-BEIR folder, for training without labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import datasets

from puma_hf.data.mbeir_reader import MBEIR, select_tasks


def load_mbeir_items(
    root: str | Path | MBEIR, split: str = "train", *, tasks: Iterable[str] | None = None, seed: int = 0
) -> datasets.Dataset:
    """Every query and every candidate of a split as an item of its own, for self-distillation.

    Queries carry one wording of their instruction, drawn with the seed; candidates carry none. Nothing in the
    result tells which candidate answers which query.

    Args:
        root: Folder in M-BEIR's layout, or an `MBEIR` of it.
        split: "train" or another split with a global pool.
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
    items: dict[tuple[str | None, str | None, str | None], None] = {}
    for task in select_tasks(data.tasks(split), tasks):
        for row, query in enumerate(data.queries(task, split)):
            instruction = data.instruction(query, task.candidate_modality, seed, row=row)
            items[query.text, query.image, instruction] = None
    for candidate in data.global_pool(split).values():
        items[candidate.text, candidate.image, None] = None
    string = datasets.Value("string")
    features = datasets.Features({"item": {"text": string, "image": string, "instruction": string}})
    rows = [dict(zip(("text", "image", "instruction"), item, strict=True)) for item in items]
    return datasets.Dataset.from_dict({"item": rows}, features=features)
