"""Exact retrieval and its metrics, M-BEIR's table, how to choose k, and what other tools' evaluations need."""

from puma_hf.configs import EvaluateConfig, SweepConfig
from puma_hf.evaluation.evaluator import MBEIREvaluator
from puma_hf.evaluation.layer_sweep import sweep
from puma_hf.evaluation.mbeir import evaluate, evaluate_mbeir
from puma_hf.evaluation.metrics import metric_path, retrieval_metrics, wrong_modality_at_1
from puma_hf.evaluation.mteb import mbeir_prompts, mbeir_scores, puma_model_meta
from puma_hf.evaluation.results import MBEIRResults, MBEIRTaskResult
from puma_hf.evaluation.sweep_report import SweepReport
from puma_hf.evaluation.topk import SearchResult, exact_search, merge_results

__all__ = [
    "EvaluateConfig", "MBEIREvaluator", "MBEIRResults", "MBEIRTaskResult", "SearchResult", "SweepConfig", "SweepReport",
    "evaluate", "evaluate_mbeir", "exact_search", "mbeir_prompts", "mbeir_scores", "merge_results", "metric_path",
    "puma_model_meta", "retrieval_metrics", "sweep", "wrong_modality_at_1",
]  # fmt: skip
