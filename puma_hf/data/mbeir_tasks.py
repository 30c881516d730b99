"""M-BEIR's tables: its datasets, its tasks and what they ask for, each defined here once.

Source: UniIR (Wei et al., ECCV 2024, arXiv 2311.17136).
"""

from __future__ import annotations

from dataclasses import dataclass

from puma_hf.modeling.messages_puma import MODALITY_NAMES

MBEIR_MODALITIES: tuple[str, str, str] = MODALITY_NAMES[:3]
TEXT, IMAGE, IMAGE_TEXT = MBEIR_MODALITIES
_SHORT_NAMES = {TEXT: "t", IMAGE: "i", IMAGE_TEXT: "it"}

# Task 5, image -> image,text, is reserved by M-BEIR and has no data.
TASK_MODALITIES: dict[int, tuple[str, str]] = {
    0: (TEXT, IMAGE),
    1: (TEXT, TEXT),
    2: (TEXT, IMAGE_TEXT),
    3: (IMAGE, TEXT),
    4: (IMAGE, IMAGE),
    6: (IMAGE_TEXT, TEXT),
    7: (IMAGE_TEXT, IMAGE),
    8: (IMAGE_TEXT, IMAGE_TEXT),
}

MBEIR_DATASET_IDS: dict[str, int] = {
    "visualnews": 0,
    "fashion200k": 1,
    "webqa": 2,
    "edis": 3,
    "nights": 4,
    "oven": 5,
    "infoseek": 6,
    "fashioniq": 7,
    "cirr": 8,
    "mscoco": 9,
}

# The k of the "Recall@k" that papers report on M-BEIR.
_REPORTED_K = {"fashion200k": 10, "fashioniq": 10}
_DEFAULT_REPORTED_K = 5


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
        return f"{_SHORT_NAMES[self.query_modality]} -> {_SHORT_NAMES[self.candidate_modality]}"

    @property
    def reported_k(self) -> int:
        """The k whose hit@k papers report for this row: 10 for the two fashion datasets, else 5."""
        return _REPORTED_K.get(self.dataset, _DEFAULT_REPORTED_K)


def dataset_id_of(record_id: str) -> int:
    """Number of the dataset of a qid or did.

    Args:
        record_id: An id such as "9:1234".

    Returns:
        The number before the colon.

    Example:
        >>> dataset_id_of("9:1234")
        9
    """
    return int(record_id.partition(":")[0])
