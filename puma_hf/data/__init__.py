"""Readers of the data PUMA is trained and measured on."""

from puma_hf.data.instructions import MBEIR_INSTRUCTIONS
from puma_hf.data.mbeir import MBEIR, load_mbeir
from puma_hf.data.mbeir_format import Candidate, MBEIRFormatError, Query
from puma_hf.data.mbeir_tasks import MBEIR_DATASET_IDS, TASK_MODALITIES, MBEIRTask

__all__ = [
    "MBEIR",
    "MBEIR_DATASET_IDS",
    "MBEIR_INSTRUCTIONS",
    "TASK_MODALITIES",
    "Candidate",
    "MBEIRFormatError",
    "MBEIRTask",
    "Query",
    "load_mbeir",
]
