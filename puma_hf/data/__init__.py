"""Readers of the data PUMA is trained and measured on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puma_hf.lazy import resolver

# Name -> module. Resolved on first use: the command reads `pairs_config` for its options, and --help is to be quick.
_NAMES = {
    "Candidate": "puma_hf.data.mbeir",
    "DistinctPositivesBatchSampler": "puma_hf.data.sampler",
    "MBEIR": "puma_hf.data.mbeir",
    "MBEIRFormatError": "puma_hf.data.records",
    "MBEIRTask": "puma_hf.data.tasks",
    "MBEIR_DATASET_IDS": "puma_hf.data.tasks",
    "MBEIR_INSTRUCTIONS": "puma_hf.data.tasks",
    "Query": "puma_hf.data.mbeir",
    "TASK_MODALITIES": "puma_hf.data.tasks",
    "build_nano": "puma_hf.data.mbeir_write",
    "check_pairs": "puma_hf.data.pairs_report",
    "load_items": "puma_hf.data.items",
    "load_mbeir": "puma_hf.data.items",
    "load_mbeir_items": "puma_hf.data.items",
    "load_pairs": "puma_hf.data.pairs",
    "open_mbeir": "puma_hf.data.mbeir_hub",
    "write_mbeir": "puma_hf.data.mbeir_write",
}

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
    "build_nano",
    "check_pairs",
    "load_items",
    "load_mbeir",
    "load_mbeir_items",
    "load_pairs",
    "open_mbeir",
    "write_mbeir",
]


__getattr__ = resolver(__name__, _NAMES)


if TYPE_CHECKING:
    from puma_hf.data.items import load_items, load_mbeir, load_mbeir_items
    from puma_hf.data.mbeir import MBEIR, Candidate, Query
    from puma_hf.data.mbeir_hub import open_mbeir
    from puma_hf.data.mbeir_write import build_nano, write_mbeir
    from puma_hf.data.pairs import load_pairs
    from puma_hf.data.pairs_report import check_pairs
    from puma_hf.data.records import MBEIRFormatError
    from puma_hf.data.sampler import DistinctPositivesBatchSampler
    from puma_hf.data.tasks import MBEIR_DATASET_IDS, MBEIR_INSTRUCTIONS, TASK_MODALITIES, MBEIRTask
