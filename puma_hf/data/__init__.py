"""Readers of the data PUMA is trained and measured on."""

from puma_hf.data.items import load_items, load_mbeir, load_mbeir_items
from puma_hf.data.mbeir import MBEIR, Candidate, Query
from puma_hf.data.mbeir_hub import open_mbeir
from puma_hf.data.mbeir_write import build_nano, write_mbeir
from puma_hf.data.pairs import check_pairs, load_pairs
from puma_hf.data.records import MBEIRFormatError
from puma_hf.data.sampler import DistinctPositivesBatchSampler
from puma_hf.data.tasks import MBEIR_DATASET_IDS, MBEIR_INSTRUCTIONS, TASK_MODALITIES, MBEIRTask

__all__ = [
    "MBEIR", "MBEIR_DATASET_IDS", "MBEIR_INSTRUCTIONS", "TASK_MODALITIES", "Candidate", "DistinctPositivesBatchSampler",
    "MBEIRFormatError", "MBEIRTask", "Query", "build_nano", "check_pairs", "load_items", "load_mbeir",
    "load_mbeir_items", "load_pairs", "open_mbeir", "write_mbeir",
]  # fmt: skip
