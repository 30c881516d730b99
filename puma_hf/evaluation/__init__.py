"""Exact retrieval, its metrics, and M-BEIR's table."""

from puma_hf.evaluation.mbeir import MBEIRResults, MBEIRTaskResult, evaluate_mbeir
from puma_hf.evaluation.retrieval import SearchResult, exact_search, retrieval_metrics, wrong_modality_at_1

__all__ = [
    "MBEIRResults",
    "MBEIRTaskResult",
    "SearchResult",
    "evaluate_mbeir",
    "exact_search",
    "retrieval_metrics",
    "wrong_modality_at_1",
]
