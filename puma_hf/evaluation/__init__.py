"""Exact retrieval and its metrics, M-BEIR's table, how to choose k, and what other tools' evaluations need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puma_hf import resolver

# Imported on first use, so that who needs one of them does not wait for the libraries of all.
_MODULES = {
    "puma_hf.configs": ("EvaluateConfig", "SweepConfig"),
    "puma_hf.evaluation.evaluator": ("MBEIREvaluator",),
    "puma_hf.evaluation.layer_sweep": ("sweep",),
    "puma_hf.evaluation.mbeir": ("evaluate", "evaluate_mbeir"),
    "puma_hf.evaluation.metrics": ("metric_path", "retrieval_metrics", "wrong_modality_at_1"),
    "puma_hf.evaluation.mteb": ("mbeir_prompts", "mbeir_scores", "puma_model_meta"),
    "puma_hf.evaluation.results": ("MBEIRResults", "MBEIRTaskResult"),
    "puma_hf.evaluation.sweep_report": ("SweepReport",),
    "puma_hf.evaluation.topk": ("SearchResult", "exact_search", "merge_results"),
}

__all__ = ["EvaluateConfig", "MBEIREvaluator", "MBEIRResults", "MBEIRTaskResult", "SearchResult", "SweepConfig"]
__all__ += ["SweepReport", "evaluate", "evaluate_mbeir", "exact_search", "mbeir_prompts", "mbeir_scores", "sweep"]
__all__ += ["merge_results", "metric_path", "puma_model_meta", "retrieval_metrics", "wrong_modality_at_1"]

__getattr__ = resolver(__name__, {name: module for module, names in _MODULES.items() for name in names})


if TYPE_CHECKING:
    from puma_hf.configs import EvaluateConfig, SweepConfig
    from puma_hf.evaluation.evaluator import MBEIREvaluator
    from puma_hf.evaluation.layer_sweep import sweep
    from puma_hf.evaluation.mbeir import evaluate, evaluate_mbeir
    from puma_hf.evaluation.metrics import metric_path, retrieval_metrics, wrong_modality_at_1
    from puma_hf.evaluation.mteb import mbeir_prompts, mbeir_scores, puma_model_meta
    from puma_hf.evaluation.results import MBEIRResults, MBEIRTaskResult
    from puma_hf.evaluation.sweep_report import SweepReport
    from puma_hf.evaluation.topk import SearchResult, exact_search, merge_results
