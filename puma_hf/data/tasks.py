"""M-BEIR's constants: its tasks, its datasets, and the instruction of each row.

Source: M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136; TIGER-Lab/M-BEIR on the Hub).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MODALITIES = TEXT, IMAGE, IMAGE_TEXT = ("text", "image", "image,text")
# Task 5, image -> image,text, is reserved by M-BEIR and has no data.
TASK_MODALITIES: dict[int, tuple[str, str]] = {
    0: (TEXT, IMAGE), 1: (TEXT, TEXT), 2: (TEXT, IMAGE_TEXT), 3: (IMAGE, TEXT), 4: (IMAGE, IMAGE),
    6: (IMAGE_TEXT, TEXT), 7: (IMAGE_TEXT, IMAGE), 8: (IMAGE_TEXT, IMAGE_TEXT),
}  # fmt: skip
TASK_OF_MODALITIES = {modalities: task_id for task_id, modalities in TASK_MODALITIES.items()}
_DATASETS = "visualnews fashion200k webqa edis nights oven infoseek fashioniq cirr mscoco"
MBEIR_DATASET_IDS: dict[str, int] = {name: number for number, name in enumerate(_DATASETS.split())}
_SHORT_NAMES = {TEXT: "t", IMAGE: "i", IMAGE_TEXT: "it"}
_NAMES_TASK = re.compile(r"(\w+)_task(\d+)")

# The benchmark's own data, kept word for word so that results can be compared: the first of the four wordings of each
# of the 16 test rows of M-BEIR's `query_instructions.tsv`. The wordings and their order are those of Pyserini's default
# M-BEIR instructions; LamRA's appendix (Liu et al., CVPR 2025, arXiv 2412.01720, Table 12) and the query prompts of
# MTEB's tasks agree where they were compared. Models are saved with them as named prompts.
_PARAGRAPH = "Retrieve a Wikipedia paragraph that provides an answer to the given query about the image."
_PAIR = "Retrieve a Wikipedia image-description pair that provides evidence for the question of this image."
_CIRR = "Retrieve a day-to-day image that aligns with the modification instructions of the provided image."
MBEIR_INSTRUCTIONS: dict[str, str] = {
    "mbeir_visualnews_task0": "Identify the news-related image in line with the described event.",
    "mbeir_mscoco_task0": "Find me an everyday image that matches the given caption.",
    "mbeir_fashion200k_task0": "Based on the following fashion description, retrieve the best matching image.",
    "mbeir_webqa_task1": "Retrieve passages from Wikipedia that provide answers to the following question.",
    "mbeir_edis_task2": "Find a news image that matches the provided caption.",
    "mbeir_webqa_task2": "Find a Wikipedia image that answers this question.",
    "mbeir_visualnews_task3": "Find a caption for the news in the given photo.",
    "mbeir_mscoco_task3": "Find an image caption describing the following everyday image.",
    "mbeir_fashion200k_task3": "Find a product description for the fashion item in the image.",
    "mbeir_nights_task4": "Find a day-to-day image that looks similar to the provided image.",
    "mbeir_oven_task6": _PARAGRAPH,
    "mbeir_infoseek_task6": _PARAGRAPH,
    "mbeir_fashioniq_task7": "Find a fashion image that aligns with the reference image and style note.",
    "mbeir_cirr_task7": _CIRR,
    "mbeir_oven_task8": _PAIR,
    "mbeir_infoseek_task8": _PAIR,
}


@dataclass(frozen=True, order=True)
class MBEIRTask:
    """One row of M-BEIR: a dataset and a direction of retrieval.

    Args:
        task_id: M-BEIR's task number, a key of `TASK_MODALITIES`.
        dataset: Name of the dataset as in the file names, in lower case.

    Example:
        >>> MBEIRTask(6, "oven").arrow
        'it -> t'
    """

    task_id: int
    dataset: str

    @property
    def name(self) -> str:
        """`<dataset>_task<n>`, the stem that M-BEIR's file names share."""
        return f"{self.dataset}_task{self.task_id}"

    @property
    def query_modality(self) -> str:
        """Modality of the queries."""
        return TASK_MODALITIES[self.task_id][0]

    @property
    def candidate_modality(self) -> str:
        """Modality of the relevant candidates."""
        return TASK_MODALITIES[self.task_id][1]

    @property
    def arrow(self) -> str:
        """The direction as M-BEIR's tables print it, such as `t -> i`."""
        return " -> ".join(_SHORT_NAMES[modality] for modality in TASK_MODALITIES[self.task_id])

    @property
    def reported_k(self) -> int:
        """The k whose hit@k papers report for this row: 10 for the two fashion datasets, else 5."""
        return 10 if self.dataset in ("fashion200k", "fashioniq") else 5


def task_named(name: str) -> MBEIRTask | None:
    """The task of a name such as "cirr_task7", or None if it names none; ValueError for a number M-BEIR has not."""
    match = _NAMES_TASK.fullmatch(name)
    if match is not None and int(match[2]) not in TASK_MODALITIES:
        raise ValueError(f"{name}: task {match[2]} is not one of M-BEIR's {sorted(TASK_MODALITIES)}. Rename it.")
    return None if match is None else MBEIRTask(int(match[2]), match[1])


def select_tasks(available: Sequence[MBEIRTask], names: Iterable[str] | None) -> list[MBEIRTask]:
    """The tasks with these names, in the order of `available`; None for all. A ValueError if one is not there."""
    if names is None:
        return list(available)
    wanted = {names} if isinstance(names, str) else set(names)
    known = [task.name for task in available]
    if not wanted or not wanted <= set(known):
        raise ValueError(f"tasks is {sorted(wanted)}, must be some of {known}; choose from these or leave it out")
    return [task for task in available if task.name in wanted]
