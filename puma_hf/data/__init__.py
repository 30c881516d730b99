"""Readers of the data PUMA is trained and measured on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puma_hf import resolver

# Imported on first use, so that who needs one of them does not wait for the libraries of all.
_MODULES = {
    "puma_hf.data.items": ("load_items", "load_mbeir", "load_mbeir_items"),
    "puma_hf.data.mbeir": ("MBEIR", "Candidate", "Query"),
    "puma_hf.data.mbeir_hub": ("open_mbeir",),
    "puma_hf.data.mbeir_write": ("build_nano", "write_mbeir"),
    "puma_hf.data.pairs": ("check_pairs", "load_pairs"),
    "puma_hf.data.records": ("MBEIRFormatError",),
    "puma_hf.data.sampler": ("DistinctPositivesBatchSampler",),
    "puma_hf.data.tasks": ("MBEIRTask", "MBEIR_DATASET_IDS", "MBEIR_INSTRUCTIONS", "TASK_MODALITIES"),
}

__all__ = [
    "MBEIR", "MBEIR_DATASET_IDS", "MBEIR_INSTRUCTIONS", "TASK_MODALITIES", "Candidate", "DistinctPositivesBatchSampler",
    "MBEIRFormatError", "MBEIRTask", "Query", "build_nano", "check_pairs", "load_items", "load_mbeir",
    "load_mbeir_items", "load_pairs", "open_mbeir", "write_mbeir",
]  # fmt: skip


__getattr__ = resolver(__name__, {name: module for module, names in _MODULES.items() for name in names})


if TYPE_CHECKING:
    from puma_hf.data.items import load_items, load_mbeir, load_mbeir_items
    from puma_hf.data.mbeir import MBEIR, Candidate, Query
    from puma_hf.data.mbeir_hub import open_mbeir
    from puma_hf.data.mbeir_write import build_nano, write_mbeir
    from puma_hf.data.pairs import check_pairs, load_pairs
    from puma_hf.data.records import MBEIRFormatError
    from puma_hf.data.sampler import DistinctPositivesBatchSampler
    from puma_hf.data.tasks import MBEIR_DATASET_IDS, MBEIR_INSTRUCTIONS, TASK_MODALITIES, MBEIRTask
