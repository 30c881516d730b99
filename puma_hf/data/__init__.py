"""Readers of the data PUMA is trained and measured on."""

from puma_hf.data.instructions import MBEIR_INSTRUCTIONS
from puma_hf.data.items import load_items, load_mbeir_items
from puma_hf.data.mbeir import MBEIR, load_mbeir
from puma_hf.data.mbeir_format import Candidate, MBEIRFormatError, Query
from puma_hf.data.mbeir_tasks import MBEIR_DATASET_IDS, TASK_MODALITIES, MBEIRTask
from puma_hf.data.nli import load_nli
from puma_hf.data.sampler import DistinctPositivesBatchSampler
from puma_hf.data.twins import TwinBatchSampler, twin_keys

__all__ = [
    "MBEIR",
    "MBEIR_DATASET_IDS",
    "MBEIR_INSTRUCTIONS",
    "TASK_MODALITIES",
    "Candidate",
    "DistinctPositivesBatchSampler",
    "MBEIRFormatError",
    "MBEIRTask",
    "Query",
    "TwinBatchSampler",
    "load_items",
    "load_mbeir",
    "load_mbeir_items",
    "load_nli",
    "twin_keys",
]
