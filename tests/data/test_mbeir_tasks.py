from __future__ import annotations

import pytest

from puma_hf.data.mbeir_tasks import MBEIR_DATASET_IDS, TASK_MODALITIES, MBEIRTask, dataset_id_of
from puma_hf.modeling.messages_puma import MODALITY_NAMES
from tests.data.mbeir_builder import MODALITIES


def test_tables_are_m_beirs() -> None:
    assert TASK_MODALITIES == MODALITIES
    assert {modality for pair in TASK_MODALITIES.values() for modality in pair} <= set(MODALITY_NAMES)
    assert sorted(MBEIR_DATASET_IDS.values()) == list(range(10))


@pytest.mark.parametrize(
    ("task", "name", "arrow", "k"),
    [
        (MBEIRTask(0, "fashion200k"), "fashion200k_task0", "t -> i", 10),
        (MBEIRTask(7, "fashioniq"), "fashioniq_task7", "it -> i", 10),
        (MBEIRTask(2, "webqa"), "webqa_task2", "t -> it", 5),
        (MBEIRTask(8, "anything_new"), "anything_new_task8", "it -> it", 5),
    ],
)
def test_task_names_itself(task: MBEIRTask, name: str, arrow: str, k: int) -> None:
    assert (task.name, task.arrow, task.reported_k) == (name, arrow, k)
    assert (task.query_modality, task.candidate_modality) == MODALITIES[task.task_id]


def test_dataset_id_is_before_the_colon() -> None:
    assert dataset_id_of("10:2") == 10
