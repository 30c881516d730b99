"""NLI pairs with hard negatives, which the first stage of PUMA and of LamRA train on.

Source: `nli_for_simcse.csv` of SimCSE (Gao et al., EMNLP 2021, arXiv 2104.08821): SNLI and MNLI, a premise with a
sentence that follows from it and one that contradicts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from puma_hf.data.tables import read_table
from puma_hf.values import cut, shown

NLI_COLUMNS = ("sent0", "sent1", "hard_neg")


def load_nli(path: str | Path) -> datasets.Dataset:
    """Training rows from a table of NLI pairs, for contrastive training.

    For self-distillation, which needs no pairs, give the same file to `load_items`.

    Args:
        path: A .csv (or .tsv, .jsonl, .json, .parquet) with the columns sent0, sent1 and hard_neg; others are
            left out.

    Returns:
        A dataset with the columns anchor, positive and negative_1, of structs as `load_mbeir(...,
        num_negatives=1)` makes them, so that both can be concatenated. There is no instruction.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column is missing or a cell is empty; the message names the line. If there are no rows.

    Example:

    ```python
    >>> from puma_hf.data.nli import load_nli

    >>> load_nli("nli_for_simcse.csv").column_names  # doctest: +SKIP
    ['anchor', 'positive', 'negative_1']
    ```
    """
    columns: dict[str, list[Any]] = {"anchor": [], "positive": [], "negative_1": []}
    for where, row in read_table(Path(path)):
        anchor, positive, negative = nli_texts(row, where)
        columns["anchor"].append({"text": anchor, "image": None, "instruction": None})
        columns["positive"].append({"text": positive, "image": None})
        columns["negative_1"].append({"text": negative, "image": None})
    if not columns["anchor"]:
        raise ValueError(f"{path} holds no rows. A header alone trains nothing; was the download cut off?")
    string = datasets.Value("string")
    cell: dict[str, Any] = {"text": string, "image": string}
    features = datasets.Features({"anchor": {**cell, "instruction": string}, "positive": cell, "negative_1": cell})
    return datasets.Dataset.from_dict(columns, features=features)


def nli_texts(row: Mapping[str, Any], where: str) -> list[str]:
    """The three sentences of a row.

    Args:
        row: The columns.
        where: File and line, for errors.

    Returns:
        What NLI_COLUMNS hold, in that order.

    Raises:
        ValueError: If a column is missing, or a cell is empty or no text.
    """
    if missing := [name for name in NLI_COLUMNS if name not in row]:
        here = cut(", ".join(map(str, row)))
        raise ValueError(f"{where}: no column {', '.join(missing)}. The columns here are {here}.")
    texts = []
    for name in NLI_COLUMNS:
        text = row[name].strip() if isinstance(row[name], str) else row[name]
        if not isinstance(text, str) or not text:
            raise ValueError(f"{where}: {name} is {shown(row[name])}, must be a text. Mend the line or leave it out.")
        texts.append(text)
    return texts
