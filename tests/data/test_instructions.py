from __future__ import annotations

import re

from puma_hf.data.instructions import MBEIR_INSTRUCTIONS
from puma_hf.data.mbeir_tasks import MBEIR_DATASET_IDS, TASK_MODALITIES


def test_there_is_one_instruction_for_each_of_the_16_rows() -> None:
    rows = [re.fullmatch(r"mbeir_(\w+)_task(\d)", name) for name in MBEIR_INSTRUCTIONS]
    found = [(row[1], int(row[2])) for row in rows if row]
    assert len(found) == len(set(found)) == 16
    assert {dataset for dataset, _ in found} == set(MBEIR_DATASET_IDS)
    assert {task for _, task in found} == set(TASK_MODALITIES)


def test_wordings_are_sentences_of_the_benchmark() -> None:
    assert MBEIR_INSTRUCTIONS["mbeir_nights_task4"] == (
        "Find a day-to-day image that looks similar to the provided image."
    )
    assert all(re.fullmatch(r"[A-Z][^\n\t\"]+\.", wording) for wording in MBEIR_INSTRUCTIONS.values())
