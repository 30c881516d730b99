"""Exact retrieval, its metrics, and M-BEIR's table."""

from puma_hf.evaluation.mbeir import evaluate_mbeir
from puma_hf.evaluation.mbeir_results import MBEIRResults, MBEIRTaskResult
from puma_hf.evaluation.metrics import retrieval_metrics, wrong_modality_at_1
from puma_hf.evaluation.search import SearchResult, exact_search

__all__ = [
    "MBEIRResults",
    "MBEIRTaskResult",
    "SearchResult",
    "evaluate_mbeir",
    "exact_search",
    "retrieval_metrics",
    "wrong_modality_at_1",
]
